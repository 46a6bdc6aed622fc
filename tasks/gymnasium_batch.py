"""Plain gymnasium environments, stepped by gymnasium's own vector environment."""
import contextlib

import gymnasium
import numpy as np

from tasks.base import GymnasiumFamily, task_of_each
from tasks.rendering import NoOpenGL


class TaskOption(gymnasium.Wrapper):
    """Starts an environment of a vector with a task of its own."""
    next_task = None

    def reset(self, *, seed=None, options=None):
        return self.env.reset(seed=seed, options={"task": self.next_task})


class GymnasiumBatch:
    """B environments of a `GymnasiumFamily`, with the part of BatchEnv's API that learning uses.

    Environment j starts every rollout with seed j, so that a run can be repeated bit for bit. So
    random starts are the same B starts in every rollout.
    """

    def __init__(self, num_envs: int, family: GymnasiumFamily, render_mode: str | None = None):
        def make():
            env = family.make_env(render_mode)
            box = env.action_space
            if not (np.all(box.low == -1) and np.all(box.high == 1)):
                one = box.dtype.type(1)  # of its own type, else gymnasium warns
                env = gymnasium.wrappers.RescaleAction(env, -one, one)
            return TaskOption(env)
        self.num_envs, self.family = num_envs, family
        self.vector = gymnasium.vector.SyncVectorEnv([make] * num_envs)

    def reset(self, *, options: dict):
        tasks = task_of_each(self.family, options["task"], self.num_envs)
        self.vector.set_attr("next_task", list(tasks))
        self._finished = np.zeros(self.num_envs, bool)
        observation, info = self.vector.reset(seed=0)
        self.outcomes = np.zeros((self.num_envs, self.family.outcome_size))
        return np.asarray(observation, dtype=float), info

    def step(self, actions: np.ndarray):
        dtype = self.vector.single_action_space.dtype
        observation, reward, terminated, truncated, info = self.vector.step(
            np.clip(actions, -1.0, 1.0).astype(dtype))
        # An environment that ended in the last step is only reset in this one: no info from it.
        resetting, self._finished = self._finished, terminated | truncated
        if resetting.all():
            info["goal_distance"] = np.zeros(self.num_envs)
        else:
            needed = ["goal_distance"] + ["outcome"] * bool(self.family.outcome_size)
            for name in needed:
                if name not in info:
                    raise ValueError(f'{self.family.name}: step() must put "{name}" into its info')
            if self.family.outcome_size:
                self.outcomes = np.array(info["outcome"], dtype=float)
        return np.asarray(observation, dtype=float), reward, terminated, truncated, info

    def render(self) -> np.ndarray:
        """Picture (rows, columns, 3) of the first environment. NoOpenGL where it gives none."""
        picture = None
        with contextlib.suppress(NotImplementedError):
            picture = self.vector.envs[0].render()
        if picture is None:
            raise NoOpenGL(f"{self.family.name} renders no rgb_array")
        return picture

    def close(self):
        self.vector.close()
