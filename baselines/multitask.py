"""Multi-task imitation: one policy that imitates all experts, then policy gradient at test time.

It is what guided meta-policy search does without its meta-objective: the same experts, the same
demonstrations, the same policy, the same inner step. Only nothing has taught the policy to adapt,
so one step size, the same for all parameters, takes the place of the learned ones.
"""
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import gmps
import settings as settings_module


@dataclass(frozen=True)
class Settings(settings_module.Settings):
    step_size: float = settings_module.within(
        0.03, 0.0, 100.0, "*of the policy gradient at test time, for all parameters")


def train(problem, settings: Settings, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
    """Experts, demonstrations, imitation; one collection, which takes no step of its own."""
    experts = problem.train_experts()
    demonstrations = problem.demonstrate(experts)
    if state is None:
        theta = gmps.imitate(problem.family, demonstrations, settings, problem.device)
        state = {"policy": {"theta": theta}, "training": None}
        yield state, {"iteration": 1, "progress": 1.0, "env_steps": 0}
    problem.meta_test(Adapter(state["policy"], problem.family, settings, problem.device))


class Adapter(gmps.Adapter):
    """GMPS's own adapter with one fixed step size."""

    def __init__(self, policy: dict, family, settings: Settings, device="cpu"):
        settings = dataclasses.replace(settings, init_step_size=settings.step_size)
        alpha = gmps.init_step_sizes(policy["theta"], settings)
        super().__init__({"theta": policy["theta"], "alpha": alpha, "scales": [None]}, family,
                         settings, device)

    def step_size(self, k: int):
        return {name: value[0] for name, value in self.alpha.items()}
