"""Every setting of a run, with its default for the push task and its range, in one typed block.

`python run.py --set NAME=VALUE` changes one; unknown names and values out of range are refused. Marks: [release] is the
authors' code, [ours] deviates from it (README, "Deviations"), [SAC] is Haarnoja et al. 2018b.
"""
import dataclasses
from dataclasses import dataclass, field


def within(default, low, high):
    return field(default=default, metadata={"low": low, "high": high})


def one_of(default, *choices):
    return field(default=default, metadata={"choices": choices})


@dataclass(frozen=True)
class Settings:
    task: str = one_of("push", "push", "ant", "door", "push-vision")
    seed: int = within(0, 0, 2 ** 31 - 1)
    experts: str = one_of("contextual", "contextual", "local", "scripted", "demonstrations")
    reward: str = one_of("dense", "dense", "sparse")

    # Tasks; each split is a fixed set of its own (envs.task_set)
    training_tasks: int = within(40, 2, 1000)         # [ours; release: 20]
    held_out_tasks: int = within(20, 1, 1000)

    # Local experts, step 1 (local_policies.py, sac.py)
    expert_iterations: int = within(40, 1, 100_000)   # each: one episode in every environment, then updates
    expert_episodes: int = within(2, 1, 1000)         # environments per training task
    expert_updates: int = within(450, 1, 100_000)     # gradient steps per iteration
    expert_width: int = within(128, 1, 4096)          # units in each of two hidden layers
    expert_batch: int = within(256, 1, 65536)         # transitions per learner and update
    expert_learning_rate: float = within(2e-3, 1e-6, 1.0)
    expert_discount: float = within(0.95, 0.0, 1.0)   # [SAC: 0.99]
    expert_return_steps: int = within(1, 1, 100)      # rewards summed before the critics' value takes over [SAC: 1]
    expert_target_rate: float = within(0.02, 1e-5, 1.0)   # Polyak averaging of the target critics, "tau" [SAC: 0.005]
    expert_reward_scale: float = within(0.1, 1e-6, 1e6)
    expert_entropy: float = within(-1.0, -10.0, 2.0)  # target entropy per action dimension [SAC]
    expert_noise_correlation: float = within(0.0, 0.0, 0.999)  # of exploration noise from step to step [ours]
    expert_relabelled: float = within(0.8, 0.0, 1.0)  # share of a batch that is relabelled (local_policies.Replay)

    # Demonstrations, step 2
    demonstration_episodes: int = within(5, 1, 1000)  # per training task
    demonstration_noise: float = within(0.3, 0.0, 5.0)  # added to all but each task's first episode; labels stay clean
    demonstration_detours: int = within(0, 0, 1000)   # of those episodes: sent to a random task's goal; labels are its own

    imitation_steps: int = within(600, 1, 1_000_000)  # of the policy without adaptation, where meta-training starts [ours]

    # Policy, rollouts and inner step (policy.py, advantages.py, gmps.py)
    hidden: int = within(100, 1, 4096)                # units in each of two hidden layers [release]
    bias_vector: int = within(4, 1, 1000)             # size of the learned input z [release]
    init_std: float = within(0.5, 1e-3, 10.0)         # of the exploration noise, learned from there [release: 1]
    min_std: float = within(0.35, 1e-6, 10.0)         # floor of the exploration noise [ours; release: 1e-6]
    step_sizes: str = one_of("shared", "shared", "per step")  # alpha, by all inner steps or each with its own [ours]
    init_step_size: float = within(0.03, 0.0, 10.0)    # alpha, then learned per element [release: 0.5]
    noise_correlation: float = within(0.0, 0.0, 0.999)  # of the exploration noise from step to step [ours]
    max_weight: float = within(1e6, 1.0, 1e30)        # of a sample in the inner step: pi / pi_behaviour [ours]
    episodes: int = within(20, 2, 10_000)             # K rollouts per task and inner step [release]
    inner_every: int = within(1, 1, 1000)             # the inner step takes every so many-th time step of them [ours]
    discount: float = within(0.9, 0.0, 1.0)           # of advantages [ours; release: 0.99]
    advantage_scale: str = one_of("shared", "shared", "task")  # what advantages are divided by [release: each task's]
    gae_lambda: float = within(0.8, 0.0, 1.0)         # [ours; release: 1]

    # Meta-training, step 3 (gmps.py)
    collections: int = within(10, 1, 10_000)          # passes through step 3
    meta_steps: int = within(25, 1, 10_000)           # outer steps on one collection [release: 300 to 500]
    meta_batch: int = within(20, 1, 1000)             # tasks per meta-step [release: all]
    inner_steps: int = within(3, 1, 10)               # that the outer loss is differentiated through [release: 1]
    # Step k past those meta-trained uses the last one's alpha times max(later_start * later_steps ** k, later_floor):
    # nothing has taught alpha how far to go there, and on push full steps undo what the first ones gained [ours]
    later_steps: float = within(0.25, 0.0, 1.0)
    later_start: float = within(1.0, 0.0, 1.0)
    later_floor: float = within(0.0, 0.0, 1.0)
    later_alpha: str = one_of("learned", "learned", "positive")  # which step sizes further steps use
    test_episodes: int = within(20, 2, 10_000)        # K at meta-test [release: push 40, ant 50]
    aggregation_episodes: int = within(2, 0, 1000)    # per task and collection, step 3c; 0: none
    warm_up_steps: int = within(25, 1, 1_000_000)     # meta-steps over which the learning rates rise [ours]
    imitation_batch: int = within(200, 1, 100_000)    # labelled states per task and meta-step, or step of imitation
    # Images per task, inner step and meta-step; 0: convolutions stay as imitation left them, and all images count [ours]
    image_batch: int = within(0, 0, 100_000)
    learning_rate: float = within(3e-3, 1e-7, 1.0)    # outer Adam, theta [release: 1e-3]
    step_size_learning_rate: float = within(1e-2, 1e-7, 1.0)  # outer Adam, alpha [ours]
    pre_update_imitation: float = within(0.3, 0.0, 100.0)     # weight of the pre-update policy's own imitation [ours]
    exploring_tasks: int = within(0, 0, 1000)         # the pre-update policy imitates these last ones; 0: all [ours]
    clip_norm: float = within(10.0, 1e-3, 1e6)        # of the outer gradient

    def __post_init__(self):
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if spec.type is float and type(value) is int:
                value = float(value)
                object.__setattr__(self, spec.name, value)
            if type(value) is not spec.type:
                raise ValueError(f"{spec.name} must be of type {spec.type.__name__}, not {value!r}")
            if "choices" in spec.metadata and value not in spec.metadata["choices"]:
                raise ValueError(f"{spec.name} must be one of {', '.join(spec.metadata['choices'])}, not {value!r}")
            if "low" in spec.metadata and not spec.metadata["low"] <= value <= spec.metadata["high"]:
                low, high = spec.metadata["low"], spec.metadata["high"]
                raise ValueError(f"{spec.name} must be between {low:g} and {high:g}, not {value:g}")


# What a task other than push wants otherwise
ANT = dict(
    expert_iterations=100, expert_episodes=1, expert_updates=800, expert_width=256, expert_learning_rate=1e-3,
    expert_discount=0.99, expert_return_steps=10, expert_reward_scale=1.0, expert_noise_correlation=0.9,
    demonstration_episodes=4, imitation_steps=1000,
    discount=0.99, gae_lambda=0.95, noise_correlation=0.9, max_weight=2.0, init_std=0.4, min_std=0.3, episodes=24,
    inner_every=4, test_episodes=50, later_steps=1.0, later_start=0.4, later_alpha="positive", collections=8, meta_batch=10,
    meta_steps=150, imitation_batch=800, pre_update_imitation=1.0, init_step_size=0.02, step_size_learning_rate=6e-3)
# Push from images: rendering takes most of the time, so there are fewer goals and one inner step, and more meta-steps
# on each collection. Labels come from the demonstrations alone. With fewer goals an iteration of the experts is shorter.
VISION = dict(
    training_tasks=24, expert_iterations=55, imitation_batch=100, collections=12, meta_steps=150, max_weight=2.0,
    inner_steps=1, aggregation_episodes=0)
# The pre-update policy imitates wide angles, so that its rollouts pass most others; rewards grow with the target angle,
# hence each task's own scale. The first inner step goes far and further ones correct it, so each has step sizes of its own
# (on the ant these fare no better within the arc, and worse outside). Labels come from the demonstrations alone, half of
# which head elsewhere.
DOOR = dict(
    reward="sparse", experts="scripted", training_tasks=24, demonstration_episodes=12, demonstration_detours=6,
    exploring_tasks=14, pre_update_imitation=1.0, advantage_scale="task", init_std=0.45, aggregation_episodes=0,
    collections=20, meta_batch=12, step_sizes="per step", max_weight=2.0)
TASKS = {"push": {}, "ant": ANT, "door": DOOR, "push-vision": VISION}

# `--experts local`: one small learner for each of the release's number of training goals
LOCAL = dict(training_tasks=20, expert_episodes=4, expert_width=64, expert_batch=128, expert_updates=300,
             expert_iterations=60)

# `--quick`: every phase for real, on budgets of seconds
QUICK = dict(training_tasks=4, held_out_tasks=3, expert_iterations=3, expert_updates=40, collections=2, meta_steps=3,
             imitation_steps=50, episodes=4, test_episodes=4)


def from_strings(pairs):
    """{name: value} from "name=value" strings; ValueError for an unknown name or a value of the wrong type."""
    known, values = {spec.name: spec.type for spec in dataclasses.fields(Settings)}, {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or name not in known:
            raise ValueError(f"unknown setting {name!r}: give NAME=VALUE with a name from settings.py")
        try:
            values[name] = known[name](text)
        except ValueError:
            raise ValueError(f"{name} must be of type {known[name].__name__}, not {text!r}") from None
    return values


def from_dict(values):
    """Settings from a saved dict; ValueError for unknown keys."""
    unknown = set(values) - {spec.name for spec in dataclasses.fields(Settings)}
    if unknown:
        raise ValueError(f"unknown settings {sorted(unknown)}")
    return Settings(**values)
