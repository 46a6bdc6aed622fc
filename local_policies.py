"""Local experts: soft actor-critic for many tasks at once, and the demonstrations that the experts give.

All learners train as one batch of networks: every weight has a leading learner axis, so one batched matrix product
serves 20 local experts at about the cost of a few. The *contextual* expert (one policy that sees the goal) is the
same code with one learner whose observation has the goal appended.

Sources: "Soft Actor-Critic Algorithms and Applications" (Haarnoja et al. 2018b, arXiv 1812.05905v2), equation
numbers below; the paper's step 1, "learn the experts" (Mendonca et al. 2019, Sec. 4).

Letters in shape comments: N learners, B batch, S tasks (and replay streams).
"""
import math
from dataclasses import dataclass

import numpy as np
import torch

from envs import rollout

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0


@dataclass(frozen=True)
class SacSettings:
    """Settings of soft actor-critic; the defaults are those of the contextual expert on push."""
    width: int = 256            # units in each of two hidden layers
    batch_size: int = 256       # transitions per learner and update
    learning_rate: float = 1e-3
    discount: float = 0.97
    target_rate: float = 0.01   # Polyak averaging of the target critics, "tau"
    reward_scale: float = 0.1
    target_entropy_per_action: float = -1.0
    relabelled: float = 0.8     # share of a batch with another training goal's reward (see `Replay.sample`)


# ---------------------------------------------------------------- networks with a leading learner axis
def init_mlp(sizes, learners, generator):
    """Weights [w1, b1, w2, b2, ...]: w (learners, in, out), b (learners, 1, out), torch.nn.Linear's distribution."""
    params = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:]):
        bound = 1.0 / math.sqrt(fan_in)
        params.append((torch.rand(learners, fan_in, fan_out, generator=generator) * 2 - 1) * bound)
        params.append((torch.rand(learners, 1, fan_out, generator=generator) * 2 - 1) * bound)
    return params


def mlp(params, x):
    """(N, B, in) -> (N, B, out), ReLU between layers."""
    for layer in range(0, len(params), 2):
        x = torch.baddbmm(params[layer + 1], x, params[layer])
        if layer < len(params) - 2:
            x = x.relu()
    return x


def policy_sample(params, observation, noise):
    """Tanh-Gaussian policy: actions (N, B, act) and their log-probabilities (N, B); `noise` is standard normal."""
    mean, log_std = mlp(params, observation).chunk(2, dim=-1)
    # Spinning Up's trap: clamp has zero gradient outside, a tanh squash does not
    log_std = LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (torch.tanh(log_std) + 1)
    pre_tanh = mean + log_std.exp() * noise
    log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    # log(1 - tanh(u)^2) in a form that stays finite for large |u| (App. C, Eq. 21 of the SAC paper)
    log_prob = log_prob - 2 * (math.log(2) - pre_tanh - torch.nn.functional.softplus(-2 * pre_tanh))
    return torch.tanh(pre_tanh), log_prob.sum(-1)


def policy_mean(params, observation):
    """Deterministic action (N, B, act): tanh of the Gaussian's mean."""
    return torch.tanh(mlp(params, observation).chunk(2, dim=-1)[0])


def critic_values(params, observation, action):
    """Both critics of each learner: (2, N, B). Critic weights have a leading axis of 2N."""
    learners = observation.shape[0]
    x = torch.cat([observation, action], dim=-1)
    return mlp(params, x.repeat(2, 1, 1)).view(2, learners, -1)


# ---------------------------------------------------------------- the three objectives (Haarnoja et al. 2018b)
def critic_loss(critic, target_critic, policy, temperature, batch, discount, noise):
    """Soft Bellman residual (Eq. 5, 6), summed over learners. `batch` as of `Replay.sample`, `temperature` (N, 1)."""
    with torch.no_grad():
        next_action, next_log_prob = policy_sample(policy, batch["next_observation"], noise)
        next_value = critic_values(target_critic, batch["next_observation"], next_action).amin(0)
        # A time limit is no end of the task: only `terminated` stops the bootstrap.
        target = batch["reward"] + discount * (1 - batch["terminated"]) * (next_value - temperature * next_log_prob)
    value = critic_values(critic, batch["observation"], batch["action"])
    return 0.5 * (value - target).square().mean(-1).sum(), {"value": value.mean()}


def policy_loss(policy, critic, temperature, batch, noise):
    """E[temperature * log pi - min Q] (Eq. 7, reparametrised as Eq. 9), summed over learners."""
    action, log_prob = policy_sample(policy, batch["observation"], noise)
    value = critic_values(critic, batch["observation"], action).amin(0)
    return (temperature * log_prob - value).mean(-1).sum(), {"log_prob": log_prob.detach()}


def temperature_loss(log_temperature, log_prob, target_entropy):
    """E[-temperature * (log pi + target entropy)] (Eq. 18), summed over learners; `log_temperature` (N, 1)."""
    return -(log_temperature.exp() * (log_prob + target_entropy)).mean(-1).sum()


class SoftActorCritic:
    """N independent learners in one set of batched tensors."""

    def __init__(self, learners, observation_size, action_size, settings, seed, device="cpu"):
        self.settings, self.learners, self.action_size = settings, learners, action_size
        self.device = torch.device(device)
        generator = torch.Generator().manual_seed(seed)
        hidden = [settings.width, settings.width]
        policy = init_mlp([observation_size, *hidden, 2 * action_size], learners, generator)
        critic = init_mlp([observation_size + action_size, *hidden, 1], 2 * learners, generator)
        self.policy = [p.to(self.device).requires_grad_() for p in policy]
        self.critic = [p.to(self.device).requires_grad_() for p in critic]
        self.target_critic = [p.detach().clone() for p in self.critic]
        self.log_temperature = torch.zeros(learners, 1, device=self.device, requires_grad=True)
        rate = dict(lr=settings.learning_rate, fused=True)
        self.optimisers = {"policy": torch.optim.Adam(self.policy, **rate),
                           "critic": torch.optim.Adam(self.critic, **rate),
                           "temperature": torch.optim.Adam([self.log_temperature], **rate)}
        self.target_entropy = settings.target_entropy_per_action * action_size

    def update(self, batch, generator):
        """One gradient step of critics, policies and temperatures. Returns a dict of scalars (detached tensors)."""
        shape = (2, *batch["action"].shape)
        next_noise, noise = torch.randn(shape, generator=generator).to(self.device)
        temperature = self.log_temperature.detach().exp()

        loss, info = critic_loss(self.critic, self.target_critic, self.policy, temperature, batch,
                                 self.settings.discount, next_noise)
        self._minimise("critic", loss, self.critic)

        frozen = [p.detach() for p in self.critic]  # the policy's loss asks for no critic gradients
        actor_loss, actor_info = policy_loss(self.policy, frozen, temperature, batch, noise)
        self._minimise("policy", actor_loss, self.policy)

        self._minimise("temperature", temperature_loss(self.log_temperature, actor_info["log_prob"],
                                                       self.target_entropy), [self.log_temperature])
        torch._foreach_lerp_(self.target_critic, frozen, self.settings.target_rate)
        return {"critic_loss": loss.detach() / (2 * self.learners), "policy_loss": actor_loss.detach() / self.learners,
                "value": info["value"].detach(), "temperature": temperature.mean()}

    def _minimise(self, name, loss, params):
        for param, gradient in zip(params, torch.autograd.grad(loss, params)):
            param.grad = gradient
        self.optimisers[name].step()

    @torch.no_grad()
    def act(self, observation, generator=None):
        """Actions (N, B, act) for observations (N, B, obs): sampled with `generator`, else the mean action."""
        if generator is None:
            return policy_mean(self.policy, observation)
        noise = torch.randn(*observation.shape[:2], self.action_size, generator=generator).to(self.device)
        return policy_sample(self.policy, observation, noise)[0]

    def state_dict(self):
        return {"policy": self.policy, "critic": self.critic, "target_critic": self.target_critic,
                "log_temperature": self.log_temperature,
                "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()}}

    def load_state_dict(self, state):
        with torch.no_grad():
            for name in ("policy", "critic", "target_critic"):
                for own, saved in zip(getattr(self, name), state[name], strict=True):
                    own.copy_(saved)
            self.log_temperature.copy_(state["log_temperature"])
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])


class Replay:
    """Transitions in S streams, one per training task, all of the same length. Arrays (S, capacity, size)."""
    FIELDS = ("observation", "action", "next_observation", "outcome", "terminated")

    def __init__(self, family, tasks, capacity):
        self.family, self.tasks, self.capacity, self.size = family, tasks, capacity, 0
        widths = (family.observation_size, family.action_size, family.observation_size, family.outcome_size, 1)
        self.data = {name: np.zeros((len(tasks), capacity, width), np.float32)
                     for name, width in zip(self.FIELDS, widths)}

    def add(self, episodes):
        """Append whole episodes from `envs.rollout`, whose environments are ordered by task."""
        streams = len(self.tasks)
        observations, mask = episodes["observations"], episodes["mask"]
        terminated = np.zeros_like(mask)
        ended = np.flatnonzero(episodes["terminated"])
        terminated[ended, mask[ended].sum(1).astype(int) - 1] = 1.0
        fields = (observations[:, :-1], episodes["actions"], observations[:, 1:], episodes["outcomes"], terminated[..., None])
        kept = mask.reshape(streams, -1) > 0
        count = int(kept.sum(1).min())  # streams stay equally long; early ends drop a few of the others' transitions
        if self.size + count > self.capacity:
            raise ValueError(f"replay of {self.capacity} transitions per task is full")
        for name, values in zip(self.FIELDS, fields):
            values = values.reshape(streams, -1, values.shape[-1])
            self.data[name][:, self.size:self.size + count] = np.stack([v[k][:count] for v, k in zip(values, kept)])
        self.size += count

    def sample(self, generator, learners, batch_size, relabelled, reward_scale):
        """A batch for every learner: dict of (N, B, ...) float tensors.

        The dynamics of all tasks are the same and every training task's reward is known at meta-training, so a
        transition met on one task is as good a sample of another. The contextual learner (N = 1) relabels a share
        `relabelled` of its batch with another training goal, which is also what it sees; a local learner keeps its own
        task and takes that share of its transitions from everyone's replay.
        """
        streams, shape = len(self.tasks), (learners, batch_size)
        stream = generator.integers(streams, size=shape)
        mixed = generator.random(shape) < relabelled
        if learners == 1:
            task = np.where(mixed, generator.integers(streams, size=shape), stream)
        else:
            task = np.broadcast_to(np.arange(learners)[:, None], shape)
            stream = np.where(mixed, stream, task)
        index = generator.integers(self.size, size=shape)
        batch = {name: values[stream, index] for name, values in self.data.items()}
        task = self.tasks[task]
        terms = self.family.reward_terms(batch.pop("outcome"), batch["action"], task)
        batch["reward"] = reward_scale * sum(terms.values())
        batch["terminated"] = batch["terminated"][..., 0]
        for name in ("observation", "next_observation"):
            batch[name] = expert_input(self.family, batch[name], task if learners == 1 else None)
        return {name: torch.as_tensor(values, dtype=torch.float32) for name, values in batch.items()}


def expert_input(family, observation, task=None):
    """Network input (..., obs [+ task]) in units of about one, as float32."""
    scaled = (observation - family.observation_centre) / family.observation_scale
    if task is not None:
        centre, half = 0.5 * (family.task_low + family.task_high), 0.5 * (family.task_high - family.task_low)
        scaled = np.concatenate([scaled, (task - centre) / half], axis=-1)
    return torch.as_tensor(scaled, dtype=torch.float32)
