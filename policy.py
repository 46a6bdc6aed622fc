"""The policy that adapts: parameters, from observations to actions, and acting in environments.

A Gaussian whose mean is an MLP on [observation, z], z a learned input, with one log-std per action
dimension ("Guided Meta-Policy Search", Mendonca et al., NeurIPS 2019, arXiv 1904.00956v2, and the
authors' release). Policies that see images put convolutions in front.

Parameters are dicts of tensors: `theta` without a task axis; adapted parameters `phi` with a
leading one, so that all tasks adapt in one batched product. Convolutions do not adapt [release]
and never have a task axis. Letters in shapes: n tasks, K episodes per task, T steps, B samples per
task, F features.
"""
import math
from collections.abc import Iterator

import numpy as np
import torch

from settings import Settings, random_streams

Params = dict[str, torch.Tensor]
MIN_STD = 1e-6  # of the exploration noise [release]


# ---------------------------------------------------------------- parameters
def uniform(shape: tuple[int, ...], fan_in: int, generator: torch.Generator,
            dtype: torch.dtype) -> torch.Tensor:
    """Initial weights as torch.nn draws them: uniform within 1 / sqrt(fan_in) of 0."""
    unit = torch.rand(shape, generator=generator, dtype=dtype) * 2 - 1
    return unit * (1.0 / math.sqrt(fan_in))


def init_policy(family, settings: Settings, generator: torch.Generator,
                dtype: torch.dtype = torch.float32) -> Params:
    """theta: MLP, z and log-std; convolutions too where the family has images.

    Weights are drawn as torch.nn.Linear draws them. z starts at 0.
    """
    inputs = family.observation_size + (KEYPOINTS if family.image_shape else 0)
    sizes = [inputs + settings.bias_vector, settings.hidden, settings.hidden, family.action_size]
    theta = init_convolutions(generator, dtype) if family.image_shape else {}
    for layer, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:]), start=1):
        for name, rows in (("w", fan_in), ("b", 1)):
            theta[f"{name}{layer}"] = uniform((rows, fan_out), fan_in, generator, dtype)
    theta["z"] = torch.zeros(1, settings.bias_vector, dtype=dtype)
    theta["log_std"] = torch.full((1, family.action_size), math.log(settings.init_std), dtype=dtype)
    return theta


def is_convolution(name: str) -> bool:
    """Whether all tasks share that parameter, adapted or not."""
    return name.startswith("conv")


def per_task(theta: Params, n: int) -> Params:
    """theta -> phi: a leading task axis of n, each task a view of the same numbers."""
    return {name: value if is_convolution(name) else value.expand(n, *value.shape)
            for name, value in theta.items()}


def learned(params: Params, settings: Settings) -> list[torch.Tensor]:
    """All of them, but log-std only with adapt_std "yes": else it stays as it is [ours]."""
    return [value for name, value in params.items()
            if name != "log_std" or settings.adapt_std == "yes"]


def detached(params: Params) -> Params:
    """A copy without gradients."""
    return {name: value.detach().clone() for name, value in params.items()}


# ---------------------------------------------------------------- from observations to actions
def normalised(family, observation: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Observations (..., obs) in units of about one."""
    scaled = (observation - family.observation_centre) / family.observation_scale
    return torch.as_tensor(scaled, dtype=dtype)


def features(params: Params, observation: torch.Tensor,
             image: torch.Tensor | None = None) -> torch.Tensor:
    """The MLP's input (..., F): keypoints of the image, if any, then observations (..., obs)."""
    if image is None:
        return observation
    return torch.cat([keypoints(params, image), observation], dim=-1)


def mean_action(phi: Params, x: torch.Tensor) -> torch.Tensor:
    """Mean of the Gaussian, (n, B, act), for features x (n, B, F)."""
    z = phi["z"].expand(-1, x.shape[1], -1)
    x = torch.cat([x, z], dim=-1)
    x = torch.baddbmm(phi["b1"], x, phi["w1"]).relu()
    x = torch.baddbmm(phi["b2"], x, phi["w2"]).relu()
    return torch.baddbmm(phi["b3"], x, phi["w3"])


def action_std(phi: Params) -> torch.Tensor:
    """Standard deviation (n, 1, act), at least MIN_STD."""
    return phi["log_std"].clamp(min=math.log(MIN_STD)).exp()


def log_prob(phi: Params, x: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """log pi_phi(a|s), (n, B), of actions (n, B, act) for features x (n, B, F).

    Summed over action dimensions: they are independent.
    """
    std = action_std(phi)
    deviation = (action - mean_action(phi, x)) / std
    return (-0.5 * deviation.square() - std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


# ---------------------------------------------------------------- acting
class CorrelatedNoise:
    """Endless standard normal noise: each `next` is correlated with the one before [ours].

    It is for experts and for rivals: at the ant's 100 Hz the legs filter white noise out.
    """

    def __init__(self, shape: tuple[int, ...], correlation: float, generator: torch.Generator):
        self.shape, self.correlation, self.generator = shape, correlation, generator
        self.noise = None

    def __next__(self) -> torch.Tensor:
        fresh, kept = torch.randn(self.shape, generator=self.generator), self.correlation
        if self.noise is not None:
            fresh = kept * self.noise + math.sqrt(1 - kept ** 2) * fresh
        self.noise = fresh
        return fresh


def exploration_noise(shape: tuple[int, int, int], settings: Settings,
                      generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless standard normal noise (n, K, act) for K episodes of each of n tasks.

    It is held for `noise_hold` steps [ours]: at the ant's 100 Hz the legs filter white noise out,
    and on push that halves the samples.

    [ours] "orthogonal": over the K episodes each number of the noise sums to zero, and its squares
    sum to K. The products of different ones sum to zero: of other action dimensions, and of draws
    in the same block, (K - 1) / act of them in a row. So a policy gradient does not mistake chance
    correlation for an effect. Each episode by itself still looks almost normal if K is much larger
    than act. With no more episodes than action dimensions noise is independent. Compare Choromanski
    et al. 2018, "Structured Evolution with Compact Architectures for Scalable Policy Optimization".
    """
    n, K, act = shape
    together = max(1, (K - 1) // act)  # draws that are orthogonal to each other
    while True:
        noise = torch.randn(n, K, together * act, generator=generator)
        if settings.noise == "orthogonal" and act < K:
            q, r = torch.linalg.qr(noise - noise.mean(1, keepdim=True))
            # r's signs make the columns' directions uniform.
            noise = math.sqrt(K) * q * r.diagonal(dim1=1, dim2=2).sign()[:, None]
        for draw in noise.split(act, dim=2):
            for _ in range(settings.noise_hold):
                yield draw


class Actor:
    """pi_phi_i on task i, for `envs.rollout`: environments are ordered by task.

    `generator` gives the exploration noise; None: mean actions. The actor keeps what its MLP saw,
    so that a policy gradient need not run the convolutions again.
    """

    def __init__(self, phi: Params, family, settings: Settings,
                 generator: torch.Generator | None = None):
        self.phi, self.family, self.settings = phi, family, settings
        self.generator, self.noise, self.seen = generator, None, []

    @torch.no_grad()
    def __call__(self, observation, last=None, explore: bool = True) -> np.ndarray:
        """Actions (n * K, act) for what n * K environments returned; `last` is not needed."""
        x = self.network_input(observation)
        mean = mean_action(self.phi, x)
        if self.generator is None or not explore:
            return mean.flatten(0, 1).cpu().numpy()
        self.seen.append(x.cpu())
        if self.noise is None:
            self.noise = exploration_noise(tuple(mean.shape), self.settings, self.generator)
        # Not clipped here: the environment clips, and log pi must be that of the sample itself.
        action = mean + action_std(self.phi) * next(self.noise).to(mean)
        return action.flatten(0, 1).cpu().numpy()

    def network_input(self, observation) -> torch.Tensor:
        """Features (n, K, F) of the observations of n * K environments."""
        z = self.phi["z"]

        def by_task(x):
            return x.to(z.device).view(len(z), -1, *x.shape[1:])
        if not self.family.image_shape:
            return by_task(normalised(self.family, observation, z.dtype))
        return features(self.phi, by_task(normalised(self.family, observation["hand"], z.dtype)),
                        by_task(torch.as_tensor(observation["image"])))

    @torch.no_grad()
    def explored(self, episodes: dict) -> dict:
        """What a policy gradient needs of episodes of `envs.rollout` that this actor explored.

        Tensors with leading axes (n, K, T), K episodes per task: "features" (F,), what the MLP saw;
        "action" (act,), before the environment clips it; "behaviour_log_prob", that of the
        actions; "reward"; "mask". They lie on the CPU.
        """
        x, n = torch.stack(self.seen, dim=2), len(self.phi["z"])

        def by_task(value):
            return torch.as_tensor(value, dtype=x.dtype).view(n, -1, *value.shape[1:])
        action = by_task(episodes["actions"])
        log_p = log_prob(self.phi, x.flatten(1, 2).to(self.phi["z"].device),
                         action.flatten(1, 2).to(self.phi["z"].device))
        return {"features": x, "action": action,
                "behaviour_log_prob": log_p.cpu().view(action.shape[:-1]),
                "reward": by_task(episodes["rewards"]), "mask": by_task(episodes["mask"])}


# ---------------------------------------------------------------- imitating experts
def leaky_clip(action: torch.Tensor) -> torch.Tensor:
    """Actions clipped to [-1, 1], as the environment executes them, but with slope 0.1 outside.

    Without the slope, a mean outside the range would get no gradient.
    """
    inside = action.clamp(-1.0, 1.0)
    return inside + 0.1 * (action - inside)


def imitated(action: torch.Tensor, settings: Settings) -> torch.Tensor:
    """The action that the loss compares with the expert's.

    With imitated_action "executed" it is clipped first [ours]. Most expert actions are at full
    speed, 1, and the environment executes a mean of 1.2 as 1.
    """
    return leaky_clip(action) if settings.imitated_action == "executed" else action


def imitation_loss(phi: Params, x: torch.Tensor, expert_action: torch.Tensor,
                   settings: Settings) -> torch.Tensor:
    """mean_i mean_s || mean of pi_phi_i(s) - a* ||^2, x (n, B, F), expert_action (n, B, act)."""
    action = imitated(mean_action(phi, x), settings)
    return (action - expert_action).square().sum(-1).mean()


def imitate(family, demonstrations, settings: Settings, device="cpu", last: int = 0) -> Params:
    """theta of one policy that imitates all experts at once, without adaptation.

    It is the reference "no_adaptation". Meta-training starts from such a policy [ours]: a random
    one's rewards say little about the goal. `last` > 0: imitate only the last `last` experts.

    Convolutions learn only here. With images, a linear readout of the MLP's input must also
    predict the state that the experts see [ours], if the demonstrations hold it. From actions alone
    the convolutions learn the block's place only roughly. Source: Levine et al. 2016, section 5.2.
    """
    rng, generator = random_streams(settings.seed, "imitation", 0)
    theta = {name: value.to(device).requires_grad_()
             for name, value in init_policy(family, settings, generator).items()}
    states = family.expert_family.observation_size
    readout = torch.zeros(len(theta["w1"]) - settings.bias_vector + 1, states, device=device,
                          requires_grad=True)  # no gradient without images
    optimiser = torch.optim.Adam([*theta.values(), readout], lr=settings.learning_rate)
    n = len(demonstrations.actions)
    tasks = np.arange(n - last if last else 0, n)
    count = settings.imitation_batch * n // len(tasks)  # as many labels for few tasks as for all
    for step in range(settings.imitation_steps):
        set_rates(optimiser, [settings.learning_rate], step / settings.imitation_steps, final=0.0)
        observation, action, *seen = demonstrations.sample(family, rng, tasks, count, device)
        image, state = (*seen, None, None)[:2]
        x = features(theta, observation, image)
        loss = imitation_loss(per_task(theta, len(tasks)), x, action, settings)
        if state is not None:
            predicted = x @ readout[:-1] + readout[-1]
            loss = loss + STATE_WEIGHT * (predicted - state).square().sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return detached(theta)


def set_rates(optimiser, rates: list[float], progress: float, final: float) -> None:
    """Learning rates fall linearly to `final` of their start as `progress` goes from 0 to 1."""
    for group, rate in zip(optimiser.param_groups, rates):
        group["lr"] = rate * (1.0 - (1.0 - final) * progress)


# ---------------------------------------------------------------- convolutions: images to points
FILTERS = 16
KEYPOINTS = 2 * FILTERS  # numbers: x and y of one point per filter
CONVOLUTIONS = ((3, 5, 3), (FILTERS, 3, 3), (FILTERS, 3, 1))  # channels, kernel, stride [release]
SHARPNESS = 10.0  # of the soft-argmax [ours]: points spread over the image from the start
STATE_WEIGHT = 10.0  # in imitation, of telling the state behind an image [ours]
CHUNK = 100       # images at a time: intermediate results then fit into a processor's cache


def init_convolutions(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
    """conv1_w, conv1_b .. conv3_w, drawn as torch.nn.Conv2d draws them.

    The last has no bias: it would move no point.
    """
    theta = {}
    for layer, (channels, kernel, _) in enumerate(CONVOLUTIONS, start=1):
        for name, shape in (("w", (FILTERS, channels, kernel, kernel)), ("b", (FILTERS,))):
            theta[f"conv{layer}_{name}"] = uniform(shape, channels * kernel * kernel, generator,
                                                   dtype)
    del theta[f"conv{layer}_b"]
    return theta


def soft_argmax(maps: torch.Tensor) -> torch.Tensor:
    """Feature maps (B, C, rows, columns) -> (B, 2C): x of every map's point, then y.

    A point is the mean position under the softmax over the map (Levine et al. 2016, section 5.1),
    in [-1, 1] from edge to edge.
    """
    batch, channels, rows, columns = maps.shape
    share = maps.flatten(2).softmax(-1).view(batch, channels, rows, columns)
    x = share.sum(2) @ torch.linspace(-1, 1, columns, dtype=maps.dtype, device=maps.device)
    y = share.sum(3) @ torch.linspace(-1, 1, rows, dtype=maps.dtype, device=maps.device)
    return torch.cat([x, y], dim=1)


def keypoints(theta: Params, image: torch.Tensor) -> torch.Tensor:
    """Images (..., rows, columns, 3) uint8 -> points (..., 32), differentiable in theta."""
    def chunk(images):
        x = images.permute(0, 3, 1, 2).to(theta["conv1_w"].dtype) * (2 / 255) - 1
        for layer, (_, kernel, stride) in enumerate(CONVOLUTIONS, start=1):
            x = torch.nn.functional.conv2d(
                x.relu() if layer > 1 else x, theta[f"conv{layer}_w"],
                theta.get(f"conv{layer}_b"), stride, padding=kernel // 2)
        return soft_argmax(SHARPNESS * x)

    flat = image.reshape(-1, *image.shape[-3:])
    points = torch.cat([chunk(images) for images in flat.split(CHUNK)])
    return points.view(*image.shape[:-3], KEYPOINTS)
