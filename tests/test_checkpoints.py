"""Tests of files and of going on: kill -9, two processes in one folder, damage, a full disk."""
import contextlib
import dataclasses
import importlib
import itertools
import multiprocessing
import os
import re
import resource
import shutil
import signal
import warnings

import loky
import mujoco
import numpy as np
import pytest
import torch

import run
from checkpoints import load_checkpoint, save_checkpoint, write_json
from settings import Settings, UserError
from tests.conftest import ARGUMENTS, PUSH, refused, result_of, start

CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["torch._dynamo"])  # the slow import of Adam, once for all
EVALUATE = ("--threads", 1, "--evaluate")


def timeless(out):
    return result_of(out) | {"wall_seconds": 0}


def files(out, *names):
    """{name: content} of a folder's files; of these alone, the rest by name only."""
    return {path.name: path.read_bytes() if path.name in names else None for path in out.iterdir()}


# ---------------------------------------------------------------- kill -9, two in one folder
def run_until(module, name, count, arguments, arrived):
    """`run.main`, which stands still at the n-th call of a function."""
    owner, calls = importlib.import_module(module), itertools.count(1)
    original = getattr(owner, name)

    def counted(*arguments, **named):
        if next(calls) == count:
            arrived.send(True)
            arrived.recv()  # for ever; EOFError once the tests are gone
        return original(*arguments, **named)
    setattr(owner, name, counted)
    run.main(arguments)


@contextlib.contextmanager
def stopped(module, name, count, *arguments):
    """A run in a process of its own stands still within a function, until SIGKILL ends it."""
    arriving, arrived = CHILDREN.Pipe()
    child = CHILDREN.Process(target=run_until, args=(
        module, name, count, list(map(str, arguments)), arrived))
    child.start()
    arrived.close()
    try:
        arriving.recv()  # EOFError where the run has ended before
        yield
    finally:
        child.kill()
        child.join()
    assert child.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("module, name, count, left", [
    pytest.param("sac", "critic_loss", 14, "experts_partial.pt", id="in iteration 7 of 8 of SAC"),
    pytest.param("os", "fsync", 4, "experts.pt.part", id="while writing experts.pt"),
    pytest.param("gmps", "outer_loss", 4, "policy_partial.pt", id="in collection 2 of 3"),
    pytest.param("os", "fsync", 12, "policy.pt", id="between policy.pt and metrics.csv"),
])
def test_killed_run_goes_on_to_the_same_result(finished, tmp_path, capsys, module, name, count,
                                               left):
    """While it lives a second one is refused; after SIGKILL the same command goes on."""
    out, compared = tmp_path / "killed", ("metrics.csv", "learning.png", "demonstrations.npz")
    with stopped(module, name, count, *ARGUMENTS, "--out", out):
        assert (out / left).exists() and not (out / "learning.png").exists()
        assert "another process works in" in refused(capsys, *ARGUMENTS, "--out", out)
    assert start(*ARGUMENTS, "--out", out) == 0 and timeless(out) == timeless(finished)
    assert files(out, *compared) == files(finished, *compared), "and nothing is left over"


def test_run_killed_in_its_film_leaves_plot_film_and_result(finished, tmp_path, monkeypatch,
                                                             capsys):
    """result.json comes last: where it is, the film is."""
    monkeypatch.setattr(type(PUSH), "frames_every", 25)  # three pictures will do
    unbroken, out = (shutil.copytree(finished, tmp_path / name) for name in ("whole", "killed"))
    for name in ("result.json", "learning.png"):
        (out / name).unlink()
    with stopped("phases", "draw_film", 1, *ARGUMENTS, "--out", out):
        assert (out / "learning.png").exists() and not (out / "result.json").exists()
    for folder in (unbroken, out):
        assert run.main([*ARGUMENTS, "--out", str(folder)]) == 0
    assert timeless(out) == timeless(finished)
    compared = ("learning.png", "before_after.gif")
    assert files(out, *compared) == files(unbroken, *compared)
    assert (out / "before_after.gif").exists() or "no video: no OpenGL" in capsys.readouterr().out


def test_run_without_opengl_finishes_without_its_film(finished, tmp_path, monkeypatch, capsys):
    def no_library(*_):
        raise RuntimeError("no library")
    monkeypatch.setattr(mujoco, "Renderer", no_library)
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "result.json").unlink()
    assert run.main([*ARGUMENTS, "--out", str(out)]) == 0
    assert "no video: no OpenGL" in capsys.readouterr().out
    assert timeless(out) == timeless(finished) and files(out) == files(finished)


def test_second_evaluation_in_a_folder_is_refused_while_the_first_runs(finished, tmp_path, capsys):
    arguments = (*EVALUATE, finished, "--gradient-steps", 0, "--rollouts", 2, "--out", "out")
    with stopped("run", "evaluate", 1, *arguments):
        assert "another process works in" in refused(capsys, *arguments)
    assert start(*arguments) == 0


def answer_of(code, **names):
    """What `code` sends as its answer, from a process of its own; EOFError where it fails."""
    receive, send = CHILDREN.Pipe(duplex=False)
    child = CHILDREN.Process(target=exec, args=(code, names | {"answer": send}))
    child.start()
    send.close()
    return receive.recv()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_threads_are_by_default_the_cores_that_the_process_may_use():
    assert run.parse([]).threads == loky.cpu_count()
    assert answer_of("import os, run; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
                     "answer.send(run.parse([]).threads)") == 1


# ---------------------------------------------------------------- damaged checkpoints
def test_every_flipped_byte_of_a_checkpoint_is_noticed(finished, tmp_path):
    """First, last, around the digest's name, many between; two that upset pickle in its own way."""
    whole, path = (finished / "policy.pt").read_bytes(), tmp_path / "policy.pt"
    places = [*np.linspace(0, len(whole) - 1, 40).astype(int)]
    places += [len(whole) - back for back in (64, 65, 71, 72)]
    places += [whole.index(b"\x80\x02") + 1, re.search(rb"K.tq.Q", whole, re.DOTALL).start()]
    for place, mask in itertools.product(places, (1, 255)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1:])
        with warnings.catch_warnings(action="error"), pytest.raises(UserError) as caught:
            load_checkpoint(path, "policy")
        assert "\n" not in str(caught.value) and "policy.pt" in str(caught.value)


@pytest.mark.parametrize("changed, word", [
    ({"hidden": None}, "lacks today's settings: hidden"), ({"new": 1}, "exceeds today's settings: "
     "new"), ({"hidden": 0}, "hidden must be between"), ({"method": "pull"}, "method 'pull'")])
def test_checkpoint_with_other_settings_than_todays_is_refused(tmp_path, capsys, changed, word):
    values = dataclasses.asdict(Settings()) | changed
    values = {name: value for name, value in values.items() if value is not None}
    save_checkpoint(tmp_path / "policy.pt", "policy", Settings(), {"settings": values})
    assert word in refused(capsys, "--evaluate", tmp_path)


# ---------------------------------------------------------------- files that are written
@contextlib.contextmanager
def file_size_limit(size):
    """No file can grow past `size` bytes: what a full disk does, with an error of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [100, 20_000, 400_000])
def test_checkpoint_that_does_not_fit_leaves_the_old_one(tmp_path, limit):
    """And nothing beside it."""
    path = tmp_path / "policy.pt"
    save_checkpoint(path, "policy", Settings(), {"theta": torch.ones(3)})
    with file_size_limit(limit), pytest.raises(UserError, match="cannot write") as caught:
        save_checkpoint(path, "policy", Settings(), {"theta": torch.zeros(100, 1000)})
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == [path]
    assert torch.equal(load_checkpoint(path, "policy")["theta"], torch.ones(3))


def test_run_on_a_full_disk_ends_in_one_line_and_goes_on_later(finished, tmp_path, capsys):
    """The experts' first checkpoint does not fit; with room the same command finishes."""
    out = tmp_path / "full"
    with file_size_limit(5_000):
        assert start(*ARGUMENTS, "--out", out) == 2
    assert capsys.readouterr().err.count("\nerror: cannot write") == 1
    assert start(*ARGUMENTS, "--out", out) == 0 and timeless(out) == timeless(finished)


def test_json_never_holds_nan(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "result.json", {"return": float("nan")})
    assert not (tmp_path / "result.json").exists()
