"""Tests: every number is held against finite differences, a closed form, another computation or a recorded fact.

    pytest                  # under three minutes on two cores
    pytest -m slow          # learning that takes longer

Sections: environments, local policies, the meta-learner, the command line. Recorded episodes of the authors' experts
are read from ../shared/reference; their tests are skipped where that folder is absent.
"""
import contextlib
import dataclasses
import errno
import io
import json
import math
import os
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import envs
import gmps
import local_policies
import run
from envs import BatchEnv, SawyerPush, random_streams, rollout, task_set
from local_policies import Experts, Replay, SoftActorCritic
from settings import Settings

HERE = Path(__file__).parent
REFERENCE = HERE.parent / "shared" / "reference"
PUSH = SawyerPush()
HORIZON = PUSH.horizon


@pytest.fixture(autouse=True)
def _quiet_folder(tmp_path, monkeypatch):
    """Tests run in a folder of their own (MuJoCo leaves its log in the current one), on one thread."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


def random_actions(num_envs, seed=0, steps=HORIZON):
    return np.random.default_rng(seed).uniform(-1, 1, (steps, num_envs, 3)).astype(np.float32)


def record(env, actions, task):
    """Observations (T+1, B, 6) and rewards (T, B) of `actions` (T, B, 3), stepped by hand."""
    observations, rewards = [env.reset(options={"task": task})[0]], []
    for action in actions:
        observation, reward, *_ = env.step(action)
        observations.append(observation)
        rewards.append(reward)
    return np.array(observations), np.array(rewards)


def push_north(steps=HORIZON, num_envs=1):
    """Actions that push the block a decimetre or two in +y, with some x motion: rewards of every term."""
    actions = np.zeros((steps, num_envs, 3), np.float32)
    actions[..., 1] = 0.8
    actions[..., 0] = 0.1 * np.sin(np.arange(steps))[:, None] + 0.05 * np.arange(num_envs)
    return actions


def scripted_expert(observations, tasks):
    """Pushes in +y until the block's y is the goal's, and steers x: (n, B, 6), (n, 2) -> (n, B, 3)."""
    to_goal = tasks[:, None] - observations[..., 3:5]
    motion = np.concatenate([10 * to_goal, np.zeros_like(to_goal[..., :1])], axis=-1)
    return np.clip(motion, -1, 1).astype(np.float32)


# ---------------------------------------------------------------- environments
def test_gymnasium_checker_finds_nothing():
    """check_env passes with every warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make("gmps/SawyerPush-v0")
        check_env(env.unwrapped)
        assert env.spec.id == SawyerPush.env_id
        batch = gymnasium.make_vec("gmps/SawyerPush-v0", num_envs=3).unwrapped
    assert isinstance(batch, BatchEnv) and batch.num_envs == 3


def test_sizes_of_observation_action_outcome():
    env = BatchEnv(4)
    observation, _ = env.reset(seed=0)
    assert observation.shape == (4, 6) and env.observation_space.shape == (4, 6) and env.action_space.shape == (4, 3)
    env.step(np.zeros((4, 3)))
    assert env.outcomes.shape == (4, 6) and env.tasks.shape == (4, 2)
    assert np.array_equal(env.single_action_space.high, np.ones(3))
    assert (PUSH.observation_size, PUSH.action_size, PUSH.task_size, PUSH.outcome_size) == (6, 3, 2, 6)


def test_start_observation_is_the_documented_one():
    observation, _ = BatchEnv(1).reset(seed=0)
    assert np.abs(observation[0] - [0, 0.4, 0.05, 0, 0.52, 0.02]).max() < 5e-3
    assert np.array_equal(observation[0, 3:], [0, 0.52, 0.02])


def test_full_action_moves_the_hand_one_centimetre():
    """30 steps of action 1 along z: mocap target and hand 0.3 m up; larger actions are clipped to 1."""
    env = BatchEnv(1, threads=1)
    actions = np.zeros((HORIZON, 1, 3))
    actions[:30, :, 2] = 1.0
    observations, _ = record(env, actions, np.array([0, 0.75]))
    assert np.allclose(env.control[0] - PUSH.hand_start, [0, 0, 0.3], atol=1e-12)
    assert np.allclose(observations[-1, 0, :3] - observations[0, 0, :3], [0, 0, 0.3], atol=0.01)
    _, reward_of_five = record(env, 5 * actions, np.array([0, 0.75]))
    assert np.array_equal(reward_of_five, record(env, actions, np.array([0, 0.75]))[1]), "actions are clipped to 1"


def test_goal_is_never_in_the_observation():
    """Same actions, two goals: observations are the same bits, rewards are not."""
    env, actions = BatchEnv(1, threads=1), push_north()
    near, near_rewards = record(env, actions, np.array([0.0, 0.7]))
    far, far_rewards = record(env, actions, np.array([0.1, 0.8]))
    assert np.array_equal(near, far)
    assert np.abs(near_rewards - far_rewards).max() > 1.0


def test_episode_is_truncated_at_step_50_and_never_terminated():
    env = gymnasium.make("gmps/SawyerPush-v0")
    env.reset(seed=1)
    ends = [env.step(action[0])[2:4] for action in random_actions(1)]
    assert ends == [(False, False)] * 49 + [(False, True)]


def test_single_env_is_a_row_of_the_batch():
    """Each row of a batch of 5 and a single environment agree bit for bit over an episode."""
    tasks, actions = task_set(PUSH, "validation", 5), 0.5 * random_actions(5, seed=2) + 0.5 * push_north(num_envs=5)
    observations, rewards = record(BatchEnv(5, threads=1), actions, tasks)
    env = gymnasium.make("gmps/SawyerPush-v0")
    for row in range(5):
        single = [env.reset(options={"task": tasks[row]})[0]]
        single_rewards = []
        for action in actions[:, row]:
            observation, reward, *_ = env.step(action)
            single.append(observation)
            single_rewards.append(reward)
        assert np.array_equal(np.array(single), observations[:, row])
        assert np.array_equal(single_rewards, rewards[:, row])


def test_same_seed_same_bits_and_another_seed_not():
    def episode(seed):
        env = BatchEnv(3, threads=1)
        first = env.reset(seed=seed)[0]
        steps = [env.step(action) for action in push_north(num_envs=3)]
        return env.tasks.copy(), first, np.array([s[0] for s in steps]), np.array([s[1] for s in steps])

    one, again, other = episode(7), episode(7), episode(8)
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not np.array_equal(one[0], other[0]) and not np.array_equal(one[3], other[3])


def test_bits_do_not_depend_on_threads():
    actions, tasks = random_actions(6, seed=3), task_set(PUSH, "validation", 6)
    one, two = (record(BatchEnv(6, threads=threads), actions, tasks) for threads in (1, 2))
    assert np.array_equal(one[0], two[0]) and np.array_equal(one[1], two[1])


def test_task_options():
    """One goal for all, or one each; anything else is refused in one line."""
    env = BatchEnv(3)
    env.reset(options={"task": [0.05, 0.72]})
    assert np.array_equal(env.tasks, [[0.05, 0.72]] * 3)
    tasks = task_set(PUSH, "validation", 3)
    env.reset(options={"task": tasks})
    assert np.array_equal(env.tasks, tasks)
    for bad in (np.zeros(3), np.zeros((2, 2)), np.zeros((4, 2)), np.zeros((1, 3, 2)), np.full(2, np.nan),
                [[0, 0.7], [0, 0.7], [0, np.inf]], [0.41, 0.8], [0.0, 0.39], [0.0, 1.21], ["a", "b"], np.zeros((0, 2))):
        with pytest.raises(ValueError) as caught:
            env.reset(options={"task": bad})
        assert "\n" not in str(caught.value)
    single = gymnasium.make("gmps/SawyerPush-v0")
    with pytest.raises(ValueError):
        single.reset(options={"task": np.zeros((2, 2))})


def test_goals_without_option_are_drawn_from_the_training_distribution():
    env = BatchEnv(400)
    env.reset(seed=5)
    assert (env.tasks >= [-0.1, 0.7]).all() and (env.tasks <= [0.1, 0.8]).all()
    # Uniform: mean and variance of 400 draws within four standard errors (4 / sqrt(12 * 400), 4 * sqrt(1/180/400))
    unit = (env.tasks - [-0.1, 0.7]) / [0.2, 0.1]
    assert np.abs(unit.mean(0) - 0.5).max() < 4 / math.sqrt(12 * 400)
    assert np.abs(unit.var(0) - 1 / 12).max() < 4 * math.sqrt(1 / 180 / 400)


def test_reward_terms_by_hand():
    """Reach and place from the outcome, by the documented formula; their sum is the reward; info has the distance."""
    env, tasks = BatchEnv(4, threads=1), task_set(PUSH, "validation", 4)
    env.reset(options={"task": tasks})
    places = []
    for action in push_north(num_envs=4):
        _, reward, _, _, info = env.step(action)
        block, tips = env.outcomes[:, :3], env.outcomes[:, 3:]
        for i in range(4):
            reach = -math.sqrt(sum((block[i, axis] - tips[i, axis]) ** 2 for axis in range(3)))
            d0 = math.sqrt((0.0 - tasks[i, 0]) ** 2 + (0.52 - tasks[i, 1]) ** 2)
            d = math.sqrt((block[i, 0] - tasks[i, 0]) ** 2 + (block[i, 1] - tasks[i, 1]) ** 2)
            assert info["reach"][i] == pytest.approx(reach, abs=1e-12)
            assert info["place"][i] == pytest.approx(100 * max(0.0, d0 - d), abs=1e-10)
            assert info["goal_distance"][i] == pytest.approx(d, abs=1e-12)
            assert reward[i] == pytest.approx(reach + 100 * max(0.0, d0 - d), abs=1e-10)
        places.append(info["place"])
    assert np.min(places) == 0.0 and np.max(places) > 5.0, "the episode must show the clipped and the open term"


def test_outcome_and_observation_are_the_simulators_positions():
    """Block, hand and fingertip midpoint read from a MjData set to the environment's state."""
    env = BatchEnv(2, threads=1)
    record(env, push_north(20, 2), np.array([0, 0.75]))
    observation = env.step(np.zeros((2, 3)))[0]
    data = envs.mujoco.MjData(env.model)
    for row in range(2):
        envs.mujoco.mj_setState(env.model, data, env.state[row], envs.FULL)
        envs.mujoco.mj_kinematics(env.model, data)
        tips = 0.5 * (data.site("left_tip").xpos + data.site("right_tip").xpos)
        # Sensors are those of the last physics step's start (0.01 s ago): within the motion of one such step
        assert np.abs(observation[row] - np.r_[data.body("hand").xpos, data.body("block").xpos]).max() < 3e-3
        assert np.abs(env.outcomes[row] - np.r_[data.body("block").xpos, tips]).max() < 3e-3
        assert np.linalg.norm(tips - data.body("hand").xpos) < 0.06


@pytest.fixture(scope="module")
def replayed():
    """The published experts' recorded actions, played open loop, beside what was recorded."""
    if not (REFERENCE / "push_expert_replay.npz").exists():
        pytest.skip("no recorded episodes in ../shared/reference")
    recorded = dict(np.load(REFERENCE / "push_expert_replay.npz"))
    env, actions = BatchEnv(5), iter(np.swapaxes(recorded["actions"], 0, 1))
    return recorded, rollout(env, lambda observation: next(actions), recorded["goals"])


def test_replay_of_recorded_experts_matches_their_returns(replayed):
    recorded, ours = replayed
    ratio = ours["rewards"].sum(1).mean() / recorded["rewards"].sum(1).mean()
    assert abs(ratio - 1) < 0.05


def test_replay_of_recorded_experts_matches_their_paths(replayed):
    """Recorded observations are those before each action."""
    recorded, ours = replayed
    difference = ours["observations"][:, :HORIZON] - recorded["observations"]
    assert np.linalg.norm(difference[:, -1, 3:5], axis=-1).mean() <= 0.015
    assert np.linalg.norm(difference[..., :3], axis=-1).max(1).mean() <= 0.025
    assert np.abs(ours["distances"][:, -1] - recorded["place_distance"][:, -1]).mean() <= 0.015


def test_recorded_rewards_follow_our_formula(replayed):
    """Recorded rewards are those of our reward terms on the recorded distances: the formula is the authors'."""
    recorded, _ = replayed
    start = np.linalg.norm(recorded["goals"] - [0, 0.52], axis=1)[:, None]
    by_formula = -recorded["reach_distance"] + 100 * np.maximum(0, start - recorded["place_distance"])
    assert np.abs(by_formula - recorded["rewards"]).max() < 0.05


@pytest.mark.parametrize("value", [np.nan, 1e12])
@pytest.mark.parametrize("part", ["position", "velocity"])
def test_diverging_simulation_ends_one_episode_only(part, value):
    """Row 2's simulator blows up in step 3: terminated, finite, counted, warned of; other rows keep their bits."""
    tasks, actions = task_set(PUSH, "validation", 4), push_north(8, 4)
    calm, wild = BatchEnv(4, threads=1), BatchEnv(4, threads=1)
    calm.reset(options={"task": tasks}), wild.reset(options={"task": tasks})
    others = np.array([0, 1, 3])
    for t, action in enumerate(actions):
        if t == 3:
            wild.state[2, 1 + (0 if part == "position" else wild.model.nq) + 8] = value
            with pytest.warns(UserWarning, match="diverged"):
                observation, reward, terminated, truncated, info = wild.step(action)
            assert terminated.tolist() == [False, False, True, False] and not truncated.any()
            assert info["diverged"].tolist() == terminated.tolist() and wild.divergences == 1
        else:
            observation, reward, terminated, truncated, _ = wild.step(action)
            assert not terminated.any() and not truncated.any()
        assert np.isfinite(observation).all() and np.isfinite(reward).all()
        expected = calm.step(action)
        assert np.array_equal(observation[others], expected[0][others])
        assert np.array_equal(reward[others], expected[1][others])
    assert wild.divergences == 1 and calm.divergences == 0
    assert wild.steps.tolist() == [8, 8, 3, 8], "the ended episode began anew in the step after"


def test_rollout_masks_what_follows_a_divergence():
    """After an early end: mask and rewards 0, distances and outcomes frozen, `terminated` set for that row alone."""
    env, step = BatchEnv(3, threads=1), iter(range(HORIZON))
    actions = push_north(num_envs=3)

    def policy(observation):
        t = next(step)
        if t == 30:
            env.state[1, 5] = np.nan
        return actions[t]

    with pytest.warns(UserWarning, match="diverged"):
        episodes = rollout(env, policy, task_set(PUSH, "validation", 3))
    assert episodes["terminated"].tolist() == [False, True, False]
    assert episodes["mask"].sum(1).tolist() == [50, 31, 50] and episodes["mask"][1, :31].all()
    assert not episodes["rewards"][1, 31:].any() and np.isfinite(episodes["rewards"]).all()
    for key in ("distances", "outcomes"):
        assert (episodes[key][1, 31:] == episodes[key][1, 30]).all()
    assert (episodes["rewards"][0] != 0).all()


def test_next_step_autoreset():
    """The step after the last gives the start observation, reward 0, no end flags and a new goal; then it goes on."""
    env, actions = BatchEnv(2, threads=1), push_north(num_envs=2)
    first = env.reset(seed=11)[0]
    goals = env.tasks.copy()
    for action in actions:
        last, _, _, truncated, _ = env.step(action)
    assert truncated.all() and not np.array_equal(last, first) and np.array_equal(env.tasks, goals)
    observation, reward, terminated, truncated, _ = env.step(np.ones((2, 3)))
    assert np.array_equal(observation, first) and not reward.any() and not (terminated | truncated).any()
    assert (env.tasks != goals).any() and env.steps.tolist() == [0, 0]
    second = np.array([env.step(action)[0] for action in actions])
    assert np.array_equal(second, record(BatchEnv(2, threads=1), actions, goals)[0][1:])


def test_task_sets_are_disjoint_fixed_and_in_range():
    sets = {split: task_set(PUSH, split, 200) for split in ("train", "validation", "held_out")}
    for tasks in sets.values():
        assert tasks.shape == (200, 2)
        assert (tasks >= [-0.1, 0.7]).all() and (tasks <= [0.1, 0.8]).all()
    everything = np.concatenate(list(sets.values()))
    assert len(np.unique(everything, axis=0)) == 600
    for split in sets:
        assert np.array_equal(task_set(PUSH, split, 20), sets[split][:20]), "a smaller set is the larger's start"


def test_training_goals_cover_the_range_evenly():
    """The largest empty disc among 20 training goals is smaller than among nearly all random sets of 20."""
    grid = np.stack(np.meshgrid(np.linspace(0, 1, 41), np.linspace(0, 1, 41)), -1).reshape(-1, 2)

    def hole(tasks):
        unit = (tasks - PUSH.task_low) / (PUSH.task_high - PUSH.task_low)
        return np.linalg.norm(grid[:, None] - unit, axis=-1).min(1).max()

    rng = np.random.default_rng(0)
    random_holes = [hole(PUSH.sample_tasks(rng, 20)) for _ in range(200)]
    assert hole(task_set(PUSH, "train", 20)) < np.quantile(random_holes, 0.05)


def test_model_has_seven_joints_listed_masses_and_the_weld():
    model = BatchEnv(1).model
    for index, (name, _, _, joint_range, mass) in enumerate(envs.ARM):
        body = model.body(name).id
        assert model.body_mass[body] == pytest.approx(mass, rel=1e-9)
        assert model.body_jntnum[body] == 1 and model.jnt_bodyid[index] == body
        assert model.jnt_type[index] == envs.mujoco.mjtJoint.mjJNT_HINGE
        assert np.allclose(model.jnt_range[index], [float(x) for x in joint_range.split()])
    assert len(envs.ARM) == 7 and sum(m for *_, m in envs.ARM) == pytest.approx(17.08)
    assert model.neq == 1 and model.eq_type[0] == envs.mujoco.mjtEq.mjEQ_WELD
    assert {model.body(model.eq_obj1id[0]).name, model.body(model.eq_obj2id[0]).name} == {"mocap", "hand"}
    assert model.opt.timestep == 0.01 and PUSH.frame_skip == 5 and model.opt.iterations == 50
    assert model.opt.cone == envs.mujoco.mjtCone.mjCONE_ELLIPTIC and model.opt.impratio == 3


def test_rollout_equals_stepping_by_hand():
    tasks, actions = task_set(PUSH, "validation", 3), push_north(num_envs=3)
    steps = iter(actions)
    episodes = rollout(BatchEnv(3, threads=1), lambda observation: next(steps), tasks)
    shapes = {"observations": (3, 51, 6), "actions": (3, 50, 3), "rewards": (3, 50), "distances": (3, 50),
              "outcomes": (3, 50, 6), "mask": (3, 50), "terminated": (3,)}
    assert {key: value.shape for key, value in episodes.items()} == shapes
    observations, rewards = record(BatchEnv(3, threads=1), actions, tasks)
    assert np.array_equal(episodes["rewards"], rewards.T)
    assert np.array_equal(episodes["observations"], np.swapaxes(observations, 0, 1))
    assert np.array_equal(episodes["actions"], np.swapaxes(actions, 0, 1))
    assert episodes["mask"].all() and not episodes["terminated"].any()


def test_render_shows_the_goal():
    """Pictures of two goals differ by more green where the goal is in view; skipped where there is no OpenGL."""
    env = BatchEnv(1, threads=1, render_mode="rgb_array")
    try:
        pictures = []
        for x in (-0.1, 0.1):
            env.reset(options={"task": [x, 0.75]})
            pictures.append(env.render().astype(int))
    except RuntimeError as error:
        pytest.skip(str(error))
    finally:
        env.close()
    assert pictures[0].shape == (480, 640, 3)
    green = [p[..., 1] - np.maximum(p[..., 0], p[..., 2]) > 40 for p in pictures]
    assert all(20 < g.sum() < 5000 for g in green) and not (green[0] & green[1]).any()


# ---------------------------------------------------------------- local policies: soft actor-critic
SAC = Settings(expert_width=16, expert_learning_rate=3e-3, expert_discount=0.9, expert_target_rate=0.05)


def sac_batch(learners, size, observation_size, action_size, generator):
    """Random transitions, a third of them terminated."""
    shape = (learners, size)
    return {"observation": torch.randn(*shape, observation_size, generator=generator),
            "action": torch.rand(*shape, action_size, generator=generator) * 2 - 1,
            "next_observation": torch.randn(*shape, observation_size, generator=generator),
            "reward": torch.randn(shape, generator=generator),
            "terminated": (torch.rand(shape, generator=generator) < 1 / 3).float()}


def test_log_probability_is_that_of_torchs_tanh_gaussian():
    """Against TransformedDistribution(Normal, TanhTransform) with mean and std read off the network."""
    generator = torch.Generator().manual_seed(0)
    params = [p.double() for p in local_policies.init_mlp([4, 8, 8, 6], 2, generator)]
    observation = 3 * torch.randn(2, 50, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, 50, 3, generator=generator, dtype=torch.float64)
    action, log_prob = local_policies.policy_sample(params, observation, noise)
    mean, raw = local_policies.mlp(params, observation).chunk(2, dim=-1)
    std = (-5 + 3.5 * (raw.tanh() + 1)).exp()  # log-std squashed into [-5, 2]
    normal = torch.distributions.Normal(mean, std)
    squashed = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform(cache_size=0))
    clear = action.abs().amax(-1) < 0.9999  # beyond, atanh in torch's inverse loses the digits, not our formula
    assert clear.sum() > 60
    assert torch.allclose(log_prob[clear], squashed.log_prob(action).sum(-1)[clear], rtol=1e-7, atol=1e-7)
    assert torch.allclose(torch.atanh(action)[clear], (mean + std * noise)[clear], rtol=1e-6, atol=1e-7)
    assert torch.equal(local_policies.policy_mean(params, observation), mean.tanh())


def test_log_probability_stays_finite_far_out():
    """u = +-40, where 1 - tanh(u)^2 is 0 in floating point: log p = log N(u) - 2 (log 2 - |u|), exactly the limit."""
    params = [torch.zeros(1, 1, 2), torch.tensor([[[40.0, 0.0]]])]
    action, log_prob = local_policies.policy_sample(params, torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))
    log_std = -1.5  # tanh(0) in the middle of [-5, 2]
    expected = -log_std - 0.5 * math.log(2 * math.pi) - 2 * (math.log(2) - 40.0)
    assert action.item() == 1.0 and log_prob.item() == pytest.approx(expected, rel=1e-6)


def numpy_mlp(params, learner, x):
    """One vector through one learner's network, in plain loops over layers."""
    weights = [p[learner].detach().double().numpy() for p in params]
    for layer in range(0, len(weights), 2):
        x = x @ weights[layer] + weights[layer + 1][0]
        if layer < len(weights) - 2:
            x = np.maximum(x, 0)
    return x


def numpy_policy(params, learner, observation, noise):
    """Action and log-probability of one observation, by the change of variables log N(u) - sum log(1 - tanh(u)^2)."""
    out = numpy_mlp(params, learner, observation)
    mean, log_std = out[:len(noise)], -5 + 3.5 * (np.tanh(out[len(noise):]) + 1)
    u = mean + np.exp(log_std) * noise
    log_normal = -0.5 * noise ** 2 - log_std - 0.5 * np.log(2 * np.pi)
    return np.tanh(u), np.sum(log_normal - np.log(1 - np.tanh(u) ** 2))


@pytest.fixture
def tiny_sac():
    """Two double-critic learners with one action, their batch and noise, and per-learner temperatures."""
    generator = torch.Generator().manual_seed(1)
    make = local_policies.init_mlp
    nets = {"policy": make([3, 5, 2], 2, generator), "critic": make([4, 5, 1], 4, generator),
            "target": make([4, 5, 1], 4, generator)}
    batch = sac_batch(2, 9, 3, 1, generator)
    noise = torch.randn(2, 9, 1, generator=generator)
    return nets, batch, noise, torch.tensor([[0.3], [1.7]])


def numpy_values(critic, learner, observation, action):
    """Both critics of `learner` (of two): rows `learner` and 2 + `learner` of the critic weights."""
    x = np.concatenate([observation, action])
    return [numpy_mlp(critic, learner + 2 * which, x)[0] for which in (0, 1)]


def test_critic_loss_by_hand(tiny_sac):
    """Loops in numpy: target r + gamma (min Q' - temperature log pi'), no bootstrap from terminated transitions."""
    nets, batch, noise, temperature = tiny_sac
    data = {key: value.double().numpy() for key, value in batch.items()}
    total, endings = 0.0, set()
    for i in range(2):
        for j in range(9):
            next_action, log_prob = numpy_policy(nets["policy"], i, data["next_observation"][i, j], noise[i, j].numpy())
            next_value = min(numpy_values(nets["target"], i, data["next_observation"][i, j], next_action))
            target = data["reward"][i, j]
            if not data["terminated"][i, j]:
                target += 0.9 * (next_value - temperature[i, 0].item() * log_prob)
            values = numpy_values(nets["critic"], i, data["observation"][i, j], data["action"][i, j])
            total += sum(0.5 * (value - target) ** 2 for value in values) / 9
            endings.add(bool(data["terminated"][i, j]))
    assert endings == {True, False}
    loss, _ = local_policies.critic_loss(nets["critic"], nets["target"], nets["policy"], temperature, batch, 0.9, noise)
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_terminated_transitions_do_not_bootstrap(tiny_sac):
    """All terminated: the loss knows neither next observation nor discount. None terminated: it knows both."""
    nets, batch, noise, temperature = tiny_sac

    def loss(terminated, discount, shift):
        changed = batch | {"terminated": torch.full_like(batch["reward"], terminated),
                           "next_observation": batch["next_observation"] + shift}
        return local_policies.critic_loss(nets["critic"], nets["target"], nets["policy"], temperature, changed,
                                          discount, noise)[0].item()

    assert loss(1.0, 0.9, 0.0) == loss(1.0, 0.1, 5.0)
    assert abs(loss(0.0, 0.9, 0.0) - loss(0.0, 0.1, 0.0)) > 1e-3
    assert abs(loss(0.0, 0.9, 0.0) - loss(0.0, 0.9, 5.0)) > 1e-3


def test_policy_loss_by_hand(tiny_sac):
    nets, batch, noise, temperature = tiny_sac
    total = 0.0
    for i in range(2):
        for j in range(9):
            observation = batch["observation"][i, j].double().numpy()
            action, log_prob = numpy_policy(nets["policy"], i, observation, noise[i, j].numpy())
            value = min(numpy_values(nets["critic"], i, observation, action))
            total += (temperature[i, 0].item() * log_prob - value) / 9
    loss, _ = local_policies.policy_loss(nets["policy"], nets["critic"], temperature, batch, noise)
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_temperature_loss_by_hand():
    """Value and gradient: d/d log t of -t * mean(log pi + H) is the loss itself, one entry per learner."""
    log_temperature = torch.tensor([[0.2], [-0.7]], requires_grad=True)
    log_prob = torch.tensor([[1.0, -2.0, 0.5], [4.0, 3.0, 2.0]])
    loss = local_policies.temperature_loss(log_temperature, log_prob, -1.5)
    each = [-math.exp(0.2) * (-0.5 / 3 - 1.5), -math.exp(-0.7) * (3.0 - 1.5)]
    assert loss.item() == pytest.approx(sum(each), rel=1e-6)
    loss.backward()
    assert log_temperature.grad.flatten().tolist() == pytest.approx(each, rel=1e-6)


def test_policy_gradient_against_finite_differences():
    """The reparametrised gradient of the policy's loss, in float64."""
    generator = torch.Generator().manual_seed(3)
    policy = [p.double().requires_grad_() for p in local_policies.init_mlp([3, 6, 4], 2, generator)]
    critic = [p.double() for p in local_policies.init_mlp([5, 6, 1], 4, generator)]
    batch = {k: v.double() for k, v in sac_batch(2, 7, 3, 2, generator).items()}
    noise = torch.randn(2, 7, 2, generator=generator, dtype=torch.float64)
    temperature = torch.tensor([[0.5], [1.5]], dtype=torch.float64)

    def loss():
        return local_policies.policy_loss(policy, critic, temperature, batch, noise)[0]

    gradient = torch.autograd.grad(loss(), policy)
    for param, exact in zip(policy, gradient, strict=True):
        estimate = finite_difference(param, lambda: loss().item())
        assert relative_error(exact, estimate) < 1e-6


def finite_difference(tensor, function, step=1e-5):
    """Central differences of `function()` with respect to every element of `tensor`, changed in place."""
    out, flat = torch.zeros_like(tensor, requires_grad=False), tensor.detach().view(-1)
    for i in range(flat.numel()):
        saved = flat[i].item()
        values = []
        for sign in (1, -1):
            flat[i] = saved + sign * step
            values.append(function())
        flat[i] = saved
        out.view(-1)[i] = (values[0] - values[1]) / (2 * step)
    return out


def relative_error(value, reference):
    return float((value - reference).norm() / reference.norm())


def test_batched_learners_are_separate_learners(monkeypatch):
    """Three learners in one batch, five updates: the same numbers as three learners on their own."""
    generator = torch.Generator().manual_seed(4)
    together = SoftActorCritic(3, 4, 2, SAC)
    alone = [SoftActorCritic(1, 4, 2, SAC) for _ in range(3)]
    with torch.no_grad():
        for i, learner in enumerate(alone):
            for own, source in zip(learner.policy, together.policy, strict=True):
                own.copy_(source[i:i + 1])
            for own, target, source in zip(learner.critic, learner.target_critic, together.critic, strict=True):
                own.copy_(source[[i, 3 + i]])
                target.copy_(source[[i, 3 + i]])
    before = [p.detach().clone() for p in together.policy]
    for _ in range(5):
        batch, noise = sac_batch(3, 8, 4, 2, generator), torch.randn(2, 3, 8, 2, generator=generator)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn", lambda *shape, generator, noise=noise: noise)
            together.update(batch, None)
        for i, learner in enumerate(alone):
            with monkeypatch.context() as patch:
                patch.setattr(torch, "randn", lambda *shape, generator, noise=noise, i=i: noise[:, i:i + 1])
                learner.update({key: value[i:i + 1] for key, value in batch.items()}, None)
    assert all((p - q).abs().max() > 1e-3 for p, q in zip(together.policy, before, strict=True))
    for i, learner in enumerate(alone):
        for name, rows in (("policy", [i]), ("critic", [i, 3 + i]), ("target_critic", [i, 3 + i])):
            for own, source in zip(getattr(learner, name), getattr(together, name), strict=True):
                assert torch.allclose(own, source[rows], rtol=0, atol=1e-6)
        assert torch.allclose(learner.log_temperature, together.log_temperature[[i]], rtol=0, atol=1e-6)


def test_target_critic_is_a_polyak_average():
    learner = SoftActorCritic(1, 3, 1, SAC)
    generator = torch.Generator().manual_seed(5)
    before = [p.clone() for p in learner.target_critic]
    learner.update(sac_batch(1, 8, 3, 1, generator), generator)
    for old, new, critic in zip(before, learner.target_critic, learner.critic, strict=True):
        assert torch.allclose(new, 0.95 * old + 0.05 * critic, rtol=0, atol=1e-7)
        assert not torch.equal(critic, old)


def linear_quadratic(a, b, q, r, discount):
    """Cost-to-go matrix P and gain K of min sum discount^t (x'qx + u'ru), x' = ax + bu, by Riccati iteration."""
    P = q
    for _ in range(1000):
        K = discount * np.linalg.solve(r + discount * b.T @ P @ b, b.T @ P @ a)
        P = q + discount * a.T @ P @ (a - b @ K)
    return P, K


def sac_on_linear_quadratic(a, b, q, r, updates, learners, settings):
    """Learn from uniformly random states and actions; returns per-learner cost ratios, values' errors, the no-control
    policy's ratio. Costs are of the mean policy (or zero actions) from the same 200 start states over 150 steps."""
    discount, states = settings.expert_discount, a.shape[0]
    P, _ = linear_quadratic(a, b, q, r, discount)
    learner = SoftActorCritic(learners, states, b.shape[1], settings)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)

    def tensor(x):
        return torch.as_tensor(x, dtype=torch.float32)

    def cost(x, u):
        return np.einsum("...i,ij,...j", x, q, x) + np.einsum("...i,ij,...j", u, r, u)

    for update in range(updates):
        x = rng.uniform(-1.5, 1.5, (learners, 128, states))
        u = rng.uniform(-1, 1, (learners, 128, b.shape[1]))
        learner.set_learning_rate(update / updates)
        learner.update({"observation": tensor(x), "action": tensor(u), "next_observation": tensor(x @ a.T + u @ b.T),
                        "reward": tensor(-cost(x, u)), "terminated": torch.zeros(learners, 128)}, generator)

    start = rng.uniform(-1, 1, (200, states))
    best = np.einsum("ni,ij,nj", start, P, start)

    def ratio(policy):
        x, total = np.tile(start, (learners, 1, 1)), np.zeros(learners)
        for t in range(150):
            u = policy(x)
            total += discount ** t * cost(x, u).sum(1)
            x = x @ a.T + u @ b.T
        return total / best

    u = rng.uniform(-0.8, 0.8, (200, b.shape[1]))
    after = start @ a.T + u @ b.T
    exact = -cost(start, u) - discount * np.einsum("ni,ij,nj->n", after, P, after)
    with torch.no_grad():
        learned = local_policies.critic_values(learner.critic, tensor(start).expand(learners, -1, -1),
                                               tensor(u).expand(learners, -1, -1)).numpy()
    # The soft value holds the entropy bonus too, about the same in every state: a constant, not counted
    value_error = (learned - exact).std((0, 2)) / exact.std()
    return ratio(lambda x: learner.act(tensor(x)).numpy()), value_error, ratio(lambda x: 0 * x[..., :b.shape[1]])


def test_soft_actor_critic_solves_a_linear_quadratic_problem():
    """One state, three learners: cost within 5% of the Riccati solution and critics near the exact Q."""
    settings = dataclasses.replace(SAC, expert_width=32, expert_entropy=-3.0)
    a, b, q, r = (np.array([[x]]) for x in (1.0, 0.5, 1.0, 0.6))
    ratios, value_errors, idle = sac_on_linear_quadratic(a, b, q, r, 1500, 3, settings)
    assert (idle > 1.5).all(), "the problem must need control"
    assert (ratios > 0.999).all() and (ratios < 1.05).all()
    assert (value_errors < 0.15).all()


@pytest.mark.slow
def test_soft_actor_critic_solves_a_double_integrator():
    """Two states, position and velocity, ten learners: cost within 5% of the Riccati solution."""
    settings = dataclasses.replace(SAC, expert_width=64, expert_entropy=-3.5)
    a, b = np.array([[1.0, 0.3], [0.0, 0.9]]), np.array([[0.0], [0.5]])
    ratios, value_errors, idle = sac_on_linear_quadratic(a, b, np.eye(2), np.array([[0.6]]), 6000, 10, settings)
    assert (idle > 1.3).all() and (ratios > 0.999).all() and (ratios < 1.05).all() and (value_errors < 0.15).all()


# ---------------------------------------------------------------- local policies: replay, experts, demonstrations
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


def test_replay_drops_what_follows_an_early_end(filled):
    """Environment 2 (task 1) ends at step 31: flagged there, 81 transitions in every stream."""
    tasks, episodes = filled
    episodes = {key: value.copy() for key, value in episodes.items()}
    episodes["mask"][2, 31:] = 0
    episodes["terminated"][2] = True
    replay = Replay(PUSH, tasks, 150)
    replay.add(episodes)
    assert replay.size == 81
    assert np.argwhere(replay.data["terminated"][..., 0]).tolist() == [[1, 30]]
    assert np.array_equal(replay.data["action"][1, 31:81], episodes["actions"][3])


def through_bytes(state):
    """What a checkpoint does to a state."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


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
    tasks, observations, actions = rng.normal(size=(2, 2)), rng.normal(size=(2, 7, 6)), rng.normal(size=(2, 7, 3))
    local_policies.save_demonstrations(tmp_path / "d.npz", tasks, observations, actions)
    loaded = local_policies.load_demonstrations(tmp_path / "d.npz", PUSH)
    assert all(np.array_equal(a, b) for a, b in zip(loaded, (tasks, observations, actions), strict=True))


@pytest.mark.parametrize("change", [
    {"tasks": np.zeros((2, 3))}, {"tasks": np.zeros((3, 2))}, {"tasks": np.zeros(2)}, {"actions": np.zeros((2, 7, 2))},
    {"actions": np.zeros((2, 6, 3))}, {"observations": np.zeros((2, 7, 5))}, {"observations": np.zeros((2, 6))},
    {"observations": None}, {"tasks": None}])
def test_demonstrations_of_wrong_shape_are_refused(tmp_path, change):
    arrays = {"tasks": np.zeros((2, 2)), "observations": np.zeros((2, 7, 6)), "actions": np.zeros((2, 7, 3))} | change
    np.savez(tmp_path / "d.npz", **{key: value for key, value in arrays.items() if value is not None})
    with pytest.raises(ValueError, match="demonstrations"):
        local_policies.load_demonstrations(tmp_path / "d.npz", PUSH)


# ---------------------------------------------------------------- the meta-learner: gradients
TINY = Settings(hidden=8, bias_vector=2, init_std=0.6, min_std=0.3, init_step_size=0.1, pre_update_imitation=0.3,
                episodes=2, imitation_batch=16)


def meta_problem(inner_steps, seed=0, n=2, size=12):
    """theta, alpha, random batches with w != 1 and a masked tail, demonstrations: float64 tensors."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    theta = gmps.init_policy(PUSH, TINY, generator, torch.float64)
    theta["z"] = 0.5 * normal(1, 2)
    theta["log_std"] = theta["log_std"] + 0.2 * normal(1, 3).abs()
    alpha = {name: 0.1 + 0.05 * normal(*value.shape) for name, value in theta.items()}
    batches = []
    for _ in range(inner_steps):
        batch = {"observation": normal(n, size, 6), "action": 0.7 * normal(n, size, 3),
                 "advantage": normal(n, size), "mask": torch.ones(n, size, dtype=torch.float64)}
        batch["mask"][0, -3:] = 0
        behaviour = gmps.log_prob(gmps.per_task(theta, n), batch["observation"], batch["action"], TINY)
        batch["log_prob"] = behaviour + 0.3 * normal(n, size)
        batches.append(batch)
    demonstration = normal(n, 10, 6), normal(n, 10, 3)
    return theta, alpha, batches, demonstration


def reference_forward(phi, observation):
    """(mean, hidden layers) of one task's policy in numpy."""
    x = np.concatenate([observation, np.tile(phi["z"], (len(observation), 1))], axis=1)
    h1 = np.maximum(x @ phi["w1"] + phi["b1"], 0)
    h2 = np.maximum(h1 @ phi["w2"] + phi["b2"], 0)
    return h2 @ phi["w3"] + phi["b3"], (x, h1, h2)


def reference_log_prob(phi, batch):
    mean, _ = reference_forward(phi, batch["observation"])
    std = np.exp(phi["log_std"])
    return (-((batch["action"] - mean) / std) ** 2 / 2 - np.log(std) - np.log(2 * np.pi) / 2).sum(1)


def reference_inner_gradient(phi, batch, weight):
    """Gradient of -mean(log pi * weight * A) over the unmasked samples of one task, by hand-written backpropagation."""
    mean, (x, h1, h2) = reference_forward(phi, batch["observation"])
    deviation = (batch["action"] - mean) / np.exp(phi["log_std"])
    share = (-weight * batch["advantage"] * batch["mask"] / batch["mask"].sum())[:, None]
    d3 = share * deviation / np.exp(phi["log_std"])
    d2 = d3 @ phi["w3"].T * (h2 > 0)
    d1 = d2 @ phi["w2"].T * (h1 > 0)
    total = dict(w3=h2.T @ d3, b3=d3.sum(0), w2=h1.T @ d2, b2=d2.sum(0), w1=x.T @ d1, b1=d1.sum(0),
                 z=(d1 @ phi["w1"].T)[:, 6:].sum(0), log_std=(share * (deviation ** 2 - 1)).sum(0))
    return {name: value.reshape(phi[name].shape) for name, value in total.items()}


class ReferenceMetaLoss:
    """The meta-objective in numpy, task by task, with the importance weights w of every inner step held fixed.

    w = stopgrad(pi_phi) / pi_behaviour: for the gradient, of both orders, w is a number and not a function of theta.
    Finite differences of the plain objective would differentiate through w as well, and differ. So the weights are
    computed once, along the path of the parameters given here, and stay as they are when those are perturbed.
    """

    def __init__(self, theta, alpha, batches, demonstration):
        self.n = len(demonstration[0])
        self.batches = [[{k: v[i].numpy() for k, v in batch.items()} for batch in batches] for i in range(self.n)]
        self.demonstration = [[part[i].numpy() for part in demonstration] for i in range(self.n)]
        self.weights = None
        self(theta, alpha)

    def __call__(self, theta, alpha):
        theta, alpha = ({k: v.detach().numpy() for k, v in params.items()} for params in (theta, alpha))
        total, weights, self.paths = 0.0, [], []
        for i in range(self.n):
            phi, path = theta, [theta]
            for k, batch in enumerate(self.batches[i]):
                if self.weights is None:
                    weights.append(np.exp(reference_log_prob(phi, batch) - batch["log_prob"]))
                weight = weights[-1] if self.weights is None else self.weights[i * len(self.batches[i]) + k]
                gradient = reference_inner_gradient(phi, batch, weight)
                phi = {name: value - alpha[name] * gradient[name] for name, value in phi.items()}
                path.append(phi)
            observation, action = self.demonstration[i]
            losses = [((reference_forward(phi, observation)[0] - action) ** 2).sum(1).mean() for phi in path]
            total += np.mean(losses[1:]) + TINY.pre_update_imitation * losses[0]
            self.paths.append(path)
        self.weights = self.weights or weights
        return total / self.n


@pytest.mark.parametrize("inner_steps", [1, 2, 3])
def test_meta_gradient_against_finite_differences(inner_steps):
    """Every element of theta and alpha, relative error per tensor at most 1e-6, w != 1, through 1 to 3 inner steps."""
    theta, alpha, batches, demonstration = meta_problem(inner_steps)
    reference = ReferenceMetaLoss(theta, alpha, batches, demonstration)
    assert all(np.abs(w - 1).max() > 0.2 for w in reference.weights), "importance weights must matter here"
    assert min(phi["log_std"].min() for path in reference.paths for phi in path) > math.log(TINY.min_std)
    for params in (theta, alpha):
        for value in params.values():
            value.requires_grad_()
    loss, info = gmps.meta_loss(theta, alpha, batches, demonstration, TINY)
    assert loss.item() == pytest.approx(reference(theta, alpha), rel=1e-12)
    assert len(info) == inner_steps + 1
    loss.backward()
    for params in (theta, alpha):
        for name, value in params.items():
            estimate = finite_difference(value, lambda: reference(theta, alpha))
            if params is alpha and name == "log_std" and inner_steps == 1:
                assert not estimate.any() and (value.grad is None or not value.grad.any()), "no path to mean actions"
            else:
                assert value.grad.shape == value.shape and estimate.norm() > 1e-6
                assert relative_error(value.grad, estimate) <= 1e-6, name


def test_adapted_parameters_are_those_of_the_task_by_task_reference():
    theta, alpha, batches, demonstration = meta_problem(3, seed=1, n=3)
    reference = ReferenceMetaLoss(theta, alpha, batches, demonstration)
    for value in theta.values():
        value.requires_grad_()
    for first_order in (False, True):
        path = gmps.adapt(theta, alpha, batches, TINY, 3, first_order)
        assert len(path) == 4
        for k, phi in enumerate(path):
            for i in range(3):
                for name, value in phi.items():
                    assert np.allclose(value[i].detach().numpy(), reference.paths[i][k][name], rtol=1e-11, atol=1e-13)


def test_stop_gradient_on_w_is_felt():
    """The meta-gradient differs from finite differences in which w moves with theta: so the test above can fail."""
    theta, alpha, batches, demonstration = meta_problem(1)
    for value in theta.values():
        value.requires_grad_()
    exact, = torch.autograd.grad(gmps.meta_loss(theta, alpha, batches, demonstration, TINY)[0], theta["b3"])

    def moving_w():
        return gmps.meta_loss(theta, alpha, batches, demonstration, TINY)[0].item()

    assert relative_error(exact, finite_difference(theta["b3"], moving_w)) > 1e-3


def test_inner_step_in_closed_form():
    """d/d b3 = -mean(w A (a - mu) / std^2), d/d log std = -mean(w A ((a - mu)^2 / std^2 - 1))."""
    theta, alpha, (batch,), _ = meta_problem(1, seed=2)
    phi = {name: value.clone().requires_grad_() for name, value in gmps.per_task(theta, 2).items()}
    after = gmps.inner_step(phi, alpha, batch, TINY)
    x = torch.cat([batch["observation"], theta["z"].expand(2, 12, 2)], dim=-1)
    mean = torch.relu(torch.relu(x @ theta["w1"] + theta["b1"]) @ theta["w2"] + theta["b2"]) @ theta["w3"] + theta["b3"]
    std = theta["log_std"].exp()
    deviation = batch["action"] - mean
    log_prob = (-0.5 * (deviation / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
    wA = (torch.exp(log_prob - batch["log_prob"]) * batch["advantage"] * batch["mask"])[..., None]
    count = torch.tensor([9.0, 12.0]).view(2, 1, 1)  # unmasked samples of either task
    for name, gradient in (("b3", -(wA * deviation / std ** 2).sum(1, keepdim=True) / count),
                           ("log_std", -(wA * (deviation ** 2 / std ** 2 - 1)).sum(1, keepdim=True) / count)):
        assert torch.allclose(after[name], theta[name] - alpha[name] * gradient, rtol=1e-12, atol=1e-14)
        assert (after[name] - theta[name]).abs().max() > 1e-3


def log_std_meta_gradient(second_order):
    """Meta-gradient of theta after one inner step whose gradient is, or is not, cut off from theta."""
    theta, alpha, (batch,), demonstration = meta_problem(1)
    for value in theta.values():
        value.requires_grad_()
    phi = gmps.per_task(theta, 2)
    loss = gmps.inner_loss(phi, batch, TINY).sum()
    gradient = torch.autograd.grad(loss, list(phi.values()), create_graph=second_order)
    phi = {name: value - alpha[name] * g for (name, value), g in zip(phi.items(), gradient, strict=True)}
    loss = gmps.imitation_loss(phi, *demonstration)
    return dict(zip(theta, torch.autograd.grad(loss, list(theta.values()), allow_unused=True), strict=True))


def test_log_std_has_a_meta_gradient_at_second_order_only():
    """Mean actions know nothing of log-std: it reaches the outer loss through the inner step's gradient alone.

    The first-order step is emulated here (theta - alpha * constant), as `first_order=True` in gmps serves rollouts and
    gives theta no gradient at all. The same step with its graph kept equals `meta_loss`'s own gradient.
    """
    first, second = log_std_meta_gradient(False), log_std_meta_gradient(True)
    assert first["log_std"] is None or not first["log_std"].any()
    assert first["w1"].norm() > 1e-3
    assert second["log_std"].norm() > 1e-4
    theta, alpha, batches, demonstration = meta_problem(1)
    for value in theta.values():
        value.requires_grad_()
    settings = dataclasses.replace(TINY, pre_update_imitation=0.0)
    gmps.meta_loss(theta, alpha, batches, demonstration, settings)[0].backward()
    for name, value in theta.items():
        assert torch.allclose(value.grad, second[name], rtol=1e-9, atol=1e-13)


def test_log_std_floor():
    """Below the floor std is the floor, and the log-probability no longer moves log-std."""
    theta, _, (batch,), _ = meta_problem(1)
    theta["log_std"] = torch.full_like(theta["log_std"], math.log(0.1)).requires_grad_()
    phi = gmps.per_task(theta, 2)
    assert torch.allclose(gmps.policy_std(phi, TINY), torch.tensor(0.3, dtype=torch.float64), rtol=1e-12, atol=0)
    gradient, = torch.autograd.grad(gmps.inner_loss(phi, batch, TINY).sum(), theta["log_std"])
    assert not gradient.any()


def test_adaptation_leaves_theta_untouched():
    """Bit for bit, in second and first order, and phi_0 is theta for every task."""
    theta, alpha, batches, demonstration = meta_problem(2)
    before = {name: value.clone() for name, value in theta.items()}
    for value in theta.values():
        value.requires_grad_()
    for first_order in (False, True):
        path = gmps.adapt(theta, alpha, batches, TINY, 2, first_order)
        gmps.meta_loss(theta, alpha, batches, demonstration, TINY)[0].backward()
    assert all(torch.equal(theta[name], before[name]) for name in theta)
    assert all(torch.equal(path[0][name][i], before[name]) for name in theta for i in range(2))
    assert all((path[1][name] - before[name]).abs().max() > 1e-6 for name in theta)


def test_tasks_adapt_independently():
    """Changing task 1's rollouts changes phi_1 and no bit of phi_0."""
    theta, alpha, batches, _ = meta_problem(2)
    for value in theta.values():
        value.requires_grad_()
    one = gmps.adapt(theta, alpha, batches, TINY, 2)[-1]
    for batch in batches:
        batch["advantage"][1] += 1.0
    two = gmps.adapt(theta, alpha, batches, TINY, 2)[-1]
    assert all(torch.equal(one[name][0], two[name][0]) for name in theta)
    assert all(not torch.equal(one[name][1], two[name][1]) for name in theta)


# ---------------------------------------------------------------- the meta-learner: data
@pytest.fixture(scope="module")
def collected():
    """(tasks, theta, phi, episodes, batch, scale) of a real collection: 2 tasks, 3 episodes each."""
    tasks, generator = task_set(PUSH, "train", 2), torch.Generator().manual_seed(0)
    theta = gmps.init_policy(PUSH, TINY, generator)
    phi = gmps.per_task(theta, 2)
    episodes = gmps.collect(BatchEnv(6), tasks, phi, TINY, generator)
    return tasks, theta, phi, episodes, *gmps.policy_gradient_batch(episodes, phi, PUSH, TINY)


def test_importance_weights_are_one_at_the_first_meta_step(collected):
    """Theta unchanged since collection: w is 1 and the inner loss is -mean(log pi * A)."""
    _, theta, phi, _, batch, _ = collected
    log_prob = gmps.log_prob(phi, batch["observation"], batch["action"], TINY)
    assert ((log_prob - batch["log_prob"]).exp() - 1).abs().max() <= 1e-6
    loss = gmps.inner_loss(gmps.adapt(theta, {}, [], TINY, 2)[0], batch, TINY)
    assert torch.allclose(loss, -(log_prob * batch["advantage"]).mean(-1), rtol=1e-6, atol=1e-7)
    moved = {name: value + 0.05 for name, value in phi.items()}
    moved_log_prob = gmps.log_prob(moved, batch["observation"], batch["action"], TINY)
    by_hand = -(moved_log_prob * torch.exp(moved_log_prob - log_prob) * batch["advantage"]).mean(-1)
    assert torch.allclose(gmps.inner_loss(moved, batch, TINY), by_hand, rtol=1e-5, atol=1e-6)
    assert (moved_log_prob - log_prob).abs().max() > 0.01


def test_collected_actions_are_the_gaussians_own_samples(collected):
    """Unclipped, of the policy's std around its mean (chi-square over 900 numbers within 4 standard errors)."""
    _, _, phi, episodes, batch, _ = collected
    x = batch["observation"]
    deviation = ((batch["action"] - gmps.policy_mean(phi, x)) / 0.6).square()
    assert deviation.numel() == 900 and abs(deviation.mean().item() - 1) < 4 * math.sqrt(2 / 900)
    assert np.abs(episodes["actions"]).max() > 1.0
    again = gmps.collect(BatchEnv(2), task_set(PUSH, "train", 2), phi, TINY, None)
    observation = (again["observations"][:, :-1] - PUSH.observation_centre) / 0.1
    mean = gmps.policy_mean(phi, torch.as_tensor(observation, dtype=torch.float32))
    assert np.allclose(again["actions"], mean.numpy(), atol=1e-6), "without a generator: mean actions"


def test_batch_of_the_inner_step(collected):
    """Observations scaled, advantages over one scale for all tasks: their own deviation, or the given one."""
    _, _, phi, episodes, batch, scale = collected
    observation = (episodes["observations"].reshape(2, 3, 51, 6)[:, :, :-1] - [0, 0.6, 0.1, 0, 0.65, 0.02]) / 0.1
    assert np.allclose(batch["observation"], observation.reshape(2, 150, 6), atol=1e-5)
    assert np.allclose(batch["action"], episodes["actions"].reshape(2, 150, 3))
    assert batch["advantage"].std().item() == pytest.approx(1.0, rel=1e-5)
    assert batch["advantage"].mean(1).abs().max() < 1e-5
    other, given = gmps.policy_gradient_batch(episodes, phi, PUSH, TINY, 7.0)
    assert given == 7.0 and torch.allclose(other["advantage"] * 7.0, batch["advantage"] * scale, rtol=1e-4, atol=1e-5)


def trajectories(n=2, K=4, T=30, seed=0):
    rng = np.random.default_rng(seed)
    observation = rng.normal(size=(n, K, T, 6)).cumsum(2) * 0.2
    reward = rng.normal(size=(n, K, T)) + observation[..., 3]
    return torch.as_tensor(observation), torch.as_tensor(reward), torch.ones(n, K, T, dtype=torch.float64)


def test_baseline_against_lstsq():
    """Ridge regression (1e-5) as numpy.linalg.lstsq on stacked equations, features written out one by one, masked."""
    observation, returns, mask = trajectories()
    mask[1, 2, 20:] = 0
    value = gmps.linear_baseline(observation, returns, mask)
    for i in range(2):
        rows, targets, kept = [], [], []
        for k in range(4):
            for t in range(30):
                s = observation[i, k, t].numpy()
                products = [s[a] * s[b] for a in range(6) for b in range(a + 1, 6)]
                rows.append([*s, *(s * s), *products, t / 100, (t / 100) ** 2, (t / 100) ** 3, 1.0])
                targets.append(returns[i, k, t].item())
                kept.append(mask[i, k, t].item() > 0)
        X, y, kept = np.array(rows), np.array(targets), np.array(kept)
        ridge = math.sqrt(1e-5) * np.eye(X.shape[1])
        solution = np.linalg.lstsq(np.vstack([X[kept], ridge]), np.r_[y[kept], np.zeros(len(ridge))], rcond=None)[0]
        assert np.allclose(value[i].reshape(-1), X @ solution, rtol=1e-7, atol=1e-7)
        assert np.var(y[kept] - (X @ solution)[kept]) < 0.9 * np.var(y[kept])


def by_hand_advantages(observation, reward, lam, discount):
    """Per task, episode and step, in loops; lam is 0 or 1 only."""
    n, K, T = reward.shape
    reward, returns = reward.numpy(), np.zeros((n, K, T))
    for t in reversed(range(T)):
        returns[..., t] = reward[..., t] + (discount * returns[..., t + 1] if t + 1 < T else 0)
    value = gmps.linear_baseline(observation, torch.as_tensor(returns), torch.ones(n, K, T).double()).numpy()
    advantage = np.zeros((n, K, T))
    for t in range(T):
        following = value[..., t + 1] if t + 1 < T else 0.0
        target = returns[..., t] if lam == 1 else reward[..., t] + discount * following
        advantage[..., t] = target - value[..., t]
    return advantage - advantage.mean((1, 2), keepdims=True)


@pytest.mark.parametrize("lam", [0, 1])
def test_advantages_at_both_ends_of_lambda(lam):
    """1: discounted returns minus the baseline; 0: one-step temporal differences. Both centred per task."""
    observation, reward, mask = trajectories(seed=1)
    settings = dataclasses.replace(TINY, gae_lambda=lam, discount=0.9)
    advantage = gmps.advantages(observation, reward, mask, settings)
    assert np.allclose(advantage, by_hand_advantages(observation, reward, lam, 0.9), rtol=1e-8, atol=1e-9)
    assert advantage.mean((1, 2)).abs().max() < 1e-12


def test_advantages_between_are_the_weighted_sum_of_n_step_ones():
    """lambda 0.5: (1 - lambda) sum lambda^(k-1) A^(k), the k-step advantages written out."""
    observation, reward, mask = trajectories(n=1, K=2, T=6, seed=2)
    lam, discount = 0.5, 0.9
    settings = dataclasses.replace(TINY, gae_lambda=lam, discount=discount)
    value = gmps.linear_baseline(observation, gmps.discounted_sum(reward, discount), mask).numpy()
    expected = np.zeros((1, 2, 6))
    for k in range(2):
        for t in range(6):
            steps = []
            for length in range(1, 7 - t):
                total = sum(discount ** j * reward[0, k, t + j].item() for j in range(length))
                tail = discount ** length * value[0, k, t + length] if t + length < 6 else 0.0
                steps.append(total + tail - value[0, k, t])
            weights = [(1 - lam) * lam ** j for j in range(len(steps) - 1)] + [lam ** (len(steps) - 1)]
            expected[0, k, t] = np.dot(weights, steps)
    expected -= expected.mean()
    assert np.allclose(gmps.advantages(observation, reward, mask, settings), expected, atol=1e-9)


def test_padding_after_an_early_end_changes_nothing():
    """Other observations behind the end of an episode: same advantages before it, zeros behind it."""
    observation, reward, mask = trajectories(seed=3)
    mask[1, 2, 17:], reward[1, 2, 17:] = 0, 0  # as `envs.rollout` leaves them
    advantage = gmps.advantages(observation, reward, mask, TINY)
    observation[1, 2, 17:] = 3.3
    padded = gmps.advantages(observation, reward, mask, TINY)
    assert torch.allclose(advantage, padded, rtol=0, atol=1e-9) and not padded[1, 2, 17:].any()
    shorter = gmps.advantages(observation[:1], reward[:1], mask[:1], TINY)
    assert torch.allclose(shorter, padded[:1], rtol=0, atol=1e-9), "and nothing in other tasks"
    assert abs((padded * mask).sum((1, 2))).max() < 1e-9


def test_discounted_sum_in_closed_form():
    ones = torch.ones(2, 10, dtype=torch.float64)
    geometric = (1 - 0.7 ** torch.arange(10, 0, -1, dtype=torch.float64)) / 0.3
    assert torch.allclose(gmps.discounted_sum(ones, 0.7), geometric.expand(2, 10), rtol=1e-12, atol=0)


def test_random_streams_are_distinct_and_repeatable():
    """Every purpose, iteration and seed has numbers of its own, in both libraries, and the same ones again."""
    keys = [(seed, purpose, k) for seed in (0, 1, 7) for purpose in envs.STREAMS for k in range(20)]

    def first(key):
        rng, generator = random_streams(*key)
        return rng.random(), torch.rand(1, generator=generator, dtype=torch.float64).item()

    draws = [first(key) for key in keys]
    assert len({a for a, _ in draws}) == len({b for _, b in draws}) == len(keys) == 300
    assert draws == [first(key) for key in keys]


# ---------------------------------------------------------------- the meta-learner: training and evaluation
LEARN = Settings(training_tasks=3, episodes=3, hidden=16, bias_vector=2, collections=3, meta_steps=4, inner_steps=2,
                 aggregation_episodes=1, imitation_batch=20, imitation_steps=20)


def scripted_demonstrations(tasks, episodes=2, noise=0.3):
    settings = Settings(demonstration_episodes=episodes, demonstration_noise=noise)
    env = BatchEnv(len(tasks) * episodes)
    observations, actions, _ = local_policies.make_demonstrations(env, scripted_expert, tasks, settings)
    return gmps.Demonstrations(observations, actions)


def meta_trained(settings, experts=scripted_expert, state=None):
    """List of (state through bytes, metrics), one per collection, and the demonstrations as they ended."""
    tasks = task_set(PUSH, "train", settings.training_tasks)
    demonstrations = scripted_demonstrations(tasks)
    theta = gmps.init_policy(PUSH, settings, torch.Generator().manual_seed(0))
    env = BatchEnv(len(tasks) * settings.episodes)
    training = gmps.meta_train(env, tasks, demonstrations, experts, theta, settings, state)
    return [(through_bytes(state), metrics) for state, metrics in training], demonstrations


def test_meta_training_resumed_ends_with_the_same_bits():
    """From each yielded state, through a file's bytes: theta, alpha, scales, counts and demonstrations are the same."""
    states, demonstrations = meta_trained(LEARN)
    last, metrics = states[-1]
    for state, _ in states[:-1]:
        resumed, regrown = meta_trained(LEARN, state=state)
        assert resumed[-1][1] == metrics
        for group in ("theta", "alpha"):
            assert all(torch.equal(resumed[-1][0][group][name], value) for name, value in last[group].items())
        assert resumed[-1][0]["scales"] == last["scales"]
        assert np.array_equal(regrown.observations, demonstrations.observations)
        assert np.array_equal(regrown.actions, demonstrations.actions)
    assert not torch.equal(states[0][0]["theta"]["w2"], last["theta"]["w2"])
    assert not torch.equal(states[0][0]["alpha"]["log_std"], torch.zeros(1, 3)), "log-std's step size is learned"


def test_meta_training_counts_its_steps_and_grows_the_demonstrations():
    """3 tasks x 50 steps x (2 inner steps x 3 episodes + 1 of aggregation) a collection; labels are the expert's."""
    calls = []

    def expert(observations, tasks):
        calls.append(observations.copy())
        return scripted_expert(observations, tasks)

    states, demonstrations = meta_trained(LEARN, expert)
    assert [metrics["env_steps"] for _, metrics in states] == [1050, 2100, 3150]
    assert [metrics["iteration"] for _, metrics in states] == [1, 2, 3]
    assert [call.shape for call in calls] == [(3, 50, 6)] * 3
    assert demonstrations.observations.shape == (3, 100 + 150, 6)
    assert np.array_equal(demonstrations.observations[:, 100:], np.concatenate(calls, axis=1))
    labels = scripted_expert(demonstrations.observations, task_set(PUSH, "train", 3))
    assert np.array_equal(demonstrations.actions, labels)


def test_demonstrations_alone_need_no_expert():
    """Without experts, or without aggregation episodes: no step spent on it, no call, no new label, same theta."""
    def never(observations, tasks):
        raise AssertionError("the expert was called")

    alone, demonstrations = meta_trained(LEARN, None)
    unused, _ = meta_trained(dataclasses.replace(LEARN, aggregation_episodes=0), never)
    assert demonstrations.observations.shape == (3, 100, 6)
    assert [metrics["env_steps"] for _, metrics in alone] == [900, 1800, 2700]
    assert all(torch.equal(value, unused[-1][0]["theta"][name]) for name, value in alone[-1][0]["theta"].items())


def test_meta_training_refuses_numbers_that_are_not_finite():
    with pytest.raises(FloatingPointError, match="not finite"):
        meta_trained(LEARN, lambda observations, tasks: np.full((*observations.shape[:2], 3), np.nan, np.float32))


def unrevealing_demonstrations(tasks, count=400, seed=0):
    """The same states for every task, of random pushes, labelled by each task's scripted expert; and the least
    imitation loss of a policy that is not told the task, which is that of the labels' mean over tasks."""
    env, rng = BatchEnv(16), np.random.default_rng(seed)
    drift = rng.uniform(-1, 1, (16, 1))
    episodes = rollout(env, lambda o: np.c_[drift + rng.normal(0, 0.3, (16, 1)), rng.uniform(0.5, 1, (16, 1)),
                                            np.zeros(16)], np.tile(tasks[0], (16, 1)))
    states = rng.permutation(episodes["observations"][:, :-1].reshape(-1, 6))[:count]
    observations = np.tile(states, (len(tasks), 1, 1))
    actions = scripted_expert(observations, tasks)
    return gmps.Demonstrations(observations, actions), float(((actions - actions.mean(0)) ** 2).sum(-1).mean())


def loss_on(phi, demonstrations):
    observation = gmps.scaled(PUSH, demonstrations.observations)
    return gmps.imitation_loss(phi, observation, torch.as_tensor(demonstrations.actions)).item()


def test_imitation_without_adaptation_nears_its_lower_bound():
    """Untold of the task, no policy does better than the mean label of a state; training comes within a tenth of it."""
    tasks = task_set(PUSH, "train", 4)
    demonstrations, bound = unrevealing_demonstrations(tasks)
    settings = dataclasses.replace(LEARN, imitation_steps=600, hidden=64, imitation_batch=100)
    theta = gmps.imitate(PUSH, demonstrations, settings)
    assert bound <= loss_on(gmps.per_task(theta, 4), demonstrations) < 1.1 * bound


def test_meta_training_teaches_the_policy_to_adapt(seed=0):
    """Scripted experts, states that do not show the goal: one inner step by reward alone brings the loss on other
    states a tenth below the bound that no policy passes without adaptation, and a tenth below the start policy's own
    step. Means over four sets of rollouts: one set alone scatters by a quarter."""
    settings = dataclasses.replace(LEARN, training_tasks=8, episodes=20, hidden=64, bias_vector=4, collections=8,
                                   meta_steps=40, inner_steps=1, imitation_steps=300, imitation_batch=100, seed=seed)
    tasks = task_set(PUSH, "train", 8)
    demonstrations, _ = unrevealing_demonstrations(tasks)
    held, bound = unrevealing_demonstrations(tasks, seed=1)
    imitation = gmps.imitate(PUSH, demonstrations, settings)
    env = BatchEnv(8 * settings.episodes)
    *_, (state, _) = gmps.meta_train(env, tasks, demonstrations, None, imitation, settings)

    def adapted_loss(theta, alpha):
        phi, losses = gmps.per_task(theta, 8), []
        for draw in range(4):
            episodes = gmps.collect(env, tasks, phi, settings, torch.Generator().manual_seed(draw))
            batch, _ = gmps.policy_gradient_batch(episodes, phi, PUSH, settings, state["scales"][0])
            losses.append(loss_on(gmps.adapted(theta, alpha, [batch], settings, 8), held))
        return np.mean(losses)

    before = adapted_loss(imitation, gmps.init_step_sizes(imitation, settings))
    after = adapted_loss(state["theta"], state["alpha"])
    assert loss_on(gmps.per_task(state["theta"], 8), held) >= bound
    assert after < 0.9 * bound and after < 0.9 * before, (after / bound, before / bound)


def evaluated(seed, theta=None):
    generator = torch.Generator().manual_seed(0)
    theta = theta or gmps.init_policy(PUSH, TINY, generator)
    tasks = task_set(PUSH, "held_out", 2)
    return gmps.evaluate(PUSH, theta, gmps.init_step_sizes(theta, TINY), [5.0], tasks, 2, TINY, seed)


def test_evaluation_is_deterministic_under_its_seed():
    """Bit for bit the same under a seed; sampled rollouts and adapted parameters differ under another."""
    one, again, other = evaluated(3), evaluated(3), evaluated(4)
    for kind in ("mean", "sampled"):
        for key in ("return", "distance"):
            assert one[kind][key].shape == (3, 2) and np.array_equal(one[kind][key], again[kind][key])
    for phi, psi in zip(one["path"], again["path"], strict=True):
        assert all(torch.equal(phi[name], psi[name]) for name in phi)
    assert not np.array_equal(one["sampled"]["return"], other["sampled"]["return"])
    assert not torch.equal(one["path"][1]["w1"], other["path"][1]["w1"])
    assert np.array_equal(one["mean"]["return"][0], other["mean"]["return"][0]), "before adaptation nothing is random"
    assert one["env_steps"] == 3 * 2 * (2 + 1) * 50


def test_evaluation_leaves_theta_untouched_and_starts_from_it():
    theta = gmps.init_policy(PUSH, TINY, torch.Generator().manual_seed(1))
    before = {name: value.clone() for name, value in theta.items()}
    path = evaluated(0, theta)["path"]
    assert all(torch.equal(theta[name], before[name]) for name in theta)
    assert all(torch.equal(path[0][name][1], before[name]) for name in theta)
    assert all(not torch.equal(path[1][name], path[0][name]) for name in theta if name != "log_std")


# ---------------------------------------------------------------- the command line
BUDGET = dict(training_tasks=2, held_out_tasks=2, expert_iterations=8, expert_updates=2, expert_episodes=2,
              expert_width=8, expert_batch=16, demonstration_episodes=3, imitation_steps=3, hidden=8, episodes=3,
              collections=3, meta_steps=2, inner_steps=2, aggregation_episodes=1, imitation_batch=10)
ARGUMENTS = ["--quick", "--threads", "1", *(f"--set={name}={value}" for name, value in BUDGET.items())]


def start(*arguments):
    """`run.main` in this process, without the pictures' seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "draw_video", lambda *_: None)
        return run.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a tiny run from start to end."""
    out = tmp_path_factory.mktemp("run") / "finished"
    assert start(*ARGUMENTS, "--out", out) == 0
    return out


def result_of(out):
    return json.loads((out / "result.json").read_text())


def test_result_has_the_agreed_keys(finished):
    result = result_of(finished)
    assert {"task", "method", "seed", "commit", "env_steps", "wall_seconds", "held_out", "held_out_sampled",
            "experts_held_out", "no_adaptation"} <= set(result)
    assert (result["task"], result["method"], result["seed"]) == ("push", "gmps", 0)
    assert result["commit"] == "unknown" or len(result["commit"].removesuffix("-dirty")) == 40
    for key in ("env_steps", "wall_seconds"):
        assert set(result[key]) == {"experts", "meta_training", "evaluation"}
        assert all(value > 0 for value in result[key].values())
    tasks = task_set(PUSH, "held_out", 2).tolist()
    steps = sorted({record["gradient_steps"] for record in result["held_out"]})
    assert steps == list(range(steps[-1] + 1)) and {0, 1, 3} <= set(steps)
    for name in ("held_out", "held_out_sampled"):
        assert [(r["gradient_steps"], r["task"]) for r in result[name]] == [(k, task) for k in steps for task in tasks]
    for name in ("held_out", "held_out_sampled", "experts_held_out", "no_adaptation"):
        for entry in result[name]:
            assert {"task", "return", "final_distance", "success"} <= set(entry)
            assert entry["success"] is (entry["final_distance"] <= 0.05)
    for name in ("experts_held_out", "no_adaptation"):
        assert [entry["task"] for entry in result[name]] == tasks


def test_environment_steps_are_counted_exactly(finished):
    result = result_of(finished)
    evaluations = len({record["gradient_steps"] for record in result["held_out"]})
    expected = {"experts": 50 * (2 * 2 * 8 + 2 * 3),  # tasks x episodes x iterations, and 3 demonstrations a task
                "meta_training": 50 * 2 * 3 * (2 * 3 + 1),  # tasks x collections x (inner x episodes + aggregation)
                "evaluation": 50 * 2 * ((3 + 1) * evaluations + 1 + 1)}  # sampled, mean; no adaptation; experts
    assert result["env_steps"] == expected


def test_results_of_a_run_are_those_of_its_policy_file(finished):
    """The mean-action return before adaptation, recomputed from policy.pt by a rollout of our own."""
    policy = torch.load(finished / "policy.pt", weights_only=True)
    phi = {name: value.double() for name, value in gmps.per_task(policy["theta"], 2).items()}

    def act(observation):
        x = torch.as_tensor((observation - PUSH.observation_centre) / 0.1)
        return torch.stack([torch.as_tensor(reference_forward({k: v[i].numpy() for k, v in phi.items()},
                                                              x[i:i + 1].numpy())[0][0]) for i in range(2)]).numpy()

    episodes = rollout(BatchEnv(2), act, task_set(PUSH, "held_out", 2))
    entries = [entry for entry in result_of(finished)["held_out"] if entry["gradient_steps"] == 0]
    assert np.allclose([entry["return"] for entry in entries], episodes["rewards"].sum(1), rtol=1e-3, atol=1e-3)
    assert np.allclose([entry["final_distance"] for entry in entries], episodes["distances"][:, -1], atol=1e-4)


def test_metrics_file_has_a_row_per_iteration(finished):
    lines = (finished / "metrics.csv").read_text().splitlines()
    columns = lines[0].split(",")
    rows = [dict(zip(columns, line.split(","), strict=True)) for line in lines[1:]]
    assert [(row["phase"], int(row["iteration"])) for row in rows] == (
        [("experts", k) for k in range(1, 9)] + [("meta_training", k) for k in range(1, 4)])
    assert [int(row["env_steps"]) for row in rows] == [200 * k for k in range(1, 9)] + [700 * k for k in range(1, 4)]
    assert all(math.isfinite(float(row["return"])) for row in rows)


def test_finished_run_started_again_changes_nothing(finished, tmp_path):
    """Same command, all checkpoints there: the same result, and no partial checkpoint is left behind."""
    before = {name: (finished / name).read_bytes() for name in ("experts.pt", "policy.pt", "metrics.csv")}
    result = result_of(finished)
    assert start(*ARGUMENTS, "--out", finished) == 0
    assert before == {name: (finished / name).read_bytes() for name in before}
    again = result_of(finished)
    assert {**again, "wall_seconds": 0} == {**result, "wall_seconds": 0}
    assert not list(finished.glob("*partial*")) + list(finished.glob("*.part"))


def test_evaluation_of_given_goals(finished, tmp_path):
    """Goals, gradient steps, rollouts and steps as asked for; the same seed gives the same file twice."""
    goals = np.array([[-0.35, 0.5], [0.35, 1.1], [0.0, 0.75]])  # off the training range, on the table
    np.save(tmp_path / "goals.npy", goals)
    results = []
    for name in ("a", "b"):
        assert start("--threads", 1, "--evaluate", finished, "--goals", tmp_path / "goals.npy", "--gradient-steps", 2,
                     "--rollouts", 4, "--seed", 5, "--out", tmp_path / name) == 0
        results.append(result_of(tmp_path / name))
    one, again = ({**result, "wall_seconds": 0} for result in results)
    assert one == again and one["seed"] == 5
    expected = [(k, goal) for k in range(3) for goal in goals.tolist()]
    assert [(r["gradient_steps"], r["task"]) for r in one["held_out"]] == expected
    assert one["env_steps"]["evaluation"] == 50 * 3 * ((4 + 1) * 3 + 1 + 1)
    assert one["env_steps"]["experts"] == result_of(finished)["env_steps"]["experts"]


def test_many_goals_are_evaluated_as_few(finished, tmp_path):
    """60 goals (more than one chunk): mean actions before adaptation are those of the goals one chunk at a time."""
    goals = PUSH.sample_tasks(np.random.default_rng(0), 60)
    entries = {}
    for name, part in (("all", goals), ("last", goals[55:])):
        np.save(tmp_path / "goals.npy", part)
        assert start("--threads", 1, "--evaluate", finished, "--goals", tmp_path / "goals.npy", "--gradient-steps", 0,
                     "--rollouts", 2, "--out", tmp_path / name) == 0
        entries[name] = result_of(tmp_path / name)
    assert [entry["task"] for entry in entries["all"]["held_out"]] == goals.tolist()
    for name in ("held_out", "no_adaptation", "experts_held_out"):
        for one, other in zip(entries["all"][name][55:], entries["last"][name], strict=True):
            assert one["return"] == pytest.approx(other["return"], rel=1e-4, abs=1e-4)


# Each breaks off a run from within, by SIGKILL at the n-th call of a function: no time is left for any clean-up.
KILLED = """
import importlib, os, signal, sys
module, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
owner = importlib.import_module(module)
original, calls = getattr(owner, name), []
def counted(*arguments, **named):
    calls.append(None)
    if len(calls) == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **named)
setattr(owner, name, counted)
import run
sys.exit(run.main(sys.argv[4:]))
"""


@pytest.mark.parametrize("module, name, count, left", [
    pytest.param("local_policies", "critic_loss", 14, "experts_partial.pt", id="in iteration 7 of 8 of the experts"),
    pytest.param("gmps", "meta_loss", 4, "policy_partial.pt", id="in collection 2 of 3 of meta-training"),
    pytest.param("os", "fsync", 4, "experts.pt.part", id="while writing experts.pt"),
])
def test_killed_run_goes_on_to_the_same_result(finished, tmp_path, module, name, count, left):
    """SIGKILL, the same command again: result.json, wall times apart, and metrics.csv are those of the unbroken run."""
    out = tmp_path / "killed"
    environment = os.environ | {"MUJOCO_GL": "disabled", "PYTHONPATH": str(HERE)}
    killed = subprocess.run([sys.executable, "-c", KILLED, module, name, str(count), *ARGUMENTS, "--out", str(out)],
                            env=environment, capture_output=True, cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert (out / left).exists() and not (out / "result.json").exists() and not (out / "policy.pt").exists()
    assert start(*ARGUMENTS, "--out", out) == 0
    unbroken, resumed = result_of(finished), result_of(out)
    assert {**resumed, "wall_seconds": 0} == {**unbroken, "wall_seconds": 0}
    assert (out / "metrics.csv").read_bytes() == (finished / "metrics.csv").read_bytes()
    assert not list(out.glob("*.part")) and not list(out.glob("*partial*"))


def refused(capsys, *arguments):
    """The one line on stderr of a command that must fail with exit code 2."""
    capsys.readouterr()
    assert start(*arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("arguments, word", [
    (["--task", "pull"], "pull"), (["--nonsense"], "--nonsense"), (["--set", "nonsense=1"], "nonsense"),
    (["--set", "hidden"], "hidden"), (["--set", "hidden=0"], "hidden"), (["--set", "hidden=x"], "hidden"),
    (["--set", "learning_rate=nan"], "learning_rate"), (["--set", "discount=1.5"], "discount"),
    (["--set", "experts=none"], "experts"), (["--experts", "none"], "none"), (["--seed", "-1"], "seed"),
    (["--seed", "x"], "seed"), (["--seed", "99999999999"], "seed"), (["--rollouts", "0"], "rollouts"),
    (["--gradient-steps", "-1"], "gradient-steps"), (["--threads", "0"], "threads"),
    (["--device", "cuda:99"], "cuda:99"), (["--device", "abacus"], "abacus"),
    (["--goals", "goals.npy"], "--evaluate"), (["--out"], "--out")])
def test_bad_argument_is_refused_in_one_line(capsys, arguments, word):
    assert word in refused(capsys, "--quick", *arguments)


def saved_as(path, array, **options):
    with open(path, "wb") as file:
        np.save(file, array, **options)


def zip_start(path):
    with open(path, "wb") as file:
        np.savez(file, goals=np.zeros((2, 2)))
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("write, word", [
    pytest.param(lambda path: saved_as(path, np.zeros((2, 3))), "(n, 2)", id="wrong shape"),
    pytest.param(lambda path: saved_as(path, np.zeros(2)), "(n, 2)", id="one axis"),
    pytest.param(lambda path: saved_as(path, np.zeros((0, 2))), "(n, 2)", id="empty"),
    pytest.param(lambda path: saved_as(path, np.array([[0, 0.75], [0, np.nan]])), "row 1", id="NaN"),
    pytest.param(lambda path: saved_as(path, np.array([[0, 0.75], [0.5, 0.75]])), "row 1", id="off the table"),
    pytest.param(lambda path: saved_as(path, np.array([["a", "b"]])), "numbers", id="text array"),
    pytest.param(lambda path: saved_as(path, np.array([[0.05 + 1j, 0.75]])), "numbers", id="complex"),
    pytest.param(lambda path: saved_as(path, np.array([[None, 1]]), allow_pickle=True), "npy", id="pickled objects"),
    pytest.param(lambda path: None, "no goals file", id="missing"),
    pytest.param(lambda path: path.write_text("0.0, 0.75\n"), "npy", id="text file"),
    pytest.param(lambda path: path.write_bytes(b""), "npy", id="no bytes"),
    pytest.param(zip_start, "npy", id="truncated npz"),
    pytest.param(lambda path: path.mkdir(), "npy", id="a folder"),
])
def test_bad_goals_file_is_refused_in_one_line(finished, tmp_path, capsys, write, word):
    write(tmp_path / "goals.npy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        line = refused(capsys, "--threads", 1, "--evaluate", finished, "--goals", tmp_path / "goals.npy", "--out",
                       tmp_path / "out")
    assert word in line and "goals.npy" in line
    assert not (tmp_path / "out" / "result.json").exists()


def copied(finished, out, *names):
    out.mkdir()
    for name in names:
        (out / name).write_bytes((finished / name).read_bytes())
    return out


@pytest.mark.parametrize("spoil, word", [
    pytest.param(lambda path, _: path.unlink(), "train first", id="missing"),
    pytest.param(lambda path, _: path.write_bytes(path.read_bytes()[:-2000]), "truncated", id="truncated"),
    pytest.param(lambda path, _: path.write_bytes(path.read_bytes()[:2]), "truncated", id="two bytes"),
    pytest.param(lambda path, _: path.write_bytes(b""), "truncated", id="no bytes"),
    pytest.param(lambda path, _: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)), "truncated", id="a picture"),
    pytest.param(lambda path, _: path.write_bytes(b"U"), "truncated", id="one letter"),
    pytest.param(lambda path, _: path.write_bytes(b"Jello, world"), "truncated", id="a short text"),
    pytest.param(lambda path, _: torch.save({"weights": torch.zeros(3)}, path), "not a policy", id="foreign"),
    pytest.param(lambda path, _: torch.save([1, 2], path), "not a policy", id="a list"),
    pytest.param(lambda path, other: path.write_bytes(other.read_bytes()), "not a policy", id="of another kind"),
])
def test_bad_policy_file_is_refused_in_one_line(finished, tmp_path, capsys, spoil, word):
    out = copied(finished, tmp_path / "copy", "policy.pt")
    spoil(out / "policy.pt", finished / "experts.pt")
    assert word in refused(capsys, "--threads", 1, "--evaluate", out)


def test_bad_checkpoint_of_a_run_is_refused_in_one_line(finished, tmp_path, capsys):
    out = copied(finished, tmp_path / "copy", "settings.json", "experts.pt")
    (out / "experts.pt").write_bytes((out / "experts.pt").read_bytes()[:3000])
    assert "experts.pt is truncated" in refused(capsys, *ARGUMENTS, "--out", out)


def test_more_rollouts_than_the_settings_allow_are_refused_in_one_line(finished, tmp_path, capsys):
    line = refused(capsys, "--threads", 1, "--evaluate", finished, "--rollouts", 10_001, "--out", tmp_path / "out")
    assert "10000" in line


def test_output_folder_that_is_a_file_is_refused(finished, tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    assert "taken" in refused(capsys, *ARGUMENTS, "--out", tmp_path / "taken")
    assert "taken" in refused(capsys, *ARGUMENTS, "--out", tmp_path / "taken" / "below")
    assert "taken" in refused(capsys, "--threads", 1, "--evaluate", finished, "--out", tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_output_folder_of_another_run_is_refused(finished, capsys):
    before = {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    line = refused(capsys, *ARGUMENTS, "--set=hidden=9", "--out", finished)
    assert "hidden" in line
    assert "seed" in refused(capsys, *ARGUMENTS, "--seed", 1, "--out", finished)
    assert "training run" in refused(capsys, "--threads", 1, "--evaluate", finished, "--out", finished)
    assert before == {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()}


# ---------------------------------------------------------------- the command line: files
def test_failed_write_leaves_the_old_file(tmp_path):
    """A writer that runs out of disk half-way: the old content stays, nothing is left beside it, one line says so."""
    path = tmp_path / "state.pt"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half of the new")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(run.UserError, match="No space left") as caught:
        run.write_atomically(path, write)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@contextlib.contextmanager
def file_size_limit(size):
    """No file of this process can grow past `size` bytes: what a full disk does, with an error of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [100, 20_000, 400_000])
def test_checkpoint_that_does_not_fit_leaves_the_old_one(tmp_path, limit):
    """torch.save itself meets the full disk, wherever in the file (it then raises a RuntimeError)."""
    path = tmp_path / "policy.pt"
    run.save_checkpoint(path, "policy", Settings(), {"theta": torch.ones(3)})
    with file_size_limit(limit), pytest.raises(run.UserError) as caught:
        run.save_checkpoint(path, "policy", Settings(), {"theta": torch.zeros(100, 1000)})
    assert "\n" not in str(caught.value)
    assert torch.equal(run.load_checkpoint(path, "policy")["theta"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]


def test_run_on_a_full_disk_ends_in_one_line_and_goes_on_later(finished, tmp_path, capsys):
    """The experts' first checkpoint does not fit: exit code 2, one error line; with room the same command finishes."""
    out = tmp_path / "full"
    with file_size_limit(5_000):
        assert start(*ARGUMENTS, "--out", out) == 2
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: cannot write")]
    assert start(*ARGUMENTS, "--out", out) == 0
    assert {**result_of(out), "wall_seconds": 0} == {**result_of(finished), "wall_seconds": 0}


def test_json_never_holds_nan(tmp_path):
    with pytest.raises(ValueError):
        run.write_json(tmp_path / "result.json", {"return": float("nan")})
    assert not (tmp_path / "result.json").exists()
