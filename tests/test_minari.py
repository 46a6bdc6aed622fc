"""Tests of demonstrations in Minari's format: what is written, what is read, what is refused."""
import dataclasses
import re
import shutil

import gymnasium
import numpy as np
import pytest

import phases
import run
import tasks
from checkpoints import load_checkpoint, read_demonstrations, write_json
from envs import BatchEnv, rollout
from local_policies import make_demonstrations
from phases import Problem, load_experts
from settings import Settings
from tasks import task_set
from tasks.rendering import NoOpenGL
from tests.conftest import (
    ARGUMENTS,
    BUDGET,
    FRAGILE,
    PUSH,
    refused,
    replay,
    result_of,
    scripted_expert,
    start,
)
from tests.test_checkpoints import timeless
from tools import minari_export, minari_io
from tools.minari_io import read_minari

minari = pytest.importorskip("minari")
pytest.importorskip("h5py")

BOX = gymnasium.spaces.Box
OBSERVATIONS, ACTIONS = BOX(-np.inf, np.inf, (6,), np.float64), BOX(-1.0, 1.0, (3,), np.float32)
GOALS = np.array([[-0.05, 0.72], [0.05, 0.78]])
DEMOS = [*(argument for argument in ARGUMENTS
           if not re.search("training_tasks|aggregation", argument)), "--demos"]


@pytest.fixture(autouse=True)
def own_datasets(tmp_path, monkeypatch):
    """Datasets of a test stay in its folder."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setattr(phases, "draw_plot", lambda *_: None)


@pytest.fixture
def exported(finished):
    """The dataset of the tiny run on push."""
    assert minari_export.main([str(finished), "--threads", "1", "--id", "own/push-v0"]) == 0
    return minari.load_dataset("own/push-v0")


def write(buffers, dataset_id="other/push-v0", **changed):
    """A dataset of episodes, on push's spaces where they are not changed."""
    spaces = {"observation_space": OBSERVATIONS, "action_space": ACTIONS}
    with pytest.warns(UserWarning):
        return minari.create_dataset_from_buffers(dataset_id, buffers, **(spaces | changed))


def episode(goal, steps=50, seed=0, sizes=(6, 3), **changed):
    """An episode of random numbers; `changed` are infos, None: without that one."""
    rng = np.random.default_rng(seed)
    infos = {"task": np.tile(goal, (steps + 1, 1))} | changed
    return minari.data_collector.EpisodeBuffer(
        observations=rng.normal(size=(steps + 1, sizes[0])),
        actions=rng.uniform(-1, 1, (steps, sizes[1])).astype(np.float32),
        rewards=rng.normal(size=steps), terminations=np.zeros(steps, bool),
        truncations=np.arange(steps) == steps - 1,
        infos={name: value for name, value in infos.items() if value is not None})


def demonstrated(out, **changed):
    """(problem, demonstrations) of a run's first two phases, with the files that they leave."""
    settings = Settings(**(BUDGET | changed))
    write_json(out / "settings.json", dataclasses.asdict(settings))
    problem = Problem(settings, out, threads=1)
    return problem, problem.demonstrate(problem.train_experts())


def same(found, problem, made):
    """What was read back is what was made, its tasks in order."""
    order = np.lexsort(problem.tasks.T[::-1])
    assert np.array_equal(found[0], problem.tasks[order])
    for name, array in made.arrays().items():
        assert np.array_equal(getattr(found[1], name), array[order]), name


# ---------------------------------------------------------------- from a run, and back
def test_export_holds_whole_episodes_as_they_were_executed(finished, exported):
    """Its actions, played in the environment, give its observations and rewards, bit for bit."""
    goals, written, _ = read_demonstrations(finished / "demonstrations.npz", PUSH)
    experts = load_experts(load_checkpoint(finished / "experts.pt", "experts"))
    episodes, each = list(exported), BUDGET["demonstration_episodes"]
    actions = np.array([part.actions for part in episodes])
    assert actions.shape == (2 * each, 50, 3) and exported.total_steps == 50 * 2 * each
    assert np.abs(actions).max() == 1.0, "noise reached beyond, the environment clips"
    again = rollout(BatchEnv(2 * each), replay(actions), np.repeat(goals, each, axis=0))
    for j, part in enumerate(episodes):
        assert np.array_equal(part.observations, again["observations"][j])
        assert np.array_equal(part.rewards, again["rewards"][j])
        assert not part.terminations.any()
        assert np.flatnonzero(part.truncations).tolist() == [49]
        assert np.array_equal(part.infos["task"], [goals[j // each]] * 51)
        labels = part.infos["expert_action"]
        assert np.array_equal(labels[:-1], written.actions.reshape(2 * each, 50, 3)[j])
        mean = experts(np.repeat(part.observations[None], 2, 0), goals)[j // each]
        assert np.allclose(labels, mean, atol=1e-5), "also of the last observation"
    environment = exported.recover_environment()
    environment.reset(options={"task": goals[0]})
    assert environment.step(actions[0, 0])[1] == episodes[0].rewards[0]


def test_run_from_the_exported_set_equals_a_run_from_the_npz(finished, exported, tmp_path):
    sources = (finished / "demonstrations.npz", "own/push-v0")
    for source, out in zip(sources, ("npz", "minari")):
        assert start(*DEMOS, source, "--out", out) == 0
    assert timeless(tmp_path / "npz") == timeless(tmp_path / "minari")
    goals, expected = run.sorted_demonstrations(sources[0], "push")
    for folder in (tmp_path / "minari" / "own" / "push-v0", exported.storage.data_path):
        found = run.sorted_demonstrations(folder, "push")
        assert phases.same_demonstrations((goals, expected), found)


def test_images_and_hidden_states_come_back_bit_for_bit(tmp_path):
    try:
        problem, made = demonstrated(tmp_path, task="push-vision", expert_iterations=1,
                                     demonstration_episodes=2)
    except NoOpenGL as error:
        pytest.skip(str(error))
    assert made.images.shape == (2, 100, 48, 64, 3) and made.states.shape == (2, 100, 6)
    assert minari_export.main([str(tmp_path), "--threads", "1"]) == 0
    same(read_minari("gmps/push-vision/gmps-seed0-v0", problem.family), problem, made)


def test_early_ends_come_back_as_they_were():
    """Visited states, labels and mask. Nothing that follows an end is written."""
    goals = np.sort(task_set(PUSH, "train", 3), axis=0)
    settings = Settings(demonstration_episodes=3)
    made, episodes = make_demonstrations(BatchEnv(9, FRAGILE), scripted_expert, goals, settings)
    labels = made.actions.reshape(9, 50, 3)
    labels = np.concatenate([labels, labels[:, -1:]], axis=1)
    dataset = write(minari_export.episode_buffers(minari, episodes, labels,
                                                  np.repeat(goals, 3, axis=0)))
    steps = episodes["mask"].sum(1)
    assert len(set(steps)) > 2 and episodes["terminated"].any()
    for part, count, terminated in zip(dataset, steps, episodes["terminated"]):
        last = np.arange(1, count + 1) == count
        assert np.array_equal(part.terminations, last & terminated)
        assert np.array_equal(part.truncations, last & ~terminated)
        assert len(part.observations) == count + 1 == len(part.infos["expert_action"])
    found, read = read_minari("other/push-v0", FRAGILE)
    assert np.array_equal(found, goals) and np.array_equal(read.mask, made.mask)
    for name in ("observations", "actions"):
        assert np.array_equal(getattr(read, name)[made.mask], getattr(made, name)[made.mask])


def test_demonstrations_in_a_plain_gymnasium_environment_go_out_and_in(tmp_path, monkeypatch):
    """A family of a fork, scripted: gymnasium knows no id of it."""
    monkeypatch.setitem(tasks.TASKS, "point", "tests.point_task:CircleGoal")
    problem, made = demonstrated(tmp_path, task="point", experts="scripted", training_tasks=3)
    assert minari_export.main([str(tmp_path), "--threads", "1", "--id", "own/point-v0"]) == 0
    assert minari.load_dataset("own/point-v0").env_spec is None
    same(read_minari("own/point-v0", problem.family), problem, made)


@pytest.mark.parametrize("arguments, word", [
    ("{finished} --id nameless", "give one like"), ("{finished} --id a", "give one like"),
    ("{finished} --id own/push-v0", "first `minari delete own/push-v0`"),
    ("nowhere", "no settings.json"), ("{other}", "do not play its demonstrations again"),
    ("{without}", "experts.pt: name the folder"), ("{given}", "that it was given"),
    ("{finished} --threads 0", "--threads must be between"),
    ("{finished} --device x", "no device")])
def test_export_refuses_in_one_line_and_writes_nothing(finished, tmp_path, capsys, arguments, word):
    """`other` has changed labels, `without` no experts, `given` learned from a user's file."""
    write([episode(GOALS[0])], "own/push-v0")
    folders = {name: shutil.copytree(finished, tmp_path / name) for name in ("other", "without")}
    folders |= {"given": tmp_path / "given", "finished": finished}
    with np.load(finished / "demonstrations.npz") as data:
        changed = dict(data) | {"actions": np.nextafter(data["actions"], 0)}
    np.savez(folders["other"] / "demonstrations.npz", **changed)
    (folders["without"] / "experts.pt").unlink()
    folders["given"].mkdir()
    write_json(folders["given"] / "settings.json",
               dataclasses.asdict(Settings(experts="demonstrations")))
    capsys.readouterr()
    assert minari_export.main(["--threads", "1", *arguments.format(**folders).split()]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and word in lines[0]
    assert list(minari.list_local_datasets()) == ["own/push-v0"]


def test_export_that_fails_leaves_no_half_dataset(finished, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")
    monkeypatch.setattr(minari.dataset._storages.hdf5_storage.HDF5Storage, "update_episodes", full)
    assert minari_export.main([str(finished), "--threads", "1", "--id", "own/push-v0"]) == 2
    assert "No space left" in capsys.readouterr().err
    assert not (tmp_path / "minari" / "own" / "push-v0").exists()


# ---------------------------------------------------------------- from somebody else
def test_tasks_are_the_distinct_ones_and_short_ones_are_padded():
    """Three episodes of one task, one of them short, and one of another; in any order."""
    parts = [episode(GOALS[1], 30, 0), episode(GOALS[0], 20, 1), episode(GOALS[1], 50, 2),
             episode(GOALS[1], 1, 3)]
    labels = np.random.default_rng(9).uniform(-1, 1, (31, 3))
    parts[0].infos["expert_action"] = labels
    write(parts)
    goals, found = read_minari("other/push-v0", PUSH)
    assert np.array_equal(goals, GOALS) and found.observations.shape == (2, 150, 6)
    for task, own in enumerate(([parts[1]], [parts[0], parts[2], parts[3]])):
        seen, shown = found.observations[task], found.actions[task]
        mask, steps = found.mask[task], [len(part.rewards) for part in own]
        assert mask.sum() == sum(steps)
        assert np.array_equal(np.flatnonzero(mask), np.concatenate(
            [50 * k + np.arange(count) for k, count in enumerate(steps)]))
        assert np.array_equal(seen[mask], np.concatenate([p.observations[:-1] for p in own]))
        expected = [labels[:-1] if part is parts[0] else part.actions for part in own]
        assert np.array_equal(shown[mask], np.concatenate(expected))


def test_episodes_longer_than_the_horizon_are_kept():
    write([episode(goal, steps) for goal, steps in zip(GOALS, (70, 10))])
    found = read_minari("other/push-v0", PUSH)[1]
    assert found.mask.sum(1).tolist() == [70, 10] and found.mask.shape == (2, 70)


def one(**changed):
    return lambda: write([episode(GOALS[0]), episode(GOALS[1], **changed)])


def spaced(observations=OBSERVATIONS, actions=ACTIONS):
    sizes = observations.shape[0] if observations.shape else 6, actions.shape[0]
    return lambda: write([episode(goal, sizes=sizes) for goal in GOALS],
                         observation_space=observations, action_space=actions)


def on_the_door():
    env = gymnasium.make("gmps/SawyerDoor-v0")
    write([episode(goal) for goal in GOALS], env=env)


def cut_short():
    dataset = write([episode(goal) for goal in GOALS])
    path = dataset.storage.data_path / "main_data.hdf5"
    path.write_bytes(path.read_bytes()[:3000])


@pytest.mark.parametrize("make, word", [
    pytest.param(lambda: None, "minari download other/push-v0", id="missing"),
    pytest.param(cut_short, "damaged", id="truncated"),
    pytest.param(lambda: write([]), "holds no episodes", id="empty"),
    pytest.param(one(task=None), 'episode 1 lacks "task"', id="no task"),
    pytest.param(lambda: write([episode(GOALS[0]), episode(GOALS[0], 20)]), "two at least",
                 id="one task"),
    pytest.param(one(task=np.full((51, 1), 0.5)), "shape (n, 2)", id="the door's task"),
    pytest.param(one(task=np.full((51, 2), 9.0)), "out of range", id="task out of range"),
    pytest.param(one(task=np.full((51, 2), np.nan)), "must be finite", id="task NaN"),
    pytest.param(one(task=np.linspace(*GOALS, 51)), "episode 1 changes its task", id="two tasks"),
    pytest.param(one(task=np.tile(GOALS[0], (50, 1))), "50 steps and 50 task", id="a task short"),
    pytest.param(one(expert_action=np.zeros((50, 3))), "steps and 50 actions", id="a label short"),
    pytest.param(one(expert_action=np.full((51, 3), 1.1)), "beyond [-1, 1]", id="labels too large"),
    pytest.param(one(expert_action=np.zeros((51, 2))), "actions have different shapes",
                 id="labels of another size"),
    pytest.param(spaced(BOX(-1, 1, (7,), np.float64)), "observations have shape (7,), those of "
                 "push (6,)", id="observation size"),
    pytest.param(spaced(gymnasium.spaces.Dict(hand=OBSERVATIONS)), "shape {'hand'", id="a dict"),
    pytest.param(spaced(actions=BOX(-1, 1, (4,))), "actions have shape (4,)", id="action size"),
    pytest.param(spaced(actions=BOX(-2, 2, (3,))), "from -2 to 2, not", id="action range"),
    pytest.param(spaced(actions=gymnasium.spaces.MultiDiscrete([3, 3, 3])), "no real numbers",
                 id="discrete actions"),
    pytest.param(on_the_door, "recorded on gmps/SawyerDoor-v0", id="another environment")])
def test_dataset_that_does_not_fit_is_refused_in_one_line(capsys, make, word):
    make()
    line = refused(capsys, *DEMOS, "other/push-v0", "--out", "out")
    assert word in line and "other/push-v0" in line


def test_what_is_no_dataset_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "empty: No data found" in refused(capsys, *DEMOS, "empty")
    assert "no demonstrations file typo" in refused(capsys, *DEMOS, "typo")
    write([episode(goal) for goal in GOALS])
    assert "hand" in refused(capsys, "--task", "push-vision", "--quick", "--demos", "other/push-v0")


# ---------------------------------------------------------------- Minari's own collector
def record(family, goals, policy, episodes, dataset_id):
    """A dataset by Minari's collector: `policy(observation, goal)` in the registered environment.
    """
    pytest.importorskip("jax")  # Minari's collector needs it
    env = minari.DataCollector(gymnasium.make(minari_io.env_id(family)), record_infos=True)
    for goal in np.repeat(goals, episodes, axis=0):
        observation, _ = env.reset(seed=0, options={"task": goal})
        ended = False
        while not ended:
            observation, _, terminated, truncated, _ = env.step(policy(observation, goal))
            ended = terminated or truncated
    with pytest.warns(UserWarning):
        env.create_dataset(dataset_id)
    env.close()


def test_recording_by_minaris_collector_is_read_with_its_own_actions():
    rng = np.random.default_rng(0)
    played = rng.uniform(-1, 1, (100, 3)).astype(np.float32)
    steps = iter(played)
    record(PUSH, GOALS, lambda *_: next(steps), 1, "other/push-v0")
    goals, found = read_minari("other/push-v0", PUSH)
    again = rollout(BatchEnv(2), replay(played.reshape(2, 50, 3)), GOALS)
    assert np.array_equal(goals, GOALS) and found.mask.all()
    assert np.array_equal(found.actions, played.reshape(2, 50, 3))
    assert np.array_equal(found.observations, again["observations"][:, :-1])


class ToldTheGoal(gymnasium.Wrapper):
    """Push for another library's learner: scaled observations end with the goal."""

    def __init__(self):
        super().__init__(gymnasium.make("gmps/SawyerPush-v0"))
        self.observation_space = BOX(-np.inf, np.inf, (8,), np.float64)

    @staticmethod
    def told(observation, goal):
        return np.concatenate([(observation - PUSH.observation_centre) / PUSH.observation_scale,
                               (goal - [0.0, 0.75]) / [0.1, 0.05]])

    def reset(self, **options):
        observation, info = self.env.reset(**options)
        return self.told(observation, info["task"]), info

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self.told(observation, info["task"]), 0.1 * reward, terminated, truncated, info


@pytest.mark.slow
def test_policy_of_another_library_teaches_push(tmp_path):
    """Stable-baselines3's SAC, told the goal, is recorded in plain push; its actions are labels.

    It stops about 7 cm from its goals. Who learns from it adapts to goals that neither has seen.
    """
    sb3 = pytest.importorskip("stable_baselines3")
    model = sb3.SAC("MlpPolicy", ToldTheGoal(), seed=0, learning_rate=2e-3, tau=0.02, gamma=0.95,
                    buffer_size=12_000, learning_starts=500, batch_size=128,
                    train_freq=(1, "episode"), gradient_steps=50, ent_coef="auto_0.1",
                    policy_kwargs={"net_arch": [64, 64]}, device="cpu").learn(12_000)

    def policy(observation, goal):
        return model.predict(ToldTheGoal.told(observation, goal))[0]
    record(PUSH, task_set(PUSH, "train", 20), policy, 3, "sb3/push-v0")
    assert start("--demos", "sb3/push-v0", "--threads", 1, "--set=meta_steps=300",
                 "--set=curve=0", "--out", "out") == 0
    result = result_of(tmp_path / "out")
    assert result["settings"]["training_tasks"] == 20 and result["env_steps"]["experts"] == 0
    before, after = (np.mean([row["final_distance"] for row in result["held_out"]
                              if row["gradient_steps"] == k]) for k in (0, 3))
    assert after < 0.1 and after < 0.9 * before
