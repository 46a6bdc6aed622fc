"""Tests of step 3a: episodes that all tasks share, and the batches drawn from stored episodes."""
import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

import gmps
import policy
from envs import Environments
from local_policies import Demonstrations
from settings import random_streams
from tasks import make_family, task_set
from tests.conftest import FRAGILE, PUSH, TINY, make_problem, push_batch, replay

SHARED = dataclasses.replace(TINY, training_tasks=3, shared_episodes=5, imitation_steps=1,
                             init_std=0.8)


def prepared(family, settings, n=3):
    """(learner, problem, its rollouts as they come: (phi, episodes, tasks, count))."""
    tasks, rollouts, environments = task_set(family, "train", n), [], Environments(family, 1)

    def rollout(actor, tasks, count):
        episodes = environments.rollout(actor, tasks, count)
        rollouts.append((actor.phi, episodes, tasks, count))
        return episodes
    problem, rng = make_problem(tasks, family=family), np.random.default_rng(0)
    problem.rollout = rollout
    learner = gmps.MetaLearner(problem, Demonstrations(
        rng.normal(size=(n, 9, family.observation_size)),
        rng.uniform(-1, 1, (n, 9, family.action_size))), settings)
    learner.theta["b3"].data[0, 1] = 0.8  # towards the block: unless it moves, tasks pay alike
    learner.begin_collection()
    return learner, problem, rollouts


# ---------------------------------------------------------------- shared episodes
@pytest.mark.parametrize("family", [FRAGILE, make_family("ant")], ids=["push, early ends", "ant"])
def test_shared_episodes_are_worth_to_each_task_what_its_own_simulation_pays(family):
    """The same actions, played on every task. The ant pays for actions, but not beyond [-1, 1].

    All but the reward is the same for every task, and counted once.
    """
    learner, problem, rollouts = prepared(family, SHARED)
    explored = gmps.collect(learner, problem)
    (phi, episodes, tasks, count), = rollouts
    actions, T = episodes["actions"], family.horizon
    assert actions.shape[:2] == (5, T) and count == 1 and np.abs(actions).max() > 1.5
    assert np.array_equal(tasks, problem.tasks[[0, 1, 2, 0, 1]])
    simulated = Environments(family, 1).rollout(replay(np.tile(actions, (3, 1, 1))),
                                                problem.tasks, 5)
    lasts = simulated["mask"].reshape(3, 5, T)
    paid = simulated["rewards"].reshape(3, 5, T)
    assert np.abs(paid[0] - paid[1]).max() > 0.01, "tasks pay differently"
    assert np.allclose(explored["reward"], paid, rtol=1e-5, atol=1e-5)
    assert explored["reward"].dtype == torch.float32

    x = policy.normalised(family, episodes["observations"][:, :-1])
    log_p = policy.log_prob(policy.per_task(learner.theta, 5), x, torch.as_tensor(actions))
    for name, expected in (("features", x), ("action", actions),
                           ("behaviour_log_prob", log_p.detach()), ("mask", lasts[0])):
        kept = explored[name].expand(3, *expected.shape)
        expected = torch.as_tensor(expected, dtype=torch.float32)
        assert torch.allclose(kept, expected.expand_as(kept), rtol=1e-5, atol=1e-5), name
    assert all(torch.equal(value[0], learner.theta[name]) for name, value in phi.items())
    assert (lasts == lasts[0]).all() and (lasts.sum() < 3 * 5 * T) == (family is FRAGILE)
    assert learner.env_steps == lasts[0].sum() <= 5 * T
    assert learner.row["return"] == pytest.approx(episodes["rewards"].sum(1).mean())


def test_without_shared_episodes_or_known_rewards_each_task_has_its_own():
    """K = 2 each. A family without an outcome_size cannot tell what another task would pay."""
    unknown = copy.copy(PUSH)
    unknown.outcome_size = 0
    for family, shared in ((PUSH, 0), (unknown, 5)):
        learner, problem, rollouts = prepared(family, dataclasses.replace(
            SHARED, shared_episodes=shared))
        explored = gmps.collect(learner, problem)
        (_, episodes, tasks, count), = rollouts
        assert count == 2 and np.array_equal(tasks, problem.tasks)
        assert explored["action"].shape == (3, 2, 50, 3) and learner.env_steps == 3 * 2 * 50
        assert np.array_equal(explored["reward"].flatten(0, 1), np.float32(episodes["rewards"]))


# ---------------------------------------------------------------- batches of stored episodes
def stored(episodes, seed=0, T=4):
    """So many episodes of 4 tasks: numbers drawn at random, but for actions that name both."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(4, episodes, T, *shape, generator=generator)
    names = 100.0 * torch.arange(4)[:, None] + torch.arange(episodes)
    return {"features": normal(6), "reward": normal(),
            "action": names[..., None, None].expand(4, episodes, T, 3),
            "behaviour_log_prob": normal(), "mask": torch.ones(4, episodes, T)}


def test_batches_draw_distinct_episodes_of_each_task_anew():
    """Of nine stored ones, four: each as often as any other, for each task by itself.

    The batch is that of the drawn episodes, with the scale that the first draw fixed.
    """
    settings = dataclasses.replace(SHARED, episodes=4)
    learner, (kept, some) = prepared(PUSH, settings, n=4)[0], (stored(9), np.array([2, 0, 3]))
    counts, alike, scale = np.zeros((3, 9)), 0, None
    for draw in range(300):
        batch = learner.batch(kept, some)
        names = batch["action"].view(3, 4, 4, 3)
        assert (names == names[:, :, :1, :1]).all(), "whole episodes"
        task, episode = np.divmod(names[..., 0, 0].long().numpy(), 100)
        assert np.array_equal(task, np.repeat(some[:, None], 4, axis=1))
        drawn = [set(row) for row in episode]
        assert [len(row) for row in drawn] == [4, 4, 4], "distinct"
        counts[np.arange(3)[:, None], episode] += 1
        alike += drawn[0] == drawn[1]
        if draw % 100 == 0:
            chosen = {name: value[task, episode] for name, value in kept.items()}
            expected, scale = push_batch(chosen, settings, scale)
            assert batch.keys() == expected.keys() and learner.scale == scale
            assert all(torch.equal(batch[name], expected[name]) for name in batch)
    share = 4 / 9
    assert np.abs(counts / 300 - share).max() < 4.5 * math.sqrt(share * (1 - share) / 300)
    assert alike < 300 / 20, "126 sets of four: the same by chance once in 126"


@pytest.mark.parametrize("count", [4, 3, 2])
def test_batches_take_all_episodes_where_no_more_than_k_are_stored(count):
    """In their order, without a random number."""
    settings = dataclasses.replace(SHARED, episodes=4)
    learner, kept = prepared(PUSH, settings, n=4)[0], stored(count)
    learner.rng = random_streams(0, "meta-training", 0)[0]
    batch = learner.batch(kept, np.array([3, 1]))
    assert learner.rng.random() == random_streams(0, "meta-training", 0)[0].random()
    expected, scale = push_batch(kept, settings, tasks=[3, 1])
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert learner.scale == scale
