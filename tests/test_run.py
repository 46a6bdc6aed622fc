"""Tests of whole runs: what they write and count, the curve, methods, demonstrations, many runs."""
import csv
import dataclasses
import io
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import baselines
import checkpoints
import gmps
import phases
import policy
import run
from checkpoints import load_checkpoint, read_demonstrations
from envs import BatchEnv, Environments, rollout
from evaluate import evaluate
from settings import Settings
from tasks import TASKS, make_family, task_set
from tests.conftest import ARGUMENTS, PUSH, reference_forward, refused, result_of, start
from tests.test_checkpoints import EVALUATE, stopped, timeless

PHASES = {"experts", "meta_training", "curve", "evaluation"}
LISTS = ("held_out", "held_out_sampled", "experts_held_out", "experts_training", "no_adaptation")
EXPERT_STEPS = 50 * 2 * (2 * 8 + 3)  # tasks x (episodes x iterations + demonstrations)
CURVE_STEPS = 50 * 10 * (4 + 3 * 3)  # of a point: mean actions in 4 rounds, and 3 explored


@pytest.fixture(autouse=True)
def no_plots(finished, monkeypatch):
    """`finished` alone has one: they take a third of a second."""
    monkeypatch.setattr(phases, "draw_plot", lambda *_: None)


# ---------------------------------------------------------------- what a run writes and counts
def test_result_has_the_agreed_keys(finished):
    result = result_of(finished)
    assert set(result) == {"task", "method", "seed", "commit", "commits", "env_steps", "curve",
                           "wall_seconds", "divergences", "device", "machine", "settings",
                           *LISTS}
    assert [result[key] for key in ("task", "method", "seed", "device")] == [
        "push", "gmps", 0, "cpu"]
    assert re.fullmatch("unknown|[0-9a-f]{40}(-dirty)?", result["commit"])
    assert result["commits"] == {phase: [result["commit"]] for phase in PHASES}
    assert set(result["wall_seconds"]) == PHASES and min(result["wall_seconds"].values()) > 0
    assert set(result["divergences"].values()) == {0}
    tasks = task_set(PUSH, "held_out", 2).tolist()
    for name in LISTS[:2]:
        assert [(row["gradient_steps"], row["adaptation_episodes"], row["task"])
                for row in result[name]] == [(k, 3 * k, task) for k in range(6) for task in tasks]
    for name in ("experts_held_out", "no_adaptation"):
        assert [row["task"] for row in result[name]] == tasks
    for row in (row for name in LISTS for row in result[name]):
        assert math.isfinite(row["return"])
        assert row["success"] is (row["final_distance"] <= 0.05)


def test_environment_steps_are_counted_exactly(finished):
    assert result_of(finished)["env_steps"] == {
        "experts": EXPERT_STEPS, "curve": CURVE_STEPS,
        "meta_training": 50 * 2 * 3 * (3 + 1),  # x collections x (episodes + aggregation)
        "evaluation": 50 * 2 * (6 * (1 + 3) + 1 + 2)}  # also no adaptation, and experts twice


def agree(entries, act, tasks):
    """Rows of result.json, and rollouts of our own."""
    episodes = rollout(BatchEnv(len(tasks), threads=1), act, tasks)
    assert [row["task"] for row in entries] == tasks.tolist()
    assert np.allclose([row["return"] for row in entries], episodes["rewards"].sum(1), atol=1e-3)
    assert np.allclose([row["final_distance"] for row in entries], episodes["distances"][:, -1],
                       atol=1e-4)


def test_results_of_a_run_are_those_of_its_policy_file(finished):
    """Mean actions before adaptation and without it, by a policy of our own."""
    saved = torch.load(finished / "policy.pt", weights_only=True)["policy"]
    assert not torch.equal(saved["theta"]["w1"], saved["no_adaptation"]["w1"])
    for name, entries in (("theta", "held_out"), ("no_adaptation", "no_adaptation")):
        phi = {key: value[0].double().numpy()
               for key, value in policy.per_task(saved[name], 1).items()}

        def act(observation, last, phi=phi):
            return reference_forward(phi, (observation - PUSH.observation_centre) / 0.1)[0]
        agree(result_of(finished)[entries][:2], act, task_set(PUSH, "held_out", 2))


def test_experts_and_demonstrations_of_a_run_belong_to_its_training_tasks(finished):
    """Both in the order of the training set: the experts' level, and the labels in the file."""
    experts = phases.load_experts(load_checkpoint(finished / "experts.pt", "experts"))
    wanted = task_set(PUSH, "train", 2)
    agree(result_of(finished)["experts_training"],
          lambda observation, last: experts(observation[:, None], wanted)[:, 0], wanted)
    tasks, given, env_steps = read_demonstrations(finished / "demonstrations.npz", PUSH)
    assert np.array_equal(tasks, wanted) and env_steps == 50 * 2 * 3 == given.mask.sum()
    assert np.allclose(experts(given.observations, tasks), given.actions, atol=1e-6)
    assert not np.allclose(experts(given.observations, tasks[::-1]), given.actions, atol=1e-6)


def test_metrics_file_has_a_row_per_iteration(finished):
    rows = list(csv.DictReader((finished / "metrics.csv").open()))
    assert set(checkpoints.COLUMNS) <= set(rows[0])
    assert [(row["phase"], int(row["iteration"]), int(row["env_steps"])) for row in rows] == [
        *(("experts", k, 200 * k) for k in range(1, 9)),
        *(("meta_training", k, 400 * k) for k in range(1, 4))]
    own = {"experts": {"temperature", "critic_loss", "policy_loss", "value"},
           "meta_training": {"adapted_return", "adapted_distance", "imitation_0", "imitation_1",
                             "gradient_norm", "weight_mean", "weight_max"}}
    for row in rows:
        numbers = {name: float(value) for name, value in row.items() if value and name != "phase"}
        assert set(numbers) == own[row["phase"]] | {"iteration", "env_steps", "return", "distance",
                                                    "divergences"}
        assert np.isfinite([*numbers.values()]).all() and row["divergences"] == "0"


def test_finished_run_started_again_changes_nothing(finished):
    before, result = {path: path.read_bytes() for path in finished.iterdir()}, timeless(finished)
    assert start(*ARGUMENTS, "--out", finished) == 0 and timeless(finished) == result
    after = {path: path.read_bytes() for path in finished.iterdir()}
    assert before | {finished / "result.json": 0} == after | {finished / "result.json": 0}


def test_every_phase_names_the_commits_of_its_code(finished, tmp_path, monkeypatch):
    """Meta-training is repeated with other code, then the evaluation alone with a third."""
    out, first = shutil.copytree(finished, tmp_path / "copy"), result_of(finished)["commit"]
    (out / "policy.pt").unlink()
    wanted = {phase: ["second"] for phase in PHASES} | {"experts": [first]}
    for now in ("second", "third"):
        monkeypatch.setattr(checkpoints, "commit", lambda now=now: now)
        assert start(*ARGUMENTS, "--out", out) == 0
        assert result_of(out)["commits"] == wanted | {"evaluation": [now]}


def test_journal_counts_what_a_phase_adds(tmp_path, monkeypatch):
    """Each commit once, the divergences of all rows, and seconds of the innermost phase."""
    journal, clock = checkpoints.Journal(tmp_path, Settings()), iter(range(0, 100, 10))
    monkeypatch.setattr(checkpoints.time, "perf_counter", lambda: next(clock))
    for now in ("first", "second", "second"):
        monkeypatch.setattr(checkpoints, "commit", lambda now=now: now)
        with journal.timing("experts"):
            journal.note("experts", {"env_steps": 5, "divergences": 2})
    with journal.timing("meta_training"), journal.timing("curve"):
        pass
    assert journal.commits["experts"] == ["first", "second"]
    assert journal.divergences == {"experts": 6}
    assert journal.env_steps == {"experts": 5, "meta_training": 0}
    assert journal.wall_seconds == {"experts": 30, "meta_training": 20, "curve": 10}


# ---------------------------------------------------------------- the curve
@pytest.mark.parametrize("points, collections", [(0, []), (20, [1, 2, 3])])
def test_curve_follows_training_and_changes_nothing(finished, tmp_path, points, collections):
    """Rows per collection and number of test episodes, also when a run is killed in its third
    point. `finished` has one point, at the end."""
    out, command = tmp_path / "out", [*ARGUMENTS, f"--set=curve={points}", "--out"]
    if points:
        with stopped("phases", "curve_points", 3, *command, out):
            assert (out / "policy_partial.pt").exists()
    assert start(*command, out) == 0
    result, one = result_of(out), result_of(finished)
    for curve, measured in ((result["curve"], collections), (one["curve"], [3])):
        assert [(row["env_steps"], row["adaptation_episodes"]) for row in curve] == [
            (EXPERT_STEPS + 400 * k, episodes) for k in measured for episodes in (0, 3, 6, 9)]
    assert result["curve"][-4:] == one["curve"] * bool(points)
    assert result["env_steps"].pop("curve", None) == (3 * CURVE_STEPS if points else None)
    assert result["env_steps"] == {name: one["env_steps"][name] for name in PHASES - {"curve"}}
    assert [result[name] for name in LISTS] == [one[name] for name in LISTS]


def test_curve_has_at_most_so_many_points(tmp_path, monkeypatch):
    """Of five collections: all, those past each third, each half, the last, none."""
    measured = {points: [] for points in (20, 3, 2, 1, 0)}
    for points, iterations in measured.items():
        problem = phases.Problem(Settings(curve=points), tmp_path, threads=1)
        monkeypatch.setattr(problem, "_add_to_curve", iterations.append)
        for k in range(1, 6):
            problem.collected({}, {"iteration": k, "progress": k / 5, "env_steps": 0})
    assert list(measured.values()) == [[1, 2, 3, 4, 5], [2, 4, 5], [3, 5], [5], []]


def test_last_point_of_the_curve_is_that_of_the_policy_file(finished):
    family, adapter, _ = phases.load_adapter(finished)
    held_out = evaluate(Environments(family, 1), adapter, task_set(family, "validation", 10), 3, 3,
                        seed=0, purpose="curve", stream=3, explore_last=False).lists["held_out"]
    for k, row in enumerate(result_of(finished)["curve"]):
        for key in ("return", "final_distance", "success"):
            mean = np.mean([entry[key] for entry in held_out[10 * k:10 * (k + 1)]])
            assert row[key] == pytest.approx(mean, rel=1e-12)


# ---------------------------------------------------------------- --evaluate
def test_evaluation_of_given_goals(finished):
    """All as asked for; the same seed gives the same file twice, one in place of the other."""
    goals = np.array([[-0.35, 0.5], [0.35, 1.1], [0.0, 0.75]])  # off the training range
    np.save("goals.npy", goals)
    results = []
    for _ in range(2):
        assert start(*EVALUATE, finished, "--goals", "goals.npy", "--seed", 5, "--rollouts", 4,
                     "--gradient-steps", 2, "--out", "out") == 0
        results.append(timeless(Path("out")))
    one, trained = results[0], result_of(finished)
    assert results[1] == one and (one["seed"], one["trained_seed"], one["rollouts"]) == (5, 0, 4)
    assert [(row["adaptation_episodes"], row["task"]) for row in one["held_out"]] == [
        (4 * k, goal) for k in range(3) for goal in goals.tolist()]
    assert one["env_steps"] == trained["env_steps"] | {
        "evaluation": 50 * 3 * ((4 + 1) * 3 + 1 + 1)}
    assert one["commits"] == trained["commits"] and "experts_training" not in one


def test_extrapolation_writes_its_figure_and_every_band(tmp_path):
    ant, out = make_family("ant"), tmp_path / "evaluation"
    settings = Settings(**ant.settings | {"task": "ant", "hidden": 8})
    theta = policy.init_policy(ant, settings, torch.Generator().manual_seed(0))
    checkpoints.Journal(tmp_path, settings).save("policy.pt", "policy", {"policy": {
        "theta": theta, "alpha": gmps.init_step_sizes(theta, settings), "scale": 1.0,
        "no_adaptation": theta}})
    assert start(*EVALUATE, tmp_path, "--task", "ant", "--extrapolate", "--gradient-steps", 1,
                 "--rollouts", 2) == 0
    goals = np.concatenate([goals for _, goals in ant.bands()])
    assert np.allclose([row["task"] for row in result_of(out)["held_out"]], [*goals, *goals])
    assert (out / "extrapolation.png").stat().st_size > 10_000


# ---------------------------------------------------------------- other tasks, methods, devices
@pytest.mark.parametrize("task, horizon, size", [("ant", 200, 2), ("door", 100, 1)])
def test_other_tasks_run_from_start_to_end(tmp_path, task, horizon, size):
    """Counts by hand. The door's experts are scripted: only their demonstrations take steps."""
    less = ("expert_iterations=1", "collections=1", "test_episodes=2", "curve=0")
    assert start("--task", task, *ARGUMENTS, *(f"--set={setting}" for setting in less),
                 "--out", tmp_path / task) == 0
    result = result_of(tmp_path / task)
    wanted = {"experts": 3, "meta_training": 3 + 1, "evaluation": 6 * (1 + 2) + 3}
    for phase, episodes in wanted.items():
        steps = 2 * horizon * (episodes + 2 * (phase == "experts" and task == "ant"))
        assert result["env_steps"][phase] <= steps, "early ends save steps"
        assert result["env_steps"][phase] == steps or task == "ant"
    assert len(result["experts_held_out"]) == 2 and len(result["held_out"][0]["task"]) == size


def test_multitask_runs_goes_on_after_a_kill_and_is_evaluated(tmp_path):
    """In its own folder, with its own setting; imitation takes no steps of meta-training."""
    command = [*ARGUMENTS, "--method", "multitask", "--set", "step_size=0.5"]
    folder, killed = Path("runs/push/multitask/seed0_quick"), tmp_path / "killed"
    with stopped("baselines.multitask", "imitate", 1, *command, "--out", killed):
        assert (killed / "demonstrations.npz").exists()
    assert start(*command) == start(*command, "--out", killed) == 0
    assert timeless(folder) == timeless(killed)
    assert load_checkpoint(folder / "policy.pt", "policy")["settings"].step_size == 0.5
    assert start(*EVALUATE, folder, "--gradient-steps", 1, "--rollouts", 2) == 0
    for out, steps in ((folder, 6 * (3 + 1) + 1 + 1), (folder / "evaluation", 2 * (2 + 1) + 1)):
        result = result_of(out)
        assert result["method"] == "multitask" and result["no_adaptation"] == []
        assert result["env_steps"] == {"experts": EXPERT_STEPS, "meta_training": 0,
                                       "curve": CURVE_STEPS, "evaluation": 50 * 2 * steps}
        means = [row["return"] for row in result["held_out"]]
        assert means[:2] != means[2:4], "it adapts"
    assert {row["env_steps"] for row in result_of(folder)["curve"]} == {EXPERT_STEPS}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
def test_run_on_cuda_is_evaluated_without(tmp_path):
    out = tmp_path / "out"
    assert start(*ARGUMENTS, "--device", "cuda", "--out", out) == start(*EVALUATE, out) == 0
    result, again = result_of(out), result_of(out / "evaluation")
    assert (result["device"], again["device"]) == ("cuda", "cpu")
    for k in (0, 1):  # round 0 owes nothing to chance
        assert result["held_out"][k]["return"] == pytest.approx(again["held_out"][k]["return"],
                                                                abs=0.1)


# ---------------------------------------------------------------- the user's demonstrations
def test_run_from_the_users_demonstrations_asks_no_expert(finished, tmp_path, capsys):
    """No experts' steps, no aggregation; a folder goes on with its own demonstrations only."""
    out, arguments = tmp_path / "out", [argument for argument in ARGUMENTS if not re.search(
        "training_tasks|aggregation", argument)]
    command = [*arguments, "--out", out, "--demos"]
    assert start(*command, finished / "demonstrations.npz") == 0
    result = timeless(out)
    assert result["method"] == "gmps-demos" and not (out / "experts.pt").exists()
    assert result["env_steps"]["experts"] == 0 == result_of(out)["wall_seconds"]["experts"]
    assert result["env_steps"]["meta_training"] == 50 * 2 * 3 * 3
    assert result["experts_held_out"] == [] == result["experts_training"]
    with np.load(finished / "demonstrations.npz") as data:
        np.savez("other.npz", **(dict(data) | {"actions": 0.5 * data["actions"]}))
    assert "other demonstrations" in refused(capsys, *command, "other.npz")
    for setting in ("training_tasks=9", "aggregation_episodes=2"):
        assert "--demos" in refused(capsys, *command, "other.npz", "--set", setting)
    for method in ("maml", "rl2", "pearl", "scratch"):
        assert "reward alone" in refused(capsys, *command, "other.npz", "--method", method)
    assert start(*command, finished / "demonstrations.npz") == 0 and timeless(out) == result


def test_users_demonstrations_are_sorted_by_task(monkeypatch):
    """The last `pre_update_tasks` must be the door's widest angles; their share is kept."""
    rng, begun = np.random.default_rng(0), []
    demos = dict(tasks=np.array([[0.9], [0.1], [0.5], [0.3]]),
                 observations=rng.normal(size=(4, 5, 6)), actions=rng.uniform(-1, 1, (4, 5, 3)))
    np.savez("demos.npz", **demos)
    monkeypatch.setattr(run, "train_one", begun.append)
    assert run.main(["--task", "door", "--demos", "demos.npz"]) == 0
    assert begun[0].tasks[:, 0].tolist() == [0.1, 0.3, 0.5, 0.9]
    for name in ("observations", "actions"):
        assert np.array_equal(getattr(begun[0].demos[1], name), demos[name][[1, 3, 2, 0]])
    assert begun[0].settings.pre_update_tasks == round(4 * 14 / 24)


# ---------------------------------------------------------------- the command line
@pytest.mark.parametrize("arguments, folder", [
    ([], "gmps/seed0"), (["--quick", "--seed", "3"], "gmps/seed3_quick"),
    (["--experts", "local"], "gmps-local/seed0"), (["--demos", "demos.npz"], "gmps-demos/seed0"),
    (["--reward", "sparse"], "gmps-sparse/seed0"), (["--method", "multitask"], "multitask/seed0")])
def test_default_folder_names_method_variant_and_seed(finished, monkeypatch, arguments, folder):
    begun = []
    monkeypatch.setattr(run, "train_one", begun.append)
    shutil.copy(finished / "demonstrations.npz", "demos.npz")
    assert run.main(arguments) == 0 and begun[0].out == Path("runs/push") / folder


def test_all_tasks_and_seeds_run_one_after_the_other_and_finished_ones_are_left_alone(
        tmp_path, monkeypatch):
    begun = []

    def only_finish(problem):
        begun.append((problem.settings.task, problem.settings.seed))
        (problem.out / "result.json").write_text("{}")
        if len(begun) == 3:
            raise KeyboardInterrupt
    monkeypatch.setattr(run, "train_one", only_finish)
    monkeypatch.setattr(run, "Camera", lambda family: io.BytesIO())
    arguments = ["--task", "all", "--seeds", "2", "--quick", "--out", str(tmp_path)]
    assert [run.main(arguments), run.main(arguments)] == [130, 0]
    assert begun == [(task, seed) for task in TASKS for seed in (0, 1)]
    assert (tmp_path / "door" / "seed1" / "settings.json").exists()


@pytest.mark.parametrize("method", baselines.METHODS)
def test_help_lists_every_setting_of_the_method(capsys, method):
    with pytest.raises(SystemExit, match="0"):
        run.main(["--method", method, "--help"])
    text = capsys.readouterr().out
    for spec in dataclasses.fields(baselines.load(method).Settings):
        assert f" {spec.name}={spec.default} " in text
    assert (" step_size=" in text) == (method in ("multitask", "scratch"))
