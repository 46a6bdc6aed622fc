"""Tests of push: its model, its reward, and recorded episodes of the authors' experts.

The recordings lie in ../shared/reference. Without that folder their test is skipped.
"""

import mujoco
import numpy as np
import pytest

import envs
from envs import BatchEnv, rollout
from tasks import sawyer
from tasks.rendering import NoOpenGL
from tests.conftest import HORIZON, PUSH, REFERENCE, push_north, record, replay


def test_model_has_seven_joints_listed_masses_and_the_weld():
    model = BatchEnv(1).model
    bodies = [model.body(name) for name, *_ in sawyer.ARM]
    masses, ranges = [mass for *_, mass in sawyer.ARM], [joint[3].split() for joint in sawyer.ARM]
    assert [body.mass[0] for body in bodies] == pytest.approx(masses, rel=1e-9)
    assert len(masses) == 7 and sum(masses) == pytest.approx(17.08)
    assert [(body.jntadr[0], body.jntnum[0]) for body in bodies] == [(i, 1) for i in range(7)]
    assert (model.jnt_type[:7] == mujoco.mjtJoint.mjJNT_HINGE).all()
    assert np.allclose(model.jnt_range[:7], np.array(ranges, float))
    assert model.neq == 1 and model.eq_type[0] == mujoco.mjtEq.mjEQ_WELD
    welded = {model.body(model.eq_obj1id[0]).name, model.body(model.eq_obj2id[0]).name}
    assert welded == {"mocap", "hand"}
    assert model.opt.timestep == 0.01 and PUSH.frame_skip == 5 and model.opt.iterations == 50
    assert model.opt.cone == mujoco.mjtCone.mjCONE_ELLIPTIC and model.opt.impratio == 3


@pytest.mark.parametrize("reward", ["dense", "sparse"])
def test_reward_by_hand(reward):
    """The documented formula on outcomes. The last goal is behind the block: it never pays."""
    env, sides = BatchEnv(4, reward=reward), set()
    tasks = np.array([[-0.1, 0.7], [0.0, 0.75], [0.1, 0.8], [0.0, 0.45]])
    env.reset(options={"task": tasks})
    for action in push_north(num_envs=4):
        _, rewards, _, _, info = env.step(action)
        block, tips = np.split(env.outcomes, 2, axis=1)
        start = np.sqrt(tasks[:, 0] ** 2 + (0.52 - tasks[:, 1]) ** 2)
        left = np.sqrt(((block[:, :2] - tasks) ** 2).sum(1))
        near = left < (start if reward == "dense" else 0.05)
        if reward == "dense":
            terms = {"reach": -np.sqrt(((block - tips) ** 2).sum(1)),
                     "place": np.where(near, 100 * (start - left), 0)}
        else:
            terms = {"near": -np.where(near, left, start)}
        for name, value in (terms | {"goal_distance": left}).items():
            assert info[name] == pytest.approx(value, abs=1e-10)
        assert rewards == pytest.approx(sum(terms.values()), abs=1e-10)
        sides |= set(near)
    assert sides == {True, False}


def test_outcome_and_observation_are_the_simulators_positions():
    """Block, hand and fingertip midpoint, read from an MjData in the environment's state."""
    env = BatchEnv(2, threads=1)
    record(env, push_north(20, 2), np.array([0, 0.75]))
    observation = env.step(np.zeros((2, 3)))[0]
    data = mujoco.MjData(env.model)
    for row in range(2):
        mujoco.mj_setState(env.model, data, env.state[row], envs.FULL)
        mujoco.mj_kinematics(env.model, data)
        hand, block = data.body("hand").xpos, data.body("block").xpos
        tips = 0.5 * (data.site("left_tip").xpos + data.site("right_tip").xpos)
        assert np.abs(observation[row] - np.r_[hand, block]).max() < 1e-9
        assert np.abs(env.outcomes[row] - np.r_[block, tips]).max() < 1e-9
        assert np.linalg.norm(tips - hand) < 0.06


def recorded_push(name):
    if not (REFERENCE / name).exists():
        pytest.skip("no recorded episodes in ../shared/reference")
    recorded = dict(np.load(REFERENCE / name))
    ours = rollout(BatchEnv(len(recorded["goals"])), replay(recorded["actions"]), recorded["goals"])
    difference = ours["observations"][:, :HORIZON] - recorded["observations"]
    block = np.linalg.norm(difference[..., 3:5], axis=-1)
    return recorded, ours["rewards"].sum(1) / recorded["rewards"].sum(1), block, difference


def test_replay_of_a_recorded_slip_leaves_the_block_behind_too():
    """The claw rides up onto the block. What follows is sensitive."""
    _, ratio, block, _ = recorded_push("push_slip_replay.npz")
    assert abs(ratio.mean() - 1) < 0.08 and block[:, -1].mean() <= 0.06


def test_replay_of_recorded_experts_matches_their_returns_paths_and_rewards():
    """The published experts' actions, played open loop. Observations are those before each action.

    Our reward terms at the recorded distances give the recorded rewards.
    """
    recorded, ratio, block, difference = recorded_push("push_expert_replay.npz")
    assert abs(ratio.mean() - 1) < 0.01
    assert block.mean() <= 0.007 and block[:, -1].mean() <= 0.012
    assert np.linalg.norm(difference[..., :3], axis=-1).max(1).mean() <= 0.025
    outcome = np.zeros((5, HORIZON, 6))  # the block so far from its goal, the tips so far above it
    outcome[..., :2] = outcome[..., 3:5] = recorded["goals"][:, None]
    outcome[..., [0, 3]] += recorded["place_distance"][..., None]
    outcome[..., 5] = recorded["reach_distance"]
    terms = PUSH.reward_terms(outcome, recorded["actions"], recorded["goals"][:, None])
    assert np.abs(sum(terms.values()) - recorded["rewards"]).max() < 0.05


def test_render_shows_the_goal():
    """Pictures of two goals differ by more green where the goal is in view."""
    env = BatchEnv(1, threads=1, render_mode="rgb_array")
    try:
        pictures = []
        for x in (-0.1, 0.1):
            env.reset(options={"task": [x, 0.75]})
            pictures.append(env.render().astype(int))
    except NoOpenGL as error:
        pytest.skip(str(error))
    finally:
        env.close()
    assert pictures[0].shape == (480, 640, 3)
    green = [p[..., 1] - np.maximum(p[..., 0], p[..., 2]) > 40 for p in pictures]
    assert all(20 < g.sum() < 5000 for g in green) and not (green[0] & green[1]).any()
