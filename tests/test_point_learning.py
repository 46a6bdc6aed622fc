"""PEARL, multitask and regress learn a point task that hides its goal; shuffled rewards undo it.

Mean actions on 20 new goals: who knows the goal gets -1.3, who stays -10. Learning tests of other
methods are in the files of those methods.
"""
import numpy as np
import pytest

from baselines import multitask, oracle, pearl, regress
from local_policies import Demonstrations
from tests.point_task import CircleGoal, misled, new_goals, point_problem, returns_by_round

GOALS = new_goals(1, 20)


@pytest.mark.slow
def test_the_posterior_finds_the_hidden_goal():
    settings = pearl.Settings(collections=20, expert_width=64, expert_reward_scale=1.0,
                              expert_discount=0.9, kl_weight=0.01, meta_batch=10,
                              updates_per_step=0.3)
    met = []
    list(pearl.train(point_problem(20, met.append), settings))
    prior, after = returns_by_round(met[0], 1, 6, GOALS)
    assert prior < -8 and after > -4, (prior, after)
    policy = {"encoder": met[0].encoder, "actor": met[0].actor}
    adapter = misled(pearl.Adapter)(policy, CircleGoal(), settings)
    after = returns_by_round(adapter, 1, 6, GOALS)[1]
    assert after < -7, after


def test_policy_gradient_after_imitation_finds_the_hidden_goal():
    """Imitation of all experts averages them: it stays. Five steps of 20 episodes find the goal."""
    settings = multitask.Settings(hidden=32, imitation_steps=300, step_size=0.03, noise_hold=1)
    met, states = [], np.random.default_rng(0).uniform(-1, 1, (20, 400, 2))
    problem = point_problem(20, met.append)
    problem.demonstrate = lambda experts: Demonstrations(states, experts(states, problem.tasks))
    list(multitask.train(problem, settings))
    returns = returns_by_round(met[0], 5, 20, GOALS)
    assert returns[0] < -8 and returns[1] > returns[0] + 1 and returns[5] > -4, returns
    adapter = misled(multitask.Adapter)({"theta": met[0].theta}, CircleGoal(), settings)
    returns = returns_by_round(adapter, 5, 20, GOALS)
    assert max(returns) < -8, returns


def test_regression_finds_the_hidden_goal(monkeypatch):
    """One episode gives the goal away to who knows the reward function."""
    monkeypatch.setattr(oracle, "make_family", lambda *_: CircleGoal())
    settings = regress.Settings(experts="scripted")
    met = []
    list(regress.train(point_problem(20, met.append), settings))
    before, after = returns_by_round(met[0], 1, 1, GOALS)
    assert before < -8 and after > -1.5, (before, after)
    policy = oracle.told_experts(CircleGoal().expert, point_problem(20).tasks)
    adapter = misled(regress.Adapter)(policy, CircleGoal(), settings)
    after = returns_by_round(adapter, 1, 1, GOALS)[1]
    assert after < -5, after
