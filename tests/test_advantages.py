"""Tests of the data of an inner step: noise, rollouts, baseline, advantages and their scale."""
import dataclasses
import math

import numpy as np
import pytest
import torch

import advantages
import gmps
import policy
from local_policies import Demonstrations
from settings import STREAMS, random_streams
from tasks import task_set
from tests.conftest import PUSH, TINY, explore, make_problem, push_batch, reference_forward

PROBLEM = make_problem(task_set(PUSH, "train", 2))
NOISY = dataclasses.replace(TINY, noise="independent")


def normal(observation):
    """In decimetres from the middle of the table, by hand."""
    return (observation - [0, 0.6, 0.1, 0, 0.65, 0.02]) / 0.1


@pytest.fixture(scope="module")
def collected():
    """(phi, episodes, explored, batch, scale): 3 episodes of each of two policies that differ."""
    generator = torch.Generator().manual_seed(0)
    theta = policy.init_policy(PUSH, TINY, generator)
    phi = {name: value + 0.1 * torch.randn(2, *value.shape[-2:], generator=generator)
           for name, value in theta.items()}
    phi["log_std"] = torch.tensor([[[0.6, 0.1, 0.9]], [[0.5, 0.4, 0.2]]]).log()
    episodes, explored = explore(phi, PROBLEM, NOISY, 3, torch.Generator().manual_seed(1))
    return phi, episodes, explored, *push_batch(explored, NOISY)


# ---------------------------------------------------------------- random numbers
def test_random_streams_are_distinct_and_repeatable():
    """Every purpose, iteration and seed has numbers of its own, in both libraries, each time."""
    keys = [(seed, purpose, k) for seed in (0, 1, 7) for purpose in STREAMS for k in range(20)]
    first = [[(rng.random(), torch.rand(1, generator=generator).item()) for rng, generator in (
        random_streams(*key) for key in keys)] for _ in range(2)]
    assert first[0] == first[1] and [len(set(draws)) for draws in zip(*first[0])] == [360, 360]


def test_exploration_noise_is_standard_normal_and_lasts():
    """Variance 1 at every step, correlation rho^k between noises k steps apart; six errors."""
    noise = policy.CorrelatedNoise((40_000,), 0.8, torch.Generator().manual_seed(0))
    rows = torch.stack([next(noise) for _ in range(6)]).double()
    expected = 0.8 ** (torch.arange(6)[:, None] - torch.arange(6)).abs().double()
    assert (rows @ rows.T / 40_000 - expected).abs().max() < 6 * math.sqrt(2 / 40_000)


@pytest.mark.parametrize("kind", ["orthogonal", "independent"])
def test_exploration_noise_is_held_and_orthogonal_over_episodes(kind):
    """(K - 1) // act draws of 2 dimensions are orthonormal over K = 8 episodes, and sum to zero."""
    settings = dataclasses.replace(TINY, noise=kind, noise_hold=2)
    noise = policy.exploration_noise((20_000, 8, 2), settings, torch.Generator().manual_seed(0))
    steps = torch.stack([next(noise) for _ in range(16)]).double()  # (16, n, K, act)
    assert torch.equal(steps[::2], steps[1::2]) and not torch.equal(steps[0], steps[2])
    draws = steps[::2].permute(1, 2, 0, 3)                          # (n, K, 8 draws, act)
    first, later = draws[:, :, :3].flatten(2), draws[:, :, 3:6].flatten(2)
    for block in (first, later):
        gram, identity = block.mT @ block / 8, torch.eye(6, dtype=torch.float64)
        exact = (gram - identity).abs().max() < 1e-5 and block.sum(1).abs().max() < 1e-2
        assert exact == (kind == "orthogonal")
    # Over many tasks: mean 0, variance 1, no correlation between blocks, symmetric in sign.
    error = 6 * math.sqrt(2 / 20_000)
    assert draws.mean(0).abs().max() < error and (draws.square().mean(0) - 1).abs().max() < error
    assert (first.mT @ later / 8).mean(0).abs().max() < error
    assert (draws > 0).double().mean() == pytest.approx(0.5, abs=0.01)


def test_few_episodes_have_independent_noise():
    noise = policy.exploration_noise((5000, 3, 3), TINY, torch.Generator().manual_seed(0))
    assert next(noise).sum(1).square().mean() == pytest.approx(3, rel=0.1)


# ---------------------------------------------------------------- what policies do, and the batch
def test_actions_are_the_policys_mean_and_noise_of_its_own(collected):
    """Each task's own network and std, unclipped; else mean actions."""
    phi, episodes, *_ = collected
    single = [{name: value[i].double().numpy() for name, value in phi.items()} for i in (0, 1)]
    noise = policy.exploration_noise((2, 3, 3), NOISY, torch.Generator().manual_seed(1))
    std = np.array([[[0.6, 0.1, 0.9]], [[0.5, 0.4, 0.2]]])
    actor, quiet = (policy.Actor(phi, PUSH, NOISY, g) for g in (torch.Generator(), None))
    for t in range(50):
        observation = episodes["observations"][:, t]
        x = normal(observation).reshape(2, 3, 6)
        mean = np.stack([reference_forward(p, x[i])[0] for i, p in enumerate(single)])
        action = mean + std * next(noise).numpy()
        assert np.allclose(episodes["actions"][:, t], action.reshape(6, 3), atol=1e-5)
        for shown in (actor(observation, explore=False), quiet(observation)):
            assert np.allclose(shown, mean.reshape(6, 3), atol=1e-5)
    assert np.abs(episodes["actions"]).max() > 1 and not actor.seen
    to_goal = episodes["outcomes"][..., :2] - np.repeat(PROBLEM.tasks, 3, axis=0)[:, None]
    assert np.allclose(episodes["distances"], np.linalg.norm(to_goal, axis=-1)), "on its own task"


def test_batch_of_the_inner_step(collected):
    """Scaled observations, unclipped actions, their densities, and advantages over one scale.

    With noise_hold 3: rows 0, 3, 6 .. of every episode, their advantages from whole episodes.
    """
    phi, episodes, explored, batch, scale = collected
    x = normal(episodes["observations"][:, :-1]).reshape(2, 150, 6)
    assert np.allclose(batch["features"], x, atol=1e-5)
    assert np.allclose(batch["action"], episodes["actions"].reshape(2, 150, 3))
    mean = policy.mean_action(phi, batch["features"])
    gaussian = torch.distributions.Normal(mean, phi["log_std"].exp())
    log_prob = gaussian.log_prob(batch["action"]).sum(-1)
    assert torch.allclose(batch["behaviour_log_prob"], log_prob, rtol=1e-5, atol=1e-5)
    log_prob = policy.log_prob(phi, batch["features"], batch["action"])
    assert (gmps.importance_weights(log_prob, batch, NOISY) - 1).abs().max() <= 1e-6
    given = advantages.advantages(
        torch.as_tensor(x).view(2, 3, 50, 6), torch.as_tensor(episodes["rewards"]).view(2, 3, 50),
        torch.ones(2, 3, 50), NOISY).view(2, 150)
    assert scale == pytest.approx(given.square().mean().sqrt().item(), rel=1e-3)
    assert torch.allclose(batch["advantage"].double(), given / scale, rtol=1e-3, atol=1e-3)
    thin = dataclasses.replace(NOISY, noise_hold=3)
    other, same = push_batch(explored, thin, 7.0)
    other["advantage"] *= 7 / scale
    for name, value in other.items():
        expected = batch[name].unflatten(1, (3, 50))[:, :, ::3].flatten(1, 2)
        assert same == 7 and torch.allclose(value, expected, rtol=1e-5, atol=1e-6), name


# ---------------------------------------------------------------- baseline and advantages
def trajectories(T, seed):
    """Observations, rewards and mask (2 tasks, 4 episodes, T steps); one ends at two thirds."""
    rng = np.random.default_rng(seed)
    observation = rng.normal(size=(2, 4, T, 6)).cumsum(2) * 0.2
    reward, mask = rng.normal(size=(2, 4, T)) + observation[..., 3], np.ones((2, 4, T))
    mask[1, 2, T * 2 // 3:] = 0
    observation[0, 0, 1] = 30.0  # an outlier: the baseline sees at most 10
    return [torch.as_tensor(x) for x in (observation, reward, mask)]


def test_baseline_against_lstsq():
    """Ridge regression (1e-5) as lstsq on stacked equations, features written out, masked."""
    observation, returns, mask = trajectories(30, seed=0)
    value = advantages.linear_baseline(observation, returns, mask).view(2, 120)
    for i in range(2):
        rows = []
        for k, t in np.ndindex(4, 30):
            s = observation[i, k, t].clamp(-10, 10).numpy()
            rows.append([*s, *(s * s), t / 100, (t / 100) ** 2, (t / 100) ** 3, 1])
        X, y, kept = np.array(rows), returns[i].reshape(-1).numpy(), mask[i].reshape(-1) > 0
        ridge = math.sqrt(1e-5) * np.eye(X.shape[1])
        stacked = np.vstack([X[kept], ridge]), np.r_[y[kept], np.zeros(len(ridge))]
        solution = np.linalg.lstsq(*stacked, rcond=None)[0]
        assert np.allclose(value[i], X @ solution, rtol=1e-7, atol=1e-7)
        assert np.var(y[kept] - (X @ solution)[kept]) < 0.9 * np.var(y[kept])


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_advantages_are_the_weighted_sum_of_n_step_ones(lam):
    """(1 - lambda) sum lambda^(k-1) A^(k), the k-step ones written out, centred per task.

    At 0 that is the temporal difference, at 1 the return minus the baseline. What stands behind an
    early end counts for nothing.
    """
    observation, reward, mask = trajectories(9, seed=2)
    settings = dataclasses.replace(TINY, gae_lambda=lam, discount=0.9)
    lengths, returns = mask.sum(2).int().tolist(), torch.zeros(2, 4, 9, dtype=torch.float64)
    for i, k, t in np.ndindex(2, 4, 9):
        returns[i, k, t] = sum(0.9 ** j * reward[i, k, t + j] for j in range(lengths[i][k] - t))
    value = advantages.linear_baseline(observation, returns, mask)
    expected = torch.zeros_like(returns)
    for i, k, t in np.ndindex(2, 4, 9):
        steps, left = [], lengths[i][k] - t
        for length in range(1, left + 1):
            total = sum(0.9 ** j * reward[i, k, t + j] for j in range(length))
            tail = 0.9 ** length * value[i, k, t + length] if length < left else 0.0
            steps.append(total + tail - value[i, k, t])
        if steps:
            weights = [(1 - lam) * lam ** j for j in range(left - 1)] + [lam ** (left - 1)]
            expected[i, k, t] = sum(w * step for w, step in zip(weights, steps))
    expected -= expected.sum((1, 2), keepdim=True) / mask.sum((1, 2), keepdim=True)
    found = advantages.advantages(observation, reward, mask, settings)
    assert torch.allclose(found, expected * mask, rtol=0, atol=1e-8)


# ---------------------------------------------------------------- the scale of advantages
@pytest.mark.parametrize("kind", ["common", "per task"])
def test_scales_of_tasks_that_differ_in_their_rewards_alone(collected, kind):
    """Rewards a hundred times the first task's; and the same in all episodes, which give no step.

    Such are those of a sparse reward that nobody found. Each task's own scale: nothing is 0 / 0.
    The policy may see other numbers than the baseline does: "features".
    """
    explored = {name: value[[0, 0, 0]] for name, value in collected[2].items()}  # copies
    explored["reward"][1] *= 100
    explored["reward"][2] = torch.arange(50)
    explored["features"] += 1
    for name in ("mask", "reward"):
        explored[name][:2, 2, 40:] = 0
    settings = dataclasses.replace(NOISY, advantage_scale=kind)
    batch, scale = push_batch(explored, settings)
    one, other, nothing = batch["advantage"]
    factor, steps = (100, 430) if kind == "common" else (1, 140)
    assert torch.allclose(factor * one, other, rtol=1e-3, atol=1e-4) and not nothing.any()
    assert other.square().sum() == pytest.approx(steps, rel=1e-3)
    assert (scale == 1) == (kind == "per task")
    for name in ("mask", "features", "action", "behaviour_log_prob"):
        assert torch.equal(batch[name], explored[name].flatten(1, 2)), name


def test_the_first_batch_with_any_reward_fixes_the_scale(collected):
    """One without leaves it open; later ones, with other rewards or none, do not change it."""
    explored = collected[2]
    demonstrations = Demonstrations(np.zeros((2, 5, 6)), np.zeros((2, 5, 3)))
    settings = dataclasses.replace(NOISY, imitation_steps=1, episodes=3)
    learner = gmps.MetaLearner(PROBLEM, demonstrations, settings)
    learner.begin_collection()
    size = push_batch(explored, NOISY)[1]
    for factor, scale in ((0.0, None), (3.0, 3 * size), (7.0, 3 * size), (0.0, 3 * size)):
        batch = learner.batch(explored | {"reward": factor * explored["reward"]}, [0, 1])
        assert learner.scale == (scale and pytest.approx(scale, rel=1e-4))
        expected = factor * size / scale if scale else 0.0
        assert batch["advantage"].square().mean().sqrt() == pytest.approx(expected, rel=1e-4)
