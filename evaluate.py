"""Meta-test: one protocol for every method. Tasks go in, the lists of result.json come out.

    from evaluate import evaluate
    evaluation = evaluate(environments, adapter, tasks, rounds=3, episodes=20, seed=0)

In every round a method explores `episodes` episodes of each task with sampled actions, learns from
them, and is measured: one episode of each task with the mean action, by a copy of the adapter.
Every method gets the same tasks, the same number of episodes per round and the same records.
"""
import copy
import dataclasses
from functools import partial

import numpy as np
from tqdm import tqdm

from envs import Environments
from local_policies import ExpertFunction, run_experts
from settings import random_streams

CHUNK = 50              # at most so many tasks at a time: bounds memory
TABLE_ROUNDS = (0, 1, 2, 3, 5)  # rounds shown in the closing table
FILM_ROUNDS = (0, 3)    # adapters kept for the film
LEVELS = {"no_adaptation": "imitation, no adaptation",
          "experts_held_out": "experts (told the goal)",
          "experts_training": "experts on the training tasks"}  # further rows of that table


@dataclasses.dataclass
class Evaluation:
    """`lists` of result.json; env steps and divergences of all episodes; for the film, `stages`,
    {round: adapter} of the first chunk of tasks, and those tasks."""
    lists: dict[str, list[dict]]
    env_steps: int = 0
    divergences: int = 0
    stages: dict[int, object] = dataclasses.field(default_factory=dict)
    stage_tasks: np.ndarray | None = None

    def count(self, episodes: dict) -> dict:
        self.env_steps += int(episodes["mask"].sum())
        self.divergences += int(episodes["diverged"].sum())
        return episodes


def records(family, tasks: np.ndarray, returns, distances, **extra) -> list[dict]:
    """Entries of result.json, one for each task; `extra` goes into every entry."""
    return [{"task": task.tolist(), **extra, "return": float(r), "final_distance": float(d),
             "success": bool(d <= family.success_distance)}
            for task, r, d in zip(tasks, returns, distances)]


def returns_and_distances(episodes: dict, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return and final distance (n,): means over each task's episodes."""
    return (episodes["rewards"].sum(1).reshape(n, -1).mean(1),
            episodes["distances"][:, -1].reshape(n, -1).mean(1))


# ---------------------------------------------------------------- the protocol
def parts_of_round(adapter, episodes: int) -> tuple[int, int]:
    """(parts, episodes of each task in one): all at once; if sequential, one by one.

    An update follows every part.
    """
    return (episodes, 1) if adapter.sequential else (1, episodes)


def evaluate(environments: Environments, adapter, tasks: np.ndarray, rounds: int, episodes: int,
             seed: int, experts: ExpertFunction | None = None, purpose: str = "evaluation",
             stream: int = 0, explore_last: bool = True, progress: bool = False) -> Evaluation:
    """Adapt to `tasks` (n, task) in `rounds` rounds of `episodes` per task, and measure.

    `seed`, `purpose` and `stream` choose the random stream of exploration. The lists, one entry per
    task and round k = 0 (before any update), 1, ..., `rounds`:
    "held_out": one episode with mean actions, after k rounds;
    "held_out_sampled": mean of the episodes explored after k rounds; success is that of the mean
    distance. `explore_last`: also after the last round, by a copy of the adapter;
    "experts_held_out", and one list for each of the adapter's `references`: one entry per task.
    """
    out = Evaluation({"held_out": [], "held_out_sampled": [], "experts_held_out": [],
                      "no_adaptation": []})
    chunks = np.array_split(tasks, -(-len(tasks) // CHUNK))
    with tqdm(total=len(chunks) * (rounds + 1), desc=f"{'evaluation':<22}", unit="round",
              disable=not progress) as bar:
        for number, chunk in enumerate(chunks):
            generator = random_streams(seed, purpose, stream + number)[1]
            adapt_and_measure(out, environments, adapter, chunk, rounds, episodes, generator,
                              explore_last, bar)
            for name, reference in getattr(adapter, "references", {}).items():
                reference.begin(len(chunk), generator)
                out.lists.setdefault(name, []).extend(measure(out, environments, reference, chunk))
            if experts is not None and getattr(experts, "contextual", True):
                out.lists["experts_held_out"] += measure_experts(out, environments, experts, chunk)
    return out


def adapt_and_measure(out: Evaluation, environments: Environments, adapter, tasks: np.ndarray,
                      rounds: int, episodes: int, generator, explore_last: bool,
                      bar: tqdm) -> None:
    """The rounds of one chunk of tasks; `bar` counts them."""
    n, updates = len(tasks), 0
    adapter.begin(n, generator)
    for k in range(rounds + 1):
        counts = {"gradient_steps": updates, "adaptation_episodes": k * episodes}
        out.lists["held_out"] += measure(out, environments, adapter, tasks, **counts)
        bar.update()
        if k in FILM_ROUNDS and k not in out.stages:
            out.stages[k], out.stage_tasks = copy.deepcopy(adapter), tasks
        if k == rounds and not explore_last:
            break
        parts, together = parts_of_round(adapter, episodes)
        sampled = []
        explorer = adapter if k < rounds else copy.deepcopy(adapter)
        for part in range(parts):
            explored = out.count(environments.rollout(explorer.act, tasks, together))
            sampled.append(returns_and_distances(explored, n))
            if k < rounds or part < parts - 1:  # nobody asks for what the very last part teaches
                explorer.update(explored)
        updates += parts
        returns, distances = np.mean(sampled, axis=0)
        out.lists["held_out_sampled"] += records(environments.family, tasks, returns, distances,
                                                 **counts)


def measure(out: Evaluation, environments: Environments, adapter, tasks: np.ndarray,
            **extra) -> list[dict]:
    """Records of one episode of each task with mean actions, by a copy of the adapter."""
    act = partial(copy.deepcopy(adapter).act, explore=False)
    episodes = out.count(environments.rollout(act, tasks))
    return records(environments.family, tasks, *returns_and_distances(episodes, len(tasks)),
                   **extra)


def measure_experts(out: Evaluation, environments: Environments, experts: ExpertFunction,
                    tasks: np.ndarray) -> list[dict]:
    """Records of one episode of each task with the experts' mean actions."""
    episodes = out.count(run_experts(environments(len(tasks)), experts, tasks))
    return records(environments.family, tasks, *returns_and_distances(episodes, len(tasks)))


# ---------------------------------------------------------------- what becomes of the lists
def by_round(entries: list[dict]) -> list[list[dict]]:
    """The entries of each round, in order."""
    rounds = {}
    for entry in entries:
        rounds.setdefault(entry["gradient_steps"], []).append(entry)
    return [rounds[steps] for steps in sorted(rounds)]


def update_word(lists: dict) -> str:
    """What a round is: a "gradient step", or a "round" of several updates of another kind."""
    rounds = by_round(lists["held_out"])
    several = len(rounds) > 1 and rounds[1][0]["gradient_steps"] > 1
    return "round" if several else "gradient step"


def mean_of(entries: list[dict], key: str) -> float:
    return float(np.mean([entry[key] for entry in entries]))


def curve_points(evaluation: Evaluation, env_steps: int) -> list[dict]:
    """Rows of result.json's `curve`: means of the mean action, one per number of test episodes."""
    return [{"env_steps": env_steps, "adaptation_episodes": entries[0]["adaptation_episodes"],
             **{key: mean_of(entries, key) for key in ("return", "final_distance", "success")}}
            for entries in by_round(evaluation.lists["held_out"])]


def closing_table(lists: dict, family, title: str = "held-out tasks") -> str:
    """Aligned text table of means over tasks, the distance in the family's unit for tables."""
    name_of_distance, factor, digits = family.table

    def row(label, entries):
        if not entries:
            return f"{label:<34}{'-':>8}{'-':>24}{'-':>10}"
        return (f"{label:<34}{mean_of(entries, 'return'):>8.1f}"
                f"{factor * mean_of(entries, 'final_distance'):>24.{digits}f}"
                f"{100 * mean_of(entries, 'success'):>9.0f}%")

    lines = [f"{title:<34}{'return':>8}{name_of_distance:>24}{'success':>10}"]
    for name, label in (("held_out", "mean action"), ("held_out_sampled", "sampled actions")):
        rounds = by_round(lists[name])
        what = update_word(lists).split()[-1]
        for k, entries in enumerate(rounds):
            if k in TABLE_ROUNDS or k == len(rounds) - 1:
                lines.append(row(f"adapted, {k} {what}{'s' * (k != 1)}, {label}", entries))
    return "\n".join([*lines, *(row(label, lists[name]) for name, label in LEVELS.items()
                                if name in lists)])


def closing_counts(result: dict) -> str:
    """The line below the closing table."""
    counted = ", ".join(f"{phase.replace('_', '-')} {steps:,}"
                        for phase, steps in result["env_steps"].items())
    seconds = sum(result["wall_seconds"].values())
    return f"environment steps: {counted}; wall time {seconds:.0f} s on {result['machine']}"


def band_means(family, lists: dict, key: str) -> list[tuple[str, list[float]]]:
    """[(label, [mean of `key` over the band's goals after 0, 1, .. rounds])], mean actions."""
    out, first = [], 0
    for label, goals in family.bands():
        part = slice(first, first + len(goals))
        rounds = by_round(lists["held_out"])
        out.append((label, [mean_of(entries[part], key) for entries in rounds]))
        first += len(goals)
    return out


def band_table(family, lists: dict) -> str:
    """Final distance of the mean action after each gradient step, a row for each band of goals."""
    last = len(by_round(lists["held_out"])) - 1
    shown = [k for k in (0, 1, 2, 3, 5, 10, 15, 20) if k <= last]
    lines = [f"{'final distance after steps':<28}" + "".join(f"{k:>8}" for k in shown)]
    for label, means in band_means(family, lists, "final_distance"):
        lines.append(f"{label:<28}" + "".join(f"{means[k]:>8.3f}" for k in shown))
    return "\n".join(lines)
