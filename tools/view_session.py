"""What the live page (tools/view.py) computes, without the page: adaptation step by step.

    session = Session(family, adapter, seed=0, threads=2)
    session.restart(goal)                   # step 0: before any gradient step
    session.step(episodes=20, noise=True)   # explore, learn, play one episode with mean actions
    session.steps[-1].distance

The numbers are those of evaluate.py for the same goal and seed. `Worker` runs the jobs of the page
one after the other on one thread.
"""
import copy
import dataclasses
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from envs import Environments
from evaluate import parts_of_round, returns_and_distances
from settings import random_streams
from tasks.base import check_tasks
from tools.pictures import draw_film


class Stopped(Exception):
    """The program ends: give up the job."""


# ---------------------------------------------------------------- one goal, step by step
@dataclasses.dataclass
class Step:
    """After so many gradient steps: one episode with mean actions, and what the step was given.

    `states` (T + 1, state): full physics states, up to an early end. `rewards` (K, T): those of the
    K rollouts that this step learned from; None before the first step. `adapter`: a copy.
    """
    states: np.ndarray
    total: float     # return
    distance: float  # final distance, in the family's task_unit
    adapter: object
    rewards: np.ndarray | None = None


def no_progress(share: float) -> None:
    """Nobody watches."""


class Session:
    """Adaptation to one goal, as far as it has come. Its methods must run on one thread."""

    def __init__(self, family, adapter, seed: int = 0, threads: int | None = None):
        self.family, self.adapter, self.seed = family, adapter, seed
        self.environments = Environments(family, threads)
        self.goal, self.steps = None, []

    @property
    def what(self) -> str:
        """The word for a step. A sequential method learns after every rollout, not by gradients."""
        return "round" if self.adapter.sequential else "gradient step"

    def restart(self, goal: np.ndarray, progress: Callable = no_progress) -> None:
        """Forget all steps, and measure step 0 on `goal` (task,). ValueError for a wrong goal."""
        self.goal = check_tasks(self.family, np.asarray(goal)[None])[0]
        self.adapter.begin(1, random_streams(self.seed, "evaluation", 0)[1])
        self.steps = [self._measure(self._counted(1, progress))]

    def step(self, episodes: int, noise: bool = True, progress: Callable = no_progress) -> None:
        """One step: `episodes` rollouts with or without noise, an update, one measured episode."""
        parts, together = parts_of_round(self.adapter, episodes)
        count, given = self._counted(parts + 1, progress), []
        for _ in range(parts):
            act = count(self.adapter.act if noise else self._act_quietly)
            explored = self.environments.rollout(act, self.goal[None], together)
            self.adapter.update(explored)
            given.append(explored["rewards"])
        step = self._measure(count)
        step.rewards = np.concatenate(given)  # (K, T)
        self.steps = [*self.steps, step]      # a new list: others read the old one meanwhile

    def _act_quietly(self, observation, last) -> np.ndarray:
        """Mean actions in rollouts that `update` will learn from."""
        if not self.adapter.sequential:  # such adapters note for `update` only what explored
            self.adapter.act(observation, last)
        return self.adapter.act(observation, last, explore=False)

    def _measure(self, count: Callable) -> Step:
        """Play one episode with mean actions, by a copy, and keep its states."""
        env, states = self.environments(1), []
        mean_action = partial(copy.deepcopy(self.adapter).act, explore=False)

        def act(observation, last):
            states.append(env.state[0].copy())
            return mean_action(observation, last)
        episode = self.environments.rollout(count(act), self.goal[None])
        states.append(env.state[0].copy())
        # After an early end the environment begins another episode: leave that out.
        states = np.array(states[:int(episode["mask"].sum()) + 1])
        total, distance = (float(x[0]) for x in returns_and_distances(episode, 1))
        return Step(states, total, distance, copy.deepcopy(self.adapter))

    def _counted(self, parts: int, progress: Callable) -> Callable:
        """A wrapper of policies that tells `progress` the share done of `parts` rollouts."""
        total, done = parts * self.family.horizon, 0

        def count(act):
            def counted(observation, last):
                nonlocal done
                progress(done / total)
                done += 1
                return act(observation, last)
            return counted
        return count

    def film(self, number: int, out: Path) -> Path | None:
        """before_after.gif of step 0 beside step `number`, in `out`; None without OpenGL."""
        path = out / "before_after.gif"
        out.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        stages = {k: copy.deepcopy(self.steps[k].adapter) for k in (0, number)}
        draw_film(out, self.family, stages, self.goal[None])
        return path if path.exists() else None

    def close(self) -> None:
        self.environments.close()


# ---------------------------------------------------------------- one thread for all work
class Worker:
    """A queue of jobs on one thread.

    Each job has a kind. While a job of a kind waits or runs, another of that kind is refused: two
    clicks do not make two adaptations. With `latest`, it takes the place of the one that waits.
    `report(kind, error)` is called on that thread: with a kind as a job begins, with None as it
    ends. `error` is the line of the job that failed, else None.
    """

    def __init__(self, report: Callable[[str | None, str | None], None]):
        self.report, self.jobs, self.running, self.stopping = report, [], None, False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._work, name="worker", daemon=True)
        self.thread.start()

    def submit(self, kind: str, job: Callable[[], None], latest: bool = False) -> bool:
        """Append a job. False: it is refused."""
        with self.changed:
            if latest:
                self.jobs = [entry for entry in self.jobs if entry[0] != kind]
            elif kind == self.running or self.waiting(kind):
                return False
            self.jobs.append((kind, job))
            self.changed.notify_all()
        return True

    def waiting(self, kind: str) -> bool:
        return any(entry[0] == kind for entry in self.jobs)

    def wait(self, timeout: float = 60.0) -> bool:
        """Wait until nothing waits or runs; whether that came about."""
        with self.changed:
            return self.changed.wait_for(lambda: not self.jobs and self.running is None, timeout)

    def check(self) -> None:
        """For jobs to call now and then: Stopped as the program ends."""
        if self.stopping:
            raise Stopped

    def stop(self) -> None:
        """End the thread; a job that calls `check` ends at once."""
        with self.changed:
            self.stopping = True
            self.changed.notify_all()
        self.thread.join(10.0)

    def _work(self) -> None:
        while True:
            with self.changed:
                self.running = None
                self.changed.notify_all()
                self.changed.wait_for(lambda: self.jobs or self.stopping)
                if self.stopping:
                    return
                self.running, job = self.jobs.pop(0)
            error = None
            try:
                self.report(self.running, None)
                job()
            except Stopped:
                return
            except Exception as problem:  # the page stays: it says what went wrong
                error = f"{type(problem).__name__}: {problem}"
                traceback.print_exc(file=sys.stderr)
            self.report(None, error)
