"""Multi-task imitation: one policy that imitates all experts, then policy gradient at test time.

It is guided meta-policy search (Mendonca et al. 2019) without step 3: the same experts, the
demonstrations of step 2, the same policy, `imitation_steps` steps of imitation. Nothing has taught
it to adapt. So one step size, the same for all parameters that adapt, takes the place of the
learned ones. Each task's advantages are divided by their own size.
"""
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import gmps
import settings as settings_module
from policy import imitate


@dataclass(frozen=True)
class Settings(settings_module.Settings):
    step_size: float = settings_module.within(
        0.01, 0.0, 10.0, "*of the policy gradient at test time, for all parameters")


def train(problem, settings: Settings, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
    """Experts, demonstrations, imitation. It yields once, and rolls out nothing in training."""
    experts = problem.train_experts()
    demonstrations = problem.demonstrate(experts)
    if state is None:
        theta = imitate(problem.family, demonstrations, settings, problem.device)
        state = {"policy": {"theta": theta}, "training": None}
        yield state, {"iteration": 1, "progress": 1.0, "env_steps": 0}
    problem.meta_test(Adapter(state["policy"], problem.family, settings, problem.device))


class Adapter(gmps.Adapter):
    """GMPS's own adapter with one fixed step size."""

    def __init__(self, policy: dict, family, settings: Settings, device="cpu"):
        settings = dataclasses.replace(settings, init_step_size=settings.step_size)
        alpha = gmps.init_step_sizes(policy["theta"], settings)
        # A common scale would need rollouts on the training tasks, so each task has its own.
        super().__init__({"theta": policy["theta"], "alpha": alpha, "scale": None}, family,
                         settings, device)

    def step_size(self, k: int, episodes: int):
        return self.alpha
