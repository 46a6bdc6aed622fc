"""RL^2: a recurrent policy that is trained by reinforcement learning to explore and then exploit.

Sources: "RL^2: Fast Reinforcement Learning via Slow Reinforcement Learning" (Duan et al. 2016,
arXiv 1611.02779) for the policy and what it maximises: the reward of a whole trial, several
episodes of one task, through which its memory lasts. "Proximal Policy Optimization Algorithms"
(PPO; Schulman et al. 2017, arXiv 1707.06347) for the learner, where Duan et al. used TRPO. "PPO,
Eq." below is of that paper; "GAE, Eq." is of "High-Dimensional Continuous Control Using Generalized
Advantage Estimation" (Schulman et al. 2016, arXiv 1506.02438).

Policy and critic are two networks with a GRU each (recurrent.py). Gradients go back through time to
the start of the trial, without truncation: a trial is short. No expert is asked, and nobody is told
the task. Letters in shapes: B trials, L steps of a trial, over the borders of its episodes.
"""
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

import settings as settings_module
from advantages import discounted_sum
from baselines import recurrent, refuse_images
from baselines.recurrent import (
    Adapter,
    Learner,
    Network,
    Policy,
    input_size,
    joined,
    mean_over,
    play_trials,
    some_trials,
)
from settings import random_streams


@dataclass(frozen=True)
class Settings(recurrent.Settings):
    trial_discount: float = settings_module.within(
        0.99, 0.0, 0.9999, "*discount of rewards over the whole trial")
    trial_lambda: float = settings_module.within(0.95, 0.0, 1.0, "lambda of its advantages")
    epochs: int = settings_module.within(10, 1, 1000, "*passes of PPO over an iteration's trials")
    minibatches: int = settings_module.within(4, 1, 10_000, "gradient steps per pass")
    clip: float = settings_module.within(0.2, 1e-3, 10.0, "*epsilon of PPO")
    entropy_weight: float = settings_module.within(1e-3, 0.0, 10.0, "of PPO's entropy bonus")
    quick = recurrent.Settings.quick | dict(epochs=2)
    # The ant's episodes are longer, and its rewards differ less: docs/lab_notes.md.
    on_task = dict(ant=dict(iterations=420, trials=1, epochs=5, expert_reward_scale=1.0))


def train(problem, settings: Settings, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
    """The whole algorithm: one pass is the loop of PPO, Algorithm 1. Yields after every iteration.

    FloatingPointError when a gradient is no longer finite.
    """
    family = problem.family
    refuse_images(family, settings)
    _, generator = random_streams(settings.seed, "meta-training", 0)
    policy = Policy(family, settings, generator)
    critic = Network(input_size(family), 1, settings, generator)
    learner = Learner(problem, settings, {"policy": policy, "critic": critic}, state)
    while learner.begin():
        # Play trials with the policy as it is, pi_old.
        agent, parts = learner.agent(), []
        acts = [agent.act] * settings.trial_episodes
        for number, (steps, episodes) in enumerate(
                play_trials(agent, problem, settings, learner.generator, acts)):
            learner.count(number, episodes)
            parts.append(steps)
        trials = joined(parts)
        # Its log-probabilities, advantages and value targets stay fixed through all epochs.
        trials |= fixed_by_old_policy(policy, critic, trials, settings, problem.device)
        # Several epochs, each step on some whole trials.
        for _ in range(settings.epochs):
            for which in np.array_split(learner.rng.permutation(len(trials["mask"])),
                                        settings.minibatches):
                if len(which):
                    batch = some_trials(trials, which, problem.device)
                    loss, info = ppo_loss(policy, critic, batch, settings)
                    learner.minimise(loss)
        yield learner.state(), learner.metrics(**{name: float(value)
                                                  for name, value in info.items()})
    problem.meta_test(Adapter(learner.policy(), family, settings, problem.device))


# ---------------------------------------------------------------- what pi_old fixes
@torch.no_grad()
def fixed_by_old_policy(policy: Policy, critic: Network, trials: dict, settings: Settings,
                        device) -> dict:
    """"old_log_prob", "advantage" and "target" of trials, (B, L) each, on the CPU.

    Advantages are standardised over all visited steps.
    """
    found = {"old_log_prob": [], "value": []}
    for which in np.array_split(np.arange(len(trials["mask"])), settings.minibatches):
        x = trials["input"][which].to(device)  # some at a time: bounds memory
        batch = {name: trials[name][which].to(device) for name in ("action", "start")}
        found["old_log_prob"].append(log_prob(policy(x)[0], policy.log_std, batch, settings).cpu())
        found["value"].append(critic(x)[0][..., 0].cpu())
    old_log_prob, value = (torch.cat(found[name]) for name in ("old_log_prob", "value"))
    mask = trials["mask"]
    advantage, target = trial_advantages(value, trials["reward"], mask, settings)
    mean = mean_over(advantage, mask)
    std = mean_over((advantage - mean).square(), mask).sqrt()
    return {"old_log_prob": old_log_prob, "target": target,
            "advantage": (advantage - mean) / (std + 1e-8) * mask}


def trial_advantages(value: torch.Tensor, reward: torch.Tensor, mask: torch.Tensor,
                     settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and value targets (B, L): generalised advantage estimates across a whole trial.

    An episode's last step is followed by the next episode's first: what is found out in one pays in
    the next. After the trial nothing follows. Rewards are multiplied by 1 - discount, so that
    values are weighted means of rewards and of the size of one: the critic then learns quickly.
    """
    discount = settings.trial_discount
    reward = (1 - discount) * settings.expert_reward_scale * reward
    value = value * mask
    next_value = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], dim=1)
    delta = (reward + discount * next_value - value) * mask               # GAE, Eq. 11
    advantage = discounted_sum(delta, discount * settings.trial_lambda)   # GAE, Eq. 16
    return advantage, advantage + value


# ---------------------------------------------------------------- log-probabilities
def noise_kept(start: torch.Tensor, settings: Settings) -> torch.Tensor:
    """(B, L, 1): share of the exploration noise that is the step before's. None at a start."""
    return (settings.expert_noise_correlation * (1 - start))[..., None]


def log_prob(mean: torch.Tensor, log_std: torch.Tensor, batch: dict,
             settings: Settings) -> torch.Tensor:
    """log pi(a_t | all that came before in the trial), (B, L), summed over action dimensions.

    `mean` (B, L, act) of what the network saw, `batch` with "action" (B, L, act) and "start".
    With correlated noise (policy.CorrelatedNoise) the step before's noise follows from its action,
    and a share of it is part of this step's mean. So the density is exact.
    """
    kept = noise_kept(batch["start"], settings)
    noise = (batch["action"] - mean) / log_std.exp()
    before = torch.cat([torch.zeros_like(noise[:, :1]), noise[:, :-1]], dim=1)
    spread = (1 - kept.square()).sqrt()
    fresh = (noise - kept * before) / spread
    return (-0.5 * fresh.square() - log_std - spread.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def entropy(log_std: torch.Tensor, batch: dict, settings: Settings) -> torch.Tensor:
    """(B, L): entropy of pi(a_t | all that came before in the trial), a Gaussian's."""
    spread = (1 - noise_kept(batch["start"], settings).square()).sqrt()
    return (log_std + spread.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


# ---------------------------------------------------------------- the losses of PPO
def clipped_surrogate(log_p: torch.Tensor, batch: dict, settings: Settings) -> torch.Tensor:
    """L^CLIP, PPO, Eq. 7, (B, L): of each step. `batch` has "old_log_prob" and "advantage"."""
    ratio = ((log_p - batch["old_log_prob"]) * batch["mask"]).exp()
    clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
    return torch.minimum(ratio * batch["advantage"], clipped * batch["advantage"])


def ppo_loss(policy: Policy, critic: Network, batch: dict,
             settings: Settings) -> tuple[torch.Tensor, dict]:
    """Minus the objective of PPO, Eq. 9: clipped surrogate, value loss, entropy bonus.

    Policy and critic share no parameter, so the value loss needs no weight.
    """
    mask = batch["mask"]
    log_p = log_prob(policy(batch["input"])[0], policy.log_std, batch, settings)
    surrogate = mean_over(clipped_surrogate(log_p, batch, settings), mask)
    value = critic(batch["input"])[0][..., 0]
    value_loss = mean_over((value - batch["target"]).square(), mask)      # L^VF
    bonus = mean_over(entropy(policy.log_std, batch, settings), mask)     # S
    loss = -surrogate + value_loss - settings.entropy_weight * bonus
    with torch.no_grad():
        log_ratio = (log_p - batch["old_log_prob"]) * mask
        outside = ((log_ratio.exp() - 1).abs() > settings.clip).to(mask)
        info = {"policy_loss": -surrogate, "critic_loss": value_loss, "entropy": bonus,
                "clipped": mean_over(outside, mask),
                # of the old policy from the new one; every term is at least 0
                "kl": mean_over(log_ratio.exp() - 1 - log_ratio, mask)}
    return loss, {name: value.detach() for name, value in info.items()}
