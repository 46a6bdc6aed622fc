"""The rows of metrics.csv, sent to a tracker as they come.

    python run.py --task push --track tensorboard      # then: tensorboard --logdir runs
    python run.py --task push --track wandb            # WANDB_MODE=offline needs no account

A tracker only reads. The run's own files are the same with and without it, and its package is
imported only where --track asks for it. What it writes is in a folder of its own in the run's.
"""
import contextlib
import dataclasses
import importlib.util
import math
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from settings import UserError

HIDDEN = ("phase", "progress")  # a name, and a number that metrics.csv leaves out, too


def check_installed(name: str | None) -> None:
    """UserError where the tracker's package is missing. It is not imported yet."""
    if name is not None and importlib.util.find_spec(name) is None:
        raise UserError(f"--track {name} needs {name}: pip install -r requirements-extra.txt")


@contextlib.contextmanager
def tracking(name: str | None, settings, out: Path) -> Iterator[Callable | None]:
    """What the journal calls with all rows of metrics whenever there is a new one. None: nobody."""
    if name is None:
        yield None
        return
    tracker, broken = TRACKERS[name](settings, out), False
    write = tracker.__enter__()

    # Whatever befalls a tracker (a full disk, no network) must not cost the run.
    def track(rows):
        nonlocal broken
        if broken:
            return
        try:
            write(rows[-1], len(rows))
        except Exception as error:
            broken = True
            print(f"tracking ends here: {type(error).__name__}: {error}")
    try:
        yield track
    finally:
        try:
            tracker.__exit__(None, None, None)
        except Exception as error:
            print(f"tracking did not close: {type(error).__name__}: {error}")


def numbers(row: dict) -> dict[str, float]:
    """What can be drawn of a row of metrics."""
    return {key: value for key, value in row.items()
            if key not in HIDDEN and isinstance(value, int | float) and math.isfinite(value)}


@contextlib.contextmanager
def to_tensorboard(settings, out: Path) -> Iterator[Callable]:
    """A curve per metric and phase, over the phase's iterations."""
    from torch.utils.tensorboard import SummaryWriter
    writers = {}

    def write(row, number):
        # A run that was killed comes again to rows that it had sent. `purge_step` hides the old
        # ones. It does so by iteration, so each phase has a folder of its own.
        phase, step = row["phase"], row["iteration"]
        if phase not in writers:
            writers[phase] = SummaryWriter(str(out / "tensorboard" / phase), purge_step=step)
        for key, value in numbers(row).items():
            writers[phase].add_scalar(key, value, step)
        writers[phase].flush()
    try:
        yield write
    finally:
        for writer in writers.values():
            writer.close()


@contextlib.contextmanager
def to_wandb(settings, out: Path) -> Iterator[Callable]:
    """A chart "phase/metric" per metric and phase, over the number of the row in metrics.csv."""
    import wandb
    folder = out / "wandb"
    folder.mkdir(exist_ok=True)
    # A run that goes on is the same run there. Rows that it sends twice are ignored there.
    name = folder / "id"
    if not name.exists():
        name.write_text(uuid.uuid4().hex[:8])
    quiet = wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True)
    try:
        session = wandb.init(project="gmps", id=name.read_text(), resume="allow", dir=str(out),
                             name=f"{settings.task} {settings.method} seed {settings.seed}",
                             config=dataclasses.asdict(settings), settings=quiet)
    except wandb.Error as error:
        raise UserError(f"wandb: {str(error).splitlines()[0]} (WANDB_MODE=offline needs no "
                        "account)") from None
    with session:
        def write(row, number):
            session.log({f"{row['phase']}/{key}": value for key, value in numbers(row).items()},
                        step=number)
        yield write


TRACKERS = {"tensorboard": to_tensorboard, "wandb": to_wandb}
