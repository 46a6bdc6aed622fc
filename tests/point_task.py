"""A point on a plane must find a goal that it does not see: tasks for learning checks, in numpy.

Seconds are enough to learn them, since B points are stepped as one array.
"""
import gymnasium
import numpy as np

from envs import Environments
from evaluate import by_round, evaluate, mean_of
from tasks.base import GymnasiumFamily, TaskFamily
from tests.conftest import make_problem


class PointGoal(TaskFamily):
    """Observation (2,): place, from the origin on. Action (2,): motion, `speed` per unit.

    Task (2,): goal in a square. Reward: minus the distance to it. Staying at the origin returns -15
    on average, the straight way at full speed -3.
    """
    name, task_unit, speed = "point", "units", 0.1
    observation_size, action_size, task_size, outcome_size = 2, 2, 2, 2
    horizon, success_distance = 20, 0.1
    task_low, task_high = np.array([-1.0, -1.0]), np.array([1.0, 1.0])

    def reward_terms(self, outcome, action, task):
        return {"near": -np.linalg.norm(outcome - task, axis=-1)}


class CircleGoal(PointGoal, GymnasiumFamily):
    """Goals on a circle, 1 from the start; a faster point, shorter episodes, and an expert.

    Who knows the goal gets -1.3 in the mean, who stays -10.
    """
    horizon, success_distance, speed = 10, 0.2, 0.25
    settings = dict(expert_reward_scale=1.0)

    def sample_tasks(self, generator, count):
        angle = generator.uniform(0.0, 2 * np.pi, count)
        return np.stack([np.cos(angle), np.sin(angle)], axis=1)

    def make_env(self, render_mode=None):
        return PointEnv()

    def expert(self, observations, tasks):
        """Straight to the goal: (n, B, 2), (n, 2) -> (n, B, 2)."""
        step = 4.0 * (tasks[:, None] - observations)
        return (step / np.maximum(1.0, np.abs(step).max(-1, keepdims=True))).astype(np.float32)


class PointBatch:
    """B points, with the part of `envs.BatchEnv`'s interface that `envs.rollout` uses."""

    def __init__(self, num_envs, family):
        self.num_envs, self.family = num_envs, family

    def reset(self, *, options):
        self.tasks = np.broadcast_to(options["task"], (self.num_envs, 2))
        self.outcomes, self.steps = np.zeros((self.num_envs, 2)), 0
        return self.outcomes.copy(), {}

    def step(self, actions):
        self.steps += 1
        self.outcomes = self.outcomes + self.family.speed * np.clip(actions, -1.0, 1.0)
        reward = self.family.rewards_of(self.outcomes, actions, self.tasks)
        never, end = np.zeros(self.num_envs, bool), self.steps == self.family.horizon
        return self.outcomes.copy(), reward, never, never | end, {"goal_distance": -reward}

    def close(self):
        pass


class PointEnv(gymnasium.Env):
    """One point with a goal on the circle, for what wants a `gymnasium.Env`."""
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float64)

    def __init__(self):
        self.batch = PointBatch(1, CircleGoal())

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.batch.reset(options=options)[0][0], {}

    def step(self, action):
        observation, reward, _, truncated, info = self.batch.step(np.asarray(action)[None])
        return observation[0], float(reward[0]), False, bool(truncated[0]), {
            "goal_distance": -float(reward[0]), "outcome": observation[0]}


class PointEnvironments(Environments):
    """`envs.Environments` of a family of points, in numpy."""

    def __call__(self, num_envs):
        return PointBatch(num_envs, self.family)


def new_goals(seed, count):
    """Goals on the circle, (count, 2), that nobody trains on."""
    return CircleGoal().sample_tasks(np.random.default_rng(seed), count)


def returns_by_round(adapter, rounds, episodes, goals):
    """Mean returns of mean actions on `goals`, before any episode and after each round."""
    lists = evaluate(PointEnvironments(CircleGoal()), adapter, goals, rounds, episodes, 0).lists
    return [mean_of(entries, "return") for entries in by_round(lists["held_out"])]


def misled(kind):
    """The class of an adapter, but rewards of its episodes are shuffled among steps and tasks."""
    class Misled(kind):
        def update(self, episodes):
            shuffled = np.random.default_rng(0).permutation(episodes["rewards"].ravel())
            super().update(episodes | {"rewards": shuffled.reshape(episodes["rewards"].shape)})
    return Misled


def point_problem(count, meta_test=None):
    """A stand-in for phases.Problem: `count` goals at equal angles, the expert that knows them."""
    angle = 2 * np.pi * np.arange(count) / count
    problem = make_problem(np.stack([np.cos(angle), np.sin(angle)], axis=1), family=CircleGoal(),
                           experts=CircleGoal().expert, meta_test=meta_test)
    problem.rollout = PointEnvironments(problem.family).rollout
    return problem
