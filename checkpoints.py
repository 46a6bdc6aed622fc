"""Files of a run: atomic writes, checkpoints, the journal in them, locks, files from a user.

Whatever goes wrong here is a `UserError`: one line that says what to do.
"""
import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import json
import os
import pickle
import struct
import subprocess
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import filelock
import numpy as np
import torch

import baselines
import settings as settings_module
from local_policies import Demonstrations, load_demonstrations
from settings import UserError
from tasks.base import TaskFamily, check_tasks

FORMAT = "gmps checkpoint 4"  # raise the number when old files can no longer be read
DIGEST = b"sha256:"           # then 64 hexadecimal digits, at the end of a checkpoint


# ---------------------------------------------------------------- writing
def write_atomically(path: Path, write: Callable, mode: str = "wb") -> None:
    """Write to a second file, then rename it.

    A reader always finds a complete file, the old or the new one, even if this process is killed.
    """
    # In the same folder, since a rename across file systems is no single act.
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, mode) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # else a crash may leave the new name with no content
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error.strerror or error}; what was saved before is "
                        "intact: make room and run the same command again to go on") from None


def write_json(path: Path, content: dict) -> None:
    text = json.dumps(content, indent=1, allow_nan=False)
    write_atomically(path, lambda file: file.write(text), "w")


def save_checkpoint(path: Path, kind: str, settings, content: dict) -> None:
    """A file that torch.load reads, with a digest behind it."""
    buffer = io.BytesIO()  # torch.save hides a full disk behind an exception of its own
    torch.save({"format": FORMAT, "kind": kind, "settings": dataclasses.asdict(settings),
                **content}, buffer)
    # Read it back now: a method's state may hold what could be written and never read again. On
    # "meta" that skips the numbers of tensors, which may be a whole replay.
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True, map_location="meta")
    except pickle.UnpicklingError:
        raise UserError(f"{path} would not be readable: a state may hold Python numbers, strings, "
                        "lists, dicts and tensors only, no numpy arrays or objects") from None
    body = buffer.getvalue()
    digest = DIGEST + hashlib.sha256(body).hexdigest().encode()
    write_atomically(path, lambda file: file.write(body + digest))


# ---------------------------------------------------------------- reading
def load_checkpoint(path: Path, kind: str) -> dict:
    """What `save_checkpoint` wrote, verified; UserError for a missing, damaged or foreign file."""
    damaged = UserError(f"{path} is truncated, damaged or not a checkpoint of this program: name "
                        "another folder, or delete it to train anew")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no {path}: train first, or name the folder of a finished run") from None
    except OSError:
        raise damaged from None
    # The zip's own checksums miss its headers; the digest covers every byte.
    body, digest = raw[:-len(DIGEST) - 64], raw[-len(DIGEST) - 64:]
    whole = digest == DIGEST + hashlib.sha256(body).hexdigest().encode()
    if digest.startswith(DIGEST) and not whole:  # torch.load may fail on it in any way
        raise damaged
    try:
        content = torch.load(io.BytesIO(body if whole else raw), weights_only=True,
                             map_location="cpu")
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, struct.error, TypeError,
            AttributeError, pickle.UnpicklingError):
        raise damaged from None
    written = content.get("format") if isinstance(content, dict) else None
    ours = isinstance(written, str) and written.startswith(FORMAT.rstrip("0123456789"))
    if ours and written != FORMAT:
        raise UserError(f"{path} was written by another version of this program: use that version, "
                        "or train anew in another folder")
    if not ours or content.get("kind") != kind:
        raise UserError(f"{path} is not a {kind} checkpoint of this program: delete it, or name "
                        "another folder")
    if not whole:
        raise damaged
    # Settings that are missing must not be filled in silently: the policy was not trained so.
    try:
        method = baselines.load(content["settings"]["method"])
        content["settings"] = settings_module.from_dict(content["settings"], method.Settings)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} was written with other settings ({error}): use the version that "
                        "wrote it, or train anew in another folder") from None
    return content


def read_goals(path: Path, family: TaskFamily) -> np.ndarray:
    """(n, task) from an npy file."""
    advice = f"save an array of shape (n, {family.task_size}) with numpy.save"
    try:
        with open(path, "rb") as file:  # numpy leaves a truncated archive open that it opened
            goals = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"no goals file {path}: {advice}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        raise UserError(f"{path} is no npy file: {advice}") from None
    if not isinstance(goals, np.ndarray):
        raise UserError(f"{path} is an npz archive, not an npy file: {advice}")
    try:
        return check_tasks(family, goals)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def read_demonstrations(path: Path, family: TaskFamily) -> tuple[np.ndarray, Demonstrations, int]:
    """What `local_policies.load_demonstrations` gives, its tasks checked."""
    try:
        tasks, demonstrations, env_steps = load_demonstrations(path, family)
        return check_tasks(family, tasks), demonstrations, env_steps
    except FileNotFoundError:
        raise UserError(f"no demonstrations file {path}: --demos takes an npz with tasks, "
                        "observations, actions; or a Minari dataset") from None
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile,
            zlib.error) as error:
        reason = "it is truncated or no npz file"
        if isinstance(error, ValueError):
            reason = str(error).splitlines()[0]
        raise UserError(f"{path}: {reason}") from None


# ---------------------------------------------------------------- what a run counts
# Of metrics.csv; a method's further metrics follow. imitation_k: the last meta-step's imitation
# loss after k = 0, 1 inner steps. weight: w of the inner loss after that meta-step.
COLUMNS = ("phase", "iteration", "env_steps", "return", "distance", "adapted_return",
           "adapted_distance", "imitation_0", "imitation_1", "gradient_norm", "weight_mean",
           "weight_max", "temperature", "critic_loss", "policy_loss", "divergences")


class Journal:
    """What a run counts: rows of metrics, curve, env steps, seconds and commits of every phase."""

    def __init__(self, out: Path, settings):
        self.out, self.settings = out, settings
        self.rows, self.curve = [], []
        # A method that asks no expert has spent nothing on one.
        self.env_steps = {"experts": 0, "meta_training": 0}
        self.wall_seconds = {"experts": 0.0, "meta_training": 0.0}
        self.commits, self.divergences = {}, {}
        self.track = None  # called with all rows whenever there is a new one: tools/track.py
        self.phase, self.since = None, time.perf_counter()

    @contextlib.contextmanager
    def timing(self, phase: str):
        """Count the seconds inside for `phase`. Nested phases: only the inner one counts."""
        self.tick()
        outer, self.phase = self.phase, phase
        if phase != "meta_training":  # it encloses all other phases; `collected` credits it
            self.credit(phase)
        try:
            yield
        finally:
            self.tick()
            self.phase = outer

    def credit(self, phase: str) -> None:
        """Note the commit for a phase. A run that resumes with other code has several."""
        commits, now = self.commits.setdefault(phase, []), commit()
        if now not in commits[-1:]:
            commits.append(now)

    def tick(self) -> None:
        """Add the seconds since the last call to the current phase."""
        now = time.perf_counter()
        if self.phase is not None:
            self.wall_seconds[self.phase] = (self.wall_seconds.get(self.phase, 0.0)
                                             + now - self.since)
        self.since = now

    def note(self, phase: str, metrics: dict) -> None:
        """Add a row of metrics and its counts; `env_steps` in it is a total, not an increment."""
        # numpy's scalars and tensors would make the checkpoint unreadable.
        metrics = {key: value.item() if hasattr(value, "item") else value
                   for key, value in metrics.items()}
        self.env_steps[phase] = int(metrics["env_steps"])
        self.divergences[phase] = (self.divergences.get(phase, 0)
                                   + metrics.get("divergences", 0))
        self.rows.append({"phase": phase} | metrics)
        if self.track is not None:
            self.track(self.rows)

    def counts(self) -> dict:
        self.tick()
        return {name: getattr(self, name) for name in (
            "rows", "curve", "env_steps", "wall_seconds", "commits", "divergences")}

    def restore(self, content: dict) -> None:
        for name in self.counts():
            setattr(self, name, content[name])

    def save(self, name: str, kind: str, content: dict) -> None:
        """A checkpoint with all counts, and metrics.csv."""
        save_checkpoint(self.out / name, kind, self.settings, content | self.counts())
        self.write_metrics()

    def load(self, name: str, kind: str) -> dict | None:
        """A checkpoint of this run; None where there is none yet."""
        if not (self.out / name).exists():
            return None
        content = load_checkpoint(self.out / name, kind)
        if content["settings"] != self.settings:
            raise UserError(f"{self.out / name} belongs to another run: choose another folder with "
                            "--out")
        return content

    def write_metrics(self) -> None:
        """metrics.csv, from all rows so far."""
        hidden = {"progress", *COLUMNS}  # progress only drives the bar and the curve
        further = dict.fromkeys(key for row in self.rows for key in row if key not in hidden)

        def write(file):
            writer = csv.DictWriter(file, [*COLUMNS, *further], restval="", lineterminator="\n",
                                    extrasaction="ignore")
            writer.writeheader()
            writer.writerows({key: f"{value:.6g}" if isinstance(value, float) else value
                              for key, value in row.items()} for row in self.rows)
        write_atomically(self.out / "metrics.csv", write, "w")


# ---------------------------------------------------------------- folders
@contextlib.contextmanager
def locked(out: Path):
    """Create `out` and hold its lock: two runs in one folder would spoil each other's files.

    The operating system frees the lock when the process ends, even if it is killed.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".write_test").touch()
        (out / ".write_test").unlink()
    except OSError as error:
        raise UserError(f"cannot write to the output folder {out}: {error.strerror}; choose "
                        "another with --out") from None
    # Not blocking: a run that waits for hours behind another looks like one that hangs.
    lock = filelock.FileLock(out / ".lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise UserError(f"another process works in {out}: wait for it, or choose another folder "
                        "with --out") from None
    try:
        yield
    finally:
        lock.release()


def open_run(out: Path, settings) -> None:
    """Check that a locked folder is new or holds this run; UserError otherwise."""
    # Checkpoints would be refused as well, but this says which setting differs.
    saved, wanted = out / "settings.json", dataclasses.asdict(settings)
    if saved.exists():
        try:
            found = json.loads(saved.read_text())
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{saved} is not readable: delete the folder or choose another with "
                            "--out")
        if found != wanted:
            names = [*wanted, *sorted({*found} - {*wanted})]  # task, method and seed come first
            other = [k for k in names if found.get(k) != wanted.get(k)]
            more = f" and {len(other) - 4} more" * (len(other) > 4)
            raise UserError(f"{out} holds another run (other {', '.join(other[:4])}{more}): choose "
                            "another folder with --out")
    elif (out / "result.json").exists():
        raise UserError(f"{out} holds another result.json: choose another folder with --out")
    else:
        write_json(saved, wanted)


def open_evaluation(out: Path) -> None:
    """Check that a locked folder is empty or holds an evaluation; UserError otherwise."""
    with contextlib.suppress(OSError, ValueError):  # no result.json, or an unreadable one
        result = out / "result.json"
        trained = (out / "settings.json").exists()
        if trained or "trained_seed" not in json.loads(result.read_text()):
            raise UserError(f"{out} holds a training run: choose another folder with --out")


@functools.cache
def commit() -> str:
    """Commit of the code, asked once, at the program's start.

    It ends in "-dirty" if Python files that a run may use were changed or new then, and not
    committed. "unknown" outside a checkout.
    """
    folder = Path(__file__).parent

    def git(*arguments):
        return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--", "*.py", ":!test_gmps.py", ":!tests",
                      ":!tools", ":!examples")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
