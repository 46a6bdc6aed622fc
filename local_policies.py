"""Steps 1 and 2: experts of the training tasks by soft actor-critic, and their demonstrations.

There are two kinds. The *contextual* expert, the default, is one learner for all tasks; its input
ends with the task. *Local* experts are one learner per training task, trained as a batch (sac.py).

Source: steps 1 and 2 of "Guided Meta-Policy Search" (Mendonca et al., NeurIPS 2019, arXiv
1904.00956v2). Letters in shapes: n tasks (and replay streams), N learners, B batch, M labelled
states per task.
"""
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch

from advantages import return_and_distance
from envs import rollout
from policy import CorrelatedNoise, Params, features, normalised
from sac import SoftActorCritic, squashed_mean
from settings import Settings, random_streams

ExpertFunction = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (n, B, obs), (n, task)


# ---------------------------------------------------------------- replay
class Replay:
    """Transitions in one stream per training task. Arrays (n, capacity, size), unscaled.

    Streams may differ in length, since episodes may end early. "end" is the index in the stream
    just past the transition's episode. Tasks that nobody knows have shape (n, 0): then every
    transition keeps its own reward, and no input holds a task.
    """
    FIELDS = ("observation", "action", "next_observation", "outcome", "reward", "terminated", "end")

    def __init__(self, family, tasks: np.ndarray, capacity: int):
        self.family, self.tasks, self.capacity = family, tasks, capacity
        self.sizes = np.zeros(len(tasks), int)
        widths = (family.observation_size, family.action_size, family.observation_size,
                  family.outcome_size, 1, 1, 1)
        self.data = {name: np.zeros((len(tasks), capacity, width), np.float32)
                     for name, width in zip(self.FIELDS, widths)}

    def add(self, episodes: dict, streams: np.ndarray) -> None:
        """Append whole episodes of `envs.rollout`; `streams` (B,) says whose task each was on."""
        lengths, observations = episodes["mask"].sum(1).astype(int), episodes["observations"]
        terminated = np.zeros_like(episodes["mask"])
        terminated[np.arange(len(lengths)), lengths - 1] = episodes["terminated"]
        fields = (observations[:, :-1], episodes["actions"], observations[:, 1:],
                  episodes["outcomes"], episodes["rewards"][..., None], terminated[..., None])
        for episode, (stream, length) in enumerate(zip(streams, lengths)):
            first, end = self.sizes[stream], self.sizes[stream] + length
            if end > self.capacity:
                raise ValueError(f"replay of {self.capacity} transitions per task is full")
            for name, values in zip(self.FIELDS, fields):  # nothing that follows an early end
                self.data[name][stream, first:end] = values[episode, :length]
            self.data["end"][stream, first:end] = end
            self.sizes[stream] = end

    def state_dict(self) -> dict:
        longest = int(self.sizes.max())
        return {"sizes": torch.as_tensor(self.sizes.copy())} | {
            name: torch.as_tensor(values[:, :longest].copy()) for name, values in self.data.items()}

    def load_state_dict(self, state: dict) -> None:
        self.sizes = state["sizes"].numpy().copy()
        for name in self.FIELDS:
            self.data[name][:, :state[name].shape[1]] = state[name].numpy()

    def sample(self, generator: np.random.Generator, learners: int, settings: Settings) -> dict:
        """A batch for every learner: a dict of (N, B, ...) float32 tensors.

        The dynamics of all tasks are the same, and the reward of every training task is known at
        meta-training. So a transition met on one task is as good a sample of another. The
        contextual learner (N = 1) gives a share `expert_relabelled` of its batch another training
        task, in the reward and in its input. A local learner keeps its own task and takes that
        share of its transitions from the streams of all tasks. A family without an outcome_size
        cannot recompute rewards: there each transition keeps its own task and reward.

        A sample spans `expert_return_steps` transitions, fewer at the end of an episode. "reward"
        is their discounted sum, "discount" what is left of the value after them.
        """
        n, shape = len(self.tasks), (learners, settings.expert_batch)
        known = self.tasks.size > 0
        share = settings.expert_relabelled if known and self.family.outcome_size else 0.0
        # `stream`: whose transition a sample is; `task`: whose reward it gets.
        begun = np.flatnonzero(self.sizes)
        stream = begun[generator.integers(len(begun), size=shape)]
        mixed = generator.random(shape) < share
        if contextual := known and learners == 1:
            task = np.where(mixed, generator.integers(n, size=shape), stream)
        else:
            task = np.broadcast_to(np.arange(learners)[:, None], shape)
            stream = np.where(mixed, stream, task)
        index = generator.integers(self.sizes[stream])
        task, data, span = self.tasks[task], self.data, np.arange(settings.expert_return_steps)

        left = data["end"][stream, index, 0].astype(int) - index  # in the episode, (N, B)
        steps = index[..., None] + np.minimum(span, left[..., None] - 1)  # (N, B, span)
        first, last = (stream, index), (stream, steps[..., -1])
        reward = self.rewards(stream[..., None], steps, task[..., None, :])
        weight = settings.expert_discount ** span * (span < left[..., None])
        batch = {"observation": data["observation"][first], "action": data["action"][first],
                 "next_observation": data["next_observation"][last],
                 "reward": settings.expert_reward_scale * (reward * weight).sum(-1),
                 "terminated": data["terminated"][last][..., 0],
                 "discount": settings.expert_discount ** np.minimum(len(span), left).astype(float)}
        for name in ("observation", "next_observation"):
            batch[name] = expert_input(self.family, batch[name], task if contextual else None)
        return {name: torch.as_tensor(value, dtype=torch.float32) for name, value in batch.items()}

    def rewards(self, stream: np.ndarray, step: np.ndarray, task: np.ndarray) -> np.ndarray:
        """Rewards (...,) of stored transitions for tasks (..., task)."""
        if not task.size or not self.family.outcome_size:
            return self.data["reward"][stream, step, 0]
        outcome, action = (self.data[name][stream, step] for name in ("outcome", "action"))
        return self.family.rewards_of(outcome, action, task)


def expert_input(family, observation: np.ndarray, task: np.ndarray | None = None) -> torch.Tensor:
    """Network input (..., obs [+ task]) in units of about one."""
    x = normalised(family, observation)
    if task is None:
        return x
    centre = 0.5 * (family.task_low + family.task_high)
    half = 0.5 * (family.task_high - family.task_low)
    return torch.cat([x, torch.as_tensor((task - centre) / half, dtype=torch.float32)], dim=-1)


# ---------------------------------------------------------------- step 1: experts
class Experts:
    """Mean actions of learned experts: observations (n, B, obs), tasks (n, task) -> (n, B, act).

    A contextual expert takes any task. Local experts know `tasks`, their training tasks, alone.
    """

    def __init__(self, family, policy: list[torch.Tensor], tasks: np.ndarray, contextual: bool):
        self.family, self.tasks, self.contextual = family, np.asarray(tasks), contextual
        self.policy = [p.detach().clone() for p in policy]

    @torch.no_grad()
    def __call__(self, observations: np.ndarray, tasks: np.ndarray) -> np.ndarray:
        if self.contextual:
            told = np.repeat(tasks[:, None], observations.shape[1], axis=1)
            x = expert_input(self.family, observations, told).flatten(0, 1)[None]
        else:
            if not np.array_equal(tasks, self.tasks):
                raise ValueError("local experts know their own training tasks only")
            x = expert_input(self.family, observations)
        action = squashed_mean(self.policy, x.to(self.policy[0].device)).cpu().numpy()
        return action.reshape(*observations.shape[:2], -1)


def train_experts(env, tasks: np.ndarray, settings: Settings, state: dict | None = None,
                  device="cpu") -> Iterator[tuple[Experts, Callable[[], dict], dict]]:
    """Step 1 of the algorithm. Yields (experts, snapshot, metrics) after every iteration.

    In every iteration each of `env`'s environments plays one episode, on tasks that take turns.
    `snapshot()` returns the state after that iteration: learner, replay, counts. A later call with
    this `state` continues bit for bit, since every iteration has its own random streams.
    FloatingPointError when a loss is not finite.
    """
    family, contextual = env.family, settings.experts == "contextual"
    learners = 1 if contextual else len(tasks)
    inputs = family.observation_size + contextual * family.task_size
    learner = SoftActorCritic(learners, inputs, family.action_size, settings, device)
    n, B = len(tasks), env.num_envs
    replay = Replay(family, tasks,
                    -(-settings.expert_iterations * B // n) * family.horizon)
    first, env_steps = 0, 0
    if state is not None:
        learner.load_state_dict(state["learner"])
        replay.load_state_dict(state["replay"])
        first, env_steps = state["iteration"], state["env_steps"]
    turns = random_streams(settings.seed, "experts", 0)[0].permutation(n)

    for iteration in range(first, settings.expert_iterations):
        rng, generator = random_streams(settings.seed, "experts", iteration)
        noise = CorrelatedNoise((learners, B // learners, family.action_size),
                                settings.expert_noise_correlation, generator)
        streams = np.sort(turns[(iteration * B + np.arange(B)) % n])
        task_of_env = tasks[streams]

        def explore(observation, last):
            if iteration == 0:  # random actions cover more than an untrained policy
                return rng.uniform(-1, 1, (B, family.action_size))
            x = expert_input(family, observation, task_of_env if contextual else None)
            x = x.view(learners, -1, x.shape[-1]).to(device)
            return learner.act(x, next(noise).to(device)).flatten(0, 1).cpu().numpy()

        # One episode in every environment, then many updates on the whole replay.
        episodes = rollout(env, explore, task_of_env)
        replay.add(episodes, streams)
        env_steps += int(episodes["mask"].sum())
        learner.set_learning_rate(iteration / settings.expert_iterations)
        info = learner.learn(replay, rng, generator)
        metrics = {"iteration": iteration + 1, "env_steps": env_steps,
                   **return_and_distance(episodes),
                   "divergences": int(episodes["diverged"].sum()),
                   **{name: float(value) for name, value in info.items()}}
        if not math.isfinite(metrics["critic_loss"] + metrics["policy_loss"]):
            raise FloatingPointError(
                f"the experts' losses are not finite in iteration {iteration + 1}: start again, "
                "with a lower expert_learning_rate and another output folder")

        def snapshot(iteration=iteration, env_steps=env_steps):
            return {"iteration": iteration + 1, "env_steps": env_steps,
                    "learner": learner.state_dict(), "replay": replay.state_dict()}
        yield Experts(family, learner.policy, tasks, contextual), snapshot, metrics


# ---------------------------------------------------------------- step 2: demonstrations
def run_experts(env, experts: ExpertFunction, tasks: np.ndarray,
                generator: np.random.Generator | None = None, noise: float = 0.0,
                aims: np.ndarray | None = None) -> dict:
    """Episodes of the experts, env.num_envs / n per task, with images where there are any.

    Gaussian `noise` is added to the actions of all episodes but each task's first. `aims`
    (env.num_envs, task): the task that a contextual expert is told instead of the episode's own.
    """
    by_task = len(tasks), env.num_envs // len(tasks)

    def act(observation, last):
        if env.family.image_shape:  # the policy sees a picture, a demonstrator the state
            observation = env.expert_observation
        if aims is None:
            action = np.array(experts(observation.reshape(*by_task, -1), tasks))
        else:
            action = np.array(experts(observation[:, None], aims)).reshape(*by_task, -1)
        if generator is not None:
            disturbance = generator.normal(0.0, noise, action[:, 1:].shape)
            action[:, 1:] += disturbance.astype(action.dtype)
        return action.reshape(env.num_envs, -1)

    return rollout(env, act, np.repeat(tasks, by_task[1], axis=0), keep_images=True)


class Demonstrations:
    """D*_i: labelled states of each task, observations (n, M, obs) and actions (n, M, act).

    `mask` (n, M): which states were visited; the rest is padding after an early end. If the policy
    sees images (n, M, rows, columns, 3), uint8, `observations` are the numbers beside them, and
    `states` (n, M, state), if known, are what the experts see. `freeze` computes `inputs` (n, M,
    F), what the policy's MLP sees. Then more can be added.
    """

    def __init__(self, observations: np.ndarray, actions: np.ndarray,
                 images: np.ndarray | None = None, mask: np.ndarray | None = None,
                 states: np.ndarray | None = None):
        mask = np.ones(actions.shape[:2], bool) if mask is None else mask
        if observations.ndim != 3 or actions.ndim != 3 or not (
                observations.shape[:2] == actions.shape[:2] == mask.shape):
            raise ValueError("demonstrations need observations (n, M, obs), actions (n, M, act) "
                             f"and mask (n, M), not {observations.shape}, {actions.shape} and "
                             f"{mask.shape}")
        for name, hidden in (("images", images), ("states", states)):
            if hidden is not None and hidden.shape[:2] != actions.shape[:2]:
                raise ValueError(f"demonstrations have {actions.shape[:2]} actions and "
                                 f"{hidden.shape[:2]} {name}")
        if not mask.any(1).all():
            raise ValueError("demonstrations lack a visited state for some task")
        self.observations, self.actions = observations, actions
        self.images, self.states, self.inputs = images, states, None
        self._set_mask(mask)

    def _set_mask(self, mask):
        self.mask = mask
        self.visited = np.argsort(~mask, axis=1, kind="stable")  # visited states first, in order

    @torch.no_grad()
    def freeze(self, family, theta: Params) -> None:
        """Compute `inputs` once, by theta; `sample` returns these from now on."""
        device = theta["z"].device
        image = [] if self.images is None else [torch.as_tensor(self.images).to(device)]
        self.inputs = features(theta, normalised(family, self.observations).to(device), *image)

    def add(self, inputs: torch.Tensor, actions: np.ndarray, mask: np.ndarray) -> None:
        """More labelled states of every task; `mask` (n, A): which were visited."""
        self.inputs = torch.cat([self.inputs, inputs.to(self.inputs)], dim=1)
        self.actions = np.concatenate([self.actions, actions], axis=1)
        self._set_mask(np.concatenate([self.mask, mask], axis=1))

    def add_visited(self, inputs: torch.Tensor, episodes: dict, experts: ExpertFunction,
                    tasks: np.ndarray) -> None:
        """Label the states of rollouts on every task with its expert, and add them (step 3c).

        `inputs` (n, episodes, T, F): what the policy saw there. An expert sees the state, even
        where the policy sees images.
        """
        states = episodes.get("states", episodes["observations"])[:, :-1]
        states = states.reshape(len(tasks), -1, states.shape[-1])
        self.add(inputs.flatten(1, 2), experts(states, tasks),
                 episodes["mask"].reshape(len(tasks), -1) > 0)

    def added(self, given: int) -> list[torch.Tensor]:
        """Copies of what `add` takes, for all that was added to the first `given` states."""
        return [torch.as_tensor(part)[:, given:].clone()
                for part in (self.inputs.cpu(), self.actions, self.mask)]

    def sample(self, family, generator: np.random.Generator, tasks: np.ndarray, count: int,
               device="cpu") -> tuple[torch.Tensor, ...]:
        """`count` random labelled states of each task index in `tasks` (m,).

        Returns network inputs (m, count, F) and expert actions (m, count, act). Before `freeze`
        observations take the inputs' place, and images (m, count, rows, columns, 3) and states
        (m, count, state) follow where there are any.
        """
        task = tasks[:, None]
        count_of = self.mask.sum(1)[task]
        index = self.visited[task, generator.integers(count_of, size=(len(tasks), count))]
        action = torch.as_tensor(self.actions[task, index], dtype=torch.float32).to(device)
        if self.inputs is not None:
            return self.inputs[torch.as_tensor(task), torch.as_tensor(index)], action
        observation = normalised(family, self.observations[task, index]).to(device)
        hidden = []
        if self.images is not None:
            hidden += [torch.as_tensor(self.images[task, index]).to(device)]
        if self.states is not None:
            hidden += [normalised(family.expert_family, self.states[task, index]).to(device)]
        return observation, action, *hidden

    def arrays(self) -> dict[str, np.ndarray]:
        """By name, without those that there are none of."""
        found = {name: getattr(self, name)
                 for name in ("observations", "actions", "mask", "images", "states")}
        return {name: value for name, value in found.items() if value is not None}


def make_demonstrations(env, experts: ExpertFunction, tasks: np.ndarray,
                        settings: Settings) -> tuple[Demonstrations, dict]:
    """Step 2: D*_i, the states that experts visit and their mean actions there; and the episodes.

    Each task's first episode has no noise. In the others noise moves the expert off its path, so
    the labels show the way back. In the last `demonstration_detours` episodes it heads for a random
    task instead. Labels are still for the episode's own task: they show the way back from further
    off. `env` holds n * settings.demonstration_episodes environments.
    """
    n, episodes_each = len(tasks), settings.demonstration_episodes
    rng, _ = random_streams(settings.seed, "demonstrations", 0)
    aims, detours = None, min(settings.demonstration_detours, episodes_each - 1)
    if detours:
        aims = np.repeat(tasks[:, None], episodes_each, axis=1)
        aims[:, -detours:] = tasks[rng.integers(n, size=(n, detours))]
        aims = aims.reshape(env.num_envs, -1)
    episodes = run_experts(env, experts, tasks, rng, settings.demonstration_noise, aims)

    def by_task(name):
        x = episodes[name][:, :-1]  # the last observation has no action
        return x.reshape(n, -1, *x.shape[2:])
    hidden = {name: by_task(name) for name in ("images", "states") if name in episodes}
    labels = experts(by_task("states" if hidden else "observations"), tasks)
    mask = episodes["mask"].reshape(n, -1) > 0
    return Demonstrations(by_task("observations"), labels, mask=mask, **hidden), episodes


def save_demonstrations(file, tasks, demonstrations: Demonstrations, env_steps: int) -> None:
    """npz with tasks (n, task), the arrays of `Demonstrations`, and the env steps they took."""
    np.savez_compressed(file, tasks=tasks, env_steps=env_steps, **demonstrations.arrays())


def load_demonstrations(file, family) -> tuple[np.ndarray, Demonstrations, int]:
    """`check_demonstrations` of an npz file, which may also lack `env_steps`."""
    with open(file, "rb") as opened:
        if not zipfile.is_zipfile(opened):
            raise ValueError("demonstrations must be an npz file, and whole")
    with np.load(file, allow_pickle=False) as data:
        return check_demonstrations(data, family)


def check_demonstrations(data: Mapping, family) -> tuple[np.ndarray, Demonstrations, int]:
    """(tasks, demonstrations, env_steps) from arrays by name; ValueError where they do not fit.

    `mask` (all visited), `env_steps` (0) and `states` may be missing.
    """
    needed = ["tasks", "observations", "actions"] + ["images"] * bool(family.image_shape)
    known = needed + ["states"] * bool(family.image_shape)
    if missing := set(needed) - set(data):
        raise ValueError(f"demonstrations lack {sorted(missing)}")
    arrays = {name: data[name] for name in known if name in data}
    mask, env_steps = data.get("mask"), data.get("env_steps", np.array(0))
    n, M = arrays["observations"].shape[:2] if arrays["observations"].ndim == 3 else (0, 0)
    wanted = {"tasks": (n, family.task_size), "observations": (n, M, family.observation_size),
              "actions": (n, M, family.action_size), "images": (n, M, *(family.image_shape or ())),
              "states": (n, M, family.expert_family.observation_size)}
    for name, array in arrays.items():
        if array.shape != wanted[name] or not n * M:
            letters = ["n"] if name == "tasks" else ["n", "M"]
            shape = ", ".join(map(str, letters + list(wanted[name][len(letters):])))
            raise ValueError(f"demonstrations: {name} have shape {array.shape}, which does not fit "
                             f"{family.name}: give ({shape}), n and M at least 1, the same for all")
        if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            raise ValueError(f"demonstrations: {name} are not all finite numbers")
    if np.abs(arrays["actions"]).max() > 1 + 1e-6:
        raise ValueError("demonstrations: actions reach beyond [-1, 1]: clip them, as the "
                         "environment does")
    if family.image_shape and arrays["images"].dtype != np.uint8:
        raise ValueError(f"demonstrations: images have type {arrays['images'].dtype}, not uint8")
    if mask is not None and mask.dtype != bool or env_steps.size != 1:
        raise ValueError("demonstrations: mask must be of type bool, env_steps one number")
    return arrays.pop("tasks"), Demonstrations(**arrays, mask=mask), int(env_steps)
