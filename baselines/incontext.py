"""In-context imitation: a recurrent student that imitates experts and adapts through its memory.

Where guided meta-policy search learns to adapt by gradient steps, this student learns to adapt by
remembering: the same experts, no gradient at test time. Its network and its input are those of RL^2
(recurrent.py). It learns by DAgger ("A Reduction of Imitation Learning and Structured Prediction to
No-Regret Online Learning", Ross, Gordon and Bagnell 2011, arXiv 1011.0686, Algorithm 3.1), over
whole trials. It acts through several episodes of a training task, the task's expert labels every
state that it visits, and it imitates the labels of all trials so far. The expert knows the task,
the student must find it out from rewards. So the best that it can do is to act as the mean of the
experts of all tasks that its memory leaves possible.

[ours] Each trial is also copied with the rewards and labels of other training tasks (`relabelled`).
So the student sees the same steps under many goals. docs/comparisons.md has the effect.

beta_i = I(i = 1), the choice without a parameter: the expert acts in the first iteration, the
student in all later ones. Letters in shapes: n tasks, B trials, L steps of a trial.
"""
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

import settings as settings_module
from baselines import recurrent, refuse_images
from baselines.recurrent import (
    Adapter,
    Learner,
    Policy,
    joined,
    mean_over,
    play_trials,
    some_trials,
)
from policy import imitated
from settings import UserError, random_streams


@dataclass(frozen=True)
class Settings(recurrent.Settings):
    iterations: int = settings_module.within(
        15, 1, 1_000_000, "*iterations: labelled trials on all training tasks, then gradient steps")
    trials: int = settings_module.within(1, 1, 10_000, "*trials per training task and iteration")
    meta_steps: int = settings_module.within(
        300, 1, 1_000_000, "*Adam steps per iteration, on the trials of all iterations")
    memory_rate: float = settings_module.within(
        3e-3, 1e-7, 1.0, "*Adam's learning rate; falls to the share final_rate")
    trial_batch: int = settings_module.within(32, 1, 100_000, "trials per gradient step")
    relabelled: int = settings_module.within(
        8, 0, 1000, "*copies of every trial with another training task's rewards and labels")
    on_task = dict(ant=dict(trial_batch=16))  # its trials are longer: this saves time


def train(problem, settings: Settings, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
    """Algorithm 3.1, with its lines counted from 1. Yields after every iteration.

    FloatingPointError when a gradient is no longer finite.
    """
    family = problem.family
    refuse_images(family, settings)
    experts = problem.train_experts()
    if experts is None:
        raise UserError("--method incontext asks experts about states that it visits itself: leave "
                        "--demos out")
    _, generator = random_streams(settings.seed, "meta-training", 0)
    student = Policy(family, settings, generator)
    learner = Learner(problem, settings, {"policy": student}, state)
    training = None if state is None else state["training"]
    trials = {} if training is None else dict(training["trials"])                 # lines 1, 2
    while learner.begin():                                                        # 3
        # Roll in: the expert acts in the first iteration, then the student.      # 4, 5
        agent, played = learner.agent(), []
        acts = who_acts(learner, agent, experts, problem)
        for number, (steps, episodes) in enumerate(
                play_trials(agent, problem, settings, learner.generator, acts)):
            learner.count(number, episodes)
            played.append((steps, episodes))
        # The task's expert labels every state that was visited; aggregate.       # 6, 7
        trials = aggregated(trials, labelled(played, experts, problem, settings))
        for shift in other_tasks(learner, problem):
            trials = aggregated(trials, labelled(played, experts, problem, settings, shift))
        # Imitate the labels of all trials so far.                                # 8
        for _ in range(settings.meta_steps):
            which = learner.rng.integers(len(trials["mask"]), size=settings.trial_batch)
            batch = some_trials(trials, which, problem.device)
            loss = imitation_loss(student, batch, settings)
            learner.minimise(loss)
        yield learner.state(trials=dict(trials)), learner.metrics(imitation_1=float(loss.detach()))
    problem.meta_test(Adapter(learner.policy(), family, settings, problem.device))


# ---------------------------------------------------------------- who acts
def ask(experts, observations: np.ndarray, tasks: np.ndarray) -> np.ndarray:
    """Experts' actions (B, ..., act) for observations (B, ..., obs), B ordered by task."""
    by_task = observations.reshape(len(tasks), -1, observations.shape[-1])
    return np.reshape(experts(by_task, tasks), (*observations.shape[:-1], -1)).astype(np.float32)


def who_acts(learner: Learner, agent: Adapter, experts, problem) -> list:
    """One after the other for each episode of a trial: the expert in iteration 1, then the student.

    In all but a trial's last episode the student explores and the expert's actions get noise, as in
    GMPS's demonstrations. The last one is played as it is measured, without noise.
    """
    settings = learner.settings
    explored = settings.trial_episodes - 1
    if learner.iteration > 1:
        return [agent.act] * explored + [partial(agent.act, explore=False)]

    def expert_acts(observation, last, noise=settings.demonstration_noise):
        agent.act(observation, last, explore=False)  # its memory takes the step in
        action = ask(experts, observation, problem.tasks)
        action += learner.rng.normal(0.0, noise, action.shape).astype(np.float32)
        agent.executed(torch.as_tensor(action))
        return action
    return [expert_acts] * explored + [partial(expert_acts, noise=0.0)]


# ---------------------------------------------------------------- labelled trials, and their loss
def labelled(played: list, experts, problem, settings: Settings, shift: int = 0) -> dict:
    """Trials (B, L, ...) of what `play_trials` gave, with the experts' actions as "label".

    With a `shift` the trials of task i become trials of task i + shift, counted in a circle. What
    was done stays as it was; the rewards are those of that task, in the network's input as well,
    and so are the labels. Rewards of all training tasks are known, as they are to GMPS.
    """
    family, parts = problem.family, []
    tasks = np.roll(problem.tasks, -shift, axis=0)
    for steps, episodes in played:
        # Experts may know the training tasks in this order only: so states move, not tasks.
        states = rolled(episodes["observations"][:, :-1], shift, len(tasks))
        labels = rolled(ask(experts, states, problem.tasks), -shift, len(tasks))
        part = steps | {"label": torch.as_tensor(labels)}
        if shift:
            told = np.repeat(tasks, settings.trials, axis=0)[:, None]
            rewards = family.rewards_of(episodes["outcomes"], episodes["actions"], told)
            part["reward"] = torch.as_tensor(rewards).to(steps["reward"]) * steps["mask"]
        parts.append(part)
    trials = joined(parts)
    if shift:
        column = family.observation_size + family.action_size  # see Adapter.act
        trials["input"][:, 1:, column] = settings.expert_reward_scale * trials["reward"][:, :-1]
    return trials


def rolled(values: np.ndarray, shift: int, n: int) -> np.ndarray:
    """(B, ...), ordered by task: what was task i's is then task (i + shift)'s."""
    return np.roll(values, shift * (len(values) // n), axis=0)


def other_tasks(learner: Learner, problem) -> np.ndarray:
    """Random shifts from each task to another; none where rewards cannot be computed again."""
    others = len(problem.tasks) - 1
    count = min(learner.settings.relabelled, others) if problem.family.outcome_size else 0
    return 1 + learner.rng.permutation(others)[:count]


def aggregated(trials: dict, new: dict) -> dict:
    """All trials so far, (B, L, ...), and what the loss needs of them."""
    needed = {name: new[name] for name in ("input", "label", "mask")}
    if not trials:
        return needed
    return {name: torch.cat([trials[name], value]) for name, value in needed.items()}


def imitation_loss(student: Policy, batch: dict, settings: Settings) -> torch.Tensor:
    """mean_s || mean of the student's policy(s and all before) - a* ||^2, over visited steps."""
    action = imitated(student(batch["input"])[0], settings)
    return mean_over((action - batch["label"]).square().sum(-1), batch["mask"])
