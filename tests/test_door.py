"""Tests of the door: sizes, start, reward against its closed form, bits, and the scripted expert on every angle."""
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import door
import gmps
import policy
from conftest import record
from envs import BatchEnv, check_tasks, make_family, rollout, task_set
from local_policies import make_demonstrations
from settings import Settings

DOOR = make_family("door")


def with_expert(tasks, noise=0.0, episodes=1, threads=1):
    """Episodes of the scripted expert, `episodes` per task, with noise on its actions."""
    env, rng = BatchEnv(len(tasks) * episodes, DOOR, threads), np.random.default_rng(0)

    def act(observation):
        actions = door.door_expert(observation.reshape(len(tasks), episodes, -1), tasks)
        assert actions.dtype == np.float32 and np.abs(actions).max() <= 1
        return (actions + rng.normal(0, noise, actions.shape)).reshape(env.num_envs, -1)

    return rollout(env, act, np.repeat(tasks, episodes, axis=0))


@pytest.fixture(scope="module")
def opened():
    """One expert episode for each of 13 angles, 0 to 60 degrees."""
    tasks = DOOR.training_tasks(13)
    return tasks, with_expert(tasks)


def test_gymnasium_checker_finds_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make("gmps/SawyerDoor-v0").unwrapped)


def test_sizes_and_start():
    """The documented observation; closed door; hand at (0, 0.4, 0.1); grasp point by the door's frame, by hand."""
    env = BatchEnv(3, DOOR, 1)
    observation, info = env.reset(options={"task": [0.5]})
    assert observation.shape == (3, 6) and env.single_action_space.shape == (3,) and env.outcomes.shape == (3, 2)
    assert np.abs(observation - [0, 0.4, 0.1, -0.1, 0.9, 0.3]).max() < 2e-3
    assert np.allclose(info["angle_error"], 0.5) and np.array_equal(info["angle_error"], info["goal_distance"])
    assert np.ptp(env.family.training_tasks(20)) == pytest.approx(np.pi / 3)
    samples = task_set(DOOR, "validation", 400)
    assert samples.shape == (400, 1) and samples.min() >= 0 and samples.max() <= np.pi / 3
    assert abs(samples.mean() / (np.pi / 3) - 0.5) < 4 / np.sqrt(12 * 400)
    for bad in ([[-0.1]], [[1.1]], [[0.1, 0.2]]):
        with pytest.raises(ValueError):
            check_tasks(DOOR, bad)
    with pytest.raises(ValueError, match="no dense reward"):
        make_family("door", "dense")


def test_reward_by_hand():
    """10 angle up to the target, as fast down past it, never below 0, and nothing for fingertips over 10 cm away."""
    angle, target = np.meshgrid(np.linspace(0, 1.5, 31), np.linspace(0, 1, 11))
    for away, near in ((0.0, 1), (0.0999, 1), (0.1001, 0), (0.5, 0)):
        outcome = np.stack([angle, np.full_like(angle, away)], axis=-1)
        rewards = sum(DOOR.reward_terms(outcome, None, target[..., None]).values())
        by_hand = near * np.where(angle <= target, 10 * angle, np.maximum(0, 10 * target - 10 * (angle - target)))
        assert np.allclose(rewards, by_hand, atol=1e-12)


def test_rewards_of_an_episode_are_those_of_the_simulators_state(opened):
    """Angle and fingertip distance from observations alone: the hand holds the fingertips 3 cm below it."""
    tasks, episodes = opened
    hand, grasp = np.split(episodes["observations"][:, 1:], 2, axis=-1)
    angle = door.door_angle(grasp)
    assert np.abs(angle - episodes["outcomes"][..., 0]).max() < 1e-6
    assert np.abs(door.grasp_point(angle) - grasp).max() < 1e-6
    assert np.abs(episodes["distances"] - np.abs(angle - tasks)).max() < 1e-6
    away = np.linalg.norm(hand - [0, 0, 0.03] - grasp, axis=-1)
    sure = np.abs(away - 0.1) > 0.01  # the hand tilts a little under load
    rewards = np.where(away < 0.1, np.maximum(0, 10 * (tasks - np.abs(angle - tasks))), 0)
    assert np.abs(episodes["rewards"] - rewards)[sure].max() < 1e-5
    assert (episodes["rewards"][:, :30] == 0).all() and sure.mean() > 0.9


def test_expert_opens_every_angle_and_holds_it(opened):
    tasks, episodes = opened
    assert np.rad2deg(episodes["distances"][:, -1]).max() < 1.0
    angle = episodes["outcomes"][..., 0]
    assert np.abs(np.diff(angle[:9, -10:])).max() < 1e-3, "up to 40 degrees the door stands still long before the end"
    assert np.rad2deg(angle[0]).max() < 0.1, "a target of 0 leaves the door closed"
    assert (episodes["outcomes"][:, -1, 1] < 0.05).all(), "and the fingertips at the handle"


def test_expert_recovers_from_noise():
    episodes = with_expert(DOOR.training_tasks(7), noise=0.3, episodes=4)
    assert np.rad2deg(episodes["distances"][:, -1]).max() < 4.0


def test_expert_is_continuous(opened):
    """No switches: a millimetre of the hand changes an action by less than 1 of its range of 2, on the path and off it."""
    tasks, episodes = opened
    rng = np.random.default_rng(0)
    states = episodes["observations"] + np.pad(rng.normal(0, 0.02, episodes["observations"].shape[:2] + (3,)),
                                               ((0, 0), (0, 0), (0, 3)))
    moved = states + np.pad(rng.normal(0, 1e-5, states.shape[:2] + (3,)), ((0, 0), (0, 0), (0, 3)))
    change = np.linalg.norm(door.door_expert(moved, tasks) - door.door_expert(states, tasks), axis=-1)
    assert (change / np.linalg.norm(moved - states, axis=-1)).max() < 1000


def test_door_stays_where_it_is_let_go():
    """The hinge's damper against the door's inertia, 2 kg and 0.4 m: turning at 1 rad/s it stops within J / damping rad."""
    env = BatchEnv(1, DOOR, 1)
    env.reset(options={"task": [0.5]})
    joint, inertia = env.model.joint("hinge"), DOOR.door_mass * 0.4 ** 2 / 3
    positions = 1 + env.model.nq
    env.state[:, 1 + joint.qposadr[0]], env.state[:, positions + joint.dofadr[0]] = 0.5, 1.0
    angles = []
    for _ in range(20):
        env.step(np.zeros((1, 3)))
        angles.append(env.state[0, 1 + joint.qposadr[0]])
    assert 0.5 < angles[0] < 0.5 + 4 * inertia / 100, "gone a little further (the handle adds inertia)"
    assert np.ptp(angles[1:]) < 1e-3, "and then it stays"


def test_door_moves_only_by_its_handle():
    """Nothing tunnels: with the hand driven at it from outside, it stays shut."""
    env = BatchEnv(1, DOOR, 1)
    actions = np.zeros((DOOR.horizon, 1, 3))
    actions[:, :, 1], actions[:20, :, 2], actions[:10, :, 0] = 1, 1, -1  # at handle's height, into the bar
    observations, rewards = record(env, actions, np.array([0.5]))
    assert np.abs(observations[-1, 0, 3:] - observations[0, 0, 3:]).max() < 5e-3
    assert observations[:, 0, 1].max() < 0.9 and np.isfinite(rewards).all() and env.divergences == 0


def test_policy_from_scratch_finds_no_reward_and_takes_no_step():
    """Its hand never comes near the handle: rewards, and so advantages and gradient, are exactly 0, not 0 / 0."""
    settings, tasks = Settings(task="door", episodes=5), task_set(DOOR, "validation", 2)
    theta = policy.init_policy(DOOR, settings, torch.Generator().manual_seed(0))
    result = gmps.evaluate(DOOR, theta, gmps.init_step_sizes(theta, settings), [None], tasks, 1, settings, 0, 1)
    assert (result["sampled"]["return"] == 0).all()
    assert all(torch.equal(result["path"][1][name], result["path"][0][name]) for name in theta)


@pytest.mark.slow
@pytest.mark.parametrize("init_std", [0.5, 1.0])
@pytest.mark.parametrize("step_size", [0.3, 3.0])
def test_policy_gradient_from_scratch_does_not_learn(init_std, step_size):
    """README's claim: 4 angles, 20 gradient steps of 20 rollouts each, and never a reward."""
    settings = Settings(task="door", episodes=20, init_std=init_std, init_step_size=step_size)
    theta = policy.init_policy(DOOR, settings, torch.Generator().manual_seed(0))
    result = gmps.evaluate(DOOR, theta, gmps.init_step_sizes(theta, settings), [None], task_set(DOOR, "validation", 4), 20,
                           settings, 0)
    assert (result["sampled"]["return"] == 0).all() and (result["mean"]["return"] == 0).all()


def test_bits_depend_neither_on_threads_nor_on_batch():
    tasks = task_set(DOOR, "validation", 4)
    one, two = (with_expert(tasks, threads=threads) for threads in (1, 2))
    alone = with_expert(tasks[2:3])
    for key in ("observations", "rewards", "outcomes"):
        assert np.array_equal(one[key], two[key]) and np.array_equal(one[key][2:3], alone[key])


def test_demonstrations_of_the_script():
    """make_demonstrations takes the scripted expert as it takes a learned one."""
    settings, tasks = Settings(task="door", demonstration_episodes=2), DOOR.training_tasks(3)
    observations, actions, steps = make_demonstrations(BatchEnv(6, DOOR, 1), door.door_expert, tasks, settings)
    assert observations.shape == (3, 200, 6) and actions.shape == (3, 200, 3) and steps == 600
