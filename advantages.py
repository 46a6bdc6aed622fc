"""From rollouts to the batch of a policy gradient: baseline, advantages, scale.

Sources: "High-Dimensional Continuous Control Using Generalized Advantage Estimation" (Schulman et
al. 2016, arXiv 1506.02438); the linear baseline of Duan et al. 2016 ("Benchmarking Deep
Reinforcement Learning for Continuous Control"), as in the authors' release of GMPS.
Letters in shapes: n tasks, K episodes per task, T steps, B samples per task.
"""
import numpy as np
import torch

from settings import Settings


def return_and_distance(episodes: dict, prefix: str = "") -> dict[str, float]:
    """"return" and final "distance", each with the prefix: means over what `envs.rollout` gave."""
    return {f"{prefix}return": float(episodes["rewards"].sum(1).mean()),
            f"{prefix}distance": float(episodes["distances"][:, -1].mean())}


# ---------------------------------------------------------------- which episodes
def for_all_tasks(explored: dict, episodes: dict, family, tasks: np.ndarray) -> dict:
    """Explored episodes (1, P, T, ...) with the rewards (n, P, T) of all tasks (n, task).

    `episodes` are the same ones as `envs.rollout` returned them.
    """
    n = len(tasks)
    outcomes, actions = (np.broadcast_to(episodes[name], (n, *episodes[name].shape))
                         for name in ("outcomes", "actions"))
    rewards = torch.as_tensor(family.rewards_of(outcomes, actions, tasks[:, None, None]))
    return explored | {"reward": rewards.to(explored["mask"]) * explored["mask"]}


def draw_episodes(stored: dict, some: np.ndarray, K: int, generator: np.random.Generator) -> dict:
    """K random episodes of each task in `some` (m,): (n or 1, P, T, ...) -> (m, K, T, ...).

    All of them, in order, where no more than K are stored. A leading 1: all tasks share them.
    """
    P = stored["mask"].shape[1]
    chosen = np.tile(np.arange(P), (len(some), 1))
    if P > K:
        chosen = generator.permuted(chosen, axis=1)[:, :K]
    task, episode = torch.as_tensor(some)[:, None], torch.as_tensor(chosen)
    return {name: value[task if len(value) > 1 else 0 * task, episode]
            for name, value in stored.items()}


# ---------------------------------------------------------------- advantages
def linear_baseline(x: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values (n, K, T): a least-squares fit of returns, per task (Duan et al. 2016).

    x (n, K, T, F): what the policy's MLP sees; returns and mask (n, K, T). Features are x, x^2, t,
    t^2, t^3 and 1. Computed in float64.
    """
    n, K, T, _ = x.shape
    x = x.double().clamp(-10, 10)
    t = (torch.arange(T, dtype=torch.float64, device=x.device) / 100).expand(n, K, T)[..., None]
    features = torch.cat([x, x.square(), t, t.square(), t ** 3, torch.ones_like(t)], dim=-1)
    features = features.view(n, K * T, -1)
    # Padding counts for nothing; a little ridge keeps the normal equations solvable.
    weighted = features * mask.double().view(n, K * T, 1)
    ridge = 1e-5 * torch.eye(features.shape[-1], dtype=torch.float64, device=x.device)
    gram = weighted.mT @ features + ridge
    coefficients = torch.linalg.solve(gram, weighted.mT @ returns.double().view(n, K * T, 1))
    return (features @ coefficients).view(n, K, T).to(returns.dtype)


def discounted_sum(values: torch.Tensor, factor: float) -> torch.Tensor:
    """out_t = values_t + factor * out_{t+1}, along the last axis."""
    t = torch.arange(values.shape[-1], dtype=torch.float64, device=values.device)
    ahead = (t[:, None] - t).tril()              # s - t for s >= t: row s, column t
    weights = (factor ** ahead).tril().to(values.dtype)
    return values @ weights


def advantages(x: torch.Tensor, reward: torch.Tensor, mask: torch.Tensor,
               settings: Settings) -> torch.Tensor:
    """Generalised advantage estimates (n, K, T), centred per task (Schulman et al., Eq. 16).

    If every episode of a task got the same rewards, there is nothing to learn from. Dividing its
    near-zero advantages by their own size would turn noise into a signal, so they are set to zero.
    """
    returns = discounted_sum(reward * mask, settings.discount)
    value = linear_baseline(x, returns, mask) * mask
    next_value = torch.cat([value[..., 1:], torch.zeros_like(value[..., :1])], dim=-1)
    delta = reward + settings.discount * next_value - value                      # Eq. 11
    advantage = discounted_sum(delta * mask, settings.discount * settings.gae_lambda)
    mean = (advantage * mask).sum((1, 2), keepdim=True) / mask.sum((1, 2), keepdim=True)
    differ = (reward != reward[:, :1]).any(2).any(1)[:, None, None]  # from the first episode's
    return (advantage - mean) * mask * differ


def scaled_per_task(advantage: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Advantages (n, K, T), each task's divided by their own root mean square [release]."""
    own = advantage.square().sum((1, 2), keepdim=True) / mask.sum((1, 2), keepdim=True)
    return advantage / own.sqrt().clamp(min=1e-6)


@torch.no_grad()
def policy_gradient_batch(episodes: dict, settings: Settings, scale: float | None = None,
                          device="cpu") -> tuple[dict, float | None]:
    """The batch of an inner step from explored episodes, and its advantages' scale.

    `episodes`: tensors (n, K, T, ...) of `policy.Actor.explored`. The batch is a dict of tensors
    (n, B, ...): "features", "action", "behaviour_log_prob" and "mask" as they are, and "advantage".
    It holds every m-th step only, those at which noise is drawn: m = settings.noise_hold, and
    B = K * ceil(T / m).

    One constant divides the advantages of all tasks: `scale` or, if that is None, this batch's root
    mean square. The release divides by each task's own deviation. Near the goal rewards hardly
    differ, and a small deviation would blow up the gradient. settings.advantage_scale "per task"
    does as the release, for families whose rewards differ in size from task to task. A common scale
    is returned as None while all advantages are zero.
    """
    episodes = {name: value.to(device) for name, value in episodes.items()}
    mask = episodes["mask"]
    advantage = advantages(episodes["features"], episodes["reward"], mask, settings)
    if settings.advantage_scale == "per task":
        scale, advantage = 1.0, scaled_per_task(advantage, mask)
    if scale is None:
        size = float((advantage.square().sum() / mask.sum()).sqrt())
        scale = size if size >= 1e-8 else None
    batch = {name: episodes[name] for name in ("features", "action", "behaviour_log_prob", "mask")}
    batch["advantage"] = advantage / (scale or 1.0)
    return {name: value[:, :, ::settings.noise_hold].flatten(1, 2)
            for name, value in batch.items()}, scale
