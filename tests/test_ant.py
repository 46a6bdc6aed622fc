"""Tests of the ant: observation, reward terms, early end, determinism, against MuJoCo's own stepping."""
import warnings

import gymnasium
import mujoco
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import envs
from envs import AntGoal, BatchEnv, make_family, rollout, task_set

ANT = AntGoal()
GOAL = np.array([1.6, 1.2])


def ant_actions(num_envs, steps=200, seed=0):
    """Random torques that last ten steps each: the ant moves, its feet strike the floor."""
    rng = np.random.default_rng(seed)
    return np.repeat(rng.uniform(-1, 1, (steps // 10, num_envs, 8)), 10, axis=0)


def test_gymnasium_checker_finds_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*(minimum|maximum) value is (-)?infinity.*")
        env = gymnasium.make("gmps/AntGoal-v0")
        check_env(env.unwrapped, skip_render_check=True)
    assert isinstance(gymnasium.make_vec("gmps/AntGoal-v0", num_envs=3).unwrapped, BatchEnv)


def test_model_is_gyms_ant_with_weak_motors():
    """Sizes, gear 30, RK4 at 0.01 s, joint ranges; the mass of capsules and sphere at density 5 by hand."""
    model = BatchEnv(1, "ant").model
    assert (model.nq, model.nv, model.nu, model.nbody) == (15, 14, 8, 15)
    assert np.all(model.actuator_gear[:, 0] == 30) and model.opt.timestep == 0.01
    assert model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4 and ANT.frame_skip == 1 and ANT.horizon == 200

    def capsule(length):
        return 5 * np.pi * 0.08 ** 2 * (length + 4 / 3 * 0.08)
    legs = 4 * (2 * capsule(np.hypot(0.2, 0.2)) + capsule(np.hypot(0.4, 0.4)))
    assert model.body_mass.sum() == pytest.approx(5 * 4 / 3 * np.pi * 0.25 ** 3 + legs)
    ranges = np.degrees(model.jnt_range[1:])
    assert np.allclose(ranges[0::2], [-30, 30]) and np.allclose(ranges[1::2], [[30, 70], [-70, -30], [-70, -30], [30, 70]])


def test_observation_is_the_documented_one():
    """Positions, velocities and MuJoCo's own rotation matrix; the goal makes no difference."""
    env, other = BatchEnv(2, "ant"), BatchEnv(2, "ant")
    observation, _ = env.reset(options={"task": GOAL})
    other.reset(options={"task": -GOAL})
    assert observation.shape == (2, 38) and ANT.observation_size == 38
    assert np.array_equal(observation[0, :7], [0, 0, 0.75, 1, 0, 0, 0]) and not observation[0, 7:29].any()
    data = mujoco.MjData(env.model)
    for action in ant_actions(2, 60):
        observation = env.step(action)[0]
        assert np.array_equal(observation, other.step(action)[0]), "the goal is hidden"
    mujoco.mj_setState(env.model, data, env.state[1], envs.FULL)
    mujoco.mj_kinematics(env.model, data)
    assert np.array_equal(observation[1, :29], np.concatenate([data.qpos, data.qvel]))
    assert np.abs(observation[1, 29:] - data.xmat[env.model.body("torso").id]).max() < 1e-12
    assert np.abs(observation[1, 29:] - np.eye(3).ravel()).max() > 0.01


def test_steps_are_mujocos_and_contact_cost_is_that_of_cfrc_ext():
    """Step by step with mj_step; |clip(cfrc_ext)|^2 by mj_rnePostConstraint in the state before the step."""
    env = BatchEnv(1, "ant", threads=1)
    env.reset(options={"task": GOAL})
    data, costs = mujoco.MjData(env.model), []
    mujoco.mj_setState(env.model, data, env.state[0], envs.FULL)
    for action in ant_actions(1, 150):
        data.ctrl[:] = action[0]
        data.qacc_warmstart[:] = 0
        mujoco.mj_forward(env.model, data)
        mujoco.mj_rnePostConstraint(env.model, data)
        costs.append(np.sum(np.clip(data.cfrc_ext, -1, 1) ** 2))
        data.qacc_warmstart[:] = 0
        mujoco.mj_step(env.model, data)
        *_, info = env.step(action)
        assert env.outcomes[0, 2] == pytest.approx(costs[-1], abs=1e-9)
        assert info["contact"][0] == pytest.approx(-0.0005 * costs[-1], abs=1e-12)
        assert np.abs(env.state[0, 1:16] - data.qpos).max() < 1e-9
    assert max(costs) > 5


@pytest.mark.parametrize("reward", ["dense", "sparse"])
def test_reward_by_hand(reward):
    env = BatchEnv(3, "ant", reward=reward)
    goals = np.array([GOAL, [0.3, 0.2], [0.0, 2.0]])
    env.reset(options={"task": goals})
    near = set()
    for action in ant_actions(3, 100, seed=2):
        action = 1.5 * action
        observation, rewards, _, _, info = env.step(action)
        away = np.abs(observation[:, :2] - goals).sum(1)
        assert np.allclose(info["goal_distance"], np.linalg.norm(observation[:, :2] - goals, axis=1))
        near |= set(away < 0.8)
        if reward == "sparse":
            away = np.minimum(away, 0.8)
        control = 0.005 * (np.clip(action, -1, 1) ** 2).sum(1)
        assert np.allclose(rewards, 4 - away - control - 0.0005 * env.outcomes[:, 2] + 0.05)
    assert near == {True, False}


def test_goals_lie_on_the_quarter_circle():
    goals = task_set(ANT, "train", 40)
    assert np.allclose(np.degrees(np.arctan2(goals[:, 1], goals[:, 0])), np.linspace(0, 90, 40))
    held_out = task_set(ANT, "held_out", 200)
    for some in (goals, held_out, task_set(ANT, "validation", 200)):
        assert np.allclose(np.hypot(*some.T), 2.0) and (some > -1e-12).all()
    assert np.abs(held_out[:, None] - goals).max(-1).min() > 1e-6
    assert [len(goals) for _, goals in ANT.bands()] == [6, 6, 6, 6]
    for beyond, (_, outside) in zip((15, 30, 45), ANT.bands()[1:]):
        angles = np.degrees(np.arctan2(outside[:, 1], outside[:, 0]))
        assert set(np.round(angles, 9)) == {-beyond, 90 + beyond}


def test_episode_ends_when_the_torso_leaves_its_band():
    """A state set too low ends its environment alone, with a reward, and the next step begins its next episode."""
    env = BatchEnv(2, "ant")
    env.reset(options={"task": GOAL})
    env.state[1, 3] = 0.15
    _, reward, terminated, truncated, info = env.step(np.zeros((2, 8)))
    assert terminated.tolist() == [False, True] and not truncated.any() and "diverged" not in info
    assert reward[1] > 0
    observation, reward, terminated, _, _ = env.step(np.zeros((2, 8)))
    assert reward[1] == 0 and not terminated.any() and observation[1, 2] == 0.75
    assert env.divergences == 0


def test_rollout_masks_what_follows_an_early_end():
    """A band that the settling ant leaves (z below 0.6): rewards stop, the last distance stays."""
    family = make_family("ant")
    family.healthy_z = (0.6, 1.0)
    episodes = rollout(BatchEnv(2, family), lambda observation: np.zeros((2, 8)), GOAL)
    length = int(episodes["mask"][0].sum())
    assert 5 < length < 200 and episodes["terminated"].all()
    assert np.all(episodes["rewards"][:, :length] > 0) and not episodes["rewards"][:, length:].any()
    assert np.all(episodes["distances"][:, length:] == episodes["distances"][:, length - 1:length])


def test_results_do_not_depend_on_threads_or_batch():
    actions = ant_actions(7, 80, seed=5)
    whole = [BatchEnv(7, "ant", threads) for threads in (1, 2)]
    part = BatchEnv(3, "ant", 1)
    for env in (*whole, part):
        env.reset(options={"task": GOAL})
    for action in actions:
        one, two = (env.step(action)[0] for env in whole)
        assert np.array_equal(one, two) and np.array_equal(one[2:5], part.step(action[2:5])[0])
