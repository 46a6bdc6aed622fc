"""Slow tests, on the trained policies in results/: that adaptation is real, for every task.

With the rewards of the rollouts exchanged between tasks, the gain of adaptation must be gone.
"""
import numpy as np
import pytest

from envs import Environments
from evaluate import by_round, evaluate, mean_of
from phases import load_adapter
from tasks import TASKS, task_set
from tests.conftest import HERE


def distances(task, exchange):
    """Mean final distance on 20 validation tasks after 0 to 3 gradient steps."""
    family, adapter, content = load_adapter(HERE / "results" / task / "gmps" / "policy")
    update, tasks, adapter.references = adapter.update, task_set(family, "validation", 20), {}

    def exchanged(episodes):
        """Task i is given the rewards of task i + 7, rollout by rollout."""
        rewards = episodes["rewards"]
        update(episodes | {"rewards": np.roll(rewards, 7 * len(rewards) // len(tasks), axis=0)})
    adapter.update = exchanged if exchange else update
    evaluation = evaluate(Environments(family), adapter, tasks, 3,
                          content["settings"].test_episodes, seed=0, explore_last=False)
    return [mean_of(entries, "final_distance")
            for entries in by_round(evaluation.lists["held_out"])]


@pytest.mark.slow
@pytest.mark.parametrize("task", list(TASKS))
def test_adaptation_gains_by_the_tasks_own_rewards_alone(task):
    own, others = distances(task, False), distances(task, True)
    assert own[0] == others[0], "the same policy before any step"
    gain = own[0] - own[3]
    assert gain > 0.3 * own[0], "there is a gain to lose"
    assert others[0] - others[3] < 0.25 * gain
