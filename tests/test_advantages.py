"""Tests of rollouts and advantages, the data of an inner step: closed forms, least squares of another library."""
import dataclasses
import math

import numpy as np
import pytest
import torch

import advantages
import envs
import gmps
import policy
from conftest import (
    PUSH,
    TINY,
)
from envs import BatchEnv, random_streams, task_set

PRODUCTS = PUSH.baseline_products


@pytest.fixture(scope="module")
def collected():
    """(tasks, theta, phi, episodes, batch, scale) of a real collection: 2 tasks, 3 episodes each."""
    tasks, generator = task_set(PUSH, "train", 2), torch.Generator().manual_seed(0)
    theta = policy.init_policy(PUSH, TINY, generator)
    phi = policy.per_task(theta, 2)
    episodes = policy.collect(BatchEnv(6), tasks, phi, TINY, generator)
    return tasks, theta, phi, episodes, *advantages.policy_gradient_batch(episodes, phi, PUSH, TINY)


def test_importance_weights_are_one_at_the_first_meta_step(collected):
    """Theta unchanged since collection: w is 1 and the inner loss is -mean(log pi * A)."""
    _, theta, phi, _, batch, _ = collected
    log_prob = policy.log_prob(phi, batch["observation"], batch["action"], TINY)
    assert ((log_prob - batch["log_prob"]).exp() - 1).abs().max() <= 1e-6
    loss = gmps.inner_loss(gmps.adapt(theta, {}, [], TINY, 2)[0], batch, TINY)
    assert torch.allclose(loss, -(log_prob * batch["advantage"]).mean(-1), rtol=1e-6, atol=1e-7)
    moved = {name: value + 0.05 for name, value in phi.items()}
    moved_log_prob = policy.log_prob(moved, batch["observation"], batch["action"], TINY)
    by_hand = -(moved_log_prob * torch.exp(moved_log_prob - log_prob) * batch["advantage"]).mean(-1)
    assert torch.allclose(gmps.inner_loss(moved, batch, TINY), by_hand, rtol=1e-5, atol=1e-6)
    assert (moved_log_prob - log_prob).abs().max() > 0.01


def test_collected_actions_are_the_gaussians_own_samples(collected):
    """Unclipped, of the policy's std around its mean (chi-square over 900 numbers within 4 standard errors)."""
    _, _, phi, episodes, batch, _ = collected
    x = batch["observation"]
    deviation = ((batch["action"] - policy.policy_mean(phi, x)) / 0.6).square()
    assert deviation.numel() == 900 and abs(deviation.mean().item() - 1) < 4 * math.sqrt(2 / 900)
    assert np.abs(episodes["actions"]).max() > 1.0
    again = policy.collect(BatchEnv(2), task_set(PUSH, "train", 2), phi, TINY, None)
    observation = (again["observations"][:, :-1] - PUSH.observation_centre) / 0.1
    mean = policy.policy_mean(phi, torch.as_tensor(observation, dtype=torch.float32))
    assert np.allclose(again["actions"], mean.numpy(), atol=1e-6), "without a generator: mean actions"


def test_batch_of_the_inner_step(collected):
    """Observations scaled, advantages over one scale for all tasks: their own root mean square, or the given one."""
    _, _, phi, episodes, batch, scale = collected
    observation = (episodes["observations"].reshape(2, 3, 51, 6)[:, :, :-1] - [0, 0.6, 0.1, 0, 0.65, 0.02]) / 0.1
    assert np.allclose(batch["observation"], observation.reshape(2, 150, 6), atol=1e-5)
    assert np.allclose(batch["action"], episodes["actions"].reshape(2, 150, 3))
    assert batch["advantage"].square().mean().sqrt().item() == pytest.approx(1.0, rel=1e-5)
    assert batch["advantage"].mean(1).abs().max() < 1e-5
    other, given = advantages.policy_gradient_batch(episodes, phi, PUSH, TINY, 7.0)
    assert given == 7.0 and torch.allclose(other["advantage"] * 7.0, batch["advantage"] * scale, rtol=1e-4, atol=1e-5)


def test_inner_step_takes_every_so_many_th_time_step(collected):
    """Rows 0, 3, 6 .. of every episode, their advantages from the whole episodes."""
    tasks, _, phi, episodes, batch, scale = collected
    thinned, same = advantages.policy_gradient_batch(episodes, phi, PUSH, dataclasses.replace(TINY, inner_every=3))
    assert same == scale and thinned["advantage"].shape == (2, 3 * 17)
    for name, value in thinned.items():
        expected = batch[name].unflatten(1, (3, 50))[:, :, ::3].flatten(1, 2)
        assert torch.allclose(value, expected, rtol=0, atol=1e-6), name


def trajectories(n=2, K=4, T=30, seed=0):
    rng = np.random.default_rng(seed)
    observation = rng.normal(size=(n, K, T, 6)).cumsum(2) * 0.2
    reward = rng.normal(size=(n, K, T)) + observation[..., 3]
    return torch.as_tensor(observation), torch.as_tensor(reward), torch.ones(n, K, T, dtype=torch.float64)


def test_baseline_against_lstsq():
    """Ridge regression (1e-5) as numpy.linalg.lstsq on stacked equations, features written out one by one, masked."""
    observation, returns, mask = trajectories()
    mask[1, 2, 20:] = 0
    value = advantages.linear_baseline(observation, returns, mask, PRODUCTS)
    for i in range(2):
        rows, targets, kept = [], [], []
        for k in range(4):
            for t in range(30):
                s = observation[i, k, t].numpy()
                products = [s[a] * s[b] for a in range(6) for b in range(a + 1, 6)]
                rows.append([*s, *(s * s), *products, t / 100, (t / 100) ** 2, (t / 100) ** 3, 1.0])
                targets.append(returns[i, k, t].item())
                kept.append(mask[i, k, t].item() > 0)
        X, y, kept = np.array(rows), np.array(targets), np.array(kept)
        ridge = math.sqrt(1e-5) * np.eye(X.shape[1])
        solution = np.linalg.lstsq(np.vstack([X[kept], ridge]), np.r_[y[kept], np.zeros(len(ridge))], rcond=None)[0]
        assert np.allclose(value[i].reshape(-1), X @ solution, rtol=1e-7, atol=1e-7)
        assert np.var(y[kept] - (X @ solution)[kept]) < 0.9 * np.var(y[kept])


def by_hand_advantages(observation, reward, lam, discount):
    """Per task, episode and step, in loops; lam is 0 or 1 only."""
    n, K, T = reward.shape
    reward, returns = reward.numpy(), np.zeros((n, K, T))
    for t in reversed(range(T)):
        returns[..., t] = reward[..., t] + (discount * returns[..., t + 1] if t + 1 < T else 0)
    value = advantages.linear_baseline(observation, torch.as_tensor(returns), torch.ones(n, K, T).double(), PRODUCTS).numpy()
    advantage = np.zeros((n, K, T))
    for t in range(T):
        following = value[..., t + 1] if t + 1 < T else 0.0
        target = returns[..., t] if lam == 1 else reward[..., t] + discount * following
        advantage[..., t] = target - value[..., t]
    return advantage - advantage.mean((1, 2), keepdims=True)


@pytest.mark.parametrize("lam", [0, 1])
def test_advantages_at_both_ends_of_lambda(lam):
    """1: discounted returns minus the baseline; 0: one-step temporal differences. Both centred per task."""
    observation, reward, mask = trajectories(seed=1)
    settings = dataclasses.replace(TINY, gae_lambda=lam, discount=0.9)
    advantage = advantages.advantages(observation, reward, mask, PRODUCTS, settings)
    assert np.allclose(advantage, by_hand_advantages(observation, reward, lam, 0.9), rtol=1e-8, atol=1e-9)
    assert advantage.mean((1, 2)).abs().max() < 1e-12


def test_advantages_between_are_the_weighted_sum_of_n_step_ones():
    """lambda 0.5: (1 - lambda) sum lambda^(k-1) A^(k), the k-step advantages written out."""
    observation, reward, mask = trajectories(n=1, K=2, T=6, seed=2)
    lam, discount = 0.5, 0.9
    settings = dataclasses.replace(TINY, gae_lambda=lam, discount=discount)
    value = advantages.linear_baseline(observation, advantages.discounted_sum(reward, discount), mask, PRODUCTS).numpy()
    expected = np.zeros((1, 2, 6))
    for k in range(2):
        for t in range(6):
            steps = []
            for length in range(1, 7 - t):
                total = sum(discount ** j * reward[0, k, t + j].item() for j in range(length))
                tail = discount ** length * value[0, k, t + length] if t + length < 6 else 0.0
                steps.append(total + tail - value[0, k, t])
            weights = [(1 - lam) * lam ** j for j in range(len(steps) - 1)] + [lam ** (len(steps) - 1)]
            expected[0, k, t] = np.dot(weights, steps)
    expected -= expected.mean()
    assert np.allclose(advantages.advantages(observation, reward, mask, PRODUCTS, settings), expected, atol=1e-9)


def test_padding_after_an_early_end_changes_nothing():
    """Other observations behind the end of an episode: same advantages before it, zeros behind it."""
    observation, reward, mask = trajectories(seed=3)
    mask[1, 2, 17:], reward[1, 2, 17:] = 0, 0  # as `envs.rollout` leaves them
    advantage = advantages.advantages(observation, reward, mask, PRODUCTS, TINY)
    observation[1, 2, 17:] = 3.3
    padded = advantages.advantages(observation, reward, mask, PRODUCTS, TINY)
    assert torch.allclose(advantage, padded, rtol=0, atol=1e-9) and not padded[1, 2, 17:].any()
    shorter = advantages.advantages(observation[:1], reward[:1], mask[:1], PRODUCTS, TINY)
    assert torch.allclose(shorter, padded[:1], rtol=0, atol=1e-9), "and nothing in other tasks"
    assert abs((padded * mask).sum((1, 2))).max() < 1e-9


def test_discounted_sum_in_closed_form():
    ones = torch.ones(2, 10, dtype=torch.float64)
    geometric = (1 - 0.7 ** torch.arange(10, 0, -1, dtype=torch.float64)) / 0.3
    assert torch.allclose(advantages.discounted_sum(ones, 0.7), geometric.expand(2, 10), rtol=1e-12, atol=0)


def test_random_streams_are_distinct_and_repeatable():
    """Every purpose, iteration and seed has numbers of its own, in both libraries, and the same ones again."""
    keys = [(seed, purpose, k) for seed in (0, 1, 7) for purpose in envs.STREAMS for k in range(20)]

    def first(key):
        rng, generator = random_streams(*key)
        return rng.random(), torch.rand(1, generator=generator, dtype=torch.float64).item()

    draws = [first(key) for key in keys]
    assert len({a for a, _ in draws}) == len({b for _, b in draws}) == len(keys) == 300
    assert draws == [first(key) for key in keys]


def test_advantages_by_each_tasks_own_scale():
    """Rewards of one task a hundred times the other's: the same advantages. Rewards of 0: none, and nothing is 0 / 0."""
    settings = dataclasses.replace(TINY, advantage_scale="task")
    env = BatchEnv(6)
    tasks = np.repeat(task_set(PUSH, "train", 1), 3, axis=0)
    phi = policy.per_task(policy.init_policy(PUSH, settings, torch.Generator().manual_seed(0)), 3)
    episodes = policy.collect(env, tasks, phi, settings, torch.Generator().manual_seed(2))
    for name in episodes:
        episodes[name] = np.concatenate([episodes[name][:2], episodes[name][:2], episodes[name][:2]])
    episodes["rewards"] = episodes["rewards"] * np.array([1.0, 1.0, 100.0, 100.0, 0.0, 0.0])[:, None]
    batch, scale = advantages.policy_gradient_batch(episodes, phi, PUSH, settings)
    one, other, nothing = batch["advantage"]
    assert one.square().mean().sqrt().item() * scale == pytest.approx(1.0, rel=1e-4)
    assert torch.allclose(one, other, rtol=1e-3, atol=1e-4) and not nothing.any()


def test_the_first_collection_with_any_reward_fixes_the_scale():
    """One without leaves the scale open; a later one with other rewards does not change it, nor one without."""
    tasks = task_set(PUSH, "train", 2)
    theta = policy.init_policy(PUSH, TINY, torch.Generator().manual_seed(0))
    learner = gmps.MetaLearner(theta, gmps.Demonstrations(np.zeros((2, 5, 6)), np.zeros((2, 5, 3))), TINY)
    phi = policy.per_task(theta, 2)
    episodes = policy.collect(BatchEnv(6), tasks, phi, TINY, torch.Generator().manual_seed(2))
    size = advantages.policy_gradient_batch(episodes, phi, PUSH, TINY)[1]
    for factor, scale in ((0.0, None), (3.0, 3 * size), (7.0, 3 * size), (0.0, 3 * size)):
        batch = learner.batch(0, episodes | {"rewards": factor * episodes["rewards"]}, phi, PUSH)
        assert learner.scales == [scale and pytest.approx(scale, rel=1e-4)]
        expected = factor * size / scale if scale else 0.0
        assert batch["advantage"].square().mean().sqrt().item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("scale", ["shared", "task"])
def test_rewards_that_are_the_same_in_all_episodes_give_no_step(scale):
    """A sparse reward that nobody found may be any constant; the other task keeps the advantages it has."""
    settings = dataclasses.replace(TINY, advantage_scale=scale)
    phi = policy.per_task(policy.init_policy(PUSH, settings, torch.Generator().manual_seed(0)), 2)
    episodes = policy.collect(BatchEnv(6), task_set(PUSH, "train", 2), phi, settings, torch.Generator().manual_seed(2))
    known, _ = advantages.policy_gradient_batch(episodes, phi, PUSH, settings, 10.0)
    assert (known["advantage"].abs().amax(1) > 0.01).all()
    episodes["rewards"][3:] = 12.5
    batch, _ = advantages.policy_gradient_batch(episodes, phi, PUSH, settings, 10.0)
    assert torch.equal(batch["advantage"][0], known["advantage"][0]) and not batch["advantage"][1].any()


def test_noise_of_a_collection_lasts_where_it_is_asked_to():
    """Actions minus their mean, over std: correlation 0.9 from step to step, 0 by default; variance 1 either way."""
    for correlation in (0.0, 0.9):
        settings = dataclasses.replace(TINY, noise_correlation=correlation)
        phi = policy.per_task(policy.init_policy(PUSH, settings, torch.Generator().manual_seed(0)), 1)
        episodes = policy.collect(BatchEnv(100), PUSH.training_tasks(1), phi, settings, torch.Generator().manual_seed(3))
        mean = policy.policy_mean(phi, policy.scaled(PUSH, episodes["observations"][:, :-1].reshape(1, -1, 6)))
        noise = (episodes["actions"] - mean.view(100, 50, 3).numpy()) / policy.policy_std(phi, settings).numpy()
        # 15,000 numbers, a tenth as many independent ones where they last: five standard errors
        assert noise.var() == pytest.approx(1.0, abs=0.2 if correlation else 0.06)
        assert (noise[:, 1:] * noise[:, :-1]).mean() == pytest.approx(correlation, abs=0.2 if correlation else 0.06)
