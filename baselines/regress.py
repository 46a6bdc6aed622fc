"""Goal regression: guess the goal from rewards, and tell it to the expert.

The rival that asks how much a dense reward gives away. It knows more than others at test time: the
reward function (`rewards_of` of the task family) and what the reward came from (`outcomes` of a
rollout), but not the goal. After every round it looks for the goal g of each task that explains the
rewards of that task's own episodes best,

    g = argmin over g of the mean over steps of ( r - r(outcome, action; g) )^2,         (1)

the maximum of the likelihood under normal noise. Then the contextual expert is told g.

Eq. 1 sums over `transitions` random steps of all episodes so far. In every exploring episode the
expert is told a random goal among those that explain all these rewards. At first all training goals
do, and their mean. With dense rewards soon none does; then it is told g.
"""
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

import settings as settings_module
from baselines import oracle
from policy import CorrelatedNoise
from settings import UserError, one_of, within

TOLERANCE = 1e-9  # goals explain rewards alike that differ by less, in shares of their square
CHUNK = 10 ** 6  # rewards computed at a time: bounds memory


@dataclass(frozen=True)
class Settings(settings_module.Settings):
    explore_goals: str = one_of("consistent", ("consistent", "guess"),
                                "*what the exploring expert is told: g or a training goal that "
                                "explains all rewards so far, at random; g alone")
    explore_noise: float = within(0.2, 0.0, 5.0, "*std of the noise on the expert's actions")
    candidates: int = within(400, 4, 100_000, "goals tried at once, and in each refinement")
    refinements: int = within(12, 0, 100, "each halves the distance between goals tried")
    transitions: int = within(1000, 1, 1_000_000, "steps that a guess is made from, of each task")


def train(problem, settings: Settings, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
    """As `oracle.train`: the experts alone."""
    if not problem.family.outcome_size:
        raise UserError(f"regress needs the reward of any goal: {problem.family.name} has no "
                        "outcome_size (tasks/base.py)")
    yield from oracle.train(problem, settings, state, Adapter)


class Adapter(oracle.Adapter):
    """The oracle's adapter with a guess that `update` betters."""

    def begin(self, count: int, generator: torch.Generator) -> None:
        super().begin(count, generator)
        self.seen = []  # of each round
        # The training goals and, last, g: (count, G, task); and which explain all rewards drawn.
        self.goals = np.concatenate([np.tile(self.tasks, (count, 1, 1)), self.guess[:, None]], 1)
        self.consistent = np.ones(self.goals.shape[:2])

    def act(self, observation, last: dict | None = None, explore: bool = True) -> np.ndarray:
        if not explore:
            return self.told(observation, self.guess)
        if last is None:  # an episode begins
            B, self.aims = len(observation), self.guess
            if self.settings.explore_goals == "consistent":
                drawn = torch.multinomial(torch.as_tensor(self.consistent), B // len(self.guess),
                                          replacement=True, generator=self.generator).numpy()
                self.aims = np.take_along_axis(self.goals, drawn[..., None], axis=1).reshape(B, -1)
            self.noise = CorrelatedNoise((B, self.family.action_size),
                                         self.settings.expert_noise_correlation, self.generator)
        return (self.told(observation, self.aims)
                + self.settings.explore_noise * next(self.noise).numpy())

    def update(self, episodes: dict) -> None:
        """A new guess for every task, from all its episodes so far."""
        names = ("outcomes", "actions", "rewards", "mask")
        n = len(self.guess)
        self.seen.append([episodes[name].reshape(n, -1, *episodes[name].shape[2:])
                          for name in names])
        *seen, mask = (np.concatenate(part, axis=1) for part in zip(*self.seen))
        # As many steps of every task, at random, and none that follows an early end.
        count = min(self.settings.transitions, int(mask.sum(1).min()))
        drawn = torch.multinomial(torch.as_tensor(mask), count, generator=self.generator).numpy()
        seen = [np.take_along_axis(part, drawn.reshape(n, count, *[1] * (part.ndim - 2)), axis=1)
                for part in seen]
        self.guess = estimate_goals(self.family, *seen, self.tasks.mean(0), self.settings)
        self.goals[:, -1] = self.guess
        error = squared_error(self.family, *seen, self.goals)
        limit = error[:, -1:] + TOLERANCE * np.square(seen[-1]).mean(1, keepdims=True)
        self.consistent = (error <= limit).astype(float)


# ---------------------------------------------------------------- least squares
def estimate_goals(family, outcomes: np.ndarray, actions: np.ndarray, rewards: np.ndarray,
                   prior: np.ndarray, settings: Settings) -> np.ndarray:
    """Goals (n, task) by Eq. 1, for n tasks at once.

    From S steps each: outcomes (n, S, outcome), actions (n, S, act), rewards (n, S). A grid of
    cells covers all goals that the family allows. Then the cells with the best centres are halved
    in every dimension, again and again. Many are kept: two places can explain the same distances
    almost alike, and the better one need not hold the best centre at first. Of goals that explain
    the rewards alike it takes the one next to `prior` (task,).
    """
    low, high = (np.asarray(limit, float) for limit in
                 family.task_limits or (family.task_low, family.task_high))
    n, d = len(rewards), family.task_size
    per_dimension = max(2, int(settings.candidates ** (1 / d) + 1e-9))
    cell = (high - low) / per_dimension
    goals = np.tile(low + cell * (0.5 + lattice(per_dimension, d)), (n, 1, 1))  # (n, C, task)
    keep = max(1, settings.candidates // 2 ** d)
    for _ in range(settings.refinements):
        best = best_goals(family, outcomes, actions, rewards, goals, prior, keep)
        halves = cell * (0.5 * lattice(2, d) - 0.25)      # from a cell's centre to its parts'
        goals = (best[:, :, None] + halves).reshape(n, -1, d)
        cell = 0.5 * cell
    return best_goals(family, outcomes, actions, rewards, goals, prior, 1)[:, 0]


def lattice(count: int, d: int) -> np.ndarray:
    """(count^d, d): all vectors of numbers 0 .. count - 1."""
    return np.stack(np.meshgrid(*[np.arange(count)] * d), axis=-1).reshape(-1, d)


def best_goals(family, outcomes, actions, rewards, goals: np.ndarray, prior: np.ndarray,
               keep: int) -> np.ndarray:
    """The `keep` goals (n, keep, task) with the least squared error, of candidates (n, C, task)."""
    error = squared_error(family, outcomes, actions, rewards, goals)
    away = np.square((goals - prior) / (family.task_high - family.task_low)).sum(-1)
    order = np.argsort(error + 1e-12 * away, axis=1, kind="stable")[:, :keep]
    return np.take_along_axis(goals, order[..., None], axis=1)


def squared_error(family, outcomes: np.ndarray, actions: np.ndarray, rewards: np.ndarray,
                  goals: np.ndarray) -> np.ndarray:
    """(n, C): the mean over steps in Eq. 1, for candidates (n, C, task)."""
    n, S = rewards.shape
    parts = []
    for some in np.array_split(goals, -(-goals[..., 0].size * S // CHUNK), axis=1):
        shape = (n, some.shape[1], S)
        outcome, action = (np.broadcast_to(x[:, None], (*shape, x.shape[-1]))
                           for x in (outcomes, actions))
        told = family.rewards_of(outcome, action, some[:, :, None])
        parts.append(np.square(rewards[:, None] - told).mean(-1))
    return np.concatenate(parts, axis=1)
