"""Reinforcement learning from scratch: every test task is learned alone, from random weights.

There is no meta-training. After each round a task's learner takes what that task's own episodes
paid, and nothing else. `learner` chooses it: "sac", the soft actor-critic of sac.py (Haarnoja et
al. 2018), off-policy, on a replay that grows; or "pg", policy gradient (Sutton et al. 2000) on the
inner loss of gmps.py, on the last round alone. Their equations are labelled there.
All tasks learn side by side, in one batch of networks that share no number.

It takes many rounds, so train (which is nothing) and then adapt for long:

    python run.py --task push --method scratch
    python run.py --task push --evaluate runs/push/scratch/seed0 --gradient-steps 100 --rollouts 5
"""
import copy
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

import settings as settings_module
from advantages import policy_gradient_batch
from baselines import refuse_images
from gmps import inner_loss
from local_policies import Replay, expert_input
from policy import Actor, CorrelatedNoise, detached, init_policy, learned, set_rates
from sac import SoftActorCritic, squashed_mean, squashed_sample
from settings import one_of, within


@dataclass(frozen=True)
class Settings(settings_module.Settings):
    curve: int = within(0, 0, 1000, "points of the validation curve: nothing is trained")
    learner: str = one_of("sac", ("sac", "pg"),
                          "*soft actor-critic, expert_updates gradient steps a round; policy "
                          "gradient, one a round")
    rate_rounds: int = within(
        100, 1, 10_000, "*rounds over which the learning rate falls to a tenth, as the experts'")
    step_size: float = within(0.01, 1e-6, 10.0, "*pg: its learning rate at the start")


def train(problem, settings: Settings, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
    """Nothing. It yields once, asks no expert and rolls out nothing."""
    refuse_images(problem.family, settings)
    if state is None:
        state = {"policy": {}, "training": None}
        yield state, {"iteration": 1, "progress": 1.0, "env_steps": 0}
    problem.meta_test(Adapter(state["policy"], problem.family, settings, problem.device))


class Adapter:
    """One learner for each test task."""
    sequential, references = False, {}

    def __init__(self, policy: dict, family, settings: Settings, device="cpu"):
        self.make = LEARNERS[settings.learner], family, settings, device

    def begin(self, count: int, generator: torch.Generator) -> None:
        """Random weights for `count` new tasks, other ones for each."""
        learner, family, settings, device = self.make
        self.learner, self.rounds = learner(count, family, settings, generator, device), 0
        self.rate_rounds = settings.rate_rounds

    def act(self, observation, last: dict | None = None, explore: bool = True) -> np.ndarray:
        return self.learner.act(observation, last, explore)

    def update(self, episodes: dict) -> None:
        """Learn; the rate falls with every round."""
        self.learner.update(episodes, min(1.0, self.rounds / self.rate_rounds))
        self.rounds += 1


# ---------------------------------------------------------------- off-policy
class OffPolicy:
    """`sac.SoftActorCritic`, one learner per task, on the replay of its own task."""

    def __init__(self, count: int, family, settings: Settings, generator: torch.Generator, device):
        self.family, self.settings, self.generator = family, settings, generator
        self.device, self.n = device, count
        seed = int(torch.randint(2 ** 31 - 1, (), generator=generator))
        self.rng = np.random.default_rng(seed)
        self.learner = SoftActorCritic(count, family.observation_size, family.action_size,
                                       dataclasses.replace(settings, seed=seed), device)
        self.policy, self.begun = detached_list(self.learner.policy), False
        self.replay = self.new_replay(10_000)

    def new_replay(self, capacity: int) -> Replay:
        """An empty one whose tasks nobody knows: rewards are those that were paid."""
        return Replay(self.family, np.zeros((self.n, 0)), capacity)

    def act(self, observation, last: dict | None, explore: bool) -> np.ndarray:
        """Actions (n * K, act): in the first round uniformly random, as the experts' are."""
        x = expert_input(self.family, observation).view(self.n, -1, observation.shape[-1])
        shape = (*x.shape[:2], self.family.action_size)
        if not explore:
            action = squashed_mean(self.policy, x.to(self.device))
        elif not self.begun:
            action = 2 * torch.rand(shape, generator=self.generator) - 1
        else:
            if last is None:
                self.noise = CorrelatedNoise(shape, self.settings.expert_noise_correlation,
                                             self.generator)
            action = squashed_sample(self.policy, x.to(self.device),
                                     next(self.noise).to(self.device))[0]
        return action.flatten(0, 1).cpu().numpy()

    def update(self, episodes: dict, progress: float) -> None:
        """Add the episodes, each to its own task's replay, and take `expert_updates` steps."""
        B, T = episodes["mask"].shape
        if self.replay.sizes.max() + B // self.n * T > self.replay.capacity:
            old, self.replay = self.replay, self.new_replay(
                2 * self.replay.capacity + B // self.n * T)
            self.replay.load_state_dict(old.state_dict())
        self.replay.add(episodes, np.repeat(np.arange(self.n), B // self.n))
        self.learner.set_learning_rate(progress)
        info = self.learner.learn(self.replay, self.rng, self.generator)
        if not math.isfinite(info["critic_loss"] + info["policy_loss"]):
            raise FloatingPointError("scratch: a loss is not finite: train again with a lower "
                                     "expert_learning_rate")
        self.policy, self.begun = detached_list(self.learner.policy), True

    def __deepcopy__(self, memo) -> "OffPolicy":
        """A copy that acts and cannot learn: a copy of the replay would be large."""
        twin = copy.copy(self)
        twin.learner = twin.replay = twin.rng = None
        return twin


def detached_list(params: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies that later updates do not reach."""
    return [p.detach().clone() for p in params]


# ---------------------------------------------------------------- on-policy
class OnPolicy:
    """Policy gradient: `gmps.inner_loss`, a step on the episodes of each round."""

    def __init__(self, count: int, family, settings: Settings, generator: torch.Generator, device):
        self.family, self.generator = family, generator
        # No training has fixed a common scale of advantages.
        self.settings = dataclasses.replace(settings, advantage_scale="per task")
        draws = [init_policy(family, settings, generator) for _ in range(count)]
        self.phi = {name: torch.stack([draw[name] for draw in draws]).to(device)
                    for name in draws[0]}
        adapting = [value.requires_grad_() for value in learned(self.phi, settings)]
        self.optimiser = torch.optim.Adam(adapting, lr=settings.step_size)
        self.actor = Actor(detached(self.phi), family, self.settings, generator)

    def act(self, observation, last: dict | None, explore: bool) -> np.ndarray:
        return self.actor(observation, last, explore)

    def update(self, episodes: dict, progress: float) -> None:
        """One gradient step. Tasks share no number, so the summed loss gives each its own."""
        batch, _ = policy_gradient_batch(self.actor.explored(episodes), self.settings,
                                         device=self.phi["z"].device)
        set_rates(self.optimiser, [self.settings.step_size], progress, final=0.1)
        self.optimiser.zero_grad()
        inner_loss(self.phi, batch, self.settings).sum().backward()
        self.optimiser.step()
        self.actor = Actor(detached(self.phi), self.family, self.settings, self.generator)


LEARNERS = {"sac": OffPolicy, "pg": OnPolicy}
