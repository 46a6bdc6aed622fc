"""Oracle: the expert of step 1, told the goal. Nothing that adapts can be expected to do better.

No adapter is ever told a task. So the ceiling is the row "experts (told the goal)" of its result:
the list `experts_held_out`, which evaluate.py measures for every method that asks for experts. The
adapter here is the same expert told the middle of the training tasks instead, whatever the task
is. Its rows are what the expert is worth without its privilege.
"""
from collections.abc import Iterator

import numpy as np
import torch

from local_policies import Experts
from settings import Settings, UserError
from tasks import make_family


def train(problem, settings: Settings, state: dict | None = None,
          kind: type | None = None) -> Iterator[tuple[dict, dict]]:
    """The experts alone. It yields once, and rolls out nothing beside their training.

    `kind`: the class of the adapter (default: this file's).
    """
    experts = ask_experts(problem, settings)
    if state is None:
        state = {"policy": told_experts(experts, problem.tasks), "training": None}
        yield state, {"iteration": 1, "progress": 1.0, "env_steps": 0}
    problem.meta_test((kind or Adapter)(state["policy"], problem.family, settings,
                                        problem.device))


def ask_experts(problem, settings: Settings):
    """The experts, trained. UserError, before any work, where nobody can be told another task."""
    if problem.family.image_shape:
        raise UserError(f"{settings.method} acts by its expert, which sees the state behind "
                        f"{problem.family.name}'s images: at test time nobody does")
    if settings.experts not in ("contextual", "scripted") or not getattr(
            problem.family.expert, "contextual", True):
        raise UserError(f"{settings.method} tells an expert the goal: it needs one for all goals, "
                        "as --experts contextual is")
    return problem.train_experts()


def told_experts(experts, tasks: np.ndarray) -> dict:
    """What `Adapter` needs: weights, none of a scripted expert; the training tasks (n, task)."""
    return {"expert": [p.cpu().clone() for p in getattr(experts, "policy", [])],
            "tasks": torch.tensor(tasks)}


class Adapter:
    """The expert told the mean training task, in every episode."""
    sequential, references = False, {}

    def __init__(self, policy: dict, family, settings: Settings, device="cpu"):
        # Experts see units of about one, also where the policy's observations are raw.
        self.family, self.settings = make_family(settings.task, settings.reward), settings
        self.tasks, self.expert = policy["tasks"].numpy(), self.family.expert
        if self.expert is None:
            weights = [p.to(device) for p in policy["expert"]]
            self.expert = Experts(self.family, weights, self.tasks, contextual=True)

    def begin(self, count: int, generator: torch.Generator) -> None:
        """`count` new tasks: the best guess at each goal, (count, task), is the mean one."""
        self.generator, self.guess = generator, np.tile(self.tasks.mean(0), (count, 1))

    def act(self, observation, last: dict | None = None, explore: bool = True) -> np.ndarray:
        return self.told(observation, self.guess)

    def told(self, observation: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """Mean actions (B, act) for goals (m, task), B / m environments in a row for each."""
        each = np.repeat(goals, len(observation) // len(goals), axis=0)
        return self.expert(observation[:, None], each)[:, 0]

    def update(self, episodes: dict) -> None:
        """It learns nothing."""
