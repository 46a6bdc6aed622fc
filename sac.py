"""Soft actor-critic for many learners at once.

All learners train as one batch of networks: every weight has a leading learner axis, so one batched
matrix product serves all of them.

Source: "Soft Actor-Critic Algorithms and Applications" (Haarnoja et al. 2018b, arXiv 1812.05905v2);
equation numbers below are its own. Letters in shapes: N learners, B batch. `settings` are those of
settings.py whose names begin with "expert_".
"""
import copy
import math
from collections.abc import Sequence

import torch

from policy import uniform
from settings import Settings

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0


# ---------------------------------------------------------------- networks, one per learner
def init_mlp(sizes: list[int], learners: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Weights [w1, b1, w2, b2, ...], drawn as torch.nn.Linear draws them.

    w has shape (learners, in, out), b (learners, 1, out).
    """
    params = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:]):
        params += [uniform((learners, rows, fan_out), fan_in, generator, torch.float32)
                   for rows in (fan_in, 1)]
    return params


def mlp(params: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """(N, B, in) -> (N, B, out). Between layers: layer normalisation (no gain, no bias) and ReLU.

    The normalisation (Ba et al. 2016) is [ours]. It bounds what critics say of actions never tried
    (Ball et al. 2023, arXiv 2302.02948). The policy has it as well. Experts need fewer steps with
    it (docs/lab_notes.md).
    """
    for layer in range(0, len(params), 2):
        x = torch.baddbmm(params[layer + 1], x, params[layer])
        if layer < len(params) - 2:
            x = torch.nn.functional.layer_norm(x, x.shape[-1:]).relu()
    return x


def gaussian(params: list[torch.Tensor],
             observation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-std (N, B, act) of the policy before tanh."""
    mean, log_std = mlp(params, observation).chunk(2, dim=-1)
    # A clamp has no gradient outside its range, where log-std would stay for good. A tanh has one.
    log_std = LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (torch.tanh(log_std) + 1)
    return mean, log_std


def squashed_sample(params: list[torch.Tensor], observation: torch.Tensor,
                    noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tanh-Gaussian policy: actions (N, B, act) and log-probabilities (N, B).

    `noise` (N, B, act) is standard normal.
    """
    mean, log_std = gaussian(params, observation)
    pre_tanh = mean + log_std.exp() * noise
    log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    # minus log(1 - tanh(u)^2), in a form that stays finite for large |u| (the paper's appendix C)
    log_prob = log_prob - 2 * (math.log(2) - pre_tanh
                               - torch.nn.functional.softplus(-2 * pre_tanh))
    return torch.tanh(pre_tanh), log_prob.sum(-1)


def squashed_mean(params: list[torch.Tensor], observation: torch.Tensor) -> torch.Tensor:
    """Deterministic action (N, B, act): tanh of the Gaussian's mean."""
    return torch.tanh(gaussian(params, observation)[0])


def critic_values(params: list[torch.Tensor], observation: torch.Tensor,
                  action: torch.Tensor) -> torch.Tensor:
    """Both critics of each learner, (2, N, B). Critic weights have a leading axis of 2N."""
    learners = observation.shape[0]
    x = torch.cat([observation, action], dim=-1)
    return mlp(params, x.repeat(2, 1, 1)).view(2, learners, -1)


# ---------------------------------------------------------------- the three objectives
def critic_loss(critic, target_critic, policy, temperature: torch.Tensor, batch: dict,
                noise: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """Soft Bellman residual (Eq. 5, 6), summed over learners.

    `batch` is that of `local_policies.Replay.sample`, `temperature` (N, 1).
    """
    with torch.no_grad():
        next_action, next_log_prob = squashed_sample(policy, batch["next_observation"], noise)
        next_value = critic_values(target_critic, batch["next_observation"], next_action).amin(0)
        soft_value = next_value - temperature * next_log_prob
        # A time limit is no end of the task: only `terminated` stops the bootstrap.
        going_on = batch["discount"] * (1 - batch["terminated"])
        target = batch["reward"] + going_on * soft_value
    value = critic_values(critic, batch["observation"], batch["action"])
    return 0.5 * (value - target).square().mean(-1).sum(), {"value": value.mean()}


def policy_loss(policy, critic, temperature: torch.Tensor, batch: dict,
                noise: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """E[temperature * log pi - min Q] (Eq. 7, reparametrised as Eq. 9), summed over learners."""
    action, log_prob = squashed_sample(policy, batch["observation"], noise)
    value = critic_values(critic, batch["observation"], action).amin(0)
    return (temperature * log_prob - value).mean(-1).sum(), {"log_prob": log_prob.detach()}


def temperature_loss(log_temperature: torch.Tensor, log_prob: torch.Tensor,
                     target_entropy: float) -> torch.Tensor:
    """E[-temperature * (log pi + target entropy)] (Eq. 18), summed over learners.

    `log_temperature` (N, 1), `log_prob` (N, B).
    """
    return -(log_temperature.exp() * (log_prob + target_entropy)).mean(-1).sum()


# ---------------------------------------------------------------- the learner
class SoftActorCritic:
    """N independent learners in one set of batched tensors.

    `further` parameters learn as well: of networks that observations come from (an encoder's).
    """

    def __init__(self, learners: int, observation_size: int, action_size: int, settings: Settings,
                 device="cpu", further: Sequence[torch.Tensor] = ()):
        self.settings, self.learners, self.action_size = settings, learners, action_size
        self.device = torch.device(device)
        generator = torch.Generator().manual_seed(settings.seed)
        hidden = [settings.expert_width] * 2
        policy = init_mlp([observation_size, *hidden, 2 * action_size], learners, generator)
        critic = init_mlp([observation_size + action_size, *hidden, 1], 2 * learners,
                          generator)
        self.policy = [p.to(self.device).requires_grad_() for p in policy]
        self.critic = [p.to(self.device).requires_grad_() for p in critic]
        self.target_critic = [p.detach().clone() for p in self.critic]
        self.log_temperature = torch.zeros(learners, 1, device=self.device, requires_grad=True)
        self.trained = [*self.policy, *self.critic, self.log_temperature, *further]
        self.optimiser = torch.optim.Adam(self.trained, lr=settings.expert_learning_rate,
                                          fused=True)
        self.target_entropy = settings.expert_entropy * action_size

    def update(self, batch: dict, generator: torch.Generator,
               further_loss: torch.Tensor | float = 0.0) -> dict:
        """One gradient step of critics, policies and temperatures. Returns detached scalars.

        No two of the three losses have a gradient in the same parameters. So one step of Adam on
        their sum is a step on each. Further parameters learn from the critics' loss, through
        batch["observation"], and from `further_loss`.
        """
        shape = (2, *batch["action"].shape)
        next_noise, noise = torch.randn(shape, generator=generator).to(self.device)
        temperature = self.log_temperature.detach().exp()
        # The policy's loss must give no gradient to the critics, nor to an encoder.
        frozen = [p.detach() for p in self.critic]
        seen = batch | {"observation": batch["observation"].detach()}

        loss, info = critic_loss(self.critic, self.target_critic, self.policy, temperature, batch,
                                 next_noise)
        actor_loss, actor_info = policy_loss(self.policy, frozen, temperature, seen, noise)
        entropy_loss = temperature_loss(self.log_temperature, actor_info["log_prob"],
                                        self.target_entropy)
        gradients = torch.autograd.grad(loss + actor_loss + entropy_loss + further_loss,
                                        self.trained)
        for parameter, gradient in zip(self.trained, gradients):
            parameter.grad = gradient
        self.optimiser.step()
        # `frozen` shares memory with the critics: these are their new weights.
        torch._foreach_lerp_(self.target_critic, frozen, self.settings.expert_target_rate)
        return {"critic_loss": loss.detach() / (2 * self.learners),
                "policy_loss": actor_loss.detach() / self.learners,
                "value": info["value"].detach(), "temperature": temperature.mean()}

    def learn(self, replay, rng, generator: torch.Generator) -> dict:
        """`expert_updates` steps on batches of a local_policies.Replay. What the last returned."""
        for _ in range(self.settings.expert_updates):
            batch = replay.sample(rng, self.learners, self.settings)
            batch = {name: value.to(self.device) for name, value in batch.items()}
            info = self.update(batch, generator)
        return info

    def set_learning_rate(self, progress: float) -> None:
        """Rates fall to a tenth as `progress` goes from 0 to 1: late policies are steady."""
        rate = self.settings.expert_learning_rate * (1.0 - 0.9 * progress)
        self.optimiser.param_groups[0]["lr"] = rate

    @torch.no_grad()
    def act(self, observation: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Actions (N, B, act): sampled with standard normal `noise` (N, B, act), else the mean."""
        if noise is None:
            return squashed_mean(self.policy, observation)
        return squashed_sample(self.policy, observation, noise)[0]

    def state_dict(self) -> dict:
        """A copy: later updates do not reach it."""
        return copy.deepcopy({
            "policy": [p.detach() for p in self.policy],
            "critic": [p.detach() for p in self.critic],
            "target_critic": self.target_critic, "log_temperature": self.log_temperature.detach(),
            "optimiser": self.optimiser.state_dict()})

    def load_state_dict(self, state: dict) -> None:
        with torch.no_grad():
            for name in ("policy", "critic", "target_critic"):
                for own, saved in zip(getattr(self, name), state[name], strict=True):
                    own.copy_(saved)
            self.log_temperature.copy_(state["log_temperature"])
        self.optimiser.load_state_dict(copy.deepcopy(state["optimiser"]))
