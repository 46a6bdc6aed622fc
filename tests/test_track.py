"""Tests of --track: a tracker holds the numbers of metrics.csv, and the run is as without it."""
import csv
import importlib.util
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import phases
from tests.conftest import ARGUMENTS, HERE, refused, start
from tests.test_checkpoints import stopped, timeless
from tools import track

CHECKPOINTS = ("experts.pt", "policy.pt")


@pytest.fixture(autouse=True)
def no_plots(finished, monkeypatch):
    monkeypatch.setattr(phases, "draw_plot", lambda *_: None)


def kept(out):
    """{(phase, metric): [(iteration, value), ...]} of metrics.csv."""
    found = {}
    for row in csv.DictReader((out / "metrics.csv").open()):
        for key, value in row.items():
            if key != "phase" and value:
                found.setdefault((row["phase"], key), []).append((int(row["iteration"]),
                                                                  float(value)))
    return found


def agree(found, out):
    """Neither more nor fewer rows than in metrics.csv, which has six digits."""
    wanted = kept(out)
    assert found.keys() == wanted.keys() and len(wanted) > 15
    for key, points in found.items():
        assert np.allclose(points, wanted[key], rtol=1e-5), key


def same_run(out, other):
    """Result and checkpoints to the last bit, without the wall times in them."""
    assert timeless(out) == timeless(other)
    for name in ("metrics.csv", "demonstrations.npz"):
        assert (out / name).read_bytes() == (other / name).read_bytes(), name
    for name in CHECKPOINTS:
        one, two = (torch.load(folder / name, weights_only=True) for folder in (out, other))
        same_content(one | {"wall_seconds": 0}, two | {"wall_seconds": 0})


def same_content(one, two):
    assert type(one) is type(two)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, dict | list):
        assert len(one) == len(two)
        if isinstance(one, dict):
            assert one.keys() == two.keys()
        for key in one if isinstance(one, dict) else range(len(one)):
            same_content(one[key], two[key])
    else:
        assert one == two


# ---------------------------------------------------------------- any tracker
def test_tracker_gets_each_row_once_when_it_comes(finished, tmp_path, monkeypatch):
    """And nothing of it is in the run's files."""
    sent, out = [], tmp_path / "out"

    def rows_so_far(settings, folder):
        assert (settings.task, folder) == ("push", out)
        return track.contextlib.nullcontext(
            lambda row, number: sent.append((number, row["phase"], row["iteration"])))
    monkeypatch.setitem(track.TRACKERS, "tensorboard", rows_so_far)
    monkeypatch.setattr(track.importlib.util, "find_spec", lambda name: True)
    assert start(*ARGUMENTS, "--track", "tensorboard", "--out", out) == 0
    assert sent == [(k, "experts", k) for k in range(1, 9)] + [
        (8 + k, "meta_training", k) for k in range(1, 4)]
    same_run(out, finished)
    assert {path.name for path in out.iterdir()} == {path.name for path in finished.iterdir()} - {
        "learning.png"}


def test_tracker_that_fails_costs_its_rows_only(finished, tmp_path, monkeypatch, capsys):
    calls = []

    def fails(row, number):
        calls.append(number)
        raise OSError("no space left")
    monkeypatch.setitem(track.TRACKERS, "wandb", lambda *_: track.contextlib.nullcontext(fails))
    monkeypatch.setattr(track.importlib.util, "find_spec", lambda name: True)
    assert start(*ARGUMENTS, "--track", "wandb", "--out", tmp_path / "out") == 0
    assert calls == [1] and "tracking ends here: OSError: no space left" in capsys.readouterr().out
    same_run(tmp_path / "out", finished)


def test_tracker_that_cannot_close_does_not_cost_the_run(finished, tmp_path, monkeypatch, capsys):
    @track.contextlib.contextmanager
    def cannot_close(*_):
        yield lambda row, number: None
        raise OSError("no space left")
    monkeypatch.setitem(track.TRACKERS, "wandb", cannot_close)
    monkeypatch.setattr(track.importlib.util, "find_spec", lambda name: True)
    assert start(*ARGUMENTS, "--track", "wandb", "--out", tmp_path / "out") == 0
    assert "tracking did not close: OSError: no space left" in capsys.readouterr().out
    same_run(tmp_path / "out", finished)


@pytest.mark.parametrize("name", track.TRACKERS)
def test_missing_package_is_one_line(monkeypatch, capsys, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install -r requirements-extra.txt" in refused(capsys, "--track", name)


def test_options_that_track_does_not_go_with(finished, capsys):
    assert "--track" in refused(capsys, "--evaluate", finished, "--track", "wandb")
    assert "invalid choice" in refused(capsys, "--track", "paper")


def test_no_tracker_is_imported_without_being_asked_for():
    code = "import run, sys; print({'tensorboard', 'wandb', 'ray'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


# ---------------------------------------------------------------- the real ones
def test_tensorboard_holds_the_rows_also_after_a_kill(finished, tmp_path):
    """A run that is killed in iteration 7, after a checkpoint of 5, sends row 6 twice."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "out"
    command = [*ARGUMENTS, "--track", "tensorboard", "--out", out]
    with stopped("sac", "critic_loss", 14, *command):
        assert (out / "experts_partial.pt").exists()
    time.sleep(1)  # event files are read in the order of the second in their names
    assert start(*command) == 0
    found = {}
    for phase in ("experts", "meta_training"):
        events = accumulator.EventAccumulator(str(out / "tensorboard" / phase))
        events.Reload()
        found |= {(phase, key): [(event.step, event.value) for event in events.Scalars(key)]
                  for key in events.Tags()["scalars"]}
    agree(found, out)
    same_run(out, finished)


def records(data):
    """The records of a .wandb file: 7 bytes, then LevelDB's log format."""
    place, parts = 7, b""
    while place < len(data):
        left = 32768 - place % 32768
        if left < 7:  # no room for a header: the block's rest is padding
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4:place + 7])  # a checksum comes first
        parts += data[place + 7:place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def offline_rows(folder, sessions):
    """([(row number, {name: value})], ids) of wandb's offline sessions."""
    from wandb.proto.wandb_internal_pb2 import Record
    found, patience = [], time.monotonic() + 30
    # wandb's own process writes the file's end a moment after the session has ended.
    while sum(record.HasField("exit") for record in found) < sessions:
        assert time.monotonic() < patience
        time.sleep(0.1)
        found = [Record.FromString(record)
                 for path in sorted(folder.glob("offline-run-*/*.wandb"))
                 for record in records(path.read_bytes())]
    rows = [{item.key or "/".join(item.nested_key): float(item.value_json)
             for item in record.history.item} for record in found if record.HasField("history")]
    return ([(int(row["_step"]), row) for row in rows],
            {record.run.run_id for record in found if record.HasField("run")})


def test_wandb_offline_holds_the_rows(finished, tmp_path, monkeypatch):
    """A second session goes on under the same id, and repeats the numbers of the rows."""
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_CONFIG_DIR": str(tmp_path / "config"),
                        "WANDB_CACHE_DIR": str(tmp_path / "cache"),
                        "WANDB_DATA_DIR": str(tmp_path / "data")}.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "out"
    command = [*ARGUMENTS, "--track", "wandb", "--out", out]
    assert start(*command) == 0
    rows, ids = offline_rows(out / "wandb", 1)
    assert ids == {(out / "wandb" / "id").read_text()}
    assert [number for number, _ in rows] == [*range(1, 12)]
    found = {}
    for _, values in rows:
        for name, value in values.items():
            if not name.startswith("_"):
                phase, key = name.split("/")
                found.setdefault((phase, key), []).append((values[f"{phase}/iteration"], value))
    agree(found, out)
    same_run(out, finished)
    (out / "policy.pt").unlink()  # meta-training once more, in a new session
    assert start(*command) == 0
    rows, again = offline_rows(out / "wandb", 2)
    assert again == ids and [number for number, _ in rows] == [*range(1, 12), 9, 10, 11]


def test_wandb_without_an_account_is_one_line(tmp_path, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured.\nMore text")
    monkeypatch.setattr(wandb, "init", refuse)
    line = refused(capsys, *ARGUMENTS, "--track", "wandb", "--out", tmp_path / "out")
    assert line == ("error: wandb: No API key configured. (WANDB_MODE=offline needs no account)")
