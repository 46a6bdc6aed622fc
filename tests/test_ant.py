"""Tests of the ant: model, observation, rewards and early ends, against MuJoCo's own stepping."""
import mujoco
import numpy as np
import pytest

import envs
from envs import BatchEnv, rollout
from tasks import make_family, task_set
from tests.conftest import REFERENCE

ANT = make_family("ant")
GOAL = np.array([1.6, 1.2])


def ant_actions(num_envs, steps, seed=0):
    """Random torques that last ten steps each: the ant moves, its feet strike the floor."""
    rng = np.random.default_rng(seed)
    return np.repeat(rng.uniform(-1, 1, (steps // 10, num_envs, 8)), 10, axis=0)


def test_model_is_gyms_ant_with_weak_motors():
    """Sizes, gear 30, RK4 at 0.01 s, joint ranges. The mass is that of density 5, by hand."""
    model = BatchEnv(1, "ant").model
    assert (model.nq, model.nv, model.nu, model.nbody) == (15, 14, 8, 15)
    assert np.all(model.actuator_gear[:, 0] == 30) and model.opt.timestep == 0.01
    assert model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4 and ANT.frame_skip == 1

    def capsule(length):
        return 5 * np.pi * 0.08 ** 2 * (length + 4 / 3 * 0.08)
    legs = 4 * (2 * capsule(np.hypot(0.2, 0.2)) + capsule(np.hypot(0.4, 0.4)))
    assert model.body_mass.sum() == pytest.approx(5 * 4 / 3 * np.pi * 0.25 ** 3 + legs)
    ranges, ankles = np.degrees(model.jnt_range[1:]), [[30, 70], [-70, -30], [-70, -30], [30, 70]]
    assert np.allclose(ranges[0::2], [-30, 30]) and np.allclose(ranges[1::2], ankles)


def test_steps_are_mujocos_and_outcomes_are_those_of_the_new_state():
    """Beside mj_step: observation, centre of mass, and contact cost by mj_rnePostConstraint."""
    env, costs = BatchEnv(1, "ant", threads=1), []
    env.reset(options={"task": GOAL})
    data = mujoco.MjData(env.model)
    mujoco.mj_setState(env.model, data, env.state[0], envs.FULL)
    for action in ant_actions(1, 150):
        data.ctrl[:] = action[0]
        data.qacc_warmstart[:] = 0
        mujoco.mj_step(env.model, data)
        data.qacc_warmstart[:] = 0
        mujoco.mj_forward(env.model, data)
        mujoco.mj_rnePostConstraint(env.model, data)
        costs.append(np.sum(np.clip(data.cfrc_ext, -1, 1) ** 2))
        observation, *_, info = env.step(action)
        rotation, centre = data.body("torso").xmat, data.body("torso").subtree_com[:2]
        assert np.abs(observation[0] - np.r_[data.qpos, data.qvel, rotation]).max() < 1e-9
        assert env.outcomes[0] == pytest.approx([*centre, costs[-1]], abs=1e-9)
        assert info["contact"][0] == pytest.approx(-0.0005 * costs[-1], abs=1e-12)
    assert max(costs) > 5 and np.abs(rotation - np.eye(3).ravel()).max() > 0.01


def test_one_step_from_each_recorded_state_gives_the_recorded_one_and_its_reward():
    """The published experts' episodes. 95th percentiles; the rest is in the contacts."""
    if not (REFERENCE / "ant_expert_replay.npz").exists():
        pytest.skip("no recorded episodes in ../shared/reference")
    recorded = dict(np.load(REFERENCE / "ant_expert_replay.npz"))
    states = np.concatenate([recorded["positions"], recorded["velocities"]], axis=-1)
    episodes, steps = states.shape[0], states.shape[1] - 1
    env = BatchEnv(episodes * steps, "ant")
    env.reset(options={"task": np.repeat(recorded["goals"], steps, axis=0)})
    env.state[:, 1:] = states[:, :-1].reshape(len(env.state), -1)
    _, rewards, *_ = env.step(recorded["actions"][:, :-1].reshape(len(env.state), -1))
    error = np.abs(env.state[:, 1:] - states[:, 1:].reshape(len(env.state), -1))
    assert np.quantile(error[:, :15].max(1), 0.95) < 1e-4
    assert np.quantile(error[:, 15:].max(1), 0.95) < 0.02
    assert np.quantile(np.abs(rewards - recorded["rewards"][:, :-1].ravel()), 0.95) < 1e-3
    start = recorded["positions"][:, 0].mean(0)  # the mean of 20 starts with noise of 0.01
    assert np.abs(start - env._start_state[1:16]).max() < 0.01


def test_start_noise_is_normal_of_the_documented_size_and_seeded():
    env = BatchEnv(500, "ant", start_noise=True)
    starts = [env.reset(seed=seed, options={"task": GOAL})[0].copy() for seed in (3, 4, 3)]
    assert np.array_equal(starts[0], starts[2]) and (starts[0][:, :3] != starts[1][:, :3]).all()
    plain = BatchEnv(1, "ant").reset(options={"task": GOAL})[0]
    joints, velocities = [0, 1, 2, *range(7, 15)], range(15, 29)
    for entries, size in ((joints, 0.01), (velocities, 0.1)):
        spread = (starts[0] - plain)[:, entries].std(0)
        assert np.abs(spread / size - 1).max() < 5 / np.sqrt(2 * 500)
    assert np.allclose(np.linalg.norm(starts[0][:, 3:7], axis=1), 1)
    assert (env.sensors != BatchEnv(1, "ant").sensors).any(1).all()
    with pytest.raises(ValueError, match="push has no start_noise"):
        BatchEnv(1, "push", start_noise=True)


@pytest.mark.parametrize("reward", ["dense", "sparse"])
def test_reward_by_hand(reward):
    env, near = BatchEnv(3, "ant", reward=reward), set()
    goals = np.array([GOAL, [0.3, 0.2], [0.0, 2.0]])
    env.reset(options={"task": goals})
    for action in 1.5 * ant_actions(3, 100, seed=2):
        _, rewards, _, _, info = env.step(action)
        to_goal = env.outcomes[:, :2] - goals
        away = np.abs(to_goal).sum(1)
        assert np.allclose(info["goal_distance"], np.linalg.norm(to_goal, axis=1))
        near |= set(away < 0.8)
        if reward == "sparse":
            away = np.minimum(away, 0.8)
        control = 0.005 * (np.clip(action, -1, 1) ** 2).sum(1)
        assert np.allclose(rewards, 4 - away - control - 0.0005 * env.outcomes[:, 2] + 0.05)
    assert near == {True, False}


def test_goals_lie_on_the_quarter_circle():
    def degrees(tasks):
        return np.degrees(np.arctan2(tasks[:, 1], tasks[:, 0]))
    train, held_out, validation = (task_set(ANT, split, 200)
                                   for split in ("train", "held_out", "validation"))
    assert np.allclose(degrees(train), np.linspace(0, 90, 200))
    for goals in (train, held_out, validation):
        assert np.allclose(np.hypot(*goals.T), 2.0) and (goals > -1e-12).all()
    everything = np.concatenate([train, held_out, validation])
    assert len(np.unique(everything, axis=0)) == 600
    assert [len(goals) for _, goals in ANT.bands()] == [6, 6, 6, 6]
    for beyond, (_, outside) in zip((15, 30, 45), ANT.bands()[1:]):
        assert set(np.round(degrees(outside), 9)) == {-beyond, 90 + beyond}


@pytest.mark.parametrize("height", [0.15, 1.05])
def test_an_ant_that_leaves_its_band_ends_its_own_episode(height):
    """The step that ends it still pays. Later rewards are 0, its last state and distance stay."""
    env, steps = BatchEnv(2, "ant"), iter(range(ANT.horizon))

    def policy(observation, last):
        if next(steps) == 5:
            env.state[1, 3] = height
        return np.zeros((2, 8))

    episodes = rollout(env, policy, np.array([GOAL, GOAL]))
    assert episodes["terminated"].tolist() == [False, True] and not episodes["diverged"].any()
    assert episodes["mask"].sum(1).tolist() == [200, 6] and episodes["mask"][1, :6].all()
    assert episodes["rewards"][1, 5] > 0 and not episodes["rewards"][1, 6:].any()
    for key, last in (("observations", 6), ("distances", 5), ("outcomes", 5)):
        assert (episodes[key][1, last:] == episodes[key][1, last]).all()
    assert env.steps.tolist() == [200, 193] and env.divergences == 0
