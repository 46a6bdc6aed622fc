"""Tests of whole runs: what they write and count, resuming after kill -9, several at once, the README's line numbers."""
import io
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import files
import gmps
import phases
import pictures
import policy
import run
import settings as settings_module
from conftest import (
    ARGUMENTS,
    HERE,
    PUSH,
    reference_forward,
    refused,
    result_of,
    start,
)
from envs import FAMILIES, AntGoal, BatchEnv, rollout, task_set
from files import read_demonstrations
from settings import Settings


def test_result_has_the_agreed_keys(finished):
    result = result_of(finished)
    assert {"task", "method", "seed", "commit", "env_steps", "wall_seconds", "held_out", "held_out_sampled",
            "experts_held_out", "experts_training", "no_adaptation"} <= set(result)
    assert (result["task"], result["method"], result["seed"]) == ("push", "gmps", 0)
    assert result["commit"] == "unknown" or len(result["commit"].removesuffix("-dirty")) == 40
    assert result["commits"] == {phase: [result["commit"]] for phase in ("experts", "meta_training", "evaluation")}
    for key in ("env_steps", "wall_seconds"):
        assert set(result[key]) == {"experts", "meta_training", "evaluation"}
        assert all(value > 0 for value in result[key].values())
    tasks = task_set(PUSH, "held_out", 2).tolist()
    steps = sorted({record["gradient_steps"] for record in result["held_out"]})
    assert steps == list(range(steps[-1] + 1)) and {0, 1, 3} <= set(steps)
    for name in ("held_out", "held_out_sampled"):
        assert [(r["gradient_steps"], r["task"]) for r in result[name]] == [(k, task) for k in steps for task in tasks]
    for name in ("held_out", "held_out_sampled", "experts_held_out", "experts_training", "no_adaptation"):
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
                "evaluation": 50 * 2 * ((3 + 1) * evaluations + 1 + 2)}  # sampled, mean; no adaptation; experts, twice
    assert result["env_steps"] == expected


def test_results_of_a_run_are_those_of_its_policy_file(finished):
    """Mean actions before adaptation and of the policy without it, recomputed from policy.pt by rollouts of our own."""
    content, result = torch.load(finished / "policy.pt", weights_only=True), result_of(finished)
    assert not torch.equal(content["theta"]["w1"], content["no_adaptation"]["w1"])
    for params, entries in ((content["theta"], [entry for entry in result["held_out"] if entry["gradient_steps"] == 0]),
                            (content["no_adaptation"], result["no_adaptation"])):
        phi = {name: value.double() for name, value in policy.per_task(params, 2).items()}

        def act(observation, phi=phi):
            x = torch.as_tensor((observation - PUSH.observation_centre) / 0.1)
            return torch.stack([torch.as_tensor(reference_forward({k: v[i].numpy() for k, v in phi.items()},
                                                                  x[i:i + 1].numpy())[0][0]) for i in range(2)]).numpy()

        episodes = rollout(BatchEnv(2), act, task_set(PUSH, "held_out", 2))
        assert np.allclose([entry["return"] for entry in entries], episodes["rewards"].sum(1), rtol=1e-3, atol=1e-3)
        assert np.allclose([entry["final_distance"] for entry in entries], episodes["distances"][:, -1], atol=1e-4)


def test_experts_level_on_their_training_tasks_is_that_of_their_file(finished):
    """Their mean actions, rolled out anew; the task labels are of the training set and in its order."""
    experts = phases.expert_policies(files.load_checkpoint(finished / "experts.pt", "experts"))
    tasks, entries = task_set(PUSH, "train", 2), result_of(finished)["experts_training"]
    episodes = rollout(BatchEnv(2), lambda observation: experts(observation[:, None], tasks)[:, 0], tasks)
    assert [entry["task"] for entry in entries] == tasks.tolist()
    assert np.allclose([entry["return"] for entry in entries], episodes["rewards"].sum(1), rtol=1e-4)
    assert np.allclose([entry["final_distance"] for entry in entries], episodes["distances"][:, -1], rtol=1e-4)


def test_demonstrations_of_a_run_belong_to_its_training_tasks(finished):
    """Row i of the file holds task i of the training set, in its order, and that task's expert's labels."""
    tasks, (observations, actions), _ = read_demonstrations(finished / "demonstrations.npz", PUSH)
    assert np.array_equal(tasks, task_set(PUSH, "train", 2))
    experts = phases.expert_policies(files.load_checkpoint(finished / "experts.pt", "experts"))
    assert np.allclose(experts(observations, tasks), actions, atol=1e-6)
    assert not np.allclose(experts(observations, tasks[::-1]), actions, atol=1e-6)


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


def test_every_phase_names_the_commits_of_its_code(finished, tmp_path, monkeypatch):
    """A run whose meta-training is repeated with other code says so, as does a phase that went on with it."""
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    before = result_of(out)["commit"]
    (out / "policy.pt").unlink()
    monkeypatch.setattr(phases, "commit", lambda: "other code")
    assert start(*ARGUMENTS, "--out", out) == 0
    assert result_of(out)["commits"] == {"experts": [before], "meta_training": ["other code"], "evaluation": ["other code"]}
    gone_on = phases.Run(settings_module.Settings(), out, "cpu", 1)
    gone_on.restore(gone_on.counts() | {"commits": {"experts": ["first", "second"]}})
    for now in ("second", "third", "third"):
        monkeypatch.setattr(phases, "commit", lambda now=now: now)
        gone_on.begin("experts")
    assert gone_on.counts()["commits"] == {"experts": ["first", "second", "third"]}


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
    trained = result_of(finished)
    assert one["env_steps"]["experts"] == trained["env_steps"]["experts"]
    assert one["commits"] == trained["commits"] and "experts_training" not in one


def test_evaluation_overwrites_evaluations_alone(finished, tmp_path, capsys):
    """A training run's result.json stays, with its settings.json beside it or without."""
    out, arguments = tmp_path / "out", ("--evaluate", finished, "--gradient-steps", 0, "--rollouts", 2, "--threads", 1)
    out.mkdir()
    shutil.copy(finished / "result.json", out)
    before = (out / "result.json").read_bytes()
    assert "training run" in refused(capsys, *map(str, arguments), "--out", str(out))
    assert (out / "result.json").read_bytes() == before
    for _ in range(2):
        assert start(*arguments, "--out", tmp_path / "other") == 0


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
    pytest.param("sac", "critic_loss", 14, "experts_partial.pt", id="in iteration 7 of 8 of the experts"),
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


# ---------------------------------------------------------------- other tasks, demonstrations, several runs
@pytest.mark.parametrize("task", ["ant", "door"])
def test_other_tasks_run_from_start_to_end(tmp_path, task):
    """Step counts of a tiny run by hand; the door's experts are scripted and take no steps but those of demonstrations."""
    out = tmp_path / task
    assert start("--task", task, *ARGUMENTS, "--set=expert_iterations=1", "--out", out) == 0
    result = result_of(out)
    horizon = {"ant": 200, "door": 100}[task]
    if task == "door":
        assert result["env_steps"]["experts"] == horizon * 2 * 3
        assert result["env_steps"]["meta_training"] == horizon * 2 * 3 * (2 * 3 + 1)
        assert result["env_steps"]["evaluation"] == horizon * 2 * ((3 + 1) * 6 + 3)
    assert result["env_steps"]["evaluation"] <= horizon * 2 * ((3 + 1) * 6 + 3), "early ends save steps"
    assert len(result["experts_held_out"]) == 2 and len(result["held_out"][0]["task"]) == {"ant": 2, "door": 1}[task]


def test_run_from_the_users_demonstrations_asks_no_expert(finished, tmp_path, capsys):
    """--demos: no experts' steps, no aggregation; a folder goes on with its own demonstrations only."""
    demos, out = finished / "demonstrations.npz", tmp_path / "out"
    arguments = [argument for argument in ARGUMENTS if "training_tasks" not in argument and "aggregation" not in argument]
    assert start(*arguments, "--demos", demos, "--out", out) == 0
    result = result_of(out)
    assert result["env_steps"]["experts"] == 0 and result["wall_seconds"]["experts"] == 0
    assert result["env_steps"]["meta_training"] == 50 * 2 * 3 * 2 * 3 and result["experts_held_out"] == []
    assert result["experts_training"] == []
    assert not (out / "experts.pt").exists()
    with np.load(demos) as data:
        np.savez(tmp_path / "other.npz", **(dict(data) | {"actions": 0.5 * data["actions"]}))
    (out / "policy.pt").unlink()
    for name in ("training_tasks=9", "aggregation_episodes=2"):
        assert "--demos" in refused(capsys, "--demos", demos, "--set", name)
    assert "other demonstrations" in refused(capsys, *arguments, "--demos", tmp_path / "other.npz", "--out", out)
    assert start(*arguments, "--demos", demos, "--out", out) == 0
    assert {**result_of(out), "wall_seconds": 0} == {**result, "wall_seconds": 0}


def test_users_demonstrations_are_sorted_by_task(tmp_path, monkeypatch):
    """settings.exploring_tasks counts from the last, so the door's widest angles must come last; their share is kept."""
    rng, runs = np.random.default_rng(0), []
    demos = dict(tasks=np.array([[0.9], [0.1], [0.5], [0.3]]), observations=rng.normal(size=(4, 5, 6)),
                 actions=rng.uniform(-1, 1, (4, 5, 3)))
    np.savez(tmp_path / "demos.npz", **demos)
    monkeypatch.setattr(run, "train_one", runs.append)
    assert run.main(["--task", "door", "--demos", str(tmp_path / "demos.npz"), "--out", str(tmp_path / "out")]) == 0
    tasks, (observations, actions) = runs[0].demos
    assert tasks[:, 0].tolist() == [0.1, 0.3, 0.5, 0.9]
    for given, taken in ((demos["observations"], observations), (demos["actions"], actions)):
        assert np.array_equal(taken, given[[1, 3, 2, 0]])
    assert runs[0].settings.exploring_tasks == round(4 * 14 / 24)


def test_all_tasks_and_seeds_run_one_after_the_other_and_finished_ones_are_left_alone(tmp_path, capsys, monkeypatch):
    begun = []

    def only_finish(one):
        begun.append((one.settings.task, one.settings.seed))
        (one.out / "result.json").write_text("{}")
        if len(begun) == 3:
            raise KeyboardInterrupt
    monkeypatch.setattr(run, "train_one", only_finish)
    monkeypatch.setattr(run, "Camera", lambda family: io.BytesIO())
    arguments = ["--task", "all", "--seeds", "2", "--quick", "--out", str(tmp_path)]
    assert run.main(arguments) == 130
    assert run.main(arguments) == 0
    assert begun == [(task, seed) for task in FAMILIES for seed in (0, 1)]
    assert (tmp_path / "door" / "seed1" / "settings.json").exists()


def test_extrapolation_writes_its_figure_and_every_band(tmp_path):
    out = tmp_path / "ant"
    settings = Settings(**settings_module.TASKS["ant"] | {"task": "ant", "hidden": 8})
    theta = policy.init_policy(AntGoal(), settings, torch.Generator().manual_seed(0))
    out.mkdir()
    files.save_checkpoint(out / "policy.pt", "policy", settings, {
        "theta": theta, "alpha": gmps.init_step_sizes(theta, settings), "scales": [1.0], "no_adaptation": theta,
        "commits": {}, "env_steps": {"experts": 1, "meta_training": 1},
        "wall_seconds": {"experts": 1.0, "meta_training": 1.0}})
    assert start("--task", "ant", "--evaluate", out, "--extrapolate", "--gradient-steps", 1, "--rollouts", 2,
                 "--threads", 1) == 0
    result = result_of(out / "evaluation")
    assert (out / "evaluation" / "extrapolation.png").stat().st_size > 10_000
    goals = np.concatenate([goals for _, goals in AntGoal().bands()])
    assert np.allclose([entry["task"] for entry in result["held_out"] if entry["gradient_steps"] == 1], goals)


def test_band_means_are_those_of_the_bands_own_goals():
    """Six goals a band in the order of `bands`, told apart by the values they are given."""
    lists = {"held_out": [{"gradient_steps": k, "return": 100 * k + goal} for k in (0, 1) for goal in range(24)]}
    means = pictures.band_means(AntGoal(), lists, "return")
    assert [label for label, _ in means] == [label for label, _ in AntGoal().bands()]
    assert [values for _, values in means] == [[6 * band + 2.5, 6 * band + 102.5] for band in range(4)]


# ---------------------------------------------------------------- README
def test_readme_names_the_right_lines():
    """Each "`text`, file.py:line" of the README's table of algorithm steps stands on that line, and on no other."""
    named = re.findall(r"`([^`]+)`, (\w+\.py):(\d+)", (HERE / "README.md").read_text())
    assert len(named) >= 12 and {"# 3a.", "# 3b.", "# 3c."} <= {text for text, _, _ in named}
    for text, file, number in named:
        lines = (HERE / file).read_text().splitlines()
        assert [index for index, line in enumerate(lines, start=1) if text in line] == [int(number)], (text, file)
