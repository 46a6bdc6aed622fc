"""The phases of a run, its files and how it resumes: experts, demonstrations, training, evaluation.

A method (gmps.py, baselines/) is a generator that knows nothing of files. It gets a `Problem`. Each
phase writes a file. When the run is started again, it reads that file instead:

    experts.pt -> demonstrations.npz -> policy.pt -> learning.png, before_after.gif -> result.json

Unfinished training is in experts_partial.pt and policy_partial.pt. Every checkpoint holds the
journal up to then: metrics, curve, counts of steps and seconds, commits.
"""
import dataclasses
import platform
from pathlib import Path

import numpy as np
import torch
from loky import cpu_count
from tqdm import tqdm

import baselines
from checkpoints import (
    Journal,
    load_checkpoint,
    read_demonstrations,
    write_atomically,
    write_json,
)
from envs import Environments, make_batch
from evaluate import (
    TABLE_ROUNDS,
    Evaluation,
    closing_counts,
    closing_table,
    curve_points,
    evaluate,
    measure_experts,
)
from local_policies import (
    Demonstrations,
    ExpertFunction,
    Experts,
    make_demonstrations,
    save_demonstrations,
    train_experts,
)
from settings import UserError
from tasks import make_family, task_set
from tasks.base import TaskFamily
from tools.pictures import draw_film, draw_plot

EXPERT_CHECKPOINT_EVERY = 5  # iterations: such a checkpoint holds the whole replay
CURVE_TASKS, CURVE_ROUNDS = 10, 3  # of validation, for each point of the curve


def progress_bar(description: str, total: int, done: int) -> tqdm:
    return tqdm(total=total, initial=done, desc=f"{description:<22}", unit="it",
                dynamic_ncols=True, mininterval=0.5)


def describe(metrics: dict) -> dict:
    """What a progress bar says."""
    formats = {"env_steps": ("steps", ","), "return": ("return", ".0f"),
               "distance": ("dist", ".3f"), "adapted_return": ("adapted", ".0f"),
               "adapted_distance": ("adapted dist", ".3f")}
    return {label: format(metrics[key], spec) for key, (label, spec) in formats.items()
            if key in metrics}


# ---------------------------------------------------------------- what a method is given
class Problem:
    """Training tasks, and all that a method may ask for. Nothing is made before it is needed.

    `family`: the task family. `tasks` (n, task): the training tasks. `device`: for networks.
    `train_experts()`, `demonstrate(experts)`, `rollout(policy, tasks, episodes)` and
    `meta_test(adapter)`: see below.
    """

    def __init__(self, settings, out: Path, device="cpu", threads: int | None = None,
                 demos: tuple[np.ndarray, Demonstrations] | None = None):
        self.settings, self.out, self.device = settings, out, device
        self.threads = threads or cpu_count()
        self.family = policy_family(settings)
        self.demos = demos  # the user's, instead of experts
        self.tasks = demos[0] if demos else task_set(self.family, "train", settings.training_tasks)
        self.environments = Environments(self.family, self.threads)
        self.method = baselines.load(settings.method)
        self.journal, self.experts, self.bar = Journal(out, settings), None, None
        self.state = None

    # ---- callables of a method
    def rollout(self, policy, tasks: np.ndarray, episodes: int) -> dict:
        """`episodes` of a policy on each task, environments ordered by task: `envs.rollout`."""
        return self.environments.rollout(policy, tasks, episodes)

    def train_experts(self) -> ExpertFunction | None:
        """Step 1: experts of the training tasks. None: there is nobody to ask.

        Writes experts.pt with the policies only; critics and replay are deleted at the end. A
        scripted expert needs no training.
        """
        settings, journal = self.settings, self.journal
        # Scripted experts cost nothing, and of a user's demonstrations nobody is left to ask.
        if settings.experts == "scripted":
            self.experts = self.family.expert
        elif settings.experts != "demonstrations":
            if not (self.out / "experts.pt").exists():
                with journal.timing("experts"):
                    self._learn_experts()
            # Load the file even if it was just written, so that a resumed run sees the same bits.
            content = journal.load("experts.pt", "experts")
            (self.out / "experts_partial.pt").unlink(missing_ok=True)
            self.experts = load_experts(content, self.device)
        return self.experts

    def demonstrate(self, experts: ExpertFunction | None) -> Demonstrations:
        """Step 2: demonstrations of the experts, or the user's. Leaves demonstrations.npz."""
        path, env_steps = self.out / "demonstrations.npz", 0
        if not path.exists():
            if self.demos is None:
                with self.journal.timing("experts"):
                    count = len(self.tasks) * self.settings.demonstration_episodes
                    env = make_batch(self.family, count, self.threads)
                    made, _ = make_demonstrations(env, experts, self.tasks, self.settings)
                    env.close()
                    env_steps = int(made.mask.sum())
            else:
                made = self.demos[1]
            write_atomically(path, lambda file: save_demonstrations(file, self.tasks, made,
                                                                    env_steps))
        # Read the file even if it was just written: fresh and resumed runs then see the same bits.
        try:
            tasks, demonstrations, env_steps = read_demonstrations(path, self.family)
        except UserError as error:
            raise UserError(f"{error} (delete it, and the run makes it again)") from None
        if self.demos is not None and not same_demonstrations(
                (tasks, demonstrations), self.demos):
            raise UserError(f"{path} holds other demonstrations: choose another folder with --out")
        if self.state is None:  # checkpoints of meta-training include them already
            self.journal.env_steps["experts"] += env_steps
        return demonstrations

    def meta_test(self, adapter) -> None:
        """Save the policy that was yielded last, adapt it to the held-out tasks, write the results.

        result.json comes last: if it exists, so do all other files.
        """
        self._close_bar()
        if not (self.out / "policy.pt").exists():
            self.journal.save("policy.pt", "policy", {"policy": self.state["policy"]})
        else:
            self.journal.write_metrics()  # the run may have been killed before it could
        (self.out / "policy_partial.pt").unlink(missing_ok=True)
        settings, journal = self.settings, self.journal
        # More rounds than were trained show whether later steps undo what the first ones gained.
        with journal.timing("evaluation"):
            tasks = task_set(self.family, "held_out", settings.held_out_tasks)
            evaluation = evaluate(self.environments, adapter, tasks, max(TABLE_ROUNDS),
                                  settings.test_episodes, settings.seed, self.experts,
                                  progress=True)
            lists = evaluation.lists
            lists["experts_training"] = [] if self.experts is None else measure_experts(
                evaluation, self.environments, self.experts, self.tasks)
        result = result_of(self, evaluation, settings.seed) | {"curve": journal.curve} | lists
        print(closing_table(lists, self.family))
        print(closing_counts(result))
        # A fault in a picture, of a new task's camera say, must not cost the numbers.
        try:
            draw_plot(self.out, self.family, settings, journal.rows, lists)
            draw_film(self.out, self.family, evaluation.stages, evaluation.stage_tasks)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError,
                ValueError) as error:
            print(f"a picture is missing: {type(error).__name__}: {error}")
        write_json(self.out / "result.json", result)
        print(f"results in {self.out}")

    # ---- resuming, metrics, checkpoints
    def resume(self) -> None:
        """Take counts, and the method's state if there is one, from the latest checkpoint."""
        # From the last phase back to the first: each checkpoint holds all counts before it.
        for name, kind in (("policy.pt", "policy"), ("policy_partial.pt", "policy in training"),
                           ("experts.pt", "experts"), ("experts_partial.pt",
                                                       "experts in training")):
            content = self.journal.load(name, kind)
            if content is not None:
                self.journal.restore(content)
                if "policy" in kind:  # policy.pt has no "training": then training is done
                    self.state = {"policy": content["policy"],
                                  "training": content.get("training")}
                return

    def collected(self, state: dict, metrics: dict) -> None:
        """After a collection: metrics, a point of the curve, a checkpoint."""
        self.state = state
        self.journal.credit("meta_training")
        before = [row["progress"] for row in self.journal.rows if row["phase"] == "meta_training"]
        self.journal.note("meta_training", metrics)
        # Point k is due when a share k / points of training is done; at most one a collection.
        points = self.settings.curve
        done = [int(share * points + 1e-9) for share in (max(before, default=0.0),
                                                         metrics["progress"])]
        if done[1] > done[0]:
            self._add_to_curve(metrics["iteration"])
        # The bar comes with the first collection: before, the experts have a bar of their own.
        if self.bar is None:
            total = round(metrics["iteration"] / metrics["progress"])
            self.bar = progress_bar("meta-training", total, metrics["iteration"] - 1)
        self.bar.set_postfix(describe(metrics), refresh=False)
        self.bar.update()
        if metrics["progress"] < 1:  # after the last collection `meta_test` saves policy.pt
            self.journal.save("policy_partial.pt", "policy in training", state)

    def _add_to_curve(self, iteration: int) -> None:
        """Measure the current policy on validation tasks. Training's steps do not include these."""
        journal, settings = self.journal, self.settings
        with journal.timing("curve"):
            adapter = self.method.Adapter(self.state["policy"], self.family, settings, self.device)
            adapter.references = {}  # they do not change, and would cost steps at every point
            tasks = task_set(self.family, "validation", CURVE_TASKS)
            evaluation = evaluate(self.environments, adapter, tasks, CURVE_ROUNDS,
                                  settings.test_episodes, settings.seed, purpose="curve",
                                  stream=iteration, explore_last=False)
            before = sum(journal.env_steps[phase] for phase in ("experts", "meta_training"))
            journal.curve += curve_points(evaluation, before)
            for counts, more in ((journal.env_steps, evaluation.env_steps),
                                 (journal.divergences, evaluation.divergences)):
                counts["curve"] = counts.get("curve", 0) + more

    def _learn_experts(self) -> None:
        settings, journal = self.settings, self.journal
        content = journal.load("experts_partial.pt", "experts in training")
        state = content and content["state"]
        family = make_family(settings.task, settings.reward).expert_family
        env = make_batch(family, settings.expert_episodes, self.threads)
        # An iteration is cheap and its checkpoint is large, so only some are kept.
        done = state["iteration"] if state else 0
        title = f"experts ({settings.experts})"
        with progress_bar(title, settings.expert_iterations, done) as bar:
            training = train_experts(env, self.tasks, settings, state, self.device)
            for experts, snapshot, metrics in training:
                journal.note("experts", metrics)
                bar.set_postfix(describe(metrics), refresh=False)
                bar.update()
                if metrics["iteration"] == settings.expert_iterations:
                    policy = [p.cpu() for p in experts.policy]
                    journal.save("experts.pt", "experts", {"policy": policy})
                elif metrics["iteration"] % EXPERT_CHECKPOINT_EVERY == 0:
                    journal.save("experts_partial.pt", "experts in training",
                                 {"state": snapshot()})
        env.close()

    def _close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def close(self) -> None:
        self._close_bar()
        self.environments.close()


def train_and_test(problem: Problem) -> None:
    """A whole run, from where its folder stands."""
    problem.resume()
    try:
        with problem.journal.timing("meta_training"):
            for state, metrics in problem.method.train(problem, problem.settings, problem.state):
                problem.collected(state, metrics)
        if not (problem.out / "result.json").exists():
            raise UserError(f"{problem.settings.method}: train() ended without its last act, "
                            "problem.meta_test(Adapter(...)): see baselines/__init__.py")
    finally:
        problem.close()


# ---------------------------------------------------------------- files and what is in them
def same_demonstrations(one: tuple, other: tuple) -> bool:
    """Whether two (tasks, demonstrations) hold the same numbers."""
    arrays = [{"tasks": tasks} | demonstrations.arrays() for tasks, demonstrations in (one, other)]
    return arrays[0].keys() == arrays[1].keys() and all(
        np.array_equal(value, arrays[1][name]) for name, value in arrays[0].items())


def policy_family(settings) -> TaskFamily:
    """The task family as the policy sees it. Experts' networks see units of about one always."""
    family = make_family(settings.task, settings.reward)
    if settings.observations == "raw":
        family.observation_centre, family.observation_scale = 0.0, 1.0
    return family


def load_experts(content: dict, device="cpu") -> Experts:
    """`Experts` from the content of experts.pt."""
    settings = content["settings"]
    family = make_family(settings.task, settings.reward).expert_family
    tasks = task_set(family, "train", settings.training_tasks)
    return Experts(family, [p.to(device) for p in content["policy"]], tasks,
                   settings.experts == "contextual")


def load_adapter(folder: str | Path, device="cpu"):
    """(family, adapter, content of policy.pt) from the folder of a trained policy."""
    content = load_checkpoint(Path(folder) / "policy.pt", "policy")
    settings = content["settings"]
    family = policy_family(settings)
    method = baselines.load(settings.method)
    return family, method.Adapter(content["policy"], family, settings, device), content


def method_label(settings, family: TaskFamily) -> str:
    """Method and variant, for folders and result.json: "gmps", "gmps-local", "gmps-paper"."""
    preset = "" if settings.preset == "ours" else f"-{settings.preset}"
    variant = {"local": "-local", "demonstrations": "-demos"}.get(settings.experts, "")
    unusual = "" if settings.reward == family.rewards[0] else f"-{settings.reward}"
    return settings.method + preset + variant + unusual


def result_of(problem: Problem, evaluation: Evaluation, seed: int) -> dict:
    """result.json without its lists."""
    journal = problem.journal
    env_steps = journal.env_steps | {"evaluation": evaluation.env_steps}
    divergences = journal.divergences | {"evaluation": evaluation.divergences}
    phases = ("experts", "meta_training", "evaluation")
    for counts, zero in ((env_steps, 0), (journal.wall_seconds, 0.0), (divergences, 0)):
        for phase in phases:
            counts.setdefault(phase, zero)
    return {"task": problem.settings.task,
            "method": method_label(problem.settings, problem.family), "seed": seed,
            "commit": journal.commits["evaluation"][-1], "commits": journal.commits,
            "env_steps": env_steps,
            "wall_seconds": journal.wall_seconds, "divergences": divergences,
            "device": str(problem.device), "machine": machine(problem.threads),
            "settings": dataclasses.asdict(problem.settings)}


def machine(threads: int) -> str:
    return (f"{platform.machine()} {platform.system()}, {cpu_count()} cores, {threads} threads, "
            f"torch {torch.__version__}")
