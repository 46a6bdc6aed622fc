"""Tests of in-context imitation: who acts, which labels, the loss; what it learns."""
import dataclasses

import numpy as np
import pytest
import torch

from baselines import incontext, recurrent
from tests.conftest import FRAGILE, PUSH, finite_difference, make_problem, relative_error
from tests.point_task import CircleGoal, point_problem
from tests.test_recurrent import POINT, numpy_gru, random_policy
from tests.test_rl2 import learned, normal

SMALL = incontext.Settings(method="incontext", hidden=6, memory=5, trials=2, trial_episodes=3,
                           iterations=3, meta_steps=2, trial_batch=4, expert_reward_scale=0.5,
                           demonstration_noise=0.2, relabelled=0)


def watched(settings=SMALL, problem=None):
    """(results of `envs.rollout` in order, states yielded) of a training."""
    problem, seen = problem or point_problem(3), []
    rollout = problem.rollout

    def watch(policy, tasks, episodes):
        seen.append(rollout(policy, tasks, episodes))
        return seen[-1]
    problem.rollout = watch
    return seen, [state for state, _ in incontext.train(problem, settings)]


def told(problem, settings=SMALL):
    """(B, task): the task of each trial."""
    return np.repeat(problem.tasks, settings.trials, axis=0)


def straight(problem, episodes, tasks=None):
    """The expert's actions on the states of rollouts, trial by trial, (B, T, act)."""
    tasks = told(problem) if tasks is None else tasks
    return CircleGoal().expert(episodes["observations"][:, :-1], tasks)


# ---------------------------------------------------------------- who acts, which labels
def test_the_expert_acts_first_then_the_student():
    """beta_i = I(i = 1). Noise on the expert's actions, and none in a trial's last episode."""
    problem = point_problem(3)
    seen, states = watched(problem=problem)
    assert len(seen) == 9
    for episode in range(3):
        noise = seen[episode]["actions"] - straight(problem, seen[episode])
        if episode == 2:
            assert not noise.any()
        else:
            assert 0.15 < noise.std() < 0.25 and abs(noise.mean()) < 0.06
    for iteration in (1, 2):
        student = recurrent.Adapter(states[iteration - 1]["policy"], POINT, SMALL)
        trials = states[iteration]["training"]["trials"]
        mean = student.network(trials["input"][6 * iteration:6 * iteration + 6])[0].detach()
        for episode in range(3):
            played = seen[3 * iteration + episode]["actions"]
            noise = (played - mean[:, 10 * episode:10 * episode + 10].numpy()) / 0.5
            if episode == 2:
                assert np.abs(noise).max() < 1e-4
            else:
                assert 0.8 < noise.std() < 1.2


def test_the_student_remembers_what_the_expert_did():
    """Its input holds the executed actions and their rewards, as it will hold its own."""
    problem = point_problem(3)
    seen, states = watched(problem=problem)
    x = states[0]["training"]["trials"]["input"].numpy()
    for episode in range(3):
        part = x[:, 10 * episode:10 * episode + 10]
        actions = np.clip(seen[episode]["actions"], -1, 1)
        assert np.allclose(part[:, 1:, 2:4], actions[:, :-1], atol=1e-6)
        assert np.allclose(part[:, 1:, 4], 0.5 * seen[episode]["rewards"][:, :-1], atol=1e-6)


def test_labels_are_the_own_tasks_expert_on_visited_states():
    """Of all iterations, and they stay."""
    problem = point_problem(3)
    seen, states = watched(problem=problem)
    for iteration, state in enumerate(states, start=1):
        labels = state["training"]["trials"]["label"].numpy()
        assert labels.shape == (6 * iteration, 30, 2)
        for k, episodes in enumerate(seen[:3 * iteration]):
            part = labels[6 * (k // 3):6 * (k // 3) + 6, 10 * (k % 3):10 * (k % 3) + 10]
            assert np.allclose(part, straight(problem, episodes), atol=1e-6)


def test_early_ends_leave_no_labels_of_states_that_nobody_visited():
    problem = make_problem(PUSH.training_tasks(3), family=FRAGILE, experts=lambda x, tasks: (
        np.concatenate([x[..., :2], x[..., 3:4]], -1).astype(np.float32)))
    seen, states = watched(problem=problem)
    trials = states[-1]["training"]["trials"]
    for row in range(6):
        visited = [episodes["observations"][row, t] for episodes in seen[:3]
                   for t in range(int(episodes["mask"][row].sum()))]
        assert trials["mask"][row].sum() == len(visited) < 150
        assert np.allclose(trials["label"][row, :len(visited)], np.array(visited)[:, [0, 1, 3]])


def test_relabelled_trials():
    """Rewards, also in the input, and labels of the other task; what was done stays.

    A whole turn of the circle computes everything again and must give the trials themselves.
    """
    problem, settings = point_problem(3), SMALL
    agent = recurrent.Adapter(random_policy(POINT, settings), POINT, settings)
    played = list(recurrent.play_trials(agent, problem, settings, torch.Generator().manual_seed(0),
                                        [agent.act] * 3))
    own, turn, other = (incontext.labelled(played, problem.train_experts(), problem, settings, s)
                        for s in (0, 3, 1))
    for name, value in own.items():
        assert torch.allclose(value, turn[name], atol=1e-6), name
    tasks = told(problem)[[2, 3, 4, 5, 0, 1]]
    for k, (_, episodes) in enumerate(played):
        part = slice(10 * k, 10 * k + 10)
        distance = np.linalg.norm(episodes["outcomes"] - tasks[:, None], axis=-1)
        assert np.allclose(other["reward"][:, part], -distance, atol=1e-5)
        assert np.allclose(other["label"][:, part], straight(problem, episodes, tasks), atol=1e-5)
    assert torch.allclose(other["input"][:, 1:, 4], 0.5 * other["reward"][:, :-1])
    rest = [0, 1, 2, 3, 5]
    assert torch.equal(other["input"][..., rest], own["input"][..., rest])
    assert (other["input"][:, 1:, 4] - own["input"][:, 1:, 4]).abs().max() > 0.1


@pytest.mark.parametrize("relabelled, outcome, expected", [(0, 2, 6), (1, 2, 12), (9, 2, 18),
                                                           (9, 0, 6)])
def test_as_many_trials_as_the_settings_say(relabelled, outcome, expected):
    """At most one for each other task; none where rewards cannot be computed again."""
    problem = point_problem(3)
    problem.family.outcome_size = outcome
    settings = dataclasses.replace(SMALL, relabelled=relabelled, iterations=1)
    _, (state,) = watched(settings, problem)
    assert len(state["training"]["trials"]["mask"]) == expected


# ---------------------------------------------------------------- the loss
@pytest.mark.parametrize("choice", ["executed", "mean"])
def test_loss_and_gradient(choice):
    """In numpy, over visited steps; every parameter against finite differences; no noise in it."""
    settings = dataclasses.replace(SMALL, imitated_action=choice)
    student = recurrent.Policy(POINT, settings, torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        for number, p in enumerate(student.parameters()):
            p.copy_(normal(*p.shape, seed=number))
    batch = {"input": normal(3, 6, 6), "label": normal(3, 6, 2, seed=1).clamp(-1, 1),
             "mask": torch.ones(3, 6, dtype=torch.float64)}
    batch["mask"][1, 4:] = 0
    loss = incontext.imitation_loss(student, batch, settings)
    loss.backward()
    errors, beyond = [], 0
    for row, length in enumerate((6, 4, 6)):
        mean = numpy_gru(student.state_dict(), batch["input"][row].numpy())[0][:length]
        beyond += (np.abs(mean) > 1).sum()
        if choice == "executed":
            mean = 0.9 * np.clip(mean, -1, 1) + 0.1 * mean
        errors += [((mean - batch["label"][row, :length].numpy()) ** 2).sum(1)]
    assert float(loss.detach()) == pytest.approx(np.concatenate(errors).mean()) and beyond > 4
    for name, parameter in student.named_parameters():
        if name == "log_std":
            assert parameter.grad is None
            continue
        with torch.no_grad():
            numeric = finite_difference(
                parameter, lambda: float(incontext.imitation_loss(student, batch, settings)))
        assert relative_error(parameter.grad, numeric) < 1e-6, name


# ---------------------------------------------------------------- what is learned
@pytest.mark.slow
def test_the_second_episode_is_better_by_what_the_first_found_out():
    """Who knows the goal gets -1.3, who stays -10. With shuffled rewards the gain is gone."""
    settings = incontext.Settings(hidden=32, memory=32, trial_episodes=2, trials=2, iterations=12,
                                  meta_steps=250, expert_reward_scale=1.0)
    (first, second), shuffled = learned(incontext, settings)
    assert second > -4 and second > first + 2, (first, second)
    assert shuffled[1] < -6, shuffled
