"""Tests of tools/sweep.py: its commands, its table, one try of a run, dead nodes."""
import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest
from tqdm import tqdm

import run
from checkpoints import write_json
from tests.conftest import ARGUMENTS, BUDGET, HERE, result_of
from tools import sweep

SETTINGS = ["--quick", *(word for name, value in BUDGET.items()
                         for word in ("--set", f"{name}={value}"))]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def refused(capsys, *arguments):
    """The one line of a sweep that must not start."""
    capsys.readouterr()
    assert sweep.main([*arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and len(err.splitlines()) == 1
    return err


def made(name, measured=None, **more):
    """A run of push that nobody has started."""
    settings = SimpleNamespace(task="push", method=name, seed=0)
    return sweep.Run(settings, Path(name), [], measured or {}, **more)


# ---------------------------------------------------------------- the commands
def printed(capsys, *arguments):
    assert sweep.main(["--print", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_printed_commands_are_those_of_run_py(capsys):
    """Each task with each method and seed, in the folder that run.py would choose."""
    lines = printed(capsys, "--tasks", "push", "door", "--methods", "gmps", "multitask", "--seeds",
                    "2", "--set", "noise=independent", "--set", "hidden=8", "--reward", "sparse")
    found = []
    for line in lines:
        words = shlex.split(line)
        assert words[:3] == ["OMP_NUM_THREADS=1", "python", "run.py"]
        options = run.parse(words[3:])
        settings = run.choose_settings(options, options.task, options.seed)
        assert (settings.noise, settings.hidden, settings.reward) == ("independent", 8, "sparse")
        assert options.threads == 1 and not options.quick
        assert options.out == Path("runs") / run.usual_folder(settings, False)
        found.append((options.task, options.method, options.seed))
    assert found == [(task, method, seed) for task in ("push", "door")
                     for method in ("gmps", "multitask") for seed in (0, 1)]


def test_commands_of_finished_runs_are_left_out(capsys, tmp_path):
    arguments = ["--seeds", "3", *SETTINGS, "--out", str(tmp_path)]
    lines = printed(capsys, *arguments)
    assert len(lines) == 3 and all("--quick" in line for line in lines)
    out = tmp_path / "push/gmps/seed1_quick"
    options = run.parse([*ARGUMENTS, "--seed", "1"])
    write_json_of(out, run.choose_settings(options, "push", 1))
    assert printed(capsys, *arguments) == [lines[0], lines[2]]
    assert "holds another run" in refused(capsys, "--print", *arguments, "--set", "hidden=9")


def write_json_of(out, settings):
    """What tells a finished run."""
    out.mkdir(parents=True)
    run.open_run(out, settings)
    write_json(out / "result.json", {})


def test_print_needs_no_ray_and_a_sweep_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert len(printed(capsys)) == 1 and "ray" not in sys.modules
    assert "pip install -r requirements-extra.txt" in refused(capsys, "--tasks", "push")


@pytest.mark.parametrize("arguments, words", [
    (["--tasks", "pull"], "unknown task 'pull'"), (["--methods", "gmps", "x"], "unknown method"),
    (["--set", "no=1"], "unknown setting 'no'"), (["--seeds", "0"], "--seeds must be at least 1"),
    (["--jobs", "0"], "--jobs must be"), (["--jobs", "2", "--address", "auto"], "--jobs is for"),
    (["--seed", "3"], "unrecognized arguments: --seed"), (["--reward", "big"], "reward"),
    (["--track", "paper"], "invalid choice")])
def test_whatever_does_not_fit_is_said_before_the_first_run(capsys, arguments, words):
    assert words in refused(capsys, "--print", *arguments)


# ---------------------------------------------------------------- how long, how far
def test_forecast_by_hand(tmp_path, monkeypatch):
    """Means over seeds; 2 slots take 40, 20, 30 and 10 s as 40 + 10 and 20 + 30."""
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    for seed, seconds in enumerate(({"experts": 30, "meta_training": 60}, {"experts": 50,
                                                                           "meta_training": 40})):
        folder = tmp_path / f"results/push/gmps/seed{seed}"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({"wall_seconds": seconds}))
    settings = run.choose_settings(run.parse([]), "push", 7)
    assert sweep.measured(settings) == {"experts": 40, "meta_training": 50}
    other = run.choose_settings(run.parse(["--method", "multitask"]), "push", 0)
    assert sweep.measured(other) == {}
    assert sweep.makespan([40, 20, 30, 10], 2) == 50 and sweep.makespan([5], 3) == 5
    known = [made("a", {"experts": 40, "meta_training": 50 * 60}) for _ in range(4)]
    line = sweep.forecast([*known, made("b"), made("c", state="done")], 2)
    assert line.startswith("5 of 6 runs to do, 2 at a time; about 1:41:32 by")  # 2 x (3,040 + 6) s
    assert line.endswith("not counted: 1 without times in results/")


def bar(description, postfix=None):
    """What a progress bar writes into a log: one of four iterations in 10 s, so 30 s are left."""
    return "\r" + tqdm.format_meter(1, 4, 10, prefix=f"{description:<22}", postfix=postfix)


def test_table_shows_phase_steps_and_time_left(tmp_path):
    """The bar's 30 s, and the phases that follow, or ">" where nobody has measured them."""
    one = made(str(tmp_path), {"experts": 1000, "meta_training": 50, "curve": 7, "evaluation": 3},
               state="running")
    log = tmp_path / "log.txt"
    log.write_text("first line\n")
    assert sweep.progress(one) == ("start", "", "")
    for text, *wanted in (
            (bar("experts (contextual)", "steps=1,234, dist=0.1"), "experts 25%", "1,234", "1:30"),
            (bar("meta-training", "steps=500"), "meta-training 25%", "500", "0:33"),
            (bar("evaluation"), "evaluation 25%", "", "0:30")):
        with log.open("a") as file:
            file.write(text)
        assert sweep.progress(one) == tuple(wanted)
    one.measured = {}
    assert sweep.progress(one)[2] == "0:30", "nothing follows the evaluation"
    log.write_text(bar("experts (local)"))
    assert sweep.progress(one) == ("experts 25%", "", ">0:30")


def test_table_counts_all_and_shows_first_what_needs_a_look():
    runs = [made("a", state="done"), made("b"), made("c", state="failed", fault="error: no"),
            made("d", state="running", tries=2), *(made(f"e{k}") for k in range(5))]
    lines = sweep.table(runs, 20)
    assert lines[0] == "1 running, 1 failed, 6 waiting, 1 done" and len(lines) == 2 + 9
    assert lines[2].split() == ["push", "d", "seed", "0", "running", "(try", "2)", "start"]
    assert lines[3].endswith("error: no") and lines[-1].split()[-1] == "done"
    short = sweep.table(runs, 6)
    assert len(short) == 6 and short[:5] == lines[:5] and short[5] == "... and 6 more"


def test_a_file_gets_a_line_for_each_change(capsys):
    one = made("a")
    screen = sweep.Screen([one, made("b")])
    for state, tries in (("waiting", 1), ("running", 1), ("running", 1), ("running", 2)):
        one.state, one.tries = state, tries
        screen.show()
    assert capsys.readouterr().out == "push a seed 0: running\npush a seed 0: running, try 2\n"


# ---------------------------------------------------------------- one try
@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A run.py of a few lines, which does what its arguments say."""
    monkeypatch.setattr(sweep, "ROOT", tmp_path)

    def write(code):
        (tmp_path / "run.py").write_text(code)
        return tmp_path / "out"
    return write


def test_a_try_logs_the_run_and_returns_its_last_line(stand_in, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    out = stand_in("import os, sys\nprint('threads', os.environ['OMP_NUM_THREADS'])\n"
                   "print('bar 1\\rbar 2', file=sys.stderr)\nsys.exit(sys.argv[1])")
    assert sweep.attempt(["error: no experts\n"], out, "sign", 0) == "error: no experts"
    one = made(str(out))
    for sign, state in (("sig", "waiting"), ("sign", "running")):
        one.sign = sign
        sweep.look(one)
        assert one.state == state
    assert (out / "log.txt").read_text().splitlines()[1:3] == ["threads 1", "bar 1"]
    assert sweep.attempt([], stand_in("raise SystemExit(0)"), "sign", 0) == ""
    assert "its log" not in sweep.attempt([], stand_in("1 / 0"), "sign", 0)
    killed = stand_in("import os\nprint('bar 100%', flush=True)\nos.kill(os.getpid(), 9)")
    assert sweep.attempt([], killed, "sign", 0) == "killed by signal 9"


def test_a_try_waits_for_the_lock_of_the_one_before(stand_in):
    """The first try does not wait; nor does anybody touch the other's log."""
    out = stand_in("import pathlib\npathlib.Path('ran').touch()")
    out.mkdir()
    (out / "log.txt").write_text("the other's")
    with filelock.FileLock(out / ".lock"):
        for patience in (0, 0.2):
            assert sweep.attempt([], out, "sign", patience) == f"another process works in {out}"
    assert (out / "log.txt").read_text() == "the other's" and not (out.parent / "ran").exists()
    lock = filelock.FileLock(out / ".lock", thread_local=False)
    lock.acquire()
    freed = threading.Timer(0.5, lock.release)
    begun = time.monotonic()
    freed.start()
    assert sweep.attempt([], out, "sign", 30) == "" and time.monotonic() - begun >= 0.5
    assert (out.parent / "ran").exists() and (out / "log.txt").read_text().startswith("sign on ")


def test_a_try_leaves_a_finished_run_alone(stand_in):
    out = stand_in("1 / 0")
    out.mkdir()
    (out / "result.json").write_text("{}")
    assert sweep.attempt([], out, "sign", 0) == "" and not (out / "log.txt").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the lock alone keeps them apart")
def test_a_run_ends_with_the_worker_that_started_it(stand_in, tmp_path):
    """Also if that is killed: the folder's lock is free at once."""
    out = stand_in("import filelock, pathlib, sys, time\n"
                   "lock = filelock.FileLock(sys.argv[1] + '/.lock').acquire()\n"
                   "pathlib.Path(sys.argv[1], 'locked').touch()\ntime.sleep(60)")
    code = ("import pathlib, sys; from tools import sweep; sweep.ROOT = pathlib.Path(sys.argv[1])\n"
            "sweep.attempt([sys.argv[2]], pathlib.Path(sys.argv[2]), 'sign', 0)")
    worker = subprocess.Popen([sys.executable, "-c", code, tmp_path, out], cwd=HERE)
    wait_for((out / "locked").exists)
    with pytest.raises(filelock.Timeout):
        filelock.FileLock(out / ".lock").acquire(timeout=0)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    filelock.FileLock(out / ".lock").acquire(timeout=5).lock.release()


def wait_for(condition, seconds=60):
    patience = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < patience
        time.sleep(0.05)


# ---------------------------------------------------------------- Ray, and dead nodes
class FakeRay:
    """Ray that runs nothing. Each task ends as `ends` says: an exception, or the try's fault."""

    class exceptions:
        RayError = type("RayError", (Exception,), {})
        RayTaskError = type("RayTaskError", (RayError,), {})
        NodeDiedError = type("NodeDiedError", (RayError,), {})

    def __init__(self, ends):
        self.ends, self.given, self.cancelled = ends, [], []

    def remote(self, function):
        assert function is sweep.attempt

        def submit(arguments, out, sign, patience):
            self.given.append((out.name, patience))
            return len(self.given) - 1

        def options(**resources):
            self.resources = resources
            return SimpleNamespace(remote=submit)
        return SimpleNamespace(options=options)

    def wait(self, handles, timeout):
        return handles[:1], handles[1:]

    def get(self, handle):
        end = self.ends[handle]
        if isinstance(end, BaseException):
            raise end
        return end

    def cancel(self, handle, force):
        self.cancelled.append((handle, force))


def test_only_a_run_whose_node_died_is_tried_again():
    """It waits for its predecessor's lock then. A run that failed by itself would fail again."""
    died, broken = FakeRay.exceptions.NodeDiedError("gone"), FakeRay.exceptions.RayTaskError
    runs = [made("a"), made("b"), made("c", state="done"), made("d")]
    ray = FakeRay([died, "error: no", broken("trace\nOSError: full"), ""])
    sweep.sweep(ray, runs, 2, 0.5, lambda: None)
    assert [(one.state, one.fault) for one in runs] == [
        ("done", ""), ("failed", "error: no"), ("done", ""), ("failed", "OSError: full")]
    assert ray.given == [("a", 0), ("b", 0), ("d", 0), ("a", sweep.PATIENCE)]
    assert ray.resources == {"num_cpus": 2, "num_gpus": 0.5, "max_retries": 0}
    always = [made("e")]
    sweep.sweep(FakeRay([died] * sweep.TRIES), always, 1, 0, lambda: None)
    assert always[0].fault == f"given up after {sweep.TRIES} tries: NodeDiedError"


def test_ctrl_c_ends_what_runs():
    ray = FakeRay(["", KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(ray, [made("a"), made("b"), made("c")], 1, 0, lambda: None)
    assert ray.cancelled == [(2, True)]


def test_failed_runs_are_named_at_the_end(capsys, monkeypatch, tmp_path):
    fake = FakeRay(["", "error: no"])
    fake.shutdown = lambda: None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(sweep, "start_ray", lambda options: (fake, 1))
    command = ["--seeds", "2", "--out", str(tmp_path)]
    assert sweep.main(command) == 1
    first, second = (tmp_path / f"push/gmps/seed{seed}" for seed in (0, 1))
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"push gmps seed 0: {first / 'result.json'}",
        f"push gmps seed 1 failed: error: no ({second / 'log.txt'})"]
    fake.ends, fake.given = ["", ""], []
    assert sweep.main(command) == 0


def test_cluster_that_is_not_there_is_one_line_at_once(capsys):
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    assert f"no Ray cluster at {address}" in refused(capsys, "--address", address)


def same_but_for_time_and_place(one, two):
    """result.json of two runs, of code that may have other commits."""
    left_out = {"wall_seconds": 0, "commit": 0, "commits": 0, "machine": 0}
    assert one | left_out == two | left_out


def test_sweep_on_this_machine(finished, tmp_path):
    """One run ends as run.py alone does, one finds a folder that is not its own."""
    pytest.importorskip("ray")
    first, second = (tmp_path / f"push/gmps/seed{seed}_quick" for seed in (0, 1))
    second.mkdir(parents=True)
    (second / "settings.json").write_text('{"seed": 5}')
    done = subprocess.run([sys.executable, HERE / "tools" / "sweep.py", "--seeds", "2", *SETTINGS,
                           "--jobs", "1", "--out", tmp_path], cwd=tmp_path, env=ENVIRONMENT,
                          capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert "push gmps seed 0: running" in lines and "push gmps seed 0: done" in lines
    assert re.fullmatch(r"push gmps seed 1 failed: error: .* holds another run.*", lines[-1])
    same_but_for_time_and_place(result_of(first), result_of(finished))


@contextlib.contextmanager
def two_nodes(monkeypatch):
    """(cluster, its one node that has a core)."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    small = dict(object_store_memory=10 ** 8)
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=dict(num_cpus=0) | small)
    try:
        yield cluster, cluster.add_node(num_cpus=1, **small)
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_run_goes_on_elsewhere_when_its_node_is_killed(tmp_path, monkeypatch):
    """In mid-training; the other node ends with the result of an unbroken run."""
    more = [*SETTINGS, "--set", "collections=30", "--set", "meta_steps=20", "--set", "curve=0"]
    out, unbroken = tmp_path / "sweep/push/gmps/seed0_quick", tmp_path / "unbroken"
    with two_nodes(monkeypatch) as (cluster, first):
        child = subprocess.Popen(
            [sys.executable, HERE / "tools" / "sweep.py", *more, "--address", cluster.address,
             "--out", tmp_path / "sweep"], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE,
            text=True)
        wait_for((out / "policy_partial.pt").exists, 120)
        log = (out / "log.txt").read_text().splitlines()[0]
        cluster.remove_node(first, allow_graceful=False)
        assert not (out / "result.json").exists()
        cluster.add_node(num_cpus=1, object_store_memory=10 ** 8)
        lines = child.communicate(timeout=300)[0].splitlines()
    assert child.returncode == 0, lines
    assert "push gmps seed 0: running, try 2" in lines
    assert ", try 1 on " in log and ", try 2 on " in (out / "log.txt").read_text()
    text = (out / "log.txt").read_text()
    assert "experts (contextual)" not in text, "they came from the checkpoint"
    done = subprocess.run([sys.executable, HERE / "run.py", *more, "--threads", "1", "--out",
                           unbroken], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    same_but_for_time_and_place(result_of(out), result_of(unbroken))
