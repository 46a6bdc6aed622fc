"""Tests of learning a test task alone: own rewards only, the gradient step by hand, learning."""
import copy
import dataclasses

import numpy as np
import pytest
import torch

from baselines import scratch
from evaluate import by_round, evaluate, mean_of
from local_policies import Replay, expert_input
from settings import UserError
from tasks import make_family
from tests.conftest import PUSH, make_problem, with_policy_gradient
from tests.point_task import PointEnvironments, PointGoal

GOALS = np.array([[-0.05, 0.72], [0.02, 0.78], [0.08, 0.75]])
SETTINGS = scratch.Settings(method="scratch", noise_hold=1, hidden=8, expert_width=8,
                            expert_batch=16, expert_updates=3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def begun(settings=SETTINGS, count=3, seed=0, family=PUSH):
    adapter = scratch.Adapter({}, family, settings)
    adapter.begin(count, generator(seed))
    return adapter


def weights(adapter):
    """{name: (n, ...)} of what acts."""
    learner = adapter.learner
    if isinstance(learner, scratch.OffPolicy):
        return dict(enumerate(learner.policy))
    return learner.actor.phi


@pytest.fixture(scope="module")
def problem():
    return make_problem(GOALS)


def with_learner(learner, **changes):
    return dataclasses.replace(SETTINGS, learner=learner, **changes)


# ---------------------------------------------------------------- both learners
def test_training_is_nothing(problem):
    """It yields once, asks for no expert, rolls out nothing; a finished run goes to meta-test."""
    met = []
    empty = make_problem(GOALS, meta_test=met.append)
    empty.train_experts = empty.demonstrate = empty.rollout = None
    (state, metrics), = scratch.train(empty, SETTINGS)
    assert metrics == {"iteration": 1, "progress": 1.0, "env_steps": 0}
    assert list(scratch.train(empty, SETTINGS, state)) == [] and len(met) == 2
    with pytest.raises(UserError, match="images"):
        next(scratch.train(make_problem(GOALS, family=make_family("push-vision")), SETTINGS))


@pytest.mark.parametrize("learner", ["sac", "pg"])
def test_weights_are_random_and_each_tasks_own(learner):
    one, same, other = (weights(begun(with_learner(learner), seed=seed)) for seed in (0, 0, 1))
    for name, value in one.items():
        assert torch.equal(value, same[name])
        if name not in ("z", "log_std"):
            assert not torch.equal(value, other[name])
            assert not torch.equal(value[0], value[1]) and not torch.equal(value[1], value[2])


@pytest.mark.parametrize("learner", ["sac", "pg"])
def test_a_task_learns_from_its_own_rewards_alone(learner, problem):
    """Other rewards on task 1: it learns something else, the others the same to the last bit."""
    learned = []
    for change in (0.0, 1.0):
        adapter = begun(with_learner(learner))
        before = weights(adapter)
        for _ in range(2):
            episodes = problem.rollout(adapter.act, GOALS, 2)
            rewards = episodes["rewards"].copy()
            rewards[2:4] += change * np.random.default_rng(0).normal(size=(2, 50))
            adapter.update(episodes | {"rewards": rewards})
            if change == 0:
                recorded = episodes
        learned.append(weights(adapter))
    assert len(recorded["mask"]) == 6
    for name, value in learned[0].items():
        assert torch.equal(value[[0, 2]], learned[1][name][[0, 2]])
    changed = [name for name, value in learned[0].items()
               if not torch.equal(value[1], learned[1][name][1])]
    moved = [name for name, value in learned[0].items() if not torch.equal(value, before[name])]
    assert set(changed) == set(moved) and len(moved) >= 6


@pytest.mark.parametrize("learner", ["sac", "pg"])
def test_a_copy_acts_and_later_updates_do_not_reach_it(learner, problem):
    adapter = begun(with_learner(learner))
    adapter.update(problem.rollout(adapter.act, GOALS, 2))
    observation = np.tile(PUSH.observation_centre, (3, 1))
    twin, before = copy.deepcopy(adapter), adapter.act(observation, explore=False)
    adapter.update(problem.rollout(adapter.act, GOALS, 2))
    assert np.array_equal(twin.act(observation, explore=False), before)
    assert not np.array_equal(adapter.act(observation, explore=False), before)


@pytest.mark.parametrize("learner", ["sac", "pg"])
def test_the_learning_rate_falls_to_a_tenth(learner, problem):
    adapter = begun(with_learner(learner, rate_rounds=2))
    inner = adapter.learner.learner if learner == "sac" else adapter.learner
    first = SETTINGS.expert_learning_rate if learner == "sac" else SETTINGS.step_size
    episodes = problem.rollout(adapter.act, GOALS, 2)
    for share in (1.0, 0.55, 0.1, 0.1):
        adapter.update(copy.deepcopy(episodes))
        assert inner.optimiser.param_groups[0]["lr"] == pytest.approx(share * first)
        if learner == "pg":
            adapter.learner.actor.seen = [torch.zeros(3, 2, 6)] * 50


# ---------------------------------------------------------------- soft actor-critic
def test_replay_of_unknown_tasks():
    """Every learner draws from its own stream, with the rewards that were paid; no task goes in.
    """
    rng = np.random.default_rng(0)
    for n in (1, 3):
        replay = Replay(PUSH, np.zeros((n, 0)), 100)
        episodes = {"observations": np.repeat(np.arange(2.0 * n), 51).reshape(2 * n, 51, 1)
                    * np.ones(6), "actions": np.zeros((2 * n, 50, 3)),
                    "outcomes": np.zeros((2 * n, 50, 6)),
                    "rewards": rng.normal(size=(2 * n, 50)), "mask": np.ones((2 * n, 50)),
                    "terminated": np.zeros(2 * n, bool)}
        replay.add(episodes, np.repeat(np.arange(n), 2))
        batch = replay.sample(rng, n, dataclasses.replace(SETTINGS, expert_reward_scale=1.0))
        assert batch["observation"].shape == (n, 16, 6)
        centre, scale = PUSH.observation_centre[0], PUSH.observation_scale[0]
        of = np.rint(batch["observation"][..., 0].numpy() * scale + centre).astype(int)
        for learner in range(n):
            assert set(of[learner]) == {2 * learner, 2 * learner + 1}
            for episode, reward in zip(of[learner], batch["reward"][learner]):
                assert np.isclose(episodes["rewards"][episode], float(reward), atol=1e-6).any()


def test_the_replay_keeps_all_rounds_and_grows(problem):
    adapter = begun()
    learner, kept = adapter.learner, []
    learner.replay = learner.new_replay(100)
    updates, sample = [], Replay.sample
    for _ in range(4):
        kept.append(problem.rollout(adapter.act, GOALS, 2))
        adapter.update(kept[-1])
    replay = learner.replay
    assert replay.capacity >= 400 and replay.sizes.tolist() == [400] * 3
    rewards = np.stack([part["rewards"].reshape(3, -1) for part in kept], axis=1).reshape(3, -1)
    assert np.allclose(replay.data["reward"][:, :400, 0], rewards, atol=1e-5)
    # As many gradient steps a round as the setting says, on the batch of all tasks.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Replay, "sample", lambda self, rng, learners, settings: updates.append(
            learners) or sample(self, rng, learners, settings))
        adapter.update(kept[-1])
    assert updates == [3] * SETTINGS.expert_updates


def test_exploration_of_soft_actor_critic(problem):
    """Uniform actions in the first round; then tanh-Gaussian; measured: tanh of the mean."""
    settings = dataclasses.replace(SETTINGS, expert_noise_correlation=0.0)
    adapter = begun(settings)
    observation = np.tile(PUSH.observation_centre, (3 * 400, 1))
    first = adapter.act(observation)
    assert first.min() < -0.99 and first.max() > 0.99
    assert np.histogram(first, 4, (-1, 1))[0] == pytest.approx(np.full(4, 900), rel=0.15)
    adapter.update(problem.rollout(adapter.act, GOALS, 2))
    policy = adapter.learner.policy
    hidden = expert_input(PUSH, observation).view(3, 400, 6)
    for layer in range(0, 6, 2):
        hidden = hidden @ policy[layer] + policy[layer + 1]
        if layer < 4:
            hidden = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:]).relu()
    mean, log_std = hidden.chunk(2, dim=-1)
    std = (-5 + 3.5 * (torch.tanh(log_std) + 1)).exp()
    sampled = np.arctanh(adapter.act(observation).astype(float)).reshape(3, 400, 3)
    assert np.allclose(sampled.mean(1), mean[:, 0], atol=0.25 * float(std.max()))
    assert np.allclose(sampled.std(1), std[:, 0], rtol=0.15)
    assert np.allclose(adapter.act(observation, explore=False).reshape(3, 400, 3),
                       torch.tanh(mean), atol=1e-6)


def test_a_loss_that_is_not_finite_is_one_line(problem):
    adapter = begun()
    episodes = problem.rollout(adapter.act, GOALS, 2)
    with pytest.raises(FloatingPointError, match="not finite"):
        adapter.update(episodes | {"rewards": np.full_like(episodes["rewards"], np.nan)})


# ---------------------------------------------------------------- policy gradient
@pytest.mark.parametrize("adapt_std", ["no", "yes"])
def test_policy_gradient_step_by_hand(adapt_std, problem):
    """Two steps of Adam, written out, along the gradient of mean log pi A; the rate falls.

    Each task's advantages are divided by their own root mean square.
    """
    settings = with_learner("pg", step_size=0.05, adapt_std=adapt_std, rate_rounds=10)
    adapter, first, second = begun(settings), {}, {}
    for number in range(2):
        phi = weights(adapter)
        episodes = problem.rollout(adapter.act, GOALS, 3)
        phi = with_policy_gradient(phi, adapter.learner.actor.explored(episodes), settings)
        adapter.update(episodes)
        for name, value in phi.items():
            rate = 0.05 * (1 - 0.9 * number / 10)
            if name == "log_std" and adapt_std == "no":
                rate = 0.0
            first[name] = 0.9 * first.get(name, 0.0) + 0.1 * value.grad
            second[name] = 0.999 * second.get(name, 0.0) + 0.001 * value.grad.square()
            step = (first[name] / (1 - 0.9 ** (number + 1))
                    / ((second[name] / (1 - 0.999 ** (number + 1))).sqrt() + 1e-8))
            change = weights(adapter)[name] - value
            clear = value.grad.abs() > 1e-5  # smaller ones differ by rounding
            assert torch.allclose(change[clear], rate * step[clear], atol=2e-5, rtol=1e-2), name
            assert clear.all() or name != "b3"


# ---------------------------------------------------------------- learning
@pytest.mark.slow
@pytest.mark.parametrize("learner, rounds, episodes", [("sac", 30, 5), ("pg", 60, 20)])
def test_the_point_task_is_learned(learner, rounds, episodes):
    """From -20 to within 2 of the straight way's -3.2; not by the rewards of another task."""
    settings = scratch.Settings(
        learner=learner, expert_width=64, expert_batch=64, expert_updates=60, hidden=32,
        expert_reward_scale=1.0, rate_rounds=rounds, step_size=0.02)
    goals = np.array([[0.8, 0.5], [-0.7, 0.6], [-0.4, -0.9], [0.9, -0.2]])
    best = np.mean([sum(-np.linalg.norm(goal - np.clip(goal, -0.1 * k, 0.1 * k))
                        for k in range(1, 21)) for goal in goals])

    def returns(shift):
        adapter = scratch.Adapter({}, PointGoal(), settings)
        update = adapter.update
        adapter.update = lambda parts: update(parts | {
            "rewards": np.roll(parts["rewards"], shift * episodes, axis=0)})
        out = evaluate(PointEnvironments(PointGoal()), adapter, goals, rounds, episodes, 0,
                       explore_last=False)
        return [mean_of(entries, "return") for entries in by_round(out.lists["held_out"])]
    own, others = returns(0), returns(1)
    assert own[0] == others[0] < best - 10
    assert min(own[-3:]) > best - 2
    assert others[-1] < best - 8
