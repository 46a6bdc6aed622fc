"""Tests of the live page: what it computes, its queue, what is refused, and the page itself."""
import asyncio
import socket
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from baselines import rl2
from baselines.recurrent import Policy
from envs import Environments
from evaluate import evaluate
from phases import load_adapter
from tasks import make_family
from tests.conftest import FRAGILE, HERE, PUSH, refused
from tools.view_session import Session, Stopped, Worker

GOAL = np.array([0.05, 0.72])
POLICY = HERE / "results" / "push" / "gmps" / "policy"


@pytest.fixture
def adapter(finished):
    return load_adapter(finished)[1]


@pytest.fixture
def session(adapter):
    return Session(PUSH, adapter, threads=1)


def remembering():
    """A sequential adapter: RL²'s, whose memory changes in every rollout; random weights."""
    torch.manual_seed(0)
    settings = rl2.Settings(method="rl2", memory=16)
    policy = Policy(PUSH, settings, torch.Generator().manual_seed(0)).state_dict()
    return rl2.Adapter(policy, PUSH, settings)


# ---------------------------------------------------------------- adaptation
@pytest.mark.parametrize("sequential", [False, True])
def test_steps_are_those_of_evaluate(adapter, sequential):
    """To the last digit, for the same goal and seed; and again after a restart."""
    adapter = remembering() if sequential else adapter
    lists = evaluate(Environments(PUSH, 1), adapter, GOAL[None], 2, 3, seed=3).lists["held_out"]
    wanted = [(entry["return"], entry["final_distance"]) for entry in lists]
    session = Session(PUSH, adapter, seed=3, threads=1)
    for _ in range(2):
        session.restart(GOAL)
        for _ in range(2):
            session.step(episodes=3)
        assert [(step.total, step.distance) for step in session.steps] == wanted
    assert len(set(wanted)) > 1, "the policy changes"
    assert session.steps[0].rewards is None and session.steps[2].rewards.shape == (3, 50)
    assert session.what == ("round" if sequential else "gradient step")


def test_states_are_those_of_the_measured_episode(session):
    """The block's last place gives the distance that the page tells."""
    session.restart(GOAL)
    session.step(episodes=2)
    block = Environments(PUSH, 1)(1).model.body("block").jntadr[0]
    for step in session.steps:
        assert len(step.states) == PUSH.horizon + 1
        place = step.states[-1, 1 + block:3 + block]
        assert np.linalg.norm(place - GOAL) == pytest.approx(step.distance, abs=1e-6)


def test_states_end_where_the_episode_does(adapter):
    """The environment begins another episode after an early end: it is not played."""
    session = Session(FRAGILE, adapter, threads=1)
    session.restart(GOAL)
    ended = FRAGILE.ended(session.steps[0].states)
    assert len(ended) <= PUSH.horizon and ended[-1] and not ended[:-1].any()


@pytest.mark.parametrize("sequential", [False, True])
def test_rollouts_without_noise_are_those_that_are_measured(adapter, sequential):
    session = Session(PUSH, remembering() if sequential else adapter, threads=1)
    session.restart(GOAL)
    session.step(episodes=3, noise=False)
    rewards = session.steps[1].rewards
    assert rewards.shape == (3, 50)
    assert rewards[0].sum() == pytest.approx(session.steps[0].total)
    # RL²'s memory changes between its rollouts.
    assert (np.ptp(rewards, axis=0).max() == 0) is not sequential


def test_progress_goes_from_nothing_to_almost_all(session):
    shares = []
    session.restart(GOAL)
    session.step(episodes=2, progress=shares.append)
    assert shares == [k / 100 for k in range(100)]


def test_training_range():
    """A box; for the ant the arc and a strip along it, and none of --extrapolate's goals."""
    push, ant, door = map(make_family, ("push", "ant", "door"))
    assert push.in_training_range(push.training_tasks(20)).all()
    assert not push.in_training_range(np.array([[0.11, 0.75], [0.0, 0.69]])).any()
    assert door.in_training_range(np.array([0.3])) and not door.in_training_range(np.array([1.2]))
    assert ant.in_training_range(ant.training_tasks(20)).all()
    for label, goals in ant.bands():
        assert (ant.in_training_range(goals) == (label == "on the arc")).all()
    assert not ant.in_training_range(np.array([[1.0, 1.0], [2.0, 2.0]])).any()


# ---------------------------------------------------------------- the queue
@pytest.fixture
def queue():
    """(worker, its reports, an event that lets the first job go on, the names of jobs done)."""
    reports, gate, done = [], threading.Event(), []
    worker = Worker(lambda *report: reports.append(report))
    yield SimpleNamespace(worker=worker, reports=reports, gate=gate, done=done)
    gate.set()
    worker.stop()
    assert not worker.thread.is_alive()


def test_second_click_is_ignored_while_the_first_waits_or_runs(queue):
    worker = queue.worker
    assert worker.submit("adapt", lambda: queue.done.append(queue.gate.wait(10)))
    assert not worker.submit("adapt", lambda: queue.done.append("twice"))
    while worker.running is None:
        time.sleep(0.001)
    assert not worker.submit("adapt", lambda: queue.done.append("twice"))
    queue.gate.set()
    assert worker.wait(10) and queue.done == [True]
    assert worker.submit("adapt", lambda: queue.done.append("later"))
    assert worker.wait(10) and queue.done == [True, "later"]


def test_latest_goal_takes_the_place_of_the_one_that_waits(queue):
    queue.worker.submit("adapt", lambda: queue.gate.wait(10))
    for goal in range(3):
        assert queue.worker.submit("restart", lambda goal=goal: queue.done.append(goal),
                                   latest=True)
    assert queue.worker.waiting("restart")
    queue.gate.set()
    assert queue.worker.wait(10) and queue.done == [2]


def test_failed_job_is_told_and_the_next_one_runs(queue, capsys):
    queue.worker.submit("adapt", lambda: 1 / 0)
    queue.worker.submit("film", lambda: queue.done.append("film"))
    assert queue.worker.wait(10) and queue.done == ["film"]
    assert queue.reports == [("adapt", None), (None, "ZeroDivisionError: division by zero"),
                             ("film", None), (None, None)]


def test_stop_ends_a_job_that_runs(queue):
    def endless():
        while True:
            queue.worker.check()
    queue.worker.submit("adapt", endless)
    queue.worker.stop()
    assert not queue.worker.thread.is_alive()
    with pytest.raises(Stopped):
        queue.worker.check()


# ---------------------------------------------------------------- what is refused
@pytest.mark.parametrize("arguments, word", [
    ("--port 8080", "--port goes with --view"), ("--host 0.0.0.0", "--host goes with --view"),
    ("--view {finished} --evaluate {finished}", "two commands"),
    ("--view {finished} --set hidden=8", "--set is for training"),
    ("--view {finished} --goals x.npy", "--goals goes with --evaluate"),
    ("--view {finished} --port 65536", "65535"), ("--view {finished} --task all", "name one task")])
def test_bad_argument_is_refused_in_one_line(finished, capsys, arguments, word):
    assert word in refused(capsys, *arguments.format(finished=finished).split())


def test_missing_packages_are_named_in_one_line(finished, capsys, monkeypatch):
    for name in ("tools.view", "tools.view_scene"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "viser", None)
    line = refused(capsys, "--view", finished)
    assert "--view needs viser" in line and "pip install -r requirements-extra.txt" in line


def test_taken_port_is_told_in_one_line(finished, capsys):
    """viser itself would take the next one."""
    pytest.importorskip("mjviser")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 is taken: choose another with --port" in refused(
            capsys, "--view", finished, "--port", port)
    assert "cannot serve on 192.0.2.1:8080" in refused(
        capsys, "--view", finished, "--host", "192.0.2.1")
    assert "give --task push" in refused(capsys, "--view", finished, "--task", "ant")
    assert "is a file" in refused(capsys, "--view", finished, "--out", finished / "policy.pt")


# ---------------------------------------------------------------- the page without a browser
@pytest.fixture
def page(adapter, tmp_path):
    pytest.importorskip("mjviser")
    from tools.view import Page, open_server
    server = open_server("127.0.0.1", 0)
    page = Page(server, Session(PUSH, adapter, 0, 1), "push", tmp_path, 3, 1)
    assert page.worker.wait()
    yield page
    page.close()


def click(callback, **event):
    asyncio.run(callback(SimpleNamespace(**event)))


def test_two_clicks_make_one_adaptation(page):
    page.count.value = 2
    for _ in range(2):
        click(page._adapt)
    assert page.worker.wait() and len(page.session.steps) == 3
    assert page.timeline.options == ("0", "1", "[2]") and "The ghost is step 1" in (
        page.caption.content)
    first = page.session.steps[2].distance
    assert np.array_equal(page.distances.data[1], [step.distance for step in page.session.steps])
    assert len(page.rewards.data) == 1 + 20 and page.rewards.visible
    click(page._chosen, target=SimpleNamespace(value="0"))
    assert page.timeline.options == ("[0]", "1", "2") and not page.rewards.visible
    click(page._more)
    assert page.worker.wait() and len(page.session.steps) == 4
    click(page._adapt)
    assert page.worker.wait() and [s.distance for s in page.session.steps][2:] == [first]
    click(page._reset)
    assert page.worker.wait() and len(page.session.steps) == 1 and page.shown == 0


def test_goal_outside_the_training_range_changes_colour_and_text(page):
    inside = page.goal.marks[0].color
    assert "inside the training range" in page.goal.text.content
    page.goal.handle.position = (0.3, 1.0, 0.0)
    click(page.goal._dragged, phase="end")
    assert "**The goal is outside the training range.**" in page.goal.text.content
    assert page.goal.marks[0].color != inside
    assert [slider.value for slider in page.goal.sliders] == [0.3, 1.0]
    assert page.worker.wait() and np.array_equal(page.session.goal, [0.3, 1.0])
    page.goal.sliders[0].value = -9.0  # the table ends at -0.4
    click(page.goal._slid, client=object())
    assert page.worker.wait() and np.array_equal(page.session.goal, [-0.4, 1.0])
    click(page._random)
    assert page.worker.wait() and PUSH.in_training_range(page.session.goal)


def test_goal_that_moves_ends_the_adaptation_to_the_old_one(page):
    page.count.value = 10
    click(page._adapt)
    page.goal.put(GOAL)
    page._goal_moved()
    assert page.worker.wait() and len(page.session.steps) == 1
    assert np.array_equal(page.session.goal, GOAL) and page.progress.value == 0


def test_closing_the_page_ends_an_adaptation(page):
    page.count.value = 10
    click(page._adapt)
    while page.worker.running != "adapt":
        time.sleep(0.001)
    page.close()
    assert not page.worker.thread.is_alive() and len(page.session.steps) < 11


@pytest.mark.parametrize("opengl", [True, False])
def test_film_is_saved_and_sent_to_the_one_who_asked(page, tmp_path, monkeypatch, opengl):
    click(page._more)
    sent, stages = [], []

    def draw(out, family, shown, tasks):
        stages.extend(shown)
        if opengl:
            (out / "before_after.gif").write_bytes(b"film")
    monkeypatch.setattr("tools.view_session.draw_film", draw)
    assert page.worker.wait()
    click(page._film, client=SimpleNamespace(send_file_download=lambda *file: sent.append(file)))
    assert page.worker.wait() and stages == [0, 1]
    assert sent == [("before_after.gif", b"film")] * opengl
    assert (str(tmp_path) if opengl else "OpenGL is missing") in page.status.content


def test_page_serves_this_machine_only(page):
    assert page.server.get_host() == "127.0.0.1"


@pytest.mark.slow
def test_a_step_takes_less_than_a_second_and_a_half(tmp_path):
    """From the click until all of it is sent. At best: other programs may want the cores."""
    pytest.importorskip("mjviser")
    from tools.view import Page, open_server
    family, adapter, content = load_adapter(POLICY)
    page = Page(open_server("127.0.0.1", 0), Session(family, adapter, threads=1), "push",
                tmp_path, content["settings"].test_episodes, threads=1)
    assert page.worker.wait()
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        click(page._more)
        assert page.worker.wait()
        seconds.append(time.monotonic() - start)
    page.close()
    assert min(seconds) < 1.5
