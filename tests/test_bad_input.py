"""Tests of what is refused in one clear line: bad arguments, goals, demonstrations, checkpoints, folders, a full disk."""
import contextlib
import dataclasses
import errno
import os
import resource
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

import files
from conftest import ARGUMENTS, HERE, refused, result_of, start
from settings import Settings


# ---------------------------------------------------------------- arguments and files that a user gives
@pytest.mark.parametrize("arguments, word", [
    (["--task", "pull"], "pull"), (["--nonsense"], "--nonsense"), (["--set", "nonsense=1"], "nonsense"),
    (["--set", "hidden"], "hidden"), (["--set", "hidden=0"], "hidden"), (["--set", "hidden=x"], "hidden"),
    (["--set", "learning_rate=nan"], "learning_rate"), (["--set", "discount=1.5"], "discount"),
    (["--set", "experts=none"], "experts"),
    (["--set", "seed=1"], "--seed"), (["--device", "meta"], "meta"),
    (["--experts", "none"], "none"), (["--seed", "-1"], "seed"),
    (["--seed", "x"], "seed"), (["--seed", "99999999999"], "seed"), (["--rollouts", "0"], "rollouts"),
    (["--gradient-steps", "-1"], "gradient-steps"), (["--threads", "0"], "threads"),
    (["--device", "cuda:99"], "cuda:99"), (["--device", "abacus"], "abacus"),
    (["--goals", "goals.npy"], "--evaluate"), (["--rollouts", "5"], "--evaluate"), (["--out"], "--out")])
def test_bad_argument_is_refused_in_one_line(capsys, arguments, word):
    assert word in refused(capsys, "--quick", *arguments)


@pytest.mark.parametrize("arguments, word", [
    (["--task", "all", "--demos", "x.npz"], "one task"), (["--task", "door", "--reward", "dense"], "no dense reward"),
    (["--task", "door", "--experts", "local"], "no local experts"),
    (["--demos", "x.npz", "--experts", "local"], "--experts"),
    (["--extrapolate"], "--evaluate"), (["--evaluate", "x", "--extrapolate"], "ant"),
    (["--task", "push-vision", "--set", "aggregation_episodes=1"], "demonstrations alone"), (["--seeds", "0"], "--seeds")])
def test_options_that_do_not_go_together_are_refused(capsys, arguments, word):
    line = refused(capsys, *arguments)
    assert word in line or "OpenGL" in line


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


@pytest.mark.parametrize("content, word", [
    (b"", "npz"), (b"PK\x03\x04 and no more", "npz"), (None, "no demonstrations file"),
    ({"tasks": np.zeros((2, 2)), "observations": np.zeros((2, 5, 6))}, "actions"),
    ({"tasks": np.full((2, 2), 9.0), "observations": np.zeros((2, 5, 6)), "actions": np.zeros((2, 5, 3))}, "out of range"),
    ({"tasks": np.zeros((2, 1)), "observations": np.zeros((2, 5, 6)), "actions": np.zeros((2, 5, 3))}, "tasks have"),
    ({"tasks": np.zeros((2, 2)), "observations": np.zeros((2, 0, 6)), "actions": np.zeros((2, 0, 3))}, "at least 1"),
    ({"tasks": np.zeros((2, 2)), "observations": np.zeros((2, 5, 6)), "actions": np.full((2, 5, 3), 9.0)}, "clip them"),
    (b"phase,iteration\n", "npz file, and whole")])
def test_bad_demonstrations_file_is_refused_in_one_line(tmp_path, capsys, content, word):
    path = tmp_path / "demos.npz"
    if isinstance(content, dict):
        np.savez(path, **content)
    elif content is not None:
        path.write_bytes(content)
    assert word in refused(capsys, *ARGUMENTS, "--demos", path, "--out", tmp_path / "out")


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
    pytest.param(lambda path, _: torch.save({"format": "gmps checkpoint 1", "kind": "policy"}, path), "another version",
                 id="of another version"),
    pytest.param(lambda path, other: path.write_bytes(other.read_bytes()), "not a policy", id="of another kind"),
])
def test_bad_policy_file_is_refused_in_one_line(finished, tmp_path, capsys, spoil, word):
    out = copied(finished, tmp_path / "copy", "policy.pt")
    spoil(out / "policy.pt", finished / "experts.pt")
    assert word in refused(capsys, "--threads", 1, "--evaluate", out)


def test_experts_of_another_run_beside_a_policy_are_refused(finished, tmp_path, capsys):
    out = copied(finished, tmp_path / "copy", "policy.pt", "experts.pt")
    content = files.load_checkpoint(out / "experts.pt", "experts")
    other = dataclasses.replace(content.pop("settings"), seed=7)
    files.save_checkpoint(out / "experts.pt", "experts", other, content)
    assert "experts.pt is of another run" in refused(capsys, "--threads", 1, "--evaluate", out)


def test_evaluate_of_a_file_is_refused_in_one_line(finished, capsys):
    assert "takes the folder" in refused(capsys, "--evaluate", finished / "policy.pt")


WITHOUT_GL = """
import ctypes, sys
original = ctypes.CDLL.__init__
def hiding(self, name, *arguments, **named):
    if name and ("EGL" in name or "OSMesa" in name):
        raise OSError("hidden")
    original(self, name, *arguments, **named)
ctypes.CDLL.__init__ = hiding
import run
sys.exit(run.main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="MuJoCo has these libraries on Linux alone")
@pytest.mark.parametrize("library", ["bogus", "egl", "osmesa"])
def test_opengl_library_that_is_absent_stops_only_what_needs_pictures(tmp_path, library):
    """MUJOCO_GL names no library, or one that is not installed: push begins, push-vision ends in one line."""
    environment = os.environ | {"MUJOCO_GL": library, "PYTHONPATH": str(HERE)}

    def command(*arguments):
        return subprocess.run([sys.executable, "-c", WITHOUT_GL, *arguments], env=environment, capture_output=True,
                              text=True, cwd=tmp_path)
    vision = command("--task", "push-vision", "--quick")
    assert vision.returncode == 2 and vision.stderr.startswith("error: no OpenGL") and vision.stderr.count("\n") == 1
    push = command("--task", "push", "--set", "seed=1")  # refused for another reason: push asks for no pictures
    assert push.returncode == 2 and "use --seed" in push.stderr


def test_bad_checkpoint_of_a_run_is_refused_in_one_line(finished, tmp_path, capsys):
    out = copied(finished, tmp_path / "copy", "settings.json", "experts.pt")
    (out / "experts.pt").write_bytes((out / "experts.pt").read_bytes()[:3000])
    assert "experts.pt is truncated" in refused(capsys, *ARGUMENTS, "--out", out)


def test_truncated_demonstrations_of_a_run_are_refused_in_one_line(finished, tmp_path, capsys):
    """Cut short, and whole at its end but not inside; deleted, as the line says, the run makes them again."""
    out = copied(finished, tmp_path / "copy", "settings.json", "experts.pt", "demonstrations.npz")
    path = out / "demonstrations.npz"
    whole = path.read_bytes()
    for spoilt in (whole[:-3000], whole[:1000] + bytes(1000) + whole[2000:]):
        path.write_bytes(spoilt)
        assert "delete it, and the run makes it again" in refused(capsys, *ARGUMENTS, "--out", out)
    path.unlink()
    assert start(*ARGUMENTS, "--out", out) == 0
    assert {**result_of(out), "wall_seconds": 0} == {**result_of(finished), "wall_seconds": 0}


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


# ---------------------------------------------------------------- files that are written
def test_failed_write_leaves_the_old_file(tmp_path):
    """A writer that runs out of disk half-way: the old content stays, nothing is left beside it, one line says so."""
    path = tmp_path / "state.pt"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half of the new")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(files.UserError, match="No space left") as caught:
        files.write_atomically(path, write)
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
    """A disk that is full anywhere in the file, in one line."""
    path = tmp_path / "policy.pt"
    files.save_checkpoint(path, "policy", Settings(), {"theta": torch.ones(3)})
    with file_size_limit(limit), pytest.raises(files.UserError) as caught:
        files.save_checkpoint(path, "policy", Settings(), {"theta": torch.zeros(100, 1000)})
    assert "\n" not in str(caught.value)
    assert torch.equal(files.load_checkpoint(path, "policy")["theta"], torch.ones(3))
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
        files.write_json(tmp_path / "result.json", {"return": float("nan")})
    assert not (tmp_path / "result.json").exists()
