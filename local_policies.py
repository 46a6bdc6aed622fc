"""Local experts: soft actor-critic on the training tasks, and the demonstrations that the experts give.

Local experts are one learner per training task, trained as one batch (sac.py). The *contextual* expert (one policy that
sees the goal) is the same code with one learner whose observation has the goal appended.

Source: steps 1 and 2 of "Guided Meta-Policy Search" (Mendonca et al., NeurIPS 2019, arXiv 1904.00956v2).
Letters in shape comments: N learners, B batch, S tasks (and replay streams).
"""
import math
import zipfile

import numpy as np
import torch

from envs import correlated_noise, random_streams, rollout
from sac import SoftActorCritic, policy_mean


# ---------------------------------------------------------------- replay
class Replay:
    """Transitions in S streams, one per training task, all of the same length. Arrays (S, capacity, size), in the
    environment's units; `end` is the index in the stream just past the transition's episode."""
    FIELDS = ("observation", "action", "next_observation", "outcome", "terminated", "end")

    def __init__(self, family, tasks, capacity):
        self.family, self.tasks, self.capacity, self.size = family, tasks, capacity, 0
        widths = (family.observation_size, family.action_size, family.observation_size, family.outcome_size, 1, 1)
        self.data = {name: np.zeros((len(tasks), capacity, width), np.float32)
                     for name, width in zip(self.FIELDS, widths)}

    def add(self, episodes):
        """Append whole episodes from `envs.rollout`, whose environments are ordered by task."""
        streams = len(self.tasks)
        observations, mask = episodes["observations"], episodes["mask"]
        terminated = np.zeros_like(mask)
        ended = np.flatnonzero(episodes["terminated"])
        terminated[ended, mask[ended].sum(1).astype(int) - 1] = 1.0
        ends = np.cumsum(mask.sum(1).reshape(streams, -1), axis=1).reshape(-1, 1)  # (S * E, 1), counted in its stream
        fields = (observations[:, :-1], episodes["actions"], observations[:, 1:], episodes["outcomes"],
                  terminated[..., None], np.broadcast_to(ends, mask.shape)[..., None])
        kept = mask.reshape(streams, -1) > 0
        count = int(kept.sum(1).min())  # streams stay equally long: an early end cuts all of them
        if self.size + count > self.capacity:
            raise ValueError(f"replay of {self.capacity} transitions per task is full")
        for name, values in zip(self.FIELDS, fields):
            values = values.reshape(streams, -1, values.shape[-1])
            self.data[name][:, self.size:self.size + count] = np.stack([v[k][:count] for v, k in zip(values, kept)])
        new_ends = self.data["end"][:, self.size:self.size + count]
        new_ends[:] = self.size + np.minimum(new_ends, count)
        self.size += count

    def state_dict(self):
        return {name: torch.as_tensor(values[:, :self.size].copy()) for name, values in self.data.items()}

    def load_state_dict(self, state):
        self.size = state["action"].shape[1]
        for name, values in state.items():
            self.data[name][:, :self.size] = values.numpy()

    def sample(self, generator, learners, settings):
        """A batch for every learner: dict of (N, B, ...) float32 tensors.

        The dynamics of all tasks are the same and every training task's reward is known at meta-training, so a
        transition met on one task is as good a sample of another. The contextual learner (N = 1) relabels a share
        `expert_relabelled` of its batch with another training goal, which is also what it sees; a local learner keeps
        its own task and takes that share of its transitions from everyone's replay. Below, `stream` says whose transition a
        sample is and `task` whose reward it gets.

        A sample spans `expert_return_steps` transitions (fewer at the end of an episode): the reward is their discounted
        sum, `discount` what is left of the value after them.
        """
        streams, shape = len(self.tasks), (learners, settings.expert_batch)
        stream = generator.integers(streams, size=shape)
        mixed = generator.random(shape) < settings.expert_relabelled
        if learners == 1:
            task = np.where(mixed, generator.integers(streams, size=shape), stream)
        else:
            task = np.broadcast_to(np.arange(learners)[:, None], shape)
            stream = np.where(mixed, stream, task)
        index = generator.integers(self.size, size=shape)
        task, data, span = self.tasks[task], self.data, np.arange(settings.expert_return_steps)
        left = data["end"][stream, index, 0].astype(int) - index  # transitions left in the episode, (N, B)
        steps = index[..., None] + np.minimum(span, left[..., None] - 1)  # (N, B, span)
        last = steps[..., -1]
        outcome, action = (data[name][stream[..., None], steps] for name in ("outcome", "action"))
        reward = sum(self.family.reward_terms(outcome, action, task[..., None, :]).values())
        weight = settings.expert_discount ** span * (span < left[..., None])
        batch = {"observation": data["observation"][stream, index], "action": action[..., 0, :],
                 "next_observation": data["next_observation"][stream, last],
                 "reward": settings.expert_reward_scale * (reward * weight).sum(-1),
                 "terminated": data["terminated"][stream, last, 0],
                 "discount": settings.expert_discount ** np.minimum(len(span), left).astype(float)}
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


# ---------------------------------------------------------------- experts: learning, labels, demonstrations
class Experts:
    """Mean actions of the learned experts. Calls map observations (n, B, obs) and tasks (n, task) to (n, B, act).

    With `contextual`, any task will do; local experts exist for `tasks`, their training tasks, alone.
    """

    def __init__(self, family, policy, tasks, contextual):
        self.family, self.tasks, self.contextual = family, np.asarray(tasks), contextual
        self.policy = [p.detach().clone() for p in policy]

    def __call__(self, observations, tasks):
        if self.contextual:
            x = expert_input(self.family, observations, np.repeat(tasks[:, None], observations.shape[1], axis=1))
            x = x.flatten(0, 1)[None]
        else:
            if not np.array_equal(tasks, self.tasks):
                raise ValueError("local experts know their own training tasks only")
            x = expert_input(self.family, observations)
        with torch.no_grad():
            return policy_mean(self.policy, x.to(self.policy[0].device)).cpu().numpy().reshape(*observations.shape[:2], -1)


def run_experts(env, experts, tasks, generator=None, noise=0.0, aims=None):
    """Episodes of the experts, `env.num_envs / n` per task: with Gaussian `noise` added to all but each task's first.

    `aims` (env.num_envs, task): what contextual experts are told in each episode, where it is not the episode's task.
    """
    n = len(tasks)

    def act(observation):
        if env.family.image_shape:  # the policy sees a picture, a demonstrator the state
            observation = env.expert_observation
        if aims is None:
            action = np.array(experts(observation.reshape(n, -1, observation.shape[-1]), tasks))
        else:
            action = np.array(experts(observation[:, None], aims)).reshape(n, -1, env.family.action_size)
        if generator is not None:
            action[:, 1:] += generator.normal(0.0, noise, action[:, 1:].shape).astype(action.dtype)
        return action.reshape(env.num_envs, -1)

    return rollout(env, act, np.repeat(tasks, env.num_envs // n, axis=0))


def train_experts(env, tasks, settings, state=None, device="cpu"):
    """Step 1 of the algorithm. A generator that yields (experts, state, metrics) after every iteration.

    `env`: BatchEnv with len(tasks) * settings.expert_episodes environments. The yielded `state` is a function that takes
    a snapshot of that moment: learner, replay, iteration and step count. Given back as `state`, a snapshot goes on with
    the same bits, since every iteration derives its own random streams from seed and iteration. FloatingPointError when
    a loss is no longer finite.
    """
    family, contextual = env.family, settings.experts == "contextual"
    learners = 1 if contextual else len(tasks)
    learner = SoftActorCritic(learners, family.observation_size + contextual * family.task_size, family.action_size,
                              settings, device)
    per_iteration = settings.expert_episodes * family.horizon
    replay = Replay(family, tasks, settings.expert_iterations * per_iteration)
    first, env_steps = 0, 0
    if state is not None:
        learner.load_state_dict(state["learner"])
        replay.load_state_dict(state["replay"])
        first, env_steps = state["iteration"], state["env_steps"]
    task_of_env = np.repeat(tasks, settings.expert_episodes, axis=0)

    for iteration in range(first, settings.expert_iterations):
        rng, generator = random_streams(settings.seed, "experts", iteration)
        noise = correlated_noise((learners, env.num_envs // learners, family.action_size),
                                 settings.expert_noise_correlation, generator)

        def explore(observation):
            if iteration == 0:
                return rng.uniform(-1, 1, (env.num_envs, family.action_size))
            x = expert_input(family, observation, task_of_env if contextual else None)
            x = x.view(learners, -1, x.shape[-1])
            return learner.act(x.to(device), next(noise).to(device)).flatten(0, 1).cpu().numpy()

        episodes = rollout(env, explore, task_of_env)
        replay.add(episodes)
        env_steps += int(episodes["mask"].sum())
        learner.set_learning_rate(iteration / settings.expert_iterations)
        for _ in range(settings.expert_updates):
            batch = {name: value.to(device) for name, value in replay.sample(rng, learners, settings).items()}
            info = learner.update(batch, generator)
        metrics = {"iteration": iteration + 1, "env_steps": env_steps,
                   "return": float(episodes["rewards"].sum(1).mean()),
                   "distance": float(episodes["distances"][:, -1].mean()),
                   **{name: float(value) for name, value in info.items()}}
        if not math.isfinite(metrics["critic_loss"] + metrics["policy_loss"]):
            raise FloatingPointError(f"the experts' losses are not finite in iteration {iteration + 1}")

        def snapshot(iteration=iteration, env_steps=env_steps):
            return {"iteration": iteration + 1, "env_steps": env_steps, "learner": learner.state_dict(),
                    "replay": replay.state_dict()}
        yield Experts(family, learner.policy, tasks, contextual), snapshot, metrics


def make_demonstrations(env, experts, tasks, settings):
    """Step 2, D*_i: states (n, M, obs) that the experts visit (an episode's last one again after an early end) and their
    mean actions there (n, M, act), and env steps; a family with images has those, (n, M, rows, columns, 3), before the
    env steps.

    Each task's first episode is the expert's own; in the others Gaussian noise moves it off its path, so that the
    labels show how it comes back. In the last `demonstration_detours` episodes of each task the expert is sent to the goal
    of a task drawn at random, while the labels are still those of its own: they show the way back from much further
    off. `env`: BatchEnv with len(tasks) * settings.demonstration_episodes environments.
    """
    rng, _ = random_streams(settings.seed, "demonstrations", 0)
    aims, detours = None, min(settings.demonstration_detours, settings.demonstration_episodes - 1)
    if detours:
        aims = np.repeat(tasks[:, None], settings.demonstration_episodes, axis=1)
        aims[:, -detours:] = tasks[rng.integers(len(tasks), size=(len(tasks), detours))]
        aims = aims.reshape(env.num_envs, -1)
    episodes = run_experts(env, experts, tasks, rng, settings.demonstration_noise, aims)
    by_task = lambda x: x[:, :-1].reshape(len(tasks), -1, *x.shape[2:])  # noqa: E731
    images = [by_task(episodes["images"])] if env.family.image_shape else []
    actions = experts(by_task(episodes["states" if images else "observations"]), tasks)
    return by_task(episodes["observations"]), actions, *images, int(episodes["mask"].sum())


def save_demonstrations(file, tasks, arrays, env_steps):
    """npz with tasks (n, task), observations (n, M, obs), actions (n, M, act), of a family with images these too
    (n, M, height, width, 3), and the env steps that they took. `arrays`: observations, actions and any images.
    """
    named = dict(zip(("observations", "actions", "images"), arrays))
    np.savez_compressed(file, tasks=tasks, env_steps=env_steps, **named)


def load_demonstrations(file, family):
    """(tasks, arrays, env_steps) as `save_demonstrations` was given, env_steps 0 where missing; ValueError where they do not
    fit `family`."""
    with open(file, "rb") as opened:
        if not zipfile.is_zipfile(opened):
            raise ValueError("demonstrations must be an npz file, and whole")
    with np.load(file, allow_pickle=False) as data:
        needed = ("tasks", "observations", "actions") + (("images",) if family.image_shape else ())
        missing = set(needed) - set(data.files)
        if missing:
            raise ValueError(f"demonstrations lack {sorted(missing)}")
        arrays = {name: data[name] for name in needed}
        env_steps = int(data["env_steps"]) if "env_steps" in data.files else 0
    n, M = arrays["observations"].shape[:2] if arrays["observations"].ndim == 3 else (0, 0)
    wanted = {"tasks": (n, family.task_size), "observations": (n, M, family.observation_size),
              "actions": (n, M, family.action_size), "images": (n, M, *(family.image_shape or ()))}
    for name, array in arrays.items():
        if array.shape != wanted[name] or not n * M:
            shape = (["n"] if name == "tasks" else ["n", "M"]) + list(wanted[name][1 if name == "tasks" else 2:])
            raise ValueError(f"demonstrations: {name} have shape {array.shape}, which does not fit {family.name}: give "
                             f"({', '.join(map(str, shape))}), with n and M at least 1 and the same for all")
        if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            raise ValueError(f"demonstrations: {name} are not all finite numbers")
    if np.abs(arrays["actions"]).max() > 1 + 1e-6:
        raise ValueError("demonstrations: actions reach beyond [-1, 1]: clip them, as the environment does")
    if family.image_shape and arrays["images"].dtype != np.uint8:
        raise ValueError(f"demonstrations: images have type {arrays['images'].dtype}, not uint8")
    tasks, *rest = arrays.values()
    return tasks, tuple(rest), env_steps
