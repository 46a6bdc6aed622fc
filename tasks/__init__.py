"""Task families by the name that --task takes. A new one is a file here and one line below.

docs/fork.md shows how; the contract is tasks/base.py.
"""
import importlib
import zlib

import numpy as np

from tasks import rendering  # noqa: F401  picks the OpenGL library before MuJoCo is imported
from tasks.base import GymnasiumFamily, MujocoFamily, TaskFamily

TASKS = {
    "push": "tasks.sawyer_push:SawyerPush",
    "ant": "tasks.ant:AntGoal",
    "door": "tasks.sawyer_door:SawyerDoor",
    "push-vision": "tasks.push_vision:SawyerPushVision",
}


def load(name: str) -> type:
    """The class of a task family, imported when it is first asked for. KeyError if unknown."""
    module, _, attribute = TASKS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def make_family(name: str, reward: str | None = None) -> TaskFamily:
    """The family of that name, with that reward or its usual one.

    ValueError for an unknown name or reward, or a family that lacks part of its contract.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    family = load(name)
    kinds = [kind for kind in (TaskFamily, MujocoFamily, GymnasiumFamily)
             if issubclass(family, kind)]
    if len(kinds) < 2:
        raise ValueError(f"{family.__name__} must be a MujocoFamily or a GymnasiumFamily")
    missing = [key for kind in kinds for key in vars(kind).get("__annotations__", ())
               if not hasattr(family, key)] + sorted(family.__abstractmethods__)
    if MujocoFamily in kinds and not family.outcome_size:
        missing.append("outcome_size")
    if family.outcome_size and family.reward_terms is TaskFamily.reward_terms:
        missing.append("reward_terms")
    if missing:
        raise ValueError(f"{family.__name__} lacks {', '.join(missing)}: see tasks/base.py")
    if reward not in (None, *family.rewards):
        offered = " or ".join(family.rewards)
        raise ValueError(f"{name} has no {reward} reward: choose {offered}")
    return family(reward)


# Beside its number each seed holds a name, so that no environment's own seed draws the same tasks.
TASK_SEEDS = {"validation": [202, zlib.crc32(b"validation")],
              "held_out": [303, zlib.crc32(b"held-out")]}


def task_set(family: TaskFamily, split: str, count: int) -> np.ndarray:
    """(count, task_size) tasks of `split` "train", "validation" or "held_out".

    The splits are fixed: the same for every run's seed. Validation and held-out tasks are random
    draws from streams of their own. Tuning looks at validation tasks only.
    """
    if split == "train":
        return family.training_tasks(count)
    return family.sample_tasks(np.random.default_rng(TASK_SEEDS[split]), count)
