"""Tests of the oracle and of goal regression: whom experts are told; least squares in closed form.
"""
import dataclasses
import types

import numpy as np
import pytest
import torch

from baselines import oracle, regress
from envs import Environments
from evaluate import by_round, evaluate
from local_policies import Experts
from phases import policy_family
from sac import SoftActorCritic
from settings import UserError
from tasks import make_family, task_set
from tasks.base import TaskFamily
from tests.conftest import PUSH, make_problem, push_north, replay, through_bytes

SETTINGS = regress.Settings(method="regress", expert_width=8)
TASKS = task_set(PUSH, "train", 5)
MEAN = TASKS.mean(0)
GOALS = np.array([[0.08, 0.71], [-0.06, 0.79], [0.0, 0.75], [0.09, 0.8]])
DOOR = make_family("door")
DOOR_SETTINGS = dataclasses.replace(SETTINGS, task="door", reward="sparse", experts="scripted")
DOOR_TASKS = np.array([[0.1], [0.3], [0.5], [0.7], [0.9]])


@pytest.fixture(scope="module")
def experts():
    """Contextual experts of push with random weights."""
    return Experts(PUSH, SoftActorCritic(1, 8, 3, SETTINGS).policy, TASKS, contextual=True)


@pytest.fixture
def adapter(experts):
    return regress.Adapter(oracle.told_experts(experts, TASKS), PUSH, SETTINGS)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- whom experts are told
@pytest.mark.parametrize("method", [oracle, regress])
def test_training_is_that_of_the_experts_alone(method, experts):
    """It yields once; a finished run goes straight to meta-test, with the same expert."""
    met = []
    problem = make_problem(TASKS, experts=experts, meta_test=met.append)
    settings = method.Settings(expert_width=8)
    (state, metrics), = method.train(problem, settings)
    assert metrics == {"iteration": 1, "progress": 1.0, "env_steps": 0}
    assert list(method.train(problem, settings, through_bytes(state))) == []
    observation = np.random.default_rng(0).normal(size=(4, 6))
    for adapter in met:
        adapter.begin(2, generator())
        told = experts(observation.reshape(2, 2, 6), np.tile(MEAN, (2, 1)))
        assert np.array_equal(adapter.act(observation, explore=False), told.reshape(4, 3))
    assert method.Adapter is type(met[1])


def test_the_oracles_adapter_learns_nothing(experts):
    adapter = oracle.Adapter(oracle.told_experts(experts, TASKS), PUSH, SETTINGS)
    adapter.begin(2, generator())
    episodes = Environments(PUSH, 1).rollout(adapter.act, TASKS[:2], 2)
    before = adapter.act(episodes["observations"][:, 9])
    adapter.update(episodes)
    assert np.array_equal(adapter.act(episodes["observations"][:, 9]), before)


def test_experts_see_units_of_about_one_also_beside_raw_observations(experts):
    raw = policy_family(dataclasses.replace(SETTINGS, observations="raw"))
    observation, policy = np.full((1, 6), 0.5), oracle.told_experts(experts, TASKS)
    one, other = (oracle.Adapter(policy, family, SETTINGS) for family in (PUSH, raw))
    for adapter in (one, other):
        adapter.begin(1, generator())
    assert np.array_equal(one.act(observation), other.act(observation))


def test_a_scripted_expert_is_told_too():
    policy = oracle.told_experts(DOOR.expert, DOOR_TASKS)
    adapter = oracle.Adapter(policy, DOOR, DOOR_SETTINGS)
    adapter.begin(1, generator())
    env = Environments(DOOR, 1)
    assert env.rollout(adapter.act, np.array([[0.5]]))["distances"][0, -1] < 0.05


def test_who_cannot_be_told_a_goal_is_refused(experts):
    """Before any work: train_experts must not be reached."""
    def problem(family):
        out = make_problem(TASKS, family=family)
        out.train_experts = None
        return out
    no_outcome = types.SimpleNamespace(outcome_size=0, name="point", image_shape=None)
    knows_some = types.SimpleNamespace(outcome_size=2, name="point", image_shape=None,
                                       expert=types.SimpleNamespace(contextual=False))
    for family, settings, word in (
            (make_family("push-vision"), SETTINGS, "images"), (no_outcome, SETTINGS, "outcome"),
            (PUSH, dataclasses.replace(SETTINGS, experts="local"), "contextual"),
            (PUSH, dataclasses.replace(SETTINGS, experts="demonstrations"), "contextual"),
            (knows_some, dataclasses.replace(SETTINGS, experts="scripted"), "contextual")):
        with pytest.raises(UserError, match=word):
            next(regress.train(problem(family), settings))


def test_exploration_is_told_training_goals_that_explain_the_rewards(adapter):
    """First all and their mean, at random, one an episode; with noise of the stated size."""
    adapter.expert = lambda observation, goals: np.pad(goals, ((0, 0), (0, 1)))[:, None]
    adapter.begin(2, generator())
    observation = np.zeros((2 * 200, 6))
    first = [adapter.act(observation, last) for last in (None, {}, {})]
    noise = np.array(first) - np.pad(adapter.aims, ((0, 0), (0, 1)))
    assert noise.std() == pytest.approx(0.2, rel=0.05) and abs(noise.mean()) < 0.02
    told, counts = np.unique(adapter.aims, axis=0, return_counts=True)
    assert np.array_equal(told, np.unique([*TASKS, MEAN], axis=0)) and counts.min() > 40
    assert not np.array_equal(adapter.aims[:200], adapter.aims[200:])
    assert np.array_equal(adapter.act(observation, explore=False)[:, :2], np.tile(MEAN, (400, 1)))
    adapter.consistent[:] = [0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1]
    adapter.act(observation, None)
    assert np.array_equal(np.unique(adapter.aims[:200], axis=0), np.unique(TASKS[[1, 3]], axis=0))
    assert np.array_equal(np.unique(adapter.aims[200:], axis=0), MEAN[None])
    adapter.settings = dataclasses.replace(SETTINGS, explore_goals="guess")
    adapter.act(observation, None)
    assert np.array_equal(adapter.told(observation, adapter.aims)[:, :2], np.tile(MEAN, (400, 1)))
    adapter.guess = GOALS[:2]  # K environments in a row for each task
    assert np.array_equal(adapter.act(observation[:6], explore=False)[:, :2],
                          np.repeat(GOALS[:2], 3, axis=0))


# ---------------------------------------------------------------- least squares
@pytest.fixture(scope="module")
def pushed():
    """Three episodes on each of four goals, in which the block moves by decimetres."""
    actions = np.swapaxes(push_north(num_envs=12), 0, 1)
    actions[..., 0] += np.tile([-0.1, 0.0, 0.1], 4)[:, None] - actions[..., :1, 0]
    return Environments(PUSH, 1).rollout(replay(actions), GOALS, 3)


def test_dense_rewards_give_the_goal_away(adapter, pushed):
    """On push within a tenth of a millimetre, by the rewards of a task's own episodes alone."""
    adapter.begin(4, generator())
    adapter.update(pushed)
    assert np.abs(adapter.guess - GOALS).max() < 1e-4
    assert np.array_equal(adapter.consistent[:, -1], np.ones(4)), "g explains what it was fitted to"
    assert not adapter.consistent[:, :-1].any(), "and no training goal does"
    # With the rewards of the goal after it, each is given that goal; the others stay.
    adapter.begin(4, generator())
    rewards = pushed["rewards"].copy()
    rewards[:3] = PUSH.rewards_of(pushed["outcomes"][:3], pushed["actions"][:3], GOALS[1])
    adapter.update(pushed | {"rewards": rewards})
    assert np.abs(adapter.guess - GOALS[[1, 1, 2, 3]]).max() < 1e-4


def test_all_rounds_count_and_nothing_after_an_early_end(adapter, pushed):
    """A second round that says nothing leaves the guess; padding holds anything."""
    adapter.begin(4, generator())
    adapter.update(pushed)
    still = {name: np.repeat(value[:, :1], value.shape[1], axis=1) for name, value in pushed.items()
             if name not in ("terminated", "diverged")}
    adapter.update(still)
    assert np.abs(adapter.guess - GOALS).max() < 1e-4
    adapter.begin(4, generator())
    mask = pushed["mask"].copy()
    mask[:, 40:], mask[1, 30:] = 0, 0
    rewards = np.where(mask > 0, pushed["rewards"], 77.0)
    adapter.update(pushed | {"mask": mask, "rewards": rewards})
    assert np.abs(adapter.guess - GOALS).max() < 1e-4


def test_without_a_word_about_the_goal_it_stays_at_the_prior(adapter, pushed):
    """The block at rest: every goal explains the rewards."""
    adapter.begin(4, generator())
    outcomes = np.tile(pushed["outcomes"][:, :1], (1, 50, 1))
    rewards = PUSH.rewards_of(outcomes, pushed["actions"], np.repeat(GOALS, 3, 0)[:, None])
    adapter.update(pushed | {"outcomes": outcomes, "rewards": rewards})
    assert np.abs(adapter.guess - MEAN).max() < 1e-3 and adapter.consistent.all()


class Linear(TaskFamily):
    """The reward is a product of outcome and goal, so Eq. 1 has a closed form."""
    name, observation_size, action_size, task_size, outcome_size, horizon = "linear", 1, 1, 3, 3, 9
    task_low, task_high, success_distance = np.full(3, -1.0), np.full(3, 1.0), 0.1

    def reward_terms(self, outcome, action, task):
        return {"product": (outcome * task).sum(-1), "cost": -action[..., 0] ** 2}


@pytest.mark.parametrize("chunk", [10 ** 6, 50])
def test_noisy_rewards_give_the_least_squares_solution(chunk, monkeypatch):
    """Against numpy's lstsq, for three dimensions and several tasks."""
    monkeypatch.setattr(regress, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    goals, outcomes = rng.uniform(-0.9, 0.9, (4, 3)), rng.normal(size=(4, 20, 3))
    actions = rng.normal(size=(4, 20, 1))
    paid = np.einsum("nsd,nd->ns", outcomes, goals) + rng.normal(0, 0.1, (4, 20))
    settings = dataclasses.replace(SETTINGS, refinements=20)
    rewards = paid - np.clip(actions[..., 0], -1, 1) ** 2
    found = regress.estimate_goals(Linear(), outcomes, actions, rewards, np.zeros(3), settings)
    best = np.stack([np.linalg.lstsq(x, y)[0] for x, y in zip(outcomes, paid)])
    assert np.abs(found - best).max() < 1e-5 and np.abs(best - goals).max() > 0.02
    error = regress.squared_error(Linear(), outcomes, actions, rewards, best[:, None])[:, 0]
    by_hand = [np.mean((y - x @ goal) ** 2) for x, y, goal in zip(outcomes, paid, best)]
    assert error == pytest.approx(by_hand)


def test_sparse_rewards_leave_several_goals(adapter):
    """Door, by hand: opened to 0.4, all wider angles explain the reward; past the target one does.
    """
    policy = oracle.told_experts(DOOR.expert, DOOR_TASKS)
    adapter = regress.Adapter(policy, DOOR, DOOR_SETTINGS)
    adapter.begin(2, generator())
    angles = np.array([np.linspace(0, 0.4, 9), np.linspace(0, 0.8, 9)])
    outcomes = np.stack([angles, np.zeros((2, 9))], axis=-1)
    targets = np.array([[0.62], [0.62]])
    episodes = {"outcomes": outcomes, "actions": np.zeros((2, 9, 3)), "mask": np.ones((2, 9)),
                "rewards": DOOR.rewards_of(outcomes, np.zeros((2, 9, 3)), targets[:, None])}
    adapter.update(episodes)
    assert np.array_equal(adapter.consistent, [[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])
    assert adapter.guess[0, 0] == pytest.approx(0.5, abs=1e-3), "the one next to the mean goal"
    assert adapter.guess[1, 0] == pytest.approx(0.62, abs=1e-4)


def test_on_the_door_goals_are_found_and_reached():
    """Through evaluate.py: two rounds of five episodes, then as near as the expert told the goal.
    """
    adapter = regress.Adapter(oracle.told_experts(DOOR.expert, DOOR_TASKS), DOOR, DOOR_SETTINGS)
    targets = np.array([[0.2], [0.62], [0.8]])
    out = evaluate(Environments(DOOR, 1), adapter, targets, 2, 5, 0, DOOR.expert,
                   explore_last=False)
    before, _, after = ([entry["final_distance"] for entry in entries]
                        for entries in by_round(out.lists["held_out"]))
    told = [entry["final_distance"] for entry in out.lists["experts_held_out"]]
    assert np.max(after) < np.max(told) + 0.01 < 0.03 and np.max(before) > 0.2
