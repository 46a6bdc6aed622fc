"""PEARL learns a point task that hides its goal."""
import numpy as np
import pytest

from baselines import pearl
from evaluate import by_round, evaluate
from tests.point_task import CircleGoal, PointEnvironments, point_problem


@pytest.mark.slow
def test_the_posterior_finds_the_hidden_goal_and_shuffled_rewards_undo_it():
    """Mean actions on 20 new goals: who knows the goal gets -1.3, who stays -10."""
    settings = pearl.Settings(collections=20, expert_width=64, expert_reward_scale=1.0,
                              expert_discount=0.9, kl_weight=0.01, meta_batch=10,
                              updates_per_step=0.3)
    met, environments = [], PointEnvironments(CircleGoal())
    list(pearl.train(point_problem(20, met.append), settings))
    goals = environments.family.sample_tasks(np.random.default_rng(1), 20)

    class Misled(pearl.Adapter):
        def update(self, episodes):
            shuffled = np.random.default_rng(0).permutation(episodes["rewards"].ravel())
            super().update(episodes | {"rewards": shuffled.reshape(episodes["rewards"].shape)})

    def returns(kind):
        policy = {"encoder": met[0].encoder, "actor": met[0].actor}
        adapter = kind(policy, environments.family, settings)
        lists = evaluate(environments, adapter, goals, 1, 6, seed=0).lists
        return [np.mean([row["return"] for row in rows]) for rows in by_round(lists["held_out"])]
    prior, after = returns(pearl.Adapter)
    misled = returns(Misled)[1]
    assert prior < -8 and after > -4, (prior, after)
    assert misled < -7, misled
