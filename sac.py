"""Soft actor-critic for many learners at once.

All learners train as one batch of networks: every weight has a leading learner axis, so one batched matrix product
serves all of them.

Source: "Soft Actor-Critic Algorithms and Applications" (Haarnoja et al. 2018b, arXiv 1812.05905v2), equation numbers
below. Letters in shape comments: N learners, B batch.
"""
import contextlib
import copy
import ctypes
import math

import torch

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0


def keep_freed_memory():
    """Let glibc keep tensors of up to 32 MB once freed (no effect elsewhere).

    It would hand them back to the system and fetch them anew at every operation; the page faults cost a fifth of an
    update of 20 learners. Constants of malloc.h: M_MMAP_THRESHOLD -3, M_TRIM_THRESHOLD -1, M_TOP_PAD -2.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, size in ((-3, 32 << 20), (-1, 512 << 20), (-2, 128 << 20)):
            mallopt(option, size)


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
    """(N, B, in) -> (N, B, out); between layers layer normalisation (Ba et al. 2016, no gain, no bias) and ReLU.

    The normalisation is [ours]. In critics it bounds what they say of actions never tried (Ball et al. 2023, arXiv
    2302.02948); the policy has it as well. Experts need fewer steps with it (README, "Deviations").
    """
    for layer in range(0, len(params), 2):
        x = torch.baddbmm(params[layer + 1], x, params[layer])
        if layer < len(params) - 2:
            x = torch.nn.functional.layer_norm(x, x.shape[-1:]).relu()
    return x


def policy_sample(params, observation, noise):
    """Tanh-Gaussian policy: actions (N, B, act) and their log-probabilities (N, B); `noise` is standard normal."""
    mean, log_std = mlp(params, observation).chunk(2, dim=-1)
    # a clamp has zero gradient outside its range, where log-std would stay for good; a tanh has not
    log_std = LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (torch.tanh(log_std) + 1)
    pre_tanh = mean + log_std.exp() * noise
    log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    # log(1 - tanh(u)^2) in a form that stays finite for large |u| (the SAC paper's appendix on action bounds)
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
def critic_loss(critic, target_critic, policy, temperature, batch, noise):
    """Soft Bellman residual (Eq. 5, 6), summed over learners. `batch` as of `Replay.sample`, `temperature` (N, 1)."""
    with torch.no_grad():
        next_action, next_log_prob = policy_sample(policy, batch["next_observation"], noise)
        next_value = critic_values(target_critic, batch["next_observation"], next_action).amin(0)
        # A time limit is no end of the task: only `terminated` stops the bootstrap.
        target = batch["reward"] + batch["discount"] * (1 - batch["terminated"]) * (next_value - temperature * next_log_prob)
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


# ---------------------------------------------------------------- the learner
class SoftActorCritic:
    """N independent learners in one set of batched tensors."""

    def __init__(self, learners, observation_size, action_size, settings, device="cpu"):
        keep_freed_memory()
        self.settings, self.learners, self.action_size = settings, learners, action_size
        self.device = torch.device(device)
        generator = torch.Generator().manual_seed(settings.seed)
        hidden = [settings.expert_width] * 2
        policy = init_mlp([observation_size, *hidden, 2 * action_size], learners, generator)
        critic = init_mlp([observation_size + action_size, *hidden, 1], 2 * learners, generator)
        self.policy = [p.to(self.device).requires_grad_() for p in policy]
        self.critic = [p.to(self.device).requires_grad_() for p in critic]
        self.target_critic = [p.detach().clone() for p in self.critic]
        self.log_temperature = torch.zeros(learners, 1, device=self.device, requires_grad=True)
        rate = dict(lr=settings.expert_learning_rate, fused=True)
        self.optimisers = {"policy": torch.optim.Adam(self.policy, **rate),
                           "critic": torch.optim.Adam(self.critic, **rate),
                           "temperature": torch.optim.Adam([self.log_temperature], **rate)}
        self.target_entropy = settings.expert_entropy * action_size

    def update(self, batch, generator):
        """One gradient step of critics, policies and temperatures. Returns a dict of scalars (detached tensors)."""
        shape = (2, *batch["action"].shape)
        next_noise, noise = torch.randn(shape, generator=generator).to(self.device)
        temperature = self.log_temperature.detach().exp()

        loss, info = critic_loss(self.critic, self.target_critic, self.policy, temperature, batch, next_noise)
        self._minimise("critic", loss, self.critic)

        frozen = [p.detach() for p in self.critic]  # the policy's loss asks for no critic gradients
        actor_loss, actor_info = policy_loss(self.policy, frozen, temperature, batch, noise)
        self._minimise("policy", actor_loss, self.policy)

        self._minimise("temperature", temperature_loss(self.log_temperature, actor_info["log_prob"],
                                                       self.target_entropy), [self.log_temperature])
        torch._foreach_lerp_(self.target_critic, frozen, self.settings.expert_target_rate)
        return {"critic_loss": loss.detach() / (2 * self.learners), "policy_loss": actor_loss.detach() / self.learners,
                "value": info["value"].detach(), "temperature": temperature.mean()}

    def set_learning_rate(self, progress):
        """Learning rates fall linearly to a tenth as `progress` goes from 0 to 1: late policies are steady."""
        for optimiser in self.optimisers.values():
            optimiser.param_groups[0]["lr"] = self.settings.expert_learning_rate * (1.0 - 0.9 * progress)

    def _minimise(self, name, loss, params):
        for param, gradient in zip(params, torch.autograd.grad(loss, params)):
            param.grad = gradient
        self.optimisers[name].step()

    @torch.no_grad()
    def act(self, observation, noise=None):
        """Actions (N, B, act) for observations (N, B, obs): with standard normal `noise` (N, B, act), else the mean."""
        if noise is None:
            return policy_mean(self.policy, observation)
        return policy_sample(self.policy, observation, noise)[0]

    def state_dict(self):
        """A copy: later updates do not reach it."""
        return copy.deepcopy({
            "policy": [p.detach() for p in self.policy], "critic": [p.detach() for p in self.critic],
            "target_critic": self.target_critic, "log_temperature": self.log_temperature.detach(),
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()}})

    def load_state_dict(self, state):
        with torch.no_grad():
            for name in ("policy", "critic", "target_critic"):
                for own, saved in zip(getattr(self, name), state[name], strict=True):
                    own.copy_(saved)
            self.log_temperature.copy_(state["log_temperature"])
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(copy.deepcopy(state["optimisers"][name]))
