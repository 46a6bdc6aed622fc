r"""Many runs of run.py, some at a time: on this machine, or on a Ray cluster.

    python tools/sweep.py --tasks push ant --methods gmps maml pearl --seeds 5
    python tools/sweep.py --tasks push --seeds 3 --set meta_steps=300 --out runs/short
    python tools/sweep.py --tasks push --seeds 5 --address auto --out /shared/runs   # on a cluster
    python tools/sweep.py --tasks push --seeds 5 --print | xargs -d '\n' -P 2 -I {} sh -c '{}'

Every run is one run.py in a process of its own, on one thread. The same command started again goes
on where it was; finished runs are left alone. On a cluster, the code and --out must lie in folders
that all nodes share. A run whose node dies goes on elsewhere, from its last checkpoint.
Exit code: 1 if a run failed.
"""
import argparse
import contextlib
import ctypes
import dataclasses
import heapq
import importlib.util
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import filelock
from loky import cpu_count

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import run as command_line
from baselines import METHODS
from checkpoints import open_run
from settings import Settings, UserError
from tasks import TASKS
from tools.tables import by_seed

TRIES = 5          # of a run whose node dies
PATIENCE = 600.0   # seconds that a retry waits for the folder's lock; NFS frees a dead node's late
REFRESH = 1.0      # seconds between two looks at the runs
STARTING = 6.0     # seconds of a run outside its phases: start and pictures
HANDED = ("preset", "reward", "experts", "track")  # options that run.py gets as they are
# What follows a phase, by the first word of its progress bar: keys of "wall_seconds" in result.json
LATER = {"experts": ("meta_training", "curve", "evaluation"), "meta-training": ("evaluation",),
         "evaluation": ()}


@dataclasses.dataclass
class Run:
    """One run of run.py, and how it fares."""
    settings: Settings
    out: Path
    arguments: list[str]
    measured: dict[str, float]  # seconds of each phase, as results/ has them; {} if it has none
    state: str = "waiting"      # then "running", "done" or "failed"
    fault: str = ""             # why it failed
    tries: int = 0
    sign: str = ""              # first line of the log of the current try

    @property
    def name(self) -> str:
        settings = self.settings
        return f"{settings.task} {settings.method} seed {settings.seed}"


# ---------------------------------------------------------------- which runs
def plan(options) -> list[Run]:
    """The runs that the options name, all of them checked. UserError for what does not fit."""
    runs = []
    for task in dict.fromkeys(TASKS if "all" in options.tasks else options.tasks):
        for method in dict.fromkeys(options.methods):
            words = ["--task", task, "--method", method, *(f"--set={text}" for text in options.set)]
            for name in HANDED:
                if getattr(options, name) is not None:
                    words += [f"--{name}", getattr(options, name)]
            if options.quick:
                words.append("--quick")
            chosen = command_line.choose_settings(command_line.parse(words), task, 0)
            if options.gpus:
                words += ["--device", "cuda"]
            for seed in range(options.seeds):
                settings = dataclasses.replace(chosen, seed=seed)
                out = options.out / command_line.usual_folder(settings, options.quick)
                arguments = [*words, "--seed", str(seed), "--threads", "1", "--out", str(out)]
                one = Run(settings, out, arguments, {} if options.quick else measured(settings))
                if (out / "result.json").exists():
                    open_run(out, settings)  # UserError if it is the result of other settings
                    one.state = "done"
                runs.append(one)
    return runs


def measured(settings: Settings) -> dict[str, float]:
    """{phase: mean seconds} of the runs in results/ of that task and method."""
    folder = ROOT / "results" / command_line.usual_folder(settings, False).parent
    found = [result["wall_seconds"] for result in by_seed(folder, "seed*/result.json")]
    return {phase: sum(seconds.get(phase, 0.0) for seconds in found) / len(found)
            for phase in (found[0] if found else ())}


def makespan(seconds: list[float], slots: int) -> float:
    """Seconds until all have ended, if each starts as soon as one of the slots is free."""
    ends = [0.0] * slots
    for duration in seconds:
        heapq.heapreplace(ends, ends[0] + duration)
    return max(ends)


def forecast(runs: list[Run], slots: int) -> str:
    """What the sweep says beforehand."""
    todo = [one for one in runs if one.state == "waiting"]
    known = [sum(one.measured.values()) + STARTING for one in todo if one.measured]
    parts = [f"{len(todo)} of {len(runs)} runs to do, {slots} at a time"]
    if known:
        parts.append(f"about {clock(makespan(known, slots))} by the times in results/, where they "
                     "had the usual settings")
    if len(known) < len(todo):
        parts.append(f"not counted: {len(todo) - len(known)} without times in results/")
    return "; ".join(parts)


def clock(seconds: float) -> str:
    """ "1:02:03" (hours, minutes, seconds) or "2:03" (minutes, seconds). """
    minutes, rest = divmod(round(seconds), 60)
    return (f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60
            else f"{minutes}:{rest:02d}")


# ---------------------------------------------------------------- one try, on whatever node
def attempt(arguments: list[str], out: Path, sign: str, patience: float) -> str:
    """Run run.py and wait for its end. Returns what went wrong; "" if nothing did."""
    out.mkdir(parents=True, exist_ok=True)
    # A node that was given up may still be at work: its run holds the lock until it ends.
    try:
        with filelock.FileLock(out / ".lock").acquire(timeout=patience):
            pass
    except filelock.Timeout:
        return f"another process works in {out}"
    if (out / "result.json").exists():
        return ""
    with open(out / "log.txt", "w") as log:
        print(sign, "on", platform.node(), file=log, flush=True)
        done = subprocess.run(
            [sys.executable, str(ROOT / "run.py"), *arguments], cwd=ROOT, stdout=log, stderr=log,
            stdin=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"},
            preexec_fn=end_with_parent)
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}"
    return last_line(out / "log.txt") if done.returncode else ""


def end_with_parent() -> None:
    """On Linux: SIGKILL for this process once its parent is dead, even if that was killed.

    A node's end would otherwise leave its run at work, and in the folder.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def last_line(log: Path) -> str:
    """The last line of a log that is not empty. A progress bar draws its lines over one another."""
    lines = [line.strip() for line in re.split(r"[\r\n]", tail(log))]
    return next((line for line in reversed(lines) if line), "its log is empty")


def tail(path: Path, size: int = 4000) -> str:
    """The end of a text file; "" if it cannot be read."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - size))
        return file.read().decode(errors="replace")
    return ""


# ---------------------------------------------------------------- how the runs fare
def look(one: Run) -> None:
    """A run in Ray's hands waits until its current try has begun a log."""
    with contextlib.suppress(OSError), open(one.out / "log.txt", errors="replace") as log:
        if log.readline().startswith(f"{one.sign} on "):
            one.state = "running"


def progress(one: Run) -> tuple[str, str, str]:
    """(phase, steps, time left) of a running run, from the last progress bar in its log.

    Time left: what the bar says, and what results/ says of the phases to come. ">" if it says
    nothing of them.
    """
    bars = re.findall(r"([\w-]+)(?: \([\w ]+\))? *: +(\d+)%[^\r\n]*\[[\d:]+<([\d:?]+)([^\r\n]*)",
                      tail(one.out / "log.txt"))
    if not bars:
        return "start", "", ""
    phase, percent, left, rest = bars[-1]
    steps = re.search(r"steps=([\d,]*\d)", rest)
    shown = ""
    if "?" not in left:
        seconds = 0
        for part in left.split(":"):
            seconds = 60 * seconds + int(part)
        later = LATER.get(phase, ())
        unknown = bool(later) and not one.measured
        shown = ">" * unknown + clock(seconds + sum(one.measured.get(key, 0.0) for key in later))
    return f"{phase} {percent}%", steps[1] if steps else "", shown


def table(runs: list[Run], height: int) -> list[str]:
    """Counts, then a row per run in at most `height` lines: first those that need a look."""
    states = ("running", "failed", "waiting", "done")
    counts = {state: sum(one.state == state for one in runs) for state in states}
    wide = max(len(one.name) for one in runs) + 2
    lines = [", ".join(f"{counts[state]} {state}" for state in states),
             f"{'run':<{wide}}{'state':<17}{'phase':<20}{'steps':>10}{'left':>10}"]
    ordered = sorted(runs, key=lambda one: states.index(one.state))
    room = height - len(lines)
    shown = ordered if len(ordered) <= room else ordered[:room - 1]
    for one in shown:
        state = one.state if one.tries < 2 else f"{one.state} (try {one.tries})"
        line = f"{one.name:<{wide}}{state:<17}"
        if one.state == "running":
            phase, steps, left = progress(one)
            line += f"{phase:<20}{steps:>10}{left:>10}"
        elif one.state == "failed":
            line += one.fault
        lines.append(line.rstrip())
    if len(shown) < len(ordered):
        lines.append(f"... and {len(ordered) - len(shown)} more")
    return lines


class Screen:
    """Shows the table in place. In a file: a line whenever a run's state changes."""

    def __init__(self, runs: list[Run]):
        self.runs, self.height = runs, 0
        self.states = {one.name: one.state for one in runs}

    def show(self) -> None:
        if sys.stdout.isatty():
            columns, lines = shutil.get_terminal_size()
            # A longer line would wrap, and the way back up would be too short.
            rows = [row[:columns - 1] for row in table(self.runs, lines - 1)]
            up = f"\x1b[{self.height}A" if self.height else ""
            print(f"{up}\x1b[J" + "\n".join(rows), flush=True)
            self.height = len(rows)
            return
        for one in self.runs:
            state = f"{one.state}{f', try {one.tries}' * (one.tries > 1)}"
            if self.states[one.name] != state:
                self.states[one.name] = state
                print(f"{one.name}: {state}", flush=True)


# ---------------------------------------------------------------- on Ray
def start_ray(options):
    """(ray, runs at a time). UserError if the cluster does not answer."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would call home
    os.environ.setdefault("RAY_worker_niceness", "0")      # else runs give way to everything else
    import ray
    quiet = dict(logging_level="ERROR", log_to_driver=False)
    host, _, port = (options.address or "").rpartition(":")
    try:
        if host and port.isdecimal():  # Ray itself would knock for a quarter of an hour
            socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=10).close()
        if options.address:
            ray.init(address=options.address, **quiet)
        else:
            ray.init(address="local", num_cpus=options.jobs * options.cores,
                     include_dashboard=False, object_store_memory=10 ** 8, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"no Ray cluster at {options.address or 'this machine'}: "
                        f"{str(error).splitlines()[0]}") from None
    there = ray.cluster_resources()
    cpus, gpus = there.get("CPU", 0), there.get("GPU", 0)
    slots = int(cpus / options.cores + 1e-6)
    if options.gpus:
        slots = min(slots, int(gpus / options.gpus + 1e-6))
    if slots < 1:
        ray.shutdown()
        raise UserError(f"no room for a run: Ray has {cpus:g} cores and {gpus:g} GPUs")
    return ray, slots


def sweep(ray, runs: list[Run], cores: int, gpus: float, show) -> None:
    """Let Ray do the runs that are waiting. `show()` is called about every second."""
    # Ray's own retries could not tell the next try that it is one.
    remote = ray.remote(attempt).options(num_cpus=cores, num_gpus=gpus, max_retries=0)
    pending = {}

    def submit(one):
        one.tries, one.state = one.tries + 1, "waiting"
        one.sign = f"sweep {os.getpid()} {time.time():.3f}, try {one.tries}"
        pending[remote.remote(one.arguments, one.out, one.sign,
                              PATIENCE if one.tries > 1 else 0.0)] = one
    for one in runs:
        if one.state == "waiting":
            submit(one)
    try:
        while pending:
            ready, _ = ray.wait(list(pending), timeout=REFRESH)
            for handle in ready:
                one = pending.pop(handle)
                try:
                    one.fault = ray.get(handle)
                except ray.exceptions.RayTaskError as error:  # a fault of `attempt` itself
                    one.fault = str(error).strip().splitlines()[-1]
                except ray.exceptions.RayError as error:  # its node died, or Ray's process there
                    if one.tries < TRIES:
                        submit(one)
                        continue
                    one.fault = f"given up after {TRIES} tries: {type(error).__name__}"
                one.state = "failed" if one.fault else "done"
            for one in pending.values():
                look(one)
            show()
    finally:
        for handle in pending:  # after Ctrl-C
            ray.cancel(handle, force=True)


# ---------------------------------------------------------------- the command line
def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line.Parser(description=__doc__, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--tasks", nargs="+", default=["push"], help=f"{', '.join(TASKS)}, or all")
    option("--methods", nargs="+", default=["gmps"], help=f"of {', '.join(METHODS)}")
    option("--seeds", type=int, default=1, metavar="N", help="seeds 0 to N - 1 of each (default 1)")
    option("--out", type=Path, default=Path("runs"), help="runs go to OUT/TASK/METHOD/seedSEED "
           "(default runs); give other settings another one")
    option("--set", action="append", default=[], metavar="NAME=VALUE", help="as for run.py")
    option("--quick", action="store_true", help="as for run.py")
    for name in HANDED:
        option(f"--{name}", help="as for run.py")
    option("--jobs", type=int, help="runs at a time on this machine (default: as many as it has "
           "cores for)")
    option("--cores", type=int, default=1, help="cores that a run is counted for (default 1)")
    option("--gpus", type=float, default=0.0, help="for each run, 0.25 say, with --device cuda")
    option("--address", help="a Ray cluster: HOST:PORT, or auto on one of its nodes")
    option("--print", action="store_true", help="print the commands, one a line, and run nothing; "
           "needs no Ray")
    options = parser.parse_args(arguments)
    if options.jobs and options.address:
        raise UserError("--jobs is for this machine: a cluster runs as many as it has --cores for")
    if options.jobs is None:
        options.jobs = max(1, cpu_count() // max(1, options.cores))
    for name in ("seeds", "jobs", "cores"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(options, name)}")
    if options.gpus < 0:
        raise UserError(f"--gpus must be at least 0, not {options.gpus}")
    if not options.print:
        if importlib.util.find_spec("ray") is None:
            raise UserError("a sweep needs Ray: pip install -r requirements-extra.txt, or --print "
                            "the commands")
        options.out = options.out.resolve()  # Ray works in another folder
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        options = parse(arguments)
        runs = plan(options)
        if options.print:
            for one in runs:
                if one.state == "waiting":
                    print("OMP_NUM_THREADS=1 python run.py", shlex.join(one.arguments))
            return 0
        if all(one.state == "done" for one in runs):
            print(f"all {len(runs)} runs are finished: see {options.out}")
            return 0
        ray, slots = start_ray(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(forecast(runs, slots), flush=True)
    try:
        sweep(ray, runs, options.cores, options.gpus, Screen(runs).show)
    except KeyboardInterrupt:
        print("stopped: the same command goes on from the last checkpoints", file=sys.stderr)
        return 130
    finally:
        ray.shutdown()
    for one in runs:
        if one.state == "done":
            print(f"{one.name}: {one.out / 'result.json'}")
    failed = [one for one in runs if one.state == "failed"]
    for one in failed:
        print(f"{one.name} failed: {one.fault} ({one.out / 'log.txt'})")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
