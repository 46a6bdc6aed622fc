"""Tests of the door: reward against its closed form, and the scripted expert on every angle."""
import numpy as np
import pytest
import torch

from envs import BatchEnv, Environments
from evaluate import evaluate
from gmps import Adapter, init_step_sizes
from policy import init_policy
from settings import Settings
from tasks import make_family, task_set
from tasks.sawyer_door import door_angle, door_expert, grasp_point
from tests.conftest import record

DOOR = make_family("door")


def with_expert(tasks, noise=0.0, episodes=1):
    """Episodes of the scripted expert, `episodes` per task, with noise on its actions."""
    rng = np.random.default_rng(0)

    def act(observation, last):
        actions = door_expert(observation.reshape(len(tasks), episodes, -1), tasks)
        assert actions.dtype == np.float32 and np.abs(actions).max() <= 1
        return (actions + rng.normal(0, noise, actions.shape)).reshape(len(observation), -1)

    return Environments(DOOR, 1).rollout(act, tasks, episodes)


@pytest.fixture(scope="module")
def opened():
    """One expert episode for each of 13 angles, 0 to 60 degrees."""
    tasks = DOOR.training_tasks(13)
    assert tasks[0] == 0 and tasks[-1] == pytest.approx(np.pi / 3)
    return tasks, with_expert(tasks)


def test_reward_by_hand():
    """10 angle up to the target, as fast down past it, never below 0.

    Nothing where the fingertips are over 10 cm away. The distance is the angle's error.
    """
    angle, target = np.meshgrid(np.linspace(0, 1.5, 31), np.linspace(0, 1, 11))
    for away, near in ((0.0, 1), (0.0999, 1), (0.1001, 0), (0.5, 0)):
        outcome = np.stack([angle, np.full_like(angle, away)], axis=-1)
        rewards = sum(DOOR.reward_terms(outcome, None, target[..., None]).values())
        past = np.maximum(0, 10 * target - 10 * (angle - target))
        by_hand = near * np.where(angle <= target, 10 * angle, past)
        assert np.allclose(rewards, by_hand, atol=1e-12)
    info = BatchEnv(3, DOOR, 1).reset(options={"task": [0.5]})[1]
    assert np.allclose(info["angle_error"], 0.5)
    assert np.array_equal(info["angle_error"], info["goal_distance"])


def test_rewards_of_an_episode_are_those_of_the_simulators_state(opened):
    """Angle and fingertips from observations alone: the hand holds the fingertips 3 cm below it."""
    tasks, episodes = opened
    hand, grasp = np.split(episodes["observations"][:, 1:], 2, axis=-1)
    angle = door_angle(grasp)
    assert np.abs(angle - episodes["outcomes"][..., 0]).max() < 1e-6
    assert np.abs(grasp_point(angle) - grasp).max() < 1e-6
    assert np.abs(episodes["distances"] - np.abs(angle - tasks)).max() < 1e-6
    away = np.linalg.norm(hand - [0, 0, 0.03] - grasp, axis=-1)
    sure = np.abs(away - 0.1) > 0.01  # the hand tilts a little under load
    rewards = np.where(away < 0.1, np.maximum(0, 10 * (tasks - np.abs(angle - tasks))), 0)
    assert np.abs(episodes["rewards"] - rewards)[sure].max() < 1e-5
    assert (episodes["rewards"][:, :30] == 0).all() and sure.mean() > 0.9


def test_expert_opens_every_angle_and_holds_it(opened):
    """Also where noise disturbs it. A target of 0 leaves the door shut."""
    _, episodes = opened
    assert np.rad2deg(episodes["distances"][:, -1]).max() < 1.0
    angle, away = np.moveaxis(episodes["outcomes"], -1, 0)
    assert np.rad2deg(angle[0]).max() < 0.1 and away[:, -1].max() < 0.05
    assert np.abs(np.diff(angle[:9, -10:])).max() < 1e-3, "up to 40 degrees it stands still"
    noisy = with_expert(DOOR.training_tasks(7), noise=0.3, episodes=4)
    assert np.rad2deg(noisy["distances"][:, -1]).max() < 4.0


def test_expert_is_continuous(opened):
    """No switches: a millimetre of the hand changes an action by less than 1 of its range of 2."""
    tasks, episodes = opened
    rng = np.random.default_rng(0)

    def hand_moved(states, size):
        off = rng.normal(0, size, (*states.shape[:2], 3))
        return states + np.concatenate([off, np.zeros_like(off)], axis=-1)
    states = hand_moved(episodes["observations"], 0.02)  # off the path as well
    moved = hand_moved(states, 1e-5)
    change = np.linalg.norm(door_expert(moved, tasks) - door_expert(states, tasks), axis=-1)
    assert (change / np.linalg.norm(moved - states, axis=-1)).max() < 1000


def test_model_of_the_door_is_the_released_one():
    """Masses of density 1000, by hand; boxes, hinge, claws."""
    model = BatchEnv(1, DOOR, 1).model
    boxes = [geom for geom in range(model.ngeom)
             if model.geom_bodyid[geom] == model.body("door").id]
    assert model.geom_size[boxes].tolist() == [[0.01, 0.2, 0.2], [0.06, 0.01, 0.01],
                                               [0.01, 0.1, 0.01]]
    assert model.geom_pos[boxes].tolist() == [[0, 0, 0], [0.05, -0.2, 0], [0.1, -0.1, 0]]
    volume = 8 * model.geom_size[boxes].prod(1).sum()
    assert model.body("door").mass[0] == pytest.approx(1000 * volume)
    hinge = model.joint("hinge")
    assert hinge.range.tolist() == [-3, 3] and hinge.damping[0] == 100 and hinge.armature[0] == 0
    assert model.actuator_gainprm[:, 0].tolist() == [100, 100]


def test_door_stays_where_it_is_let_go():
    """Turning at 1 rad/s it stops within inertia / damping."""
    env = BatchEnv(1, DOOR, 1)
    env.reset(options={"task": [0.5]})
    joint = env.model.joint("hinge")
    position, velocity = 1 + joint.qposadr[0], 1 + env.model.nq + joint.dofadr[0]
    env.state[:, position], env.state[:, velocity] = 0.5, 1.0
    angles = []
    for _ in range(20):
        env.step(np.zeros((1, 3)))
        angles.append(env.state[0, position])
    inertia = 1000 * 8 * 0.01 * 0.2 * 0.2 * 0.4 ** 2 / 3  # of the panel, about its edge
    assert 0.5 < angles[0] < 0.5 + 4 * inertia / 100 and np.ptp(angles[1:]) < 1e-3


def test_door_pushed_from_outside_turns_the_other_way_and_pays_nothing():
    """The hand never enters the panel: nothing tunnels."""
    env = BatchEnv(1, DOOR, 1)
    actions = np.zeros((DOOR.horizon, 1, 3))
    actions[:, :, 1], actions[:20, :, 2], actions[:10, :, 0] = 1, 1, -1
    observations, rewards = record(env, actions, np.array([0.5]))
    hand, grasp = np.split(observations[:, 0], 2, axis=1)
    angle = door_angle(grasp)
    assert angle[-1] < -0.2 and (np.diff(angle) < 1e-3).all() and (rewards == 0).all()
    assert (hand[:, 1] < grasp[:, 1] + 0.02).all() and env.divergences == 0


@pytest.mark.parametrize("init_std, step_size, tasks, rounds", [(0.5, 0.03, 2, 1)] + [
    pytest.param(init_std, step_size, 4, 20, marks=pytest.mark.slow)
    for init_std in (0.5, 1.0) for step_size in (0.3, 3.0)])
def test_policy_gradient_from_scratch_finds_no_reward(init_std, step_size, tasks, rounds):
    """The hand never comes near the handle: advantages and gradient are exactly 0, not 0 / 0."""
    settings = Settings(task="door", episodes=20, init_std=init_std, init_step_size=step_size)
    theta = init_policy(DOOR, settings, torch.Generator().manual_seed(0))
    policy = {"theta": theta, "alpha": init_step_sizes(theta, settings), "scale": None}
    adapter = Adapter(policy, DOOR, settings)
    lists = evaluate(Environments(DOOR), adapter, task_set(DOOR, "validation", tasks), rounds,
                     settings.episodes, seed=0).lists
    for name in ("held_out", "held_out_sampled"):
        assert [entry["return"] for entry in lists[name]] == [0] * tasks * (rounds + 1)
    assert adapter.steps == rounds
    assert all((adapter.actor.phi[name] == value).all() for name, value in theta.items())
