"""A point on a plane must find a goal that it does not see: for learning checks, no simulator."""
import numpy as np

from envs import Environments
from tasks.base import TaskFamily


class PointGoal(TaskFamily):
    """Observation (2,): place, from the origin on. Action (2,): motion, 0.1 per unit.

    Task (2,): goal. Reward: minus the distance to it. Staying at the origin returns -15 on average,
    the straight way at full speed -3.
    """
    name, task_unit = "point", "units"
    observation_size, action_size, task_size, outcome_size = 2, 2, 2, 2
    horizon, success_distance = 20, 0.1
    task_low, task_high = np.array([-1.0, -1.0]), np.array([1.0, 1.0])
    baseline_products = (0, 1)

    def reward_terms(self, outcome, action, task):
        return {"near": -np.linalg.norm(outcome - task, axis=-1)}


class PointBatch:
    """What `envs.rollout` asks of B environments."""

    def __init__(self, num_envs, family):
        self.num_envs, self.family = num_envs, family

    def reset(self, options):
        self.tasks, self.time = options["task"], 0
        self.outcomes = np.zeros((self.num_envs, 2))
        return self.outcomes.copy(), {}

    def step(self, action):
        self.outcomes = self.outcomes + 0.1 * np.clip(action, -1, 1)
        self.time += 1
        reward = self.family.rewards_of(self.outcomes, action, self.tasks)
        ended = np.zeros(self.num_envs, bool)
        return (self.outcomes.copy(), reward, ended, ended | (self.time == self.family.horizon),
                {"goal_distance": -reward})


class PointEnvironments(Environments):
    """`envs.Environments` of points."""

    def __init__(self):
        super().__init__(PointGoal())

    def __call__(self, num_envs):
        return PointBatch(num_envs, self.family)
