"""Tests of replay, experts and demonstrations."""
import dataclasses
import math

import numpy as np
import pytest
import torch

import local_policies
from conftest import (
    PUSH,
    numpy_mlp,
    push_north,
    random_actions,
    scripted_expert,
    through_bytes,
)
from envs import BatchEnv, correlated_noise, rollout, task_set
from local_policies import Experts, Replay
from sac import SoftActorCritic
from settings import Settings

SAC = Settings(expert_width=16, expert_learning_rate=3e-3, expert_discount=0.9, expert_target_rate=0.05)


@pytest.fixture(scope="module")
def filled():
    """(tasks, episodes of 2 environments per task) of three tasks with random pushes."""
    tasks = task_set(PUSH, "train", 3)
    actions = iter(0.3 * random_actions(6, seed=9) + 0.7 * push_north(num_envs=6))
    return tasks, rollout(BatchEnv(6), lambda observation: next(actions), np.repeat(tasks, 2, axis=0))


def sampled_with_sources(filled, learners, share):
    """A batch of `Replay.sample` and, for each transition, its stream and index, found by its action's bits."""
    tasks, episodes = filled
    replay = Replay(PUSH, tasks, 200)
    replay.add(episodes)
    settings = Settings(expert_batch=400, expert_relabelled=share, expert_reward_scale=0.25)
    batch = replay.sample(np.random.default_rng(0), learners, settings)
    place = {replay.data["action"][s, i].tobytes(): (s, i) for s in range(3) for i in range(100)}
    assert replay.size == 100 and len(place) == 300
    found = np.array([[place[action.tobytes()] for action in row] for row in batch["action"].numpy()])
    return replay, batch, found[..., 0], found[..., 1]


def check_transition(replay, batch, stream, index, goal):
    """Reward by hand for `goal` (N, B, 2), and (scaled) observations those of the stored transition."""
    outcome = replay.data["outcome"][stream, index].astype(float)
    block, tips = outcome[..., :3], outcome[..., 3:]
    gain = np.linalg.norm(goal - [0, 0.52], axis=-1) - np.linalg.norm(goal - block[..., :2], axis=-1)
    reward = 0.25 * (-np.linalg.norm(block - tips, axis=-1) + 100 * np.maximum(0, gain))
    assert np.abs(batch["reward"].numpy() - reward).max() < 1e-4
    for name in ("observation", "next_observation"):
        seen = batch[name][..., :6].numpy() * 0.1 + [0, 0.6, 0.1, 0, 0.65, 0.02]
        assert np.abs(seen - replay.data[name][stream, index]).max() < 1e-6


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_contextual_replay_rewards_are_those_of_the_goal_in_the_input(filled, share):
    replay, batch, stream, index = sampled_with_sources(filled, 1, share)
    assert batch["observation"].shape == (1, 400, 8)
    goal = batch["observation"][..., 6:].numpy() * [0.1, 0.05] + [0.0, 0.75]
    assert np.array_equal(batch["observation"][..., 6:], batch["next_observation"][..., 6:])
    which = np.linalg.norm(goal[..., None, :] - replay.tasks, axis=-1)
    assert which.min(-1).max() < 1e-7, "only training goals"
    check_transition(replay, batch, stream, index, goal)
    # A relabelled transition keeps its goal one time in three: 1 - 2/3 share keep theirs; four standard errors of 400
    kept, expected = (which.argmin(-1) == stream).mean(), 1 - share * 2 / 3
    assert abs(kept - expected) <= 4 * math.sqrt(expected * (1 - expected) / 400)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_local_replay_keeps_each_learners_own_task(filled, share):
    replay, batch, stream, index = sampled_with_sources(filled, 3, share)
    assert batch["observation"].shape == (3, 400, 6)
    check_transition(replay, batch, stream, index, np.broadcast_to(replay.tasks[:, None], (3, 400, 2)))
    kept, expected = (stream == np.arange(3)[:, None]).mean(), 1 - share * 2 / 3
    assert abs(kept - expected) <= 4 * math.sqrt(expected * (1 - expected) / 1200)


def test_replay_stores_episodes_by_task(filled):
    """Row s holds task s's episodes in order, and what follows a transition is its next observation."""
    tasks, episodes = filled
    replay = Replay(PUSH, tasks, 150)
    replay.add(episodes)
    for s in range(3):
        assert np.array_equal(replay.data["action"][s, :50], episodes["actions"][2 * s])
        following = episodes["observations"][2 * s + 1, 1:]
        assert np.allclose(replay.data["next_observation"][s, 50:100], following, atol=1e-7)
        assert np.allclose(replay.data["outcome"][s, 50:100], episodes["outcomes"][2 * s + 1], atol=1e-7)
    assert not replay.data["terminated"].any(), "a time limit is no end"
    with pytest.raises(ValueError, match="full"):
        replay.add(episodes)


def replay_with_an_early_end(filled):
    """(replay, episodes) in which environment 2 (task 1) ends at step 31."""
    tasks, episodes = filled
    episodes = {key: value.copy() for key, value in episodes.items()}
    episodes["mask"][2, 31:] = 0
    episodes["terminated"][2] = True
    replay = Replay(PUSH, tasks, 150)
    replay.add(episodes)
    return replay, episodes


def test_replay_drops_what_follows_an_early_end(filled):
    """Flagged where it ends, 81 transitions in every stream."""
    replay, episodes = replay_with_an_early_end(filled)
    assert replay.size == 81
    assert np.argwhere(replay.data["terminated"][..., 0]).tolist() == [[1, 30]]
    assert np.array_equal(replay.data["action"][1, 31:81], episodes["actions"][3])


def test_replay_sums_rewards_over_several_steps(filled):
    """Five steps by a loop: discounted rewards up to the end of the episode, and what is left of the value after them."""
    replay, episodes = replay_with_an_early_end(filled)
    settings = Settings(expert_batch=600, expert_relabelled=0.0, expert_reward_scale=1.0, expert_discount=0.9,
                        expert_return_steps=5)
    batch = replay.sample(np.random.default_rng(0), 1, settings)
    place = {replay.data["action"][s, i].tobytes(): (s, i) for s in range(3) for i in range(replay.size)}
    spans, ended = set(), set()
    for i in range(600):
        stream, index = place[batch["action"][0, i].numpy().tobytes()]
        length = [50, 31][stream == 1]  # of the stream's first episode
        environment, t, last = 2 * stream, index, length
        if index >= length:  # second episode; its stream was cut to the shortest one's 81 transitions
            environment, t, last = 2 * stream + 1, index - length, min(50, 81 - length)
        span = min(5, last - t)
        rewards = episodes["rewards"][environment, t:t + span]
        assert batch["reward"][0, i].item() == pytest.approx((0.9 ** np.arange(span)) @ rewards, abs=2e-3)
        assert batch["discount"][0, i].item() == pytest.approx(0.9 ** span)
        seen = batch["next_observation"][0, i, :6].numpy() * 0.1 + [0, 0.6, 0.1, 0, 0.65, 0.02]
        assert np.abs(seen - episodes["observations"][environment, t + span]).max() < 1e-6
        assert batch["terminated"][0, i] == (environment == 2 and t + span == 31)
        spans.add(span)
        ended.add(bool(batch["terminated"][0, i]))
    assert spans == {1, 2, 3, 4, 5} and ended == {True, False}


def test_exploration_noise_is_standard_normal_and_lasts():
    """Variance 1 at every step, correlation rho^k between noises k steps apart; six standard errors."""
    noise = correlated_noise((40_000,), 0.8, torch.Generator().manual_seed(0))
    rows = torch.stack([next(noise) for _ in range(6)]).double()
    moments = rows @ rows.T / 40_000
    expected = 0.8 ** (torch.arange(6)[:, None] - torch.arange(6)).abs().double()
    assert (moments - expected).abs().max() < 6 * math.sqrt(2 / 40_000)


def test_learner_and_replay_go_on_from_a_checkpoint_with_the_same_bits(filled):
    tasks, episodes = filled
    settings = dataclasses.replace(SAC, expert_batch=16)

    def train(learner, replay, seed):
        rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        for _ in range(4):
            learner.update(replay.sample(rng, 1, settings), generator)

    def fresh(seed):
        return SoftActorCritic(1, 8, 3, dataclasses.replace(settings, seed=seed)), Replay(PUSH, tasks, 300)

    learner, replay = fresh(0)
    replay.add(episodes)
    train(learner, replay, 1)
    saved = through_bytes({"learner": learner.state_dict(), "replay": replay.state_dict()})
    other, other_replay = fresh(1)
    other.load_state_dict(saved["learner"])
    other_replay.load_state_dict(saved["replay"])
    for pair in ((learner, replay), (other, other_replay)):
        pair[1].add(episodes)
        train(*pair, 2)
    for name in ("policy", "critic", "target_critic"):
        assert all(torch.equal(p, q) for p, q in zip(getattr(learner, name), getattr(other, name), strict=True))
    assert torch.equal(learner.log_temperature, other.log_temperature)
    assert other_replay.size == 200


@pytest.mark.parametrize("kind", ["contextual", "local"])
def test_expert_training_resumed_ends_with_the_same_bits(kind):
    """Snapshot after iteration 2 of 4, through bytes, into a fresh generator; and env steps counted exactly."""
    tasks = task_set(PUSH, "train", 2)
    settings = Settings(training_tasks=2, expert_iterations=4, expert_episodes=2, expert_updates=3, expert_width=8,
                        expert_batch=16, experts=kind)
    env = BatchEnv(4)
    saved = None
    for experts, snapshot, metrics in local_policies.train_experts(env, tasks, settings):  # noqa: B007
        if metrics["iteration"] == 2:
            saved = through_bytes(snapshot())
    unbroken = [p.clone() for p in experts.policy]
    resumed = list(local_policies.train_experts(env, tasks, settings, saved))
    assert [metrics["env_steps"] for *_, metrics in resumed] == [3 * 200, 4 * 200]
    assert all(torch.equal(p, q) for p, q in zip(unbroken, resumed[-1][0].policy, strict=True))
    assert resumed[-1][2] == metrics


def test_experts_see_their_own_task():
    """A contextual call equals the network on [scaled observation, scaled goal]; local experts refuse other tasks."""
    tasks, rng = task_set(PUSH, "train", 3), np.random.default_rng(0)
    observations = rng.uniform(-0.2, 0.8, (3, 5, 6))
    learner = SoftActorCritic(1, 8, 3, SAC)
    actions = Experts(PUSH, learner.policy, tasks, True)(observations, tasks)
    for i in range(3):
        for j in range(5):
            x = np.r_[(observations[i, j] - [0, 0.6, 0.1, 0, 0.65, 0.02]) / 0.1, (tasks[i] - [0, 0.75]) / [0.1, 0.05]]
            assert np.allclose(actions[i, j], np.tanh(numpy_mlp(learner.policy, 0, x)[:3]), atol=1e-5)
    learners = SoftActorCritic(3, 6, 3, SAC)
    local = Experts(PUSH, learners.policy, tasks, False)
    x = (observations[2, 4] - [0, 0.6, 0.1, 0, 0.65, 0.02]) / 0.1
    assert np.allclose(local(observations, tasks)[2, 4], np.tanh(numpy_mlp(learners.policy, 2, x)[:3]), atol=1e-5)
    with pytest.raises(ValueError, match="own training tasks"):
        local(observations, tasks[::-1])


def test_demonstrations_are_visited_states_with_clean_labels():
    """First episode of a task: the expert's own path. Others: off it by noise, labels still the expert's mean."""
    tasks, settings = task_set(PUSH, "train", 2), Settings(demonstration_episodes=2, demonstration_noise=0.5)
    env = BatchEnv(4)
    observations, actions, env_steps = local_policies.make_demonstrations(env, scripted_expert, tasks, settings)
    assert observations.shape == (2, 100, 6) and actions.shape == (2, 100, 3) and env_steps == 200
    assert np.array_equal(actions, scripted_expert(observations, tasks))
    clean = rollout(BatchEnv(2), lambda o: scripted_expert(o[:, None], tasks)[:, 0], tasks)
    assert np.array_equal(observations[:, :50], clean["observations"][:, :50])
    assert np.abs(observations[:, 50:, :3] - observations[:, :50, :3]).max() > 0.01


def test_demonstrations_file_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    tasks, observations, actions = rng.normal(size=(2, 2)), rng.normal(size=(2, 7, 6)), rng.uniform(-1, 1, (2, 7, 3))
    local_policies.save_demonstrations(tmp_path / "d.npz", tasks, (observations, actions), 150)
    loaded = local_policies.load_demonstrations(tmp_path / "d.npz", PUSH)
    assert np.array_equal(loaded[0], tasks) and loaded[2] == 150
    assert all(np.array_equal(a, b) for a, b in zip(loaded[1], (observations, actions), strict=True))


@pytest.mark.parametrize("change", [
    {"tasks": np.zeros((2, 3))}, {"tasks": np.zeros((3, 2))}, {"tasks": np.zeros(2)}, {"actions": np.zeros((2, 7, 2))},
    {"actions": np.zeros((2, 6, 3))}, {"observations": np.zeros((2, 7, 5))}, {"observations": np.zeros((2, 6))},
    {"observations": None}, {"tasks": None}])
def test_demonstrations_of_wrong_shape_are_refused(tmp_path, change):
    arrays = {"tasks": np.zeros((2, 2)), "observations": np.zeros((2, 7, 6)), "actions": np.zeros((2, 7, 3))} | change
    np.savez(tmp_path / "d.npz", **{key: value for key, value in arrays.items() if value is not None})
    with pytest.raises(ValueError, match="demonstrations"):
        local_policies.load_demonstrations(tmp_path / "d.npz", PUSH)


def test_detours_are_other_tasks_paths_with_the_tasks_own_labels():
    """A scripted expert that is sent elsewhere in each task's last episode: its states, labelled for the task itself."""
    settings = Settings(demonstration_episodes=3, demonstration_noise=0.0, demonstration_detours=1)
    tasks = np.array([[-0.1, 0.7], [0.1, 0.8], [0.0, 0.75]])
    observations, actions, _ = local_policies.make_demonstrations(BatchEnv(9), scripted_expert, tasks, settings)
    assert np.array_equal(actions, scripted_expert(observations, tasks)), "labels are those of the task"
    by_episode = observations.reshape(3, 3, 50, 6)
    assert np.array_equal(by_episode[:, 0], by_episode[:, 1])
    own = by_episode[:, 0]
    matches = [[np.array_equal(by_episode[i, 2], own[j]) for j in range(3)] for i in range(3)]
    assert np.sum(matches, axis=1).tolist() == [1, 1, 1] and not np.array_equal(matches, np.eye(3))
