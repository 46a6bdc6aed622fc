"""Slow tests, on the trained policies in results/: that adaptation is real, for every task.

With the rewards of the rollouts exchanged between tasks, the gain of adaptation must be gone.
"""
import numpy as np
import pytest

import advantages
import gmps
from conftest import HERE
from envs import FAMILIES, make_family, task_set
from files import load_checkpoint


def distances(task, steps, monkeypatch=None):
    """Mean final distance on 20 validation tasks after 0 .. steps gradient steps; with `monkeypatch`, rewards exchanged."""
    folder = HERE / "results" / task / "policy"
    policy = load_checkpoint(folder / "policy.pt", "policy")
    settings = policy["settings"]
    family = make_family(task, settings.reward)
    tasks = task_set(family, "validation", 20)
    if monkeypatch is not None:
        real = advantages.policy_gradient_batch

        def exchanged(episodes, phi, family, settings, scale):
            """Task i is given the rewards of task i + 7, rollout by rollout."""
            n = len(tasks)
            rewards = episodes["rewards"].reshape(n, -1, episodes["rewards"].shape[1])
            return real(episodes | {"rewards": np.roll(rewards, 7, axis=0).reshape(episodes["rewards"].shape)}, phi, family,
                        settings, scale)
        monkeypatch.setattr(gmps, "policy_gradient_batch", exchanged)
    settings = type(settings)(**{**vars(settings), "episodes": settings.test_episodes})
    result = gmps.evaluate(family, policy["theta"], policy["alpha"], policy["scales"], tasks, steps, settings, 0)
    return result["mean"]["distance"].mean(1)


@pytest.mark.slow
@pytest.mark.parametrize("task", list(FAMILIES))
def test_adaptation_gains_by_the_tasks_own_rewards_alone(task, monkeypatch):
    own = distances(task, 3)
    others = distances(task, 3, monkeypatch)
    assert own[0] == others[0], "the same policy before any step"
    gain = own[0] - own[3]
    assert gain > 0.3 * own[0], "there is a gain to lose"
    assert others[0] - others[3] < 0.25 * gain
