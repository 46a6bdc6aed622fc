"""Files of a run: atomic writes, checkpoints, JSON, goals from a file. Every failure is one line that says what to do.
"""
import contextlib
import dataclasses
import functools
import io
import json
import os
import pickle
import struct
import subprocess
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

import settings as settings_module
from envs import check_tasks
from local_policies import load_demonstrations

FORMAT = "gmps checkpoint 2"  # 2: experts' networks have layer normalisation
MODULES = ("advantages", "ant", "door", "envs", "files", "gmps", "local_policies", "phases", "pictures", "policy", "run",
           "sac", "sawyer", "settings", "vision")


class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2."""


def write_atomically(path, write, mode="wb"):
    """Write to a neighbour, then rename: a reader, or a run killed at any moment, finds the old file or the new."""
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, mode) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error.strerror or error}; what was saved before is intact: "
                        "make room and run the same command again to go on") from None


def save_checkpoint(path, kind, settings, content):
    buffer = io.BytesIO()  # torch.save hides a full disk behind an exception of its own
    torch.save({"format": FORMAT, "kind": kind, "settings": dataclasses.asdict(settings), **content}, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def load_checkpoint(path, kind):
    """The dict that `save_checkpoint` wrote; UserError for a file that is missing, truncated or not ours."""
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise UserError(f"no {path}: train first, or name the folder of a finished run") from None
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, struct.error, pickle.UnpicklingError):
        raise UserError(f"{path} is truncated or not a checkpoint of this program: name another folder, or "
                        "delete it to train anew") from None
    written = content.get("format") if isinstance(content, dict) else None
    if isinstance(written, str) and written != FORMAT and written.startswith(FORMAT.rstrip("0123456789")):
        raise UserError(f"{path} was written by another version of this program: use that version, or train anew in another "
                        "folder")
    if written != FORMAT or content.get("kind") != kind:
        raise UserError(f"{path} is not a {kind} checkpoint of this program: delete it, or name another folder")
    try:
        content["settings"] = settings_module.from_dict(content["settings"])
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} was written with other settings ({error}): use the version that wrote it") from None
    return content


def write_json(path, content):
    write_atomically(path, lambda file: json.dump(content, file, indent=1, allow_nan=False), "w")


def read_goals(path, family):
    try:
        with open(path, "rb") as file:  # numpy leaves a truncated archive open that it opened itself
            goals = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"no goals file {path}: save an array of shape (n, {family.task_size}) with numpy.save") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        raise UserError(f"{path} is no npy file: save an array of shape (n, {family.task_size}) with numpy.save") from None
    if not isinstance(goals, np.ndarray):
        raise UserError(f"{path} is an npz archive: save one array of shape (n, {family.task_size}) with numpy.save")
    try:
        return check_tasks(family, goals)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def read_demonstrations(path, family):
    """Demonstrations of an npz file (local_policies.load_demonstrations), or UserError."""
    try:
        demonstrations = load_demonstrations(path, family)
        check_tasks(family, demonstrations[0])
    except FileNotFoundError:
        raise UserError(f"no demonstrations file {path}: --demos takes an npz with tasks, observations, actions") from None
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).splitlines()[0] if isinstance(error, ValueError) else "it is truncated or no npz file"
        raise UserError(f"{path}: {reason}") from None
    return demonstrations


def make_folder(out):
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".write_test").touch()
        (out / ".write_test").unlink()
    except OSError as error:
        raise UserError(f"cannot write to the output folder {out}: {error.strerror}; choose another with --out") from None


def open_folder(out, settings):
    """Create `out`, or check that it is writable and holds this run's settings or none."""
    make_folder(out)
    saved, wanted = out / "settings.json", dataclasses.asdict(settings)
    if saved.exists():
        try:
            found = json.loads(saved.read_text())
        except (OSError, ValueError):
            raise UserError(f"{saved} is not readable: delete the folder or choose another with --out") from None
        if found != wanted:
            names = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k)) if isinstance(found, dict) else []
            raise UserError(f"{out} holds another run (other {', '.join(names[:4]) or 'settings'}): choose another folder "
                            "with --out")
    elif (out / "result.json").exists():
        raise UserError(f"{out} holds another result.json: choose another folder with --out")
    else:
        write_json(saved, wanted)


def open_evaluation(out):
    """Create `out`, or check that it is writable and holds nothing but an evaluation."""
    result = out / "result.json"
    with contextlib.suppress(OSError, ValueError):
        if (out / "settings.json").exists() or "trained_seed" not in json.loads(result.read_text()):
            raise UserError(f"{out} holds a training run: choose another folder with --out")
    make_folder(out)


@functools.cache
def commit():
    """Commit of the code when first asked, which is at the program's start: "-dirty" where a module that this program uses
    differs from it, "unknown" outside a checkout."""
    folder = Path(__file__).parent
    modules = [folder / f"{name}.py" for name in MODULES]

    def git(*arguments):
        return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", *modules) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
