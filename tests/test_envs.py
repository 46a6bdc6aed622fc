"""Tests of the environments: gymnasium's checker, recorded episodes, closed forms, bits.

Recorded episodes of the authors' experts are read from ../shared/reference; without that folder their tests are skipped.
"""
import math
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import envs
import sawyer
from conftest import HORIZON, PUSH, REFERENCE, push_north, random_actions, record
from envs import BatchEnv, SawyerPush, rollout, task_set


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
    for index, (name, _, _, joint_range, mass) in enumerate(sawyer.ARM):
        body = model.body(name).id
        assert model.body_mass[body] == pytest.approx(mass, rel=1e-9)
        assert model.body_jntnum[body] == 1 and model.jnt_bodyid[index] == body
        assert model.jnt_type[index] == envs.mujoco.mjtJoint.mjJNT_HINGE
        assert np.allclose(model.jnt_range[index], [float(x) for x in joint_range.split()])
    assert len(sawyer.ARM) == 7 and sum(m for *_, m in sawyer.ARM) == pytest.approx(17.08)
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
