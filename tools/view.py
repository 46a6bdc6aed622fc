"""The live page: set a goal, let a policy adapt to it, and watch. `python run.py --view DIR`.

    python run.py --task push --view results/push/gmps/policy    # then open http://127.0.0.1:8080

Built on viser and mjviser (requirements-extra.txt), which only this file and view_scene.py import.
Three threads share the work. viser's thread runs the callbacks of buttons; none of them computes.
The worker computes (tools/view_session.py). The main thread plays episodes until Ctrl-C.
"""
import contextlib
import errno
import io
import socket
import time
from pathlib import Path

import numpy as np
import torch
import viser

from settings import UserError
from tasks.base import MujocoFamily
from tools.view_scene import Goal, Robot
from tools.view_session import Session, Worker

PICTURES, PAUSE = 30, 1.0  # pictures a second; seconds at the end of an episode
ROLLOUTS_SHOWN = 20  # curves of rewards


# ---------------------------------------------------------------- the page
class Page:
    """Everything that a browser shows. All browsers see the same."""

    def __init__(self, server: viser.ViserServer, session: Session, title: str, out: Path,
                 episodes: int, threads: int):
        self.server, self.session, self.out = server, session, out
        self.shown, self.began = 0, time.monotonic()
        family, self.what = session.family, session.what
        self.column, self.factor, self.digits = family.table
        server.gui.configure_theme(show_logo=False, show_share_button=False,
                                   control_width="medium")
        server.gui.main_panel.dock_right()
        self.worker = Worker(self._report)
        self.robot = Robot(server, family)
        self._controls(title, episodes)
        self._curves()
        # OpenMP counts the threads of torch for each thread that asks.
        self.worker.submit("threads", lambda: torch.set_num_threads(threads))
        self._goal_moved()

    def _controls(self, title: str, episodes: int) -> None:
        gui = self.server.gui
        gui.add_markdown(f"{title}. The policy does not see the goal. Only its rewards depend on "
                         "the goal.")
        self.goal = Goal(self.server, self.session.family, self._goal_moved)
        button = gui.add_button
        random = button("Random goal")
        self.episodes = gui.add_slider("Rollouts per step", 2, max(100, episodes), 1, episodes)
        self.count = gui.add_slider(f"{self.what.capitalize()}s", 1, 10, 1, 3)
        self.noise = gui.add_checkbox("Exploration noise in rollouts", True)
        self.adapt = button("Adapt", color="green", hint="Start again, and take these steps.")
        self.more = button("One more step")
        reset = button("Reset", hint="Back to the policy before any step.")
        self.progress = gui.add_progress_bar(0.0)
        self.status = gui.add_markdown("")
        self.timeline = gui.add_button_group(f"After {self.what}", ("0",))
        self.caption = gui.add_markdown("")
        self.film = button("Save film")
        for handle, callback in ((random, self._random), (self.adapt, self._adapt),
                                 (self.more, self._more), (reset, self._reset),
                                 (self.timeline, self._chosen), (self.film, self._film)):
            handle.on_click(callback)

    def _curves(self) -> None:
        panel = self.server.gui.add_panel()
        with panel.add_tab("Curves", viser.Icon.CHART_LINE):
            self.distances = self._plot(f"{self.column}, by {self.what}", "#1c7ed6")
            self.returns = self._plot(f"return per episode, by {self.what}", "#e8590c")
            self.told = self.server.gui.add_markdown("")
            self.rewards = self._plot("reward of each time step", "#2b8a3e", ROLLOUTS_SHOWN)
        panel.dock_left()
        panel.set_width(330)

    def _plot(self, title: str, colour: str, curves: int = 1):
        """An empty plot; `_draw` fills it."""
        line = {"stroke": colour, "width": 2 if curves == 1 else 1,
                "points": {"show": curves == 1, "size": 8}, "label": title}
        return self.server.gui.add_uplot(
            (np.zeros(1),) * (1 + curves), ({"label": ""},) + (line,) * curves, title=title,
            axes=({"incrs": [1, 2, 5, 10, 20, 50, 100]}, {}), legend={"show": False},
            scales={"x": {"time": False}}, padding=(12, 24, 0, 0), height=160)

    # ---- callbacks: none of them computes
    async def _random(self, event) -> None:
        self.goal.put(self.session.family.sample_tasks(np.random.default_rng(), 1)[0])
        self._goal_moved()

    async def _reset(self, event) -> None:
        self._goal_moved()

    def _goal_moved(self) -> None:
        """What was learned belongs to the old goal: start again."""
        self.worker.submit("restart", self._restart, latest=True)

    async def _adapt(self, event) -> None:
        count, episodes, noise = self.count.value, self.episodes.value, self.noise.value
        self.worker.submit("adapt", lambda: self._steps(count, episodes, noise, fresh=True))

    async def _more(self, event) -> None:
        episodes, noise = self.episodes.value, self.noise.value
        self.worker.submit("adapt", lambda: self._steps(1, episodes, noise, fresh=False))

    async def _chosen(self, event) -> None:
        self._show(int(event.target.value.strip("[]")))

    async def _film(self, event) -> None:
        number, client = self.shown, event.client
        self.worker.submit("film", lambda: self._save(number, client))

    # ---- jobs: they run on the worker
    def _restart(self) -> None:
        self.session.restart(self.goal.task, self._share(0, 1))
        self._show(0)

    def _steps(self, count: int, episodes: int, noise: bool, fresh: bool) -> None:
        if fresh and len(self.session.steps) > 1:
            self._restart()
        for number in range(count):
            if self.worker.waiting("restart"):  # the goal has moved on
                return
            self.status.content = f"Computing {self.what} {len(self.session.steps)}."
            self.session.step(episodes, noise, self._share(number, count))
            self._show(len(self.session.steps) - 1)

    def _share(self, number: int, count: int):
        """A callback for part `number` of `count` that moves the progress bar."""
        def progress(share: float) -> None:
            self.worker.check()
            percent = round(100 * (number + share) / count)
            if percent % 2 == 0:  # a message of each step would flood the browser
                self.progress.value = percent
        return progress

    def _save(self, number: int, client) -> None:
        self.status.content = "Drawing the film."
        path = self.session.film(number, self.out)
        if path is None:
            self.note = "**No film.** OpenGL is missing, see README."
        else:
            self.note = f"The film is {path}."
            client.send_file_download(path.name, path.read_bytes())

    def _report(self, kind: str | None, error: str | None) -> None:
        """Before and after every job."""
        busy = kind is not None
        self.adapt.disabled = self.more.disabled = self.film.disabled = busy
        self.progress.animated = busy
        if busy:
            self.note = "Ready."  # unless the job finds something else to say
        else:
            self.progress.value = 0.0
            self.status.content = f"**Failed.** {error}" if error else self.note

    # ---- what is shown
    def _show(self, number: int) -> None:
        """Play step `number` from its start, the one before as ghost; mark it in the timeline."""
        steps = self.session.steps
        number = min(number, len(steps) - 1)  # the goal may have moved since the click
        if number < 0:
            return
        self.shown, self.began = number, time.monotonic()
        step = steps[number]
        self.timeline.options = tuple(f"[{k}]" if k == number else str(k)
                                      for k in range(len(steps)))
        ghost = f" The ghost is step {number - 1}." if number else ""
        name = self.column.split(" (")[0]
        unit = self.column.partition("(")[2].rstrip(")")
        self.caption.content = (
            f"The robot plays step {number}, without noise.{ghost} Return {step.total:.1f}, "
            f"{name} {self.factor * step.distance:.{self.digits}f} {unit}.")
        x = np.arange(len(steps))
        self._draw(self.distances, x, [[self.factor * s.distance for s in steps]])
        self._draw(self.returns, x, [[s.total for s in steps]])
        self._show_rewards(number, step.rewards)

    def _show_rewards(self, number: int, rewards: np.ndarray | None) -> None:
        self.rewards.visible = rewards is not None
        if rewards is None:
            self.told.content = "At step 0 the policy has seen no reward."
            return
        alike = np.ptp(rewards, axis=0).max() == 0
        self.told.content = (
            f"These rewards of {len(rewards)} rollouts led to step {number}. They are all that the "
            "policy ever sees of the goal." + (" All rollouts are alike: without noise there is "
                                               "nothing to compare." if alike else ""))
        some = rewards[np.arange(ROLLOUTS_SHOWN) % len(rewards)]
        self._draw(self.rewards, np.arange(1, rewards.shape[1] + 1), some)

    @staticmethod
    def _draw(plot, x, curves) -> None:
        """Curves (curves, x) in a plot whose axis of y holds 0."""
        low, high = min(0.0, np.min(curves)), max(0.0, np.max(curves))
        margin = 0.1 * (high - low) or 1.0
        plot.scales = {"x": {"time": False, "range": (0.0, float(max(3, x[-1])))},
                       "y": {"range": (float(low - (low < 0) * margin), float(high + margin))}}
        plot.data = tuple(np.asarray(values, float) for values in (x, *curves))

    def play(self) -> None:
        """Show pictures of the chosen step for ever."""
        last, pause = None, 1.0 / PICTURES
        family, model = self.session.family, self.robot.model
        seconds = family.frame_skip * model.opt.timestep  # of a step of the environment
        while True:
            time.sleep(pause)
            steps, number = self.session.steps, self.shown
            if not self.server.get_clients() or number >= len(steps):
                continue
            played = [steps[k].states for k in (number, number - 1) if k >= 0]
            row = int((time.monotonic() - self.began) / seconds)
            if row * seconds > max(map(len, played)) * seconds + PAUSE:
                self.began, row = time.monotonic(), 0
            states = [part[min(row, len(part) - 1)] for part in played]
            now = self.began, *(min(row, len(part) - 1) for part in played)
            if now != last:  # else the picture stands already
                self.robot.show(states[0], states[1] if number else None)
                last = now

    def close(self) -> None:
        self.worker.stop()
        self.session.close()
        self.server.stop()


# ---------------------------------------------------------------- the command
def open_server(host: str, port: int) -> viser.ViserServer:
    """A server on exactly that address. UserError where it is taken or none of ours."""
    try:  # viser would take the next port, silently
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is taken: choose another with --port") from None
        reason = error.strerror.partition(" (")[0]
        raise UserError(f"cannot serve on {host}:{port} ({reason}): choose another --host or "
                        "--port") from None
    with contextlib.redirect_stdout(io.StringIO()):  # viser's own banner
        return viser.ViserServer(host=host, port=port, label="Adaptation", verbose=False)


def view(adapter, family, title: str, options, episodes: int) -> None:
    """Serve the page until Ctrl-C."""
    if not isinstance(family, MujocoFamily):
        raise UserError(f"--view shows MuJoCo tasks: {family.name} is none")
    host, port = options.host or "127.0.0.1", 8080 if options.port is None else options.port
    out = options.out or Path("runs") / "view" / family.name
    if out.is_file():
        raise UserError(f"--out {out} is a file: name a folder for the films")
    server = open_server(host, port)
    session = Session(family, adapter, options.seed, options.threads)
    page = Page(server, session, title, out, episodes, options.threads)
    print(f"http://{host}:{server.get_port()} (Ctrl-C ends)", flush=True)
    try:
        page.play()
    except KeyboardInterrupt:
        print("closed")
    finally:
        with contextlib.redirect_stdout(io.StringIO()):
            page.close()
