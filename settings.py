"""Every setting of a run, grouped by component, with default, range and a line of help.

    python run.py --help                       # lists them; * marks those that a fork changes first
    python run.py --task push --set hidden=64  # changes one; repeat --set for more

Where a task family needs another value, its file in tasks/ has it, in `settings`. A method's own
settings are a subclass in its file in baselines/.
Marks: [release] is the authors' code, [ours] departs from it (docs/deviations.md), [SAC] is
Haarnoja et al. 2018b.
"""
import dataclasses
from dataclasses import dataclass, field

import numpy as np
import torch


class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2."""


def within(default, low, high, help):
    """A number between low and high. A "*" in front of its help marks a usual one."""
    return field(default=default, metadata={"low": low, "high": high, "help": help})


def one_of(default, choices, help):
    """One word of several."""
    return field(default=default, metadata={"choices": choices, "help": help})


def any_word(default, help):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    # ---- Run (the command line has options of its own for the first six)
    preset: str = one_of("ours", ("ours", "paper"),
                         "ours; or the settings of the paper and the release, see --preset")
    task: str = any_word("push", "task family, a name of tasks.TASKS")
    method: str = any_word("gmps", "method, a name of baselines.METHODS")
    seed: int = within(0, 0, 2 ** 31 - 1, "seed of every random number of the run")
    experts: str = one_of("contextual", ("contextual", "local", "scripted", "demonstrations"),
                          "which experts are imitated")
    reward: str = any_word("dense", "which of the task family's rewards")
    training_tasks: int = within(40, 2, 1000, "*number of training tasks [release: 20, ant 40]")
    held_out_tasks: int = within(20, 1, 1000, "number of tasks for the final evaluation")
    test_episodes: int = within(20, 2, 10_000,
                                "*episodes per task and round at meta-test [release: 40, ant 50]")
    curve: int = within(20, 0, 1000,
                        "maximum number of points of the validation curve; 0: no curve [ours]")

    # ---- Experts: soft actor-critic (local_policies.py, sac.py)
    expert_iterations: int = within(
        200, 1, 100_000, "*iterations: in each, an episode in every environment, then updates")
    expert_episodes: int = within(10, 1, 10_000, "episodes per iteration; tasks take turns")
    expert_updates: int = within(300, 1, 100_000, "gradient steps per iteration")
    expert_width: int = within(128, 1, 4096, "units in each of two hidden layers")
    expert_batch: int = within(128, 1, 65536, "transitions per learner and update")
    expert_learning_rate: float = within(3e-3, 1e-6, 1.0, "Adam's; falls to a tenth [SAC: 3e-4]")
    expert_discount: float = within(0.99, 0.0, 1.0, "discount [SAC]")
    expert_return_steps: int = within(
        1, 1, 100, "rewards summed before the critics' value takes over [SAC: 1]")
    expert_target_rate: float = within(
        0.02, 1e-5, 1.0, "Polyak averaging of the target critics, tau [SAC: 0.005]")
    expert_reward_scale: float = within(0.1, 1e-6, 1e6, "factor on rewards")
    expert_entropy: float = within(-1.0, -10.0, 2.0, "target entropy per action dimension [SAC]")
    expert_noise_correlation: float = within(
        0.0, 0.0, 0.999, "correlation of exploration noise with the step before [ours]")
    expert_relabelled: float = within(
        0.8, 0.0, 1.0, "share of a batch that gets another training task's rewards [ours]")

    # ---- Demonstrations (local_policies.py)
    demonstration_episodes: int = within(3, 1, 1000, "per training task")
    demonstration_noise: float = within(
        0.3, 0.0, 5.0, "std of action noise, not in a task's first episode; none on labels [ours]")
    demonstration_detours: int = within(
        0, 0, 1000, "of these, episodes that head for another task; labels for their own [ours]")

    # ---- Policy and rollouts (policy.py)
    observations: str = one_of("normalised", ("normalised", "raw"),
                               "what the policy sees: in units of about one; raw [release]")
    hidden: int = within(100, 1, 4096, "*units in each of two hidden layers [release]")
    bias_vector: int = within(4, 1, 1000, "size of the learned input z [release]")
    init_std: float = within(
        0.5, 1e-3, 10.0, "std of exploration noise; with adapt_std, at the start [release: 1]")
    noise: str = one_of("orthogonal", ("orthogonal", "independent"),
                        "exploration noise over a task's episodes; independent [release]")
    noise_hold: int = within(2, 1, 1000, "m: exploration noise is held for m time steps, and the "
                                         "inner loss uses every m-th one [ours; release: 1]")
    episodes: int = within(10, 2, 10_000, "*K, episodes per task for the inner step [release: 20]")
    shared_episodes: int = within(
        100, 0, 10_000, "*of the pre-update policy per collection, for all tasks; 0: K each [ours]")

    # ---- Inner step (advantages.py, gmps.py)
    init_step_size: float = within(0.03, 0.0, 10.0, "*alpha at the start [release: 0.5]")
    later_steps: float = within(
        0.3, 0.0, 1.0,
        "at meta-test, factor on alpha's positive part after the first step; with fewer than "
        "test_episodes smaller still [ours]; 1: alpha [release]")
    adapt_std: str = one_of("no", ("no", "yes"), "yes: log-std is learned, and adapts in the inner "
                                                 "step [release]; no [ours]")
    discount: float = within(0.9, 0.0, 1.0, "*of advantages [ours; release: 0.99]")
    gae_lambda: float = within(0.8, 0.0, 1.0, "*of advantages [ours; release: 1]")
    advantage_scale: str = one_of("common", ("common", "per task"),
                                  "divide advantages by one scale, or each task's [release]")
    max_weight: float = within(2.0, 1.0, 1e30, "upper bound of the importance weight w [ours]")

    # ---- Meta-training (gmps.py)
    imitation_steps: int = within(
        300, 0, 1_000_000, "gradient steps of imitation before meta-training [ours; release: none]")
    imitation_batch: int = within(200, 1, 100_000, "labelled states per task and meta-step")
    collections: int = within(5, 1, 10_000, "*passes through step 3 of the algorithm")
    meta_steps: int = within(600, 1, 10_000, "*Adam steps on one collection [release: 300 to 500]")
    meta_batch: int = within(5, 1, 1000, "tasks per meta-step [release: all]")
    aggregation_episodes: int = within(
        1, 0, 1000, "per task and collection, step 3c; 0: none [release: none]")
    imitated_action: str = one_of("executed", ("executed", "mean"),
                                  "what imitates the expert: the clipped mean; the mean [release]")
    learning_rate: float = within(5e-3, 1e-7, 1.0, "*of theta [release: 1e-3]")
    step_size_learning_rate: float = within(1e-2, 1e-7, 1.0, "of alpha [release: 1e-3]")
    final_rate: float = within(0.1, 0.0, 1.0, "both rates fall to this share [ours; release: 1]")
    pre_update_imitation: float = within(
        0.3, 0.0, 100.0, "weight of the pre-update policy's own imitation loss [ours]")
    pre_update_tasks: int = within(
        0, 0, 1000, "the pre-update policy imitates this many tasks, the last ones; 0: all [ours]")

    # Not settings, but changes that a method's own class may name:
    quick = {}    # what --quick changes beside QUICK
    on_task = {}  # {task: what is the default there}; it wins over the task's family

    def __post_init__(self):
        for spec in dataclasses.fields(self):
            value, limits = getattr(self, spec.name), spec.metadata
            if spec.type is float and type(value) is int:
                value = float(value)
                object.__setattr__(self, spec.name, value)
            if type(value) is not spec.type:
                raise ValueError(
                    f"{spec.name} must be of type {spec.type.__name__}, not {value!r}")
            if "choices" in limits and value not in limits["choices"]:
                raise ValueError(
                    f"{spec.name} must be one of {', '.join(limits['choices'])}, not {value!r}")
            if "low" in limits and not limits["low"] <= value <= limits["high"]:
                raise ValueError(f"{spec.name} must be between {limits['low']:g} and "
                                 f"{limits['high']:g}, not {value:g}")


# `--preset paper`: the paper's settings, or the release's where the paper is silent. A family's
# `paper_settings` come on top. Soft actor-critic stays as it is, since the release has none.
PAPER = dict(
    training_tasks=20, test_episodes=40, demonstration_noise=0.0, demonstration_detours=0,
    observations="raw", init_std=1.0, noise="independent", noise_hold=1, episodes=20,
    shared_episodes=0, init_step_size=0.5, later_steps=1.0, adapt_std="yes",
    discount=0.99, gae_lambda=1.0, advantage_scale="per task", max_weight=1e30,
    imitation_steps=0, collections=20, meta_steps=300, meta_batch=1000,
    imitated_action="mean", learning_rate=1e-3, step_size_learning_rate=1e-3, final_rate=1.0,
    pre_update_imitation=0.0, pre_update_tasks=0)

# `--quick`: every phase for real, on budgets of seconds
QUICK = dict(training_tasks=4, held_out_tasks=3, expert_iterations=3, expert_updates=40,
             collections=2, meta_steps=3, imitation_steps=50, episodes=4, test_episodes=4, curve=1)

GROUPS = {"preset": "Run", "expert_iterations": "Experts: soft actor-critic",
          "demonstration_episodes": "Demonstrations", "hidden": "Policy and rollouts",
          "init_step_size": "Inner step", "imitation_steps": "Meta-training"}  # by first setting


def help_text(kind: type = Settings) -> str:
    """Settings of a Settings class, a line each, grouped. Its own come last."""
    lines = ["settings, for --set NAME=VALUE (* a fork usually changes these first).",
             "A task may have other defaults: see its file in tasks/, `on_task` in the method's "
             "file, or settings.json of a run."]
    known = {spec.name for spec in dataclasses.fields(Settings)}
    for spec in dataclasses.fields(kind):
        if spec.name in GROUPS:
            lines.append(f"\n  {GROUPS[spec.name]}")
        elif spec.name not in known and "\n  The method's own" not in lines:
            lines.append("\n  The method's own")
        text = spec.metadata["help"]
        star = "*" if text.startswith("*") else " "
        words = " | ".join(spec.metadata.get("choices", ()))
        lines.append(f"  {star} {spec.name + '=' + str(spec.default):<32} {text.lstrip('*')}"
                     + (f" ({words})" if words else ""))
    return "\n".join(lines)


def from_strings(pairs: list[str], kind: type = Settings) -> dict:
    """{name: value} from "name=value" strings; ValueError for an unknown name or a wrong type."""
    known, values = {spec.name: spec.type for spec in dataclasses.fields(kind)}, {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or name not in known:
            raise ValueError(f"unknown setting {name!r}: give NAME=VALUE with a name that "
                             "python run.py --help lists")
        try:
            values[name] = known[name](text)
        except ValueError:
            raise ValueError(
                f"{name} must be of type {known[name].__name__}, not {text!r}") from None
    return values


def from_dict(values: dict, kind: type = Settings) -> Settings:
    """Settings from a saved dict; ValueError if names are missing or unknown."""
    known = {spec.name for spec in dataclasses.fields(kind)}
    for fault, names in (("lacks", known - set(values)), ("exceeds", set(values) - known)):
        if names:
            raise ValueError(f"it {fault} today's settings: {', '.join(sorted(names))}")
    return kind(**values)


# Every iteration of every phase has its own random streams, so resuming needs no stored random
# state. Add new purposes at the end only: their position is part of the seed.
STREAMS = ("experts", "demonstrations", "imitation", "meta-training", "evaluation", "curve")


def random_streams(seed: int, purpose: str,
                   iteration: int) -> tuple[np.random.Generator, torch.Generator]:
    """numpy's and torch's generator of one iteration of one phase."""
    generator = np.random.default_rng([seed, STREAMS.index(purpose), iteration])
    return generator, torch.Generator().manual_seed(int(generator.integers(2 ** 62)))
