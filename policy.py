"""The policy that adapts, and its rollouts.

An MLP on [observation, z] with a Gaussian of global log-std ("Guided Meta-Policy Search", Mendonca et al., NeurIPS 2019,
and the authors' release). Letters in shape comments: n tasks, K episodes per task, T steps, B samples per task.
Parameters are dicts of tensors; `theta` has no task axis, adapted parameters `phi` carry a leading task axis, so all
tasks adapt in one batched product.
"""
import math

import numpy as np
import torch

from envs import correlated_noise, rollout
from vision import KEYPOINTS, init_convolutions, keypoints


# ---------------------------------------------------------------- parameters
def init_policy(family, settings, generator, dtype=torch.float32):
    """theta: MLP on [observation, z], plus z itself and the global log-std. Linear layers as torch.nn.Linear's.

    For a family with images: convolutions too, whose points in the image come before the numbers of the observation.
    """
    inputs = family.observation_size + (KEYPOINTS if family.image_shape else 0)
    sizes = [inputs + settings.bias_vector, settings.hidden, settings.hidden, family.action_size]
    theta = init_convolutions(generator, dtype) if family.image_shape else {}
    for layer, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:]), start=1):
        bound = 1.0 / math.sqrt(fan_in)
        theta[f"w{layer}"] = (torch.rand(fan_in, fan_out, generator=generator, dtype=dtype) * 2 - 1) * bound
        theta[f"b{layer}"] = (torch.rand(1, fan_out, generator=generator, dtype=dtype) * 2 - 1) * bound
    theta["z"] = torch.zeros(1, settings.bias_vector, dtype=dtype)
    theta["log_std"] = torch.full((1, family.action_size), math.log(settings.init_std), dtype=dtype)
    return theta


def shared(name):
    """Whether all tasks share that parameter, adapted or not: the convolutions' do, and have no task axis in phi."""
    return name.startswith("conv")


def per_task(theta, n):
    """theta -> phi with a leading task axis of n, each task a view of the same parameters."""
    return {name: value if shared(name) else value.expand(n, *value.shape) for name, value in theta.items()}


def one_task(phi, i):
    """phi of task i alone, its task axis kept."""
    return {name: value if shared(name) else value[i:i + 1] for name, value in phi.items()}


def detached(params):
    return {name: value.detach().clone() for name, value in params.items()}


# ---------------------------------------------------------------- from observations to actions
def scaled(family, observation, dtype=torch.float32):
    return torch.as_tensor((observation - family.observation_centre) / family.observation_scale, dtype=dtype)


def see(phi, observation, image=None):
    """What `policy_mean` takes: scaled observations (n, B, obs), behind the points found in images (n, B, ...), if any."""
    return observation if image is None else torch.cat([keypoints(phi, image), observation], dim=-1)


def seen(phi, batch):
    """A batch with the numbers of its observation behind the points found in its images, if it has any."""
    return batch | {"observation": see(phi, batch["observation"], batch.get("image"))}


def policy_mean(phi, observation):
    """Mean action (n, B, act) for scaled observations (n, B, obs), as `see` returns them."""
    z = phi["z"].expand(-1, observation.shape[1], -1)
    x = torch.cat([observation, z], dim=-1)
    x = torch.baddbmm(phi["b1"], x, phi["w1"]).relu()
    x = torch.baddbmm(phi["b2"], x, phi["w2"]).relu()
    return torch.baddbmm(phi["b3"], x, phi["w3"])


def policy_std(phi, settings):
    """(n, 1, act), never under the floor."""
    return phi["log_std"].clamp(min=math.log(settings.min_std)).exp()


def log_prob(phi, observation, action, settings):
    """Gaussian log-probability (n, B) of actions (n, B, act)."""
    std = policy_std(phi, settings)
    deviation = (action - policy_mean(phi, observation)) / std
    return (-0.5 * deviation.square() - std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


# ---------------------------------------------------------------- rollouts
def policy_input(family, phi, observation):
    """What an environment returned for n tasks' episodes in order -> input of `policy_mean`, (n, B, ...)."""
    n, dtype, device = len(phi["z"]), phi["z"].dtype, phi["z"].device
    split = lambda x: x.to(device).view(n, -1, *x.shape[1:])  # noqa: E731
    if not family.image_shape:
        return split(scaled(family, observation, dtype))
    return see(phi, split(scaled(family, observation["hand"], dtype)), split(torch.as_tensor(observation["image"])))


@torch.no_grad()
def collect(env, tasks, phi, settings, generator):
    """Roll out phi_i on task i, `env.num_envs / n` episodes each. `generator` None: mean actions.

    Returns the episodes of `envs.rollout`, environments ordered by task.
    """
    n, std = len(tasks), policy_std(phi, settings)
    noise = None if generator is None else correlated_noise((n, env.num_envs // n, env.family.action_size),
                                                            settings.noise_correlation, generator)

    def act(observation):
        mean = policy_mean(phi, policy_input(env.family, phi, observation))
        # Not clipped here: the environment clips, and log pi must be that of the Gaussian's own sample.
        action = mean if noise is None else mean + std * next(noise).to(mean)
        return action.flatten(0, 1).cpu().numpy()

    return rollout(env, act, np.repeat(tasks, env.num_envs // n, axis=0))
