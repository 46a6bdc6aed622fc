"""PEARL: infer from a few episodes what the task is, and act accordingly. Off-policy meta-RL.

An encoder turns transitions of a task into a Gaussian belief about a latent variable z. Actor and
critics see z beside the observation. At meta-test no weight changes: the belief narrows.

Source: "Efficient Off-Policy Meta-Reinforcement Learning via Probabilistic Context Variables"
(Rakelly et al. 2019, arXiv 1903.08254); equations and lines of its Algorithm 1 have its numbers.
[ours]: soft actor-critic is that of sac.py, with a learned temperature and no value network. Its
settings named expert_ are those of the experts: the family's, or the defaults. The divergence from
the prior is a mean over tasks, as the critics' loss is. The release sums it over tasks.

Letters in shapes: n training tasks, m tasks of a gradient step, N transitions of a context, B
transitions per task. A transition of a context is (s, a, r), as in the release.
"""
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

import settings as settings_module
from advantages import return_and_distance
from baselines import refuse_images
from local_policies import Replay
from policy import CorrelatedNoise, normalised
from sac import SoftActorCritic, init_mlp, mlp, squashed_mean, squashed_sample
from settings import random_streams, within


@dataclass(frozen=True)
class Settings(settings_module.Settings):
    collections: int = within(75, 1, 10_000, "*each: episodes on all tasks, then gradient steps")
    meta_batch: int = within(16, 1, 1000, "*tasks per gradient step")
    learning_rate: float = within(1e-3, 1e-7, 1.0, "*of all networks, Adam's [release: 3e-4]")
    latent: int = within(5, 1, 1000, "*numbers in z")
    kl_weight: float = within(0.001, 0.0, 1e6, "*beta, of the divergence from the prior")
    trial_episodes: int = within(4, 1, 1000, "*K, episodes per training task and collection")
    updates_per_step: float = within(0.225, 1e-6, 100.0, "*gradient steps per environment step")
    task_batch: int = within(32, 1, 65536, "transitions per task and gradient step")
    context_batch: int = within(128, 1, 65536, "N, transitions of a trial that z comes from")
    recent_trials: int = within(10, 1, 10_000, "latest trials of each task that give contexts")
    relabelled: float = within(0.0, 0.0, 1.0, "share of transitions and contexts that is other "
                               "tasks', with this task's rewards [ours]; 0 without outcome_size")
    quick = dict(updates_per_step=0.02)
    on_task = dict(ant=dict(collections=47), door=dict(collections=38))


# ---------------------------------------------------------------- the algorithm
def train(problem, settings: Settings, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
    """Algorithm 1. Yields (state, metrics) per collection; `state` resumes from there.

    UserError where the policy must see images. FloatingPointError when a loss is not finite.
    """
    refuse_images(problem.family, settings)
    learner = Learner(problem, settings, state)
    while learner.begin_collection():                                  # line 2
        collect(learner, problem)                                      # lines 3 to 10
        for _ in range(learner.gradient_steps()):                      # line 11
            context, batch = learner.sample()                          # line 13, of some tasks
            mean, variance = posterior(*evidence(learner.encoder, context))
            z = draw(mean, variance, learner.generator)                # line 14
            kl = kl_from_prior(mean, variance)                         # line 17
            learner.minimise(given_z(batch, z), kl)                    # lines 15, 16 and 19 to 21
        yield learner.state(), learner.metrics()
    problem.meta_test(Adapter(learner.policy(), problem.family, settings, problem.device))


def collect(learner: "Learner", problem) -> None:
    """Lines 3 to 10: a trial of K episodes on every training task, as at meta-test.

    In the first collection actions are uniform in [-1, 1], as the experts' are [ours].
    """
    tasks = problem.tasks
    adapter = Adapter(learner.policy(), problem.family, learner.settings, problem.device)
    adapter.begin(len(tasks), learner.generator)
    shape = len(tasks), problem.family.action_size
    act = (lambda *_: learner.rng.uniform(-1, 1, shape)) if learner.collection == 1 else adapter.act
    for k in range(learner.settings.trial_episodes):
        episodes = problem.rollout(act, tasks, 1)
        learner.replay.add(episodes, np.arange(len(tasks)))
        adapter.update(episodes)
        learner.count(episodes, first=k == 0)
    learner.bounds = np.vstack([learner.bounds, learner.replay.sizes])


# ---------------------------------------------------------------- the encoder
def context_input(family, settings, observation, action, reward) -> torch.Tensor:
    """What the encoder sees of transitions, (..., c): normalised, rewards (...,) scaled."""
    parts = [normalised(family, observation), action,
             settings.expert_reward_scale * reward[..., None]]
    return torch.cat([torch.as_tensor(part, dtype=torch.float32) for part in parts], dim=-1)


def evidence(encoder: list[torch.Tensor], context: torch.Tensor,
             mask: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """Sums of mean / variance and of 1 / variance over a context (m, N, c): each (m, latent).

    They are the natural parameters of a product of Gaussian factors Psi(z|c_n), one for each
    transition (Eq. 2). More transitions are just added, in any order. `mask` (m, N): which count.
    """
    m, N, _ = context.shape
    mean, raw = mlp(encoder, context.flatten(0, 1)[None]).view(m, N, -1).chunk(2, dim=-1)
    precision = 1.0 / torch.nn.functional.softplus(raw).clamp(min=1e-7)
    if mask is not None:
        precision = precision * mask[..., None]
    return (mean * precision).sum(1), precision.sum(1)


def posterior(weighted: torch.Tensor, precision: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Mean and variance (m, latent) of q(z|c), Eq. 2. Without a context: the prior, N(0, 1)."""
    precision = torch.where(precision > 0, precision, 1.0)
    return weighted / precision, 1.0 / precision


def kl_from_prior(mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """KL(q(z|c) || N(0, 1)), (m,): the second term of Eq. 1."""
    return 0.5 * (mean.square() + variance - 1.0 - variance.log()).sum(-1)


def draw(mean: torch.Tensor, variance: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A sample of z for each Gaussian, differentiable in both."""
    return mean + variance.sqrt() * torch.randn(mean.shape, generator=generator).to(mean)


def given_z(batch: dict, z: torch.Tensor) -> dict:
    """A batch (m, B, ...) as soft actor-critic takes it, (1, m * B, ...): observations end in z."""
    told = z[:, None].expand(-1, batch["action"].shape[1], -1)
    seen = {name: torch.cat([batch[name], told], dim=-1)
            for name in ("observation", "next_observation")}
    return {name: value.flatten(0, 1)[None] for name, value in (batch | seen).items()}


# ---------------------------------------------------------------- what meta-training updates
class Memory(Replay):
    """A replay whose checkpoint is half as large: most next observations follow in their stream."""

    @staticmethod
    def last(state: dict) -> torch.Tensor:
        """(n, longest) bool: which transitions are the last of their episode."""
        return state["end"][..., 0] == torch.arange(1, state["end"].shape[1] + 1)

    def state_dict(self) -> dict:
        state = super().state_dict()
        return state | {"next_observation": state["next_observation"][self.last(state)]}

    def load_state_dict(self, state: dict) -> None:
        following = state["observation"].roll(-1, dims=1)
        following[self.last(state)] = state["next_observation"]
        super().load_state_dict(state | {"next_observation": following})


class Learner:
    """What `train` updates: encoder, actor and critics; replay, random streams, counts."""

    def __init__(self, problem, settings: Settings, state: dict | None):
        self.settings, self.device, self.n = settings, problem.device, len(problem.tasks)
        family, latent = problem.family, settings.latent
        # Initial weights are of stream 0: collections count from 1.
        seen = family.observation_size + family.action_size + 1
        sizes = [seen, *[settings.expert_width] * 2, 2 * latent]
        encoder = state["policy"]["encoder"] if state is not None else init_mlp(
            sizes, 1, random_streams(settings.seed, "meta-training", 0)[1])
        self.encoder = [p.to(self.device, copy=True).requires_grad_() for p in encoder]
        self.sac_settings = replace(  # what sac.py and `Replay.sample` read under other names
            settings, expert_learning_rate=settings.learning_rate, expert_batch=settings.task_batch,
            expert_relabelled=settings.relabelled if family.outcome_size else 0.0)
        self.learner = SoftActorCritic(1, family.observation_size + latent, family.action_size,
                                       self.sac_settings, self.device, further=self.encoder)
        steps = settings.collections * settings.trial_episodes * family.horizon
        self.replay = Memory(family, problem.tasks, steps)
        self.bounds = np.zeros((1, self.n), int)  # (trials + 1, n): where each ends in its stream
        self.collection = self.env_steps = 0
        if state is not None and state["training"] is None:  # of a finished run
            self.collection, self.learner.policy = settings.collections, state["policy"]["actor"]
        elif state is not None:
            training = state["training"]
            self.learner.load_state_dict(training["learner"])
            self.replay.load_state_dict(training["replay"])
            self.bounds = training["bounds"].numpy()
            self.collection, self.env_steps = len(self.bounds) - 1, training["env_steps"]

    def begin_collection(self) -> bool:
        """Begin a collection, with random streams of its own. False: all are done."""
        if self.collection == self.settings.collections:
            return False
        self.collection += 1
        self.rng, self.generator = random_streams(self.settings.seed, "meta-training",
                                                  self.collection)
        self.steps_before, self.row, self.info = self.env_steps, {"divergences": 0}, {}
        return True

    def count(self, episodes: dict, first: bool) -> None:
        """Count env steps. Note return and distance of a trial's first and of its last episode."""
        self.env_steps += int(episodes["mask"].sum())
        self.row["divergences"] += int(episodes["diverged"].sum())
        self.row |= return_and_distance(episodes)
        if first:
            self.row |= return_and_distance(episodes, "prior_")

    def gradient_steps(self) -> int:
        """How many are due after a collection, in proportion to the env steps so far."""
        rate = self.settings.updates_per_step
        return math.floor(rate * self.env_steps) - math.floor(rate * self.steps_before)

    def sample(self) -> tuple[torch.Tensor, dict]:
        """Line 13: contexts (m, N, c) and a batch of (m, B, ...), of m random training tasks."""
        some = self.rng.permutation(self.n)[:self.settings.meta_batch]
        batch = self.replay.sample(self.rng, self.n, self.sac_settings).items()
        return self.context(some), {name: value[some].to(self.device) for name, value in batch}

    def context(self, some: np.ndarray) -> torch.Tensor:
        """Contexts (m, N, c) of the tasks `some`, each drawn from one of the latest trials [ours].

        One, as at meta-test. Not always the very latest: so few trials the encoder can tell apart
        by their states, whatever the rewards. A share `relabelled` are another task's trials.
        """
        m, rng, replay, now = len(some), self.rng, self.replay, self.collection
        trial = rng.integers(max(0, now - self.settings.recent_trials), now, size=m)
        mixed = rng.random(m) < self.sac_settings.expert_relabelled
        stream = np.where(mixed, rng.integers(self.n, size=m), some)
        first, end = (self.bounds[k, stream][:, None] for k in (trial, trial + 1))
        stream, index = stream[:, None], rng.integers(first, end, (m, self.settings.context_batch))
        observation, action = (replay.data[name][stream, index]
                               for name in ("observation", "action"))
        reward = replay.rewards(stream, index, replay.tasks[some, None])
        return context_input(replay.family, self.settings, observation, action,
                             reward).to(self.device)

    def minimise(self, batch: dict, kl: torch.Tensor) -> None:
        """One step of Adam on Eq. 3, Eq. 4 and beta times the tasks' mean divergence (Eq. 1)."""
        self.info = {"kl": kl.detach().mean()} | self.learner.update(
            batch, self.generator, self.settings.kl_weight * kl.mean())

    def policy(self) -> dict:
        """What `Adapter` needs."""
        return {name: [p.detach().clone() for p in params]
                for name, params in (("encoder", self.encoder), ("actor", self.learner.policy))}

    def state(self) -> dict:
        """A copy of all that resuming needs."""
        return {"policy": self.policy(), "training": {
            "learner": self.learner.state_dict(), "replay": self.replay.state_dict(),
            "bounds": torch.tensor(self.bounds), "env_steps": self.env_steps}}

    def metrics(self) -> dict:
        """A row of metrics.csv: losses are those of the last gradient step."""
        if not math.isfinite(sum(self.info.values())):
            raise FloatingPointError(
                f"a loss is not finite in collection {self.collection}: start anew in another "
                "folder, with a lower learning_rate")
        return self.row | self.info | {"iteration": self.collection, "env_steps": self.env_steps,
                                       "progress": self.collection / self.settings.collections}


# ---------------------------------------------------------------- meta-test
class Adapter:
    """Algorithm 2: posterior sampling (contract: baselines/__init__.py).

    Every episode draws a z and keeps it: the first from the prior, later ones from the posterior
    given all episodes of the task before. Measured: mean actions, z the posterior's mean [ours].
    """
    sequential = True  # each episode of a round learns from those before
    references = {}

    def __init__(self, policy: dict, family, settings: Settings, device="cpu"):
        self.encoder, self.actor = ([p.to(device) for p in policy[name]]
                                    for name in ("encoder", "actor"))
        self.family, self.settings, self.device = family, settings, device

    def begin(self, count: int, generator: torch.Generator) -> None:
        """Forget all contexts: `count` new tasks, the prior for each."""
        self.generator = generator
        self.context = 2 * [torch.zeros(count, self.settings.latent, device=self.device)]

    @torch.no_grad()
    def act(self, observation, last: dict | None = None, explore: bool = True) -> np.ndarray:
        """Actions (count * K, act) for count * K environments, ordered by task."""
        if last is None:  # an episode begins; one actor for all, or one a task (tools/finetune.py)
            B, actors = len(observation), len(self.actor[0])
            mean, variance = (x.repeat_interleave(B // len(x), 0) for x in posterior(*self.context))
            self.z = draw(mean, variance, self.generator) if explore else mean
            self.noise = CorrelatedNoise((actors, B // actors, self.family.action_size),
                                         self.settings.expert_noise_correlation, self.generator)
        x = torch.cat([normalised(self.family, observation).to(self.z), self.z], dim=-1)
        x = x.view(*self.noise.shape[:2], -1)
        action = (squashed_sample(self.actor, x, next(self.noise).to(x))[0] if explore
                  else squashed_mean(self.actor, x))
        return action.flatten(0, 1).cpu().numpy()

    @torch.no_grad()
    def update(self, episodes: dict) -> None:
        """Add every transition of the episodes just explored to its task's context."""
        count = len(self.context[0])
        context = context_input(self.family, self.settings, episodes["observations"][:, :-1],
                                episodes["actions"], episodes["rewards"])
        mask = torch.as_tensor(episodes["mask"]).to(context)
        new = evidence(self.encoder, *(x.view(count, -1, *x.shape[2:]).to(self.device)
                                       for x in (context, mask)))
        self.context = [old + more for old, more in zip(self.context, new)]
