"""From rollouts to the batch of a policy gradient: baseline, generalised advantage estimates, scale.

Letters in shape comments: n tasks, K episodes per task, T steps. Sources: "High-Dimensional Continuous Control Using
Generalized Advantage Estimation" (Schulman et al. 2016, arXiv 1506.02438); the linear baseline of Duan et al. 2016
("Benchmarking Deep Reinforcement Learning for Continuous Control"), as in the authors' release.
"""
import torch

from policy import log_prob, scaled, seen


def linear_baseline(observation, returns, mask, products):
    """Least-squares fit of returns on [s, s^2, s_i s_j, t, t^2, t^3, 1], per task (Duan et al. 2016; release's baseline).

    The products s_i s_j of the entries named in `products` are [ours]: the value of a block's distance to a goal is no
    sum over coordinates.

    observation (n, K, T, obs) scaled, returns and mask (n, K, T) -> values (n, K, T). Computed in float64.
    """
    n, K, T, _ = observation.shape
    s = observation.double().clamp(-10, 10)
    t = (torch.arange(T, dtype=torch.float64, device=s.device) / 100).expand(n, K, T)[..., None]
    i, j = torch.triu_indices(len(products), len(products), 1, device=s.device)
    crossed = s[..., products]
    features = [s, s.square(), crossed[..., i] * crossed[..., j], t, t.square(), t ** 3, torch.ones_like(t)]
    features = torch.cat(features, dim=-1).view(n, K * T, -1)
    weighted = features * mask.double().view(n, K * T, 1)
    gram = weighted.mT @ features + 1e-5 * torch.eye(features.shape[-1], dtype=torch.float64, device=s.device)
    coefficients = torch.linalg.solve(gram, weighted.mT @ returns.double().view(n, K * T, 1))
    return (features @ coefficients).view(n, K, T).to(returns.dtype)


def discounted_sum(values, factor):
    """out_t = values_t + factor * out_{t+1} along the last axis."""
    out, running = torch.empty_like(values), torch.zeros_like(values[..., 0])
    for t in reversed(range(values.shape[-1])):
        running = values[..., t] + factor * running
        out[..., t] = running
    return out


def advantages(observation, reward, mask, products, settings):
    """Generalised advantage estimates (n, K, T), centred per task.

    A task whose episodes all got the same rewards (a sparse reward that nobody found) has none: what the baseline leaves of
    a constant is no signal, and divided by its own size it would look like one.
    """
    returns = discounted_sum(reward * mask, settings.discount)
    value = linear_baseline(observation, returns, mask, products) * mask
    next_value = torch.cat([value[..., 1:], torch.zeros_like(value[..., :1])], dim=-1)
    delta = reward + settings.discount * next_value - value
    advantage = discounted_sum(delta * mask, settings.discount * settings.gae_lambda)
    mean = (advantage * mask).sum((1, 2), keepdim=True) / mask.sum((1, 2), keepdim=True)
    differ = (reward != reward[:, :1]).any(2).any(1)[:, None, None]
    return (advantage - mean) * mask * differ


@torch.no_grad()
def policy_gradient_batch(episodes, phi, family, settings, advantage_scale=None):
    """Batch of the inner step from the episodes that phi collected, and the scale of its advantages, None where all are 0.

    A dict of (n, B, ...), B = K * T: "observation" scaled, "action" before the environment clips it, "advantage" and
    "mask", for a family with images "image", and "log_prob", that of the actions under phi, the behaviour policy. With
    settings.inner_every > 1 these are of every so many-th time step alone: where exploration noise lasts, neighbours say
    the same.

    Advantages are divided by one constant for all tasks, `advantage_scale` (None: this batch's root mean square):
    dividing by each task's own deviation would blow up the gradient near the goal, where rewards hardly differ. With
    settings.advantage_scale "task" it is done all the same, where rewards differ in size from task to task.
    """
    n, dtype = len(phi["z"]), phi["z"].dtype
    tensor = lambda x: torch.as_tensor(x, dtype=dtype).to(phi["z"].device).view(n, -1, *x.shape[1:])  # noqa: E731
    observation = scaled(family, episodes["observations"][:, :-1], dtype).to(phi["z"].device)
    observation = observation.view(n, -1, *observation.shape[1:])  # (n, K, T, obs)
    mask = tensor(episodes["mask"])
    advantage = advantages(observation, tensor(episodes["rewards"]), mask, family.baseline_products, settings)
    if settings.advantage_scale == "task":
        advantage_scale, own = 1.0, advantage.square().sum((1, 2), keepdim=True) / mask.sum((1, 2), keepdim=True)
        advantage = advantage / own.sqrt().clamp(min=1e-6)
    if advantage_scale is None:
        size = float((advantage.square().sum() / mask.sum()).sqrt())
        advantage_scale = size if size >= 1e-8 else None  # nobody found any reward: no advantage and no step, not 0 / 0
    batch = {"observation": observation, "action": tensor(episodes["actions"]),
             "advantage": advantage / (advantage_scale or 1.0), "mask": mask}
    if family.image_shape:
        images = episodes["images"][:, :-1]
        batch["image"] = torch.as_tensor(images.reshape(n, -1, *images.shape[1:])).to(phi["z"].device)
    batch = {name: value[:, :, ::settings.inner_every].flatten(1, 2) for name, value in batch.items()}
    batch["log_prob"] = log_prob(phi, seen(phi, batch)["observation"], batch["action"], settings)
    return batch, advantage_scale
