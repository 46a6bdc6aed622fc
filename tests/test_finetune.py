"""Tests of tools/finetune.py: gradient steps of PEARL and of recurrent policies on new tasks."""
import copy
import dataclasses

import numpy as np
import pytest
import torch

from advantages import advantages
from baselines import pearl, recurrent, rl2
from evaluate import by_round, evaluate, mean_of
from policy import CorrelatedNoise
from tests.conftest import ARGUMENTS, make_problem, result_of, start
from tests.point_task import CircleGoal, PointEnvironments
from tests.test_recurrent import random_policy
from tools import finetune

POINT = CircleGoal()
GOALS = np.array([[1.0, 0.0], [0.0, 1.0], [-0.6, 0.8]])
SMALL = dict(expert_noise_correlation=0.6, expert_reward_scale=1.0, discount=0.9, gae_lambda=1.0)


def small(kind):
    """An untrained adapter of PEARL or of RL^2 on the point."""
    if kind == "pearl":
        settings = pearl.Settings(latent=3, expert_width=16, **SMALL)
        policy = pearl.Learner(make_problem(GOALS, family=POINT), settings, None).policy()
        return pearl.Adapter(policy, POINT, settings)
    settings = rl2.Settings(hidden=8, memory=6, trial_episodes=2, init_std=0.4, **SMALL)
    network = random_policy(POINT, settings)
    return recurrent.Adapter({name: 0.3 * value if name != "log_std" else value
                              for name, value in network.items()}, POINT, settings)


def begun(kind, K=6, rate=0.02, seed=3):
    """After the first round of two episodes, and the K episodes explored after it."""
    adapter, environments = finetune.FineTuned(small(kind), 2, rate), PointEnvironments(POINT)
    adapter.begin(3, torch.Generator().manual_seed(seed))
    for _ in range(2):
        assert adapter.sequential
        adapter.update(environments.rollout(adapter.act, GOALS, 1))
    assert not adapter.sequential
    return adapter, environments.rollout(adapter.act, GOALS, K)


KINDS = pytest.mark.parametrize("kind", ["pearl", "rl2"])


@KINDS
def test_the_first_round_is_the_methods_own(kind):
    """Same records up to the first round's end; other ones after it, with one update a round."""
    plain, tuned = (evaluate(PointEnvironments(POINT), adapter, GOALS, 3, 4, seed=5).lists
                    for adapter in (small(kind), finetune.FineTuned(small(kind), 4, 0.05)))
    of = [[[entry["return"] for entry in part] for part in by_round(lists["held_out"])]
          for lists in (plain, tuned)]
    for k, equal in enumerate((True, True, False, False)):
        assert np.allclose(of[0][k], of[1][k], atol=1e-5) == equal
    assert [part[0]["gradient_steps"] for part in by_round(tuned["held_out"])] == [0, 4, 5, 6]
    assert [part[0]["adaptation_episodes"] for part in by_round(tuned["held_out"])] == [0, 4, 8, 12]


@KINDS
def test_what_is_differentiated_is_what_acted(kind):
    """(action - mean) / std is the noise that exploration drew, step by step, for every episode."""
    drawn = []

    class Watched(CorrelatedNoise):
        def __next__(self):
            drawn.append(super().__next__())
            return drawn[-1]
    with pytest.MonkeyPatch.context() as patch:
        for module in (pearl, recurrent):
            patch.setattr(module, "CorrelatedNoise", Watched)
        adapter, episodes = begun(kind)
    mean, log_std, action = adapter.own.gaussians(episodes)
    noise = torch.stack([part.reshape(18, 2) for part in drawn[-10:]], dim=1)
    assert torch.allclose((action - mean) / log_std.exp(), noise, atol=2e-3)


def test_noise_is_known_where_tanh_hides_it():
    """With means far beyond tanh's range every action of PEARL is 1, yet the noise is what it was.
    """
    adapter, _ = begun("pearl")
    with torch.no_grad():
        adapter.own.parameters[-1][..., :2] += 12.0
    episodes = PointEnvironments(POINT).rollout(adapter.act, GOALS, 6)
    assert (episodes["actions"] == 1.0).all()
    mean, log_std, action = adapter.own.gaussians(episodes)
    noise = ((action - mean) / log_std.exp()).detach()
    assert 0.8 < noise.square().mean().item() < 1.2
    step = torch.corrcoef(torch.stack([noise[:, :-1].flatten(), noise[:, 1:].flatten()]))[0, 1]
    assert float(step) == pytest.approx(SMALL["expert_noise_correlation"], abs=0.15)


@KINDS
def test_loss_and_step_by_hand(kind):
    """With torch.distributions, noise of one step, two episodes that end early: their later steps
    count nowhere. Adam's first step has the size of its rate.
    """
    adapter, episodes = begun(kind)
    episodes["mask"][[1, 9], 6:] = 0
    adapter.adapter.settings = dataclasses.replace(adapter.adapter.settings,
                                                   expert_noise_correlation=0.0)
    mean, log_std, action = adapter.own.gaussians(episodes)
    log_p = torch.distributions.Normal(mean, log_std.exp().expand(mean.shape)).log_prob(action)
    log_p = log_p.sum(-1).view(3, 6, 10)
    seen, reward, mask = (torch.as_tensor(values, dtype=torch.float32).unflatten(0, (3, 6))
                          for values in (episodes["observations"][:, :-1], episodes["rewards"],
                                         episodes["mask"]))
    advantage = advantages(seen, reward, mask, adapter.adapter.settings)
    loss = adapter.loss(episodes)
    for i in range(3):
        counts = mask[i].bool()
        own = advantage[i][counts]
        size = own.square().mean().sqrt()
        assert torch.allclose(loss[i], -(log_p[i][counts] * own / size).mean(), rtol=1e-4)
    gradients = torch.autograd.grad(loss.sum(), adapter.own.parameters)
    before = [p.detach().clone() for p in adapter.own.parameters]
    adapter.update(episodes)
    for old, new, g in zip(before, adapter.own.parameters, gradients):  # Adam's first step
        moved = g.abs() > 1e-4
        assert torch.allclose((new - old)[moved], -0.02 * g[moved].sign(), rtol=1e-2)


@KINDS
def test_tasks_do_not_share_their_networks(kind):
    """Other rewards on task 1 change its actions alone. The trained network stays as it was."""
    adapter, episodes = begun(kind)
    trained = copy.deepcopy(adapter.original)
    other, changed = copy.deepcopy(adapter), copy.deepcopy(episodes)
    changed["rewards"][6:12] = np.random.default_rng(0).normal(size=(6, 10))
    adapter.update(episodes)
    other.update(changed)
    first, second = (PointEnvironments(POINT).rollout(
        lambda x, last, one=one: one.act(x, last, explore=False), GOALS)["actions"]
        for one in (adapter, other))
    assert np.array_equal(first[[0, 2]], second[[0, 2]]) and not np.allclose(first[1], second[1])
    weights = "actor" if kind == "pearl" else "network"
    for part in (adapter.original, trained):
        part.begin(3, torch.Generator().manual_seed(0))
    again, once = (PointEnvironments(POINT).rollout(part.act, GOALS)["actions"]
                   for part in (adapter.original, trained))
    assert np.array_equal(again, once) and hasattr(adapter.original, weights)


@KINDS
def test_it_learns_a_goal_and_shuffled_rewards_undo_it(kind):
    """From an untrained policy, 30 rounds of 20 episodes."""
    gained = {}
    for shuffled in (False, True):
        adapter, environments = finetune.FineTuned(small(kind), 2, 0.02), PointEnvironments(POINT)
        rng, inner = np.random.default_rng(0), environments.rollout

        def rollout(act, tasks, episodes=1, shuffled=shuffled, rng=rng, inner=inner):
            result = inner(act, tasks, episodes)
            if shuffled:
                result["rewards"] = rng.permuted(result["rewards"].ravel()).reshape(-1, 10)
            return result
        adapter.begin(3, torch.Generator().manual_seed(1))
        for _ in range(2):
            adapter.update(rollout(adapter.act, GOALS, 1))
        for _ in range(30):
            adapter.update(rollout(adapter.act, GOALS, 20))
        measured = inner(lambda x, last, one=adapter: one.act(x, last, explore=False), GOALS)
        gained[shuffled] = measured["rewards"].sum(1).mean()
    assert gained[False] > -4 and gained[True] < -7, gained  # who stays at the start has -10


def test_the_command(tmp_path, capsys, finished):
    """A PEARL policy goes on; the rate is in result.json. Another method is refused in one line."""
    run_folder = tmp_path / "pearl"
    assert start(*ARGUMENTS, "--method", "pearl", "--out", run_folder) == 0
    arguments = ["--evaluate", str(run_folder), "--rollouts", "3", "--gradient-steps", "2",
                 "--threads", "1", "--out", str(tmp_path / "tuned")]
    assert finetune.main(["--rate", "0.002", *arguments]) == 0
    result = result_of(tmp_path / "tuned")
    assert result["finetune_rate"] == 0.002 and result["rollouts"] == 3
    assert [part[0]["gradient_steps"] for part in by_round(result["held_out"])] == [0, 3, 4]
    assert np.isfinite(mean_of(result["held_out"], "return"))
    assert finetune.main(["--evaluate", str(finished), "--out", str(tmp_path / "no")]) == 2
    assert "pearl" in capsys.readouterr().err.splitlines()[-1]
