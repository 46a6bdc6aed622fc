"""Tests of families, environments and rollouts: the checker, closed forms, bits."""
import math
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from envs import BatchEnv, Environments, SingleEnv, make_batch, rollout
from tasks import TASKS, make_family, sawyer, task_set
from tasks.base import GymnasiumFamily, MujocoFamily
from tasks.rendering import NoOpenGL
from tasks.sawyer_push import SawyerPush
from tests.conftest import HORIZON, PUSH, push_north, record, replay

IDS = {"push": "gmps/SawyerPush-v0", "ant": "gmps/AntGoal-v0", "door": "gmps/SawyerDoor-v0",
       "push-vision": "gmps/SawyerPushVision-v0"}
LOW, HIGH = np.array([-0.1, 0.7]), np.array([0.1, 0.8])


def busy(family, tasks):
    """A policy under which bodies touch: pushes, a door that opens, an ant whose feet strike."""
    if family.expert is not None:
        return lambda observation, last: family.expert(observation[:, None], tasks)[:, 0]
    held = np.random.default_rng(0).uniform(
        -1, 1, (len(tasks), family.horizon // 10, family.action_size))
    if family.name == "push":
        held = 0.3 * held + [0, 0.7, 0]
    return replay(np.repeat(held, 10, axis=1))


# ---------------------------------------------------------------- families
@pytest.mark.parametrize("missing", ["task_low", "success_distance", "outcome", "goal_position"])
def test_an_incomplete_family_is_refused_in_one_line_that_names_what_it_lacks(missing, monkeypatch):
    """Two required attributes, two abstract methods. The same class with all of them is taken."""
    parts = {name: value for part in (sawyer.SawyerFamily, SawyerPush)
             for name, value in vars(part).items() if not name.startswith("_")}
    monkeypatch.setitem(TASKS, "mine", f"{__name__}:Mine")
    monkeypatch.setitem(globals(), "Mine", type("Mine", (MujocoFamily,), dict(parts)))
    assert make_family("mine").horizon == HORIZON
    del parts[missing]
    monkeypatch.setitem(globals(), "Mine", type("Mine", (MujocoFamily,), parts))
    with pytest.raises((TypeError, ValueError), match=f"Mine.*{missing}") as caught:
        make_family("mine")
    assert "\n" not in str(caught.value)


def test_unknown_tasks_and_rewards_are_refused():
    with pytest.raises(ValueError, match="^unknown task 'pull': .*push, ant, door, push-vision$"):
        make_family("pull")
    with pytest.raises(ValueError, match="door has no dense reward"):
        make_family("door", "dense")


def test_import_registers_the_families_and_their_usual_reward_is_the_first():
    ids = {name for name in gymnasium.registry if name.startswith("gmps/")}
    assert ids == set(IDS.values()) and list(TASKS) == list(IDS)
    usual = {"push": "dense", "ant": "dense", "door": "sparse", "push-vision": "dense"}
    for name, reward in usual.items():
        assert make_family(name).reward == make_family(name).rewards[0] == reward
        assert make_family(name).name == name and make_family(name).expert_family.reward == reward
    assert make_family("push", "sparse").reward == "sparse"


@pytest.mark.parametrize("name", IDS)
def test_gymnasium_checker_finds_nothing(name):
    """check_env passes with every warning an error. An unbounded observation is no fault."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*(minimum|maximum) value is (-)?infinity.*")
        try:
            check_env(gymnasium.make(IDS[name]).unwrapped)
            batch = gymnasium.make_vec(IDS[name], num_envs=3).unwrapped
        except NoOpenGL as error:
            pytest.skip(str(error))
    assert isinstance(batch, BatchEnv) and (batch.num_envs, batch.family.name) == (3, name)


@pytest.mark.parametrize("name, sizes, start", [
    ("push", (6, 3, 2, 6, 50), [0, 0.4, 0.05, 0, 0.52, 0.02]),
    ("ant", (38, 8, 2, 3, 200),
     [0, 0, 0.55, 1, 0, 0, 0, *(0, 1, 0, -1, 0, -1, 0, 1), *14 * [0], 1, 0, 0, 0, 1, 0, 0, 0, 1]),
    ("door", (6, 3, 1, 2, 100), [0, 0.4, 0.1, -0.1, 0.9, 0.3])])
def test_sizes_and_start_are_the_documented_ones(name, sizes, start):
    env = BatchEnv(4, name)
    observation, _ = env.reset(seed=0)
    shown = observation, env.action_space.high, env.tasks, env.outcomes
    assert sizes == (*(part.shape[1] for part in shown), env.family.horizon)
    family = env.family
    assert sizes[:4] == (family.observation_size, family.action_size, family.task_size,
                         family.outcome_size)
    assert observation.shape == env.observation_space.shape and (env.action_space.high == 1).all()
    assert np.abs(observation - start).max() < 2e-3 and (observation == observation[0]).all()


# ---------------------------------------------------------------- tasks
@pytest.mark.parametrize("name, good, bad", [
    ("push", [0.05, 0.72], [
        np.zeros(3), np.zeros((2, 2)), np.zeros((4, 2)), np.zeros((1, 3, 2)), np.zeros((0, 2)),
        [np.nan, 0.7], [[0, 0.7], [0, 0.7], [0, np.inf]], ["a", "b"], [0, 0.7 + 0j],
        [0.41, 0.8], [-0.41, 0.8], [0.0, 0.39], [0.0, 1.21]]),
    ("door", [0.5], [[-0.1], [1.1], [0.1, 0.2]])])
def test_task_options(name, good, bad):
    """One task for all, or one each. Anything else is refused in one line."""
    env = BatchEnv(3, name)
    env.reset(options={"task": good})
    assert np.array_equal(env.tasks, [good] * 3)
    tasks = task_set(env.family, "validation", 3)
    env.reset(options={"task": tasks})
    assert np.array_equal(env.tasks, tasks)
    for task in bad:
        with pytest.raises(ValueError) as caught:
            env.reset(options={"task": task})
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="3 rows for 1"):
        SingleEnv(name).reset(options={"task": tasks})


@pytest.mark.parametrize("name, low, high", [("push", LOW, HIGH), ("door", 0, math.pi / 3)])
def test_tasks_without_option_are_drawn_from_the_training_distribution(name, low, high):
    """Uniform: mean and variance of 400 draws, within four standard errors. The seed fixes them."""
    env, drawn = BatchEnv(400, name), []
    for seed in (5, 6, 5):
        env.reset(seed=seed)
        drawn.append(env.tasks)
    assert np.array_equal(drawn[0], drawn[2]) and (drawn[0] != drawn[1]).all()
    unit = (env.tasks - low) / (high - low)
    assert (unit >= 0).all() and (unit <= 1).all()
    assert np.abs(unit.mean(0) - 0.5).max() < 4 / math.sqrt(12 * 400)
    assert np.abs(unit.var(0) - 1 / 12).max() < 4 * math.sqrt(1 / 180 / 400)


def test_task_sets_are_fixed_disjoint_in_range_and_goals_to_train_on_leave_no_hole():
    """No point of the range is 3.4 cm away from all of the first 20 training goals."""
    sets = {split: task_set(PUSH, split, 200) for split in ("train", "validation", "held_out")}
    everything = np.concatenate(list(sets.values()))
    assert everything.shape == np.unique(everything, axis=0).shape == (600, 2)
    assert (everything >= LOW).all() and (everything <= HIGH).all()
    for split, tasks in sets.items():
        assert np.array_equal(task_set(PUSH, split, 20), tasks[:20]), "a part is the start"
    x, y = np.meshgrid(*np.linspace(LOW, HIGH, 81).T)
    train = sets["train"][:20].T
    assert np.hypot(x[..., None] - train[0], y[..., None] - train[1]).min(-1).max() < 0.0335


# ---------------------------------------------------------------- episodes
@pytest.mark.parametrize("name", ["push", "ant", "door"])
def test_rollouts_are_what_one_environment_steps_by_hand_bit_for_bit(name):
    """Neither threads nor the rest of the batch matter. The task shows in rewards alone."""
    family = make_family(name)
    tasks, T = task_set(family, "validation", 5), family.horizon
    whole = rollout(BatchEnv(5, family, 2), busy(family, tasks), tasks)
    assert {key: value.shape for key, value in whole.items()} == {
        "observations": (5, T + 1, family.observation_size), "actions": (5, T, family.action_size),
        "rewards": (5, T), "distances": (5, T), "outcomes": (5, T, family.outcome_size),
        "mask": (5, T), "terminated": (5,), "diverged": (5,)}
    assert whole["mask"].all() and not (whole["terminated"] | whole["diverged"]).any()
    assert (np.ptp(whole["outcomes"][..., :2], axis=1).max(1) > 0.01).all(), "all of them move"
    for rows in (slice(5), slice(2, 4)):
        env = BatchEnv(len(tasks[rows]), family, threads=1)
        part = rollout(env, replay(whole["actions"][rows]), tasks[rows])
        assert all(np.array_equal(part[key], whole[key][rows]) for key in whole)
    other = rollout(BatchEnv(5, family, 1), replay(whole["actions"]), np.roll(tasks, 1, axis=0))
    assert np.array_equal(other["observations"], whole["observations"])
    assert (other["rewards"] != whole["rewards"]).any(1).all()
    alone = SingleEnv(family)
    for row in (0, 4):
        first, begun = alone.reset(options={"task": tasks[row]})
        observations, rewards, terminated, truncated, infos = zip(
            *map(alone.step, whole["actions"][row]))
        assert np.array_equal([first, *observations], whole["observations"][row])
        assert np.array_equal(rewards, whole["rewards"][row])
        assert np.array_equal([info["goal_distance"] for info in infos], whole["distances"][row])
        assert np.array_equal([info["task"] for info in (begun, *infos)], [tasks[row]] * (T + 1))
        assert not any(terminated) and truncated == (False,) * (T - 1) + (True,)
        assert not np.array_equal(alone.step(0 * whole["actions"][0, 0])[0], first), "goes on"


def test_full_action_moves_the_hand_one_centimetre():
    """30 steps of action 1 along z: target and hand go up 0.3 m. Larger actions count as 1."""
    env = BatchEnv(1, threads=1)
    actions = np.zeros((HORIZON, 1, 3))
    actions[:30, :, 2] = 1.0
    observations, rewards = record(env, actions, np.array([0, 0.75]))
    assert np.allclose(env.control[0] - PUSH.hand_start, [0, 0, 0.3], atol=1e-12)
    assert np.allclose(observations[-1, 0, :3] - observations[0, 0, :3], [0, 0, 0.3], atol=0.01)
    assert observations[1, 0, 2] > observations[0, 0, 2] + 0.005, "at once"
    assert np.array_equal(rewards, record(env, 5 * actions, np.array([0, 0.75]))[1])


def test_next_step_autoreset():
    """The step after the last gives the start, reward 0, no end flags and a new goal."""
    env, actions = BatchEnv(2, threads=1), push_north(num_envs=2)
    first = env.reset(seed=11)[0]
    goals = env.tasks.copy()
    for action in actions:
        last, _, terminated, truncated, _ = env.step(action)
    assert truncated.all() and not terminated.any() and np.array_equal(env.tasks, goals)
    observation, *flags, _ = env.step(np.ones((2, 3)))
    assert np.array_equal(observation, first) and not np.array_equal(last, first)
    assert not np.any(flags) and not env.steps.any() and (env.tasks != goals).any()
    second = np.array([env.step(action)[0] for action in actions])
    assert np.array_equal(second, record(BatchEnv(2, threads=1), actions, goals)[0][1:])


def test_environments_order_rollouts_by_task_and_keep_batches_by_size():
    tasks, environments = task_set(PUSH, "validation", 2), Environments(PUSH, 1)
    episodes = environments.rollout(lambda observation, last: np.zeros((6, 3)), tasks, episodes=3)
    start = np.linalg.norm(tasks - PUSH.block_start[:2], axis=1)
    assert np.allclose(episodes["distances"][:, 0], np.repeat(start, 3), atol=1e-12)
    assert start[0] != start[1] and environments(6) is environments(6) is not environments(2)
    environments.close()
    assert not environments.batches


# ---------------------------------------------------------------- any gymnasium environment
class Point(gymnasium.Env):
    """A point in the plane, with random start and steps. x > 0.5 terminates, y > 0.5 truncates."""
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(-2, 2, (2,), np.float32)
    shown = ("goal_distance", "outcome")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.goal, self.place = options["task"], self.np_random.normal(0, 0.05, 2)
        return self.place.copy(), {}

    def step(self, action):
        self.place = self.place + 0.1 * action + self.np_random.normal(0, 0.01, 2)
        distance = np.linalg.norm(self.place - self.goal)
        info = {"goal_distance": distance, "outcome": self.place.copy()}
        return (self.place.copy(), -distance, *(bool(end) for end in self.place > 0.5),
                {name: info[name] for name in self.shown})


class PointFamily(GymnasiumFamily):
    name, horizon, success_distance = "point", 8, 0.1
    observation_size = action_size = task_size = outcome_size = 2
    task_low, task_high = np.full(2, -1.0), np.full(2, 1.0)

    def make_env(self, render_mode=None):
        return Point()


def test_a_gymnasium_family_rolls_out_as_stepped_by_hand():
    """Actions in [-1, 1] are stretched to the environment's [-2, 2].

    Row 1 terminates in its 3rd step. Row 2 is truncated in its 3rd; what autoreset begins in its
    place terminates, which is nobody's business. Policies are told the last rewards and who is
    alive, and see how an episode ended.
    """
    family, told, seen = PointFamily(), [], []
    tasks = family.sample_tasks(np.random.default_rng(0), 3)
    actions = np.random.default_rng(1).uniform(-0.5, 0.5, (3, 8, 2))
    actions[0, 2, 1] = -3.0  # beyond the range
    actions[1, :, 0] = actions[2, :3, 1] = actions[2, 3:, 0] = 1.0

    def policy(observation, last):
        told.append(last)
        seen.append(observation)
        return actions[:, len(told) - 1]
    batch = make_batch(family, 3)
    episodes = rollout(batch, policy, tasks)
    for j, end in enumerate((8, 3, 3)):
        env = Point()
        start, _ = env.reset(seed=j, options={"task": tasks[j]})
        steps = [env.step(2 * np.clip(action, -1, 1).astype(np.float32))
                 for action in actions[j, :end]]
        alive, held = np.arange(8) < end, np.minimum(np.arange(9), end)  # the last value stays
        places = np.array([start, *(step[0] for step in steps)])[held]
        distances = np.array([step[4]["goal_distance"] for step in steps])[held[1:] - 1]
        by_hand = {"observations": places, "outcomes": places[1:], "distances": distances,
                   "rewards": -distances * alive, "mask": alive, "actions": actions[j],
                   "terminated": j == 1, "diverged": False}
        for key, value in by_hand.items():
            assert np.array_equal(episodes[key][j], value), key
    assert told[0] is None and set(told[1]) == {"reward", "alive"}
    rewards, alive = (np.stack([last[key] for last in told[1:]], axis=1) for key in told[1])
    assert np.array_equal(rewards, episodes["rewards"][:, :-1])
    assert np.array_equal(alive, episodes["mask"][:, 1:])
    assert np.array_equal(np.stack(seen, axis=1), episodes["observations"][:, :-1])
    again = rollout(batch, replay(actions), tasks)
    assert all(np.array_equal(again[key], episodes[key]) for key in episodes)
    alone = rollout(make_batch(family, 1), replay(np.ones((1, 8, 2))), tasks[:1])
    assert alone["mask"].sum() == 3, "also where every environment is reset in the same step"


def test_gymnasium_families_that_do_not_fit_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="point is no MuJoCo family"):
        BatchEnv(1, PointFamily())
    monkeypatch.setattr(Point, "shown", ("outcome",))
    with pytest.raises(ValueError, match='"goal_distance"'):
        rollout(make_batch(PointFamily(), 2), replay(np.zeros((2, 8, 2))), np.zeros((2, 2)))


# ---------------------------------------------------------------- simulators that diverge
@pytest.mark.parametrize("value", [np.nan, 1e12])
@pytest.mark.parametrize("part", ["position", "velocity"])
def test_a_simulator_that_diverges_ends_its_own_episode(part, value):
    """Row 2 blows up in step 3: finite, counted, masked. The others keep their bits."""
    tasks, actions = task_set(PUSH, "validation", 4), push_north(num_envs=4)
    calm, wild = (BatchEnv(4, threads=1) for _ in range(2))
    steps = iter(enumerate(actions))

    def policy(observation, last):
        t, action = next(steps)
        if t == 3:
            wild.state[2, 1 + (0 if part == "position" else wild.model.nq) + 8] = value
        return action

    with pytest.warns(UserWarning, match="diverged in environments .2.; 1 so far"):
        spoilt = rollout(wild, policy, tasks)
    whole = rollout(calm, replay(actions.swapaxes(0, 1)), tasks)
    for key, values in spoilt.items():
        assert np.isfinite(values).all()
        assert np.array_equal(values[[0, 1, 3]], whole[key][[0, 1, 3]])
    for key in ("terminated", "diverged"):
        assert spoilt[key].tolist() == [False, False, True, False]
    assert spoilt["mask"][2].tolist() == [1] * 4 + [0] * 46 and not spoilt["rewards"][2, 4:].any()
    assert (spoilt["rewards"][2, :4] != 0).all() and not whole["diverged"].any()
    for key, last in (("observations", 4), ("distances", 3), ("outcomes", 3)):
        assert (spoilt[key][2, last:] == spoilt[key][2, last - 1]).all(), "the last good state"
    assert (wild.divergences, calm.divergences) == (1, 0)
    assert wild.steps.tolist() == [50, 50, 45, 50], "the ended episode began anew in the step after"
