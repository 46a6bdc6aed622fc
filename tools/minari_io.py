"""Read demonstrations from Minari, the common format of recorded episodes (minari.farama.org).

An episode of T steps holds T + 1 observations and T actions. What else counts is in its infos:

    task           (T+1, task)   the episode's task, the same at every step
    expert_action  (T+1, act)    the label of each observation; missing: the actions are the labels
    states         (T+1, state)  what experts see, where the policy sees images; may be missing

`run.py --demos` reads such datasets, tools/minari_export.py writes them. Minari is optional.
Letters in shapes: n tasks, E episodes per task, T steps of the longest episode.
"""
import re
from pathlib import Path

import gymnasium
import numpy as np

from local_policies import Demonstrations, check_demonstrations
from settings import UserError
from tasks.base import TaskFamily, check_tasks


def import_minari():
    """The package; UserError, which says what to install, where it is missing."""
    try:
        import h5py  # noqa: F401  Minari works without, until it opens a file
        import minari
    except ImportError as error:
        raise UserError(f"Minari is missing here ({error}): pip install -r "
                        "requirements-extra.txt") from None
    return minari


def names_minari(where: Path) -> bool:
    """Whether a path is a dataset's folder, or may be the id of one: "...-v0"."""
    return where.is_dir() or not where.exists() and bool(re.search(r"-v\d+$", where.name))


def env_id(family: TaskFamily) -> str:
    """Gymnasium's id of a family's environment, see the end of envs.py."""
    return f"gmps/{type(family).__name__}-v0"


def read_minari(where: str | Path, family: TaskFamily) -> tuple[np.ndarray, Demonstrations]:
    """(tasks (n, task), demonstrations) of a dataset, by its id or its folder.

    Tasks are the distinct ones of all episodes. UserError, in one line, where it does not fit.
    """
    minari, folder = import_minari(), Path(where)
    try:
        if not folder.is_dir():
            dataset = minari.load_dataset(str(where))
        else:
            inner = folder / "data"
            dataset = minari.MinariDataset(inner if inner.is_dir() else folder)
        check_spaces(dataset, family)
        recorded = [labelled(episode, family) for episode in dataset if len(episode.rewards)]
        return by_task(recorded, family)
    except FileNotFoundError:
        raise UserError(f"no Minari dataset {where} here: see `minari list local`, or get it with "
                        f"`minari download {where}`") from None
    except ImportError as error:  # of another file format than HDF5
        raise UserError(f"{where}: {error}") from None
    except (AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError,
            ValueError) as error:
        reason = str(error).splitlines()[0] if isinstance(error, ValueError) else (
            f"it is damaged or no Minari dataset ({type(error).__name__})")
        raise UserError(f"{where}: {reason}") from None


def check_spaces(dataset, family: TaskFamily) -> None:
    """ValueError where a dataset is not of this family's environment."""
    # Push and door agree in all sizes, so the name comes first.
    spec, own = dataset.env_spec, env_id(family)
    if spec is not None and spec.id.startswith("gmps/") and spec.id != own:
        raise ValueError(f"it was recorded on {spec.id}, not on {own}")
    wanted = (family.observation_size,)
    if family.image_shape:
        wanted = {"hand": wanted, "image": family.image_shape}
    seen, actions = dataset.observation_space, dataset.action_space
    found = seen.shape
    if isinstance(seen, gymnasium.spaces.Dict):
        found = {name: space.shape for name, space in seen.items()}
    for name, shape, needed in (("observations", found, wanted),
                                ("actions", actions.shape, (family.action_size,))):
        if shape != needed:
            raise ValueError(f"{name} have shape {shape}, those of {family.name} {needed}")
    if not isinstance(actions, gymnasium.spaces.Box):
        raise ValueError("actions are no real numbers")
    if not (np.all(actions.low == -1) and np.all(actions.high == 1)):
        raise ValueError(f"actions range from {actions.low.min():g} to {actions.high.max():g}, not "
                         "from -1 to 1: rescale them")


def labelled(episode, family: TaskFamily) -> dict[str, np.ndarray]:
    """One episode: task (task,), actions (at least T, act), the rest (T+1, ...); steps."""
    infos, steps = episode.infos or {}, len(episode.rewards)
    name = f"episode {episode.id}"
    if "task" not in infos:
        raise ValueError(f'{name} lacks "task" in its infos: record them, with the task '
                         "(DataCollector(env, record_infos=True))")
    seen = {"observations": episode.observations}
    if family.image_shape:
        seen = {"observations": episode.observations["hand"],
                "images": episode.observations["image"]}
        seen |= {"states": infos["states"]} if "states" in infos else {}
    if "expert_action" in infos:
        seen["actions"] = infos["expert_action"]
    tasks = np.asarray(infos["task"])
    for part, rows in (seen | {"task": tasks}).items():
        if len(rows) != steps + 1:
            raise ValueError(f"{name} has {steps} steps and {len(rows)} {part}, not {steps + 1}")
    try:
        tasks = check_tasks(family, tasks.reshape(steps + 1, -1))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if (tasks != tasks[0]).any():
        raise ValueError(f"{name} changes its task on the way")
    return {"actions": episode.actions} | seen | {"task": tasks[0], "steps": np.array(steps)}


def by_task(recorded: list[dict], family: TaskFamily) -> tuple[np.ndarray, Demonstrations]:
    """Tasks in order, and their demonstrations from what `labelled` gave of each episode."""
    if not recorded:
        raise ValueError("it holds no episodes")
    tasks, task_of = np.unique([episode["task"] for episode in recorded], axis=0,
                               return_inverse=True)
    own = [np.flatnonzero(task_of == task) for task in range(len(tasks))]
    if len(own) < 2:
        raise ValueError("all its episodes are of one task, and meta-training needs two at least")
    # Short episodes repeat their last step, tasks with few episodes their last one. The mask leaves
    # these out. T is the horizon at least, as in the demonstrations of a run.
    steps = np.array([episode["steps"] for episode in recorded])
    E, T = max(map(len, own)), max(family.horizon, steps.max())
    which = np.array([rows[np.minimum(np.arange(E), len(rows) - 1)] for rows in own])  # (n, E)
    real = np.arange(E) < np.array([len(rows) for rows in own])[:, None]
    mask = real[..., None] & (np.arange(T) < steps[which][..., None])  # (n, E, T)
    arrays = {"tasks": tasks, "mask": mask.reshape(len(tasks), -1)}
    for name in set.intersection(*map(set, recorded)) - {"task", "steps"}:
        parts = [np.asarray(episode[name]) for episode in recorded]
        if len({rows.shape[1:] for rows in parts}) > 1:
            raise ValueError(f"{name} have different shapes in different episodes")
        parts = np.array([rows[np.minimum(np.arange(T), len(rows) - 1)] for rows in parts])
        arrays[name] = parts[which].reshape(len(tasks), E * T, *parts.shape[2:])
    tasks, demonstrations, _ = check_demonstrations(arrays, family)
    return tasks, demonstrations
