"""Write the demonstrations of a run as a Minari dataset (minari.farama.org).

    python tools/minari_export.py runs/door/gmps/seed0                   # gmps/door/gmps-seed0-v0
    python tools/minari_export.py runs/door/gmps/seed0 --id mine/door-v1
    python run.py --task door --demos mine/door-v1                       # from such a dataset

The run's file demonstrations.npz holds labelled states, neither executed actions nor rewards. So
the experts play their episodes again, from the same random numbers. Their states and labels must
equal the file's in every digit, or nothing is written. Another machine, or another number of
threads, may change the last digit. What the infos hold: tools/minari_io.py. The dataset lies where
Minari keeps all of its own: in $MINARI_DATASETS_PATH, or else in ~/.minari/datasets.
"""
import argparse
import json
import shutil
import sys
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import torch
from loky import cpu_count

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import baselines
import run as command_line
import settings as settings_module
from checkpoints import read_demonstrations
from envs import make_batch
from local_policies import make_demonstrations
from phases import Problem, method_label, same_demonstrations
from settings import UserError
from tasks.base import MujocoFamily, TaskFamily
from tasks.rendering import NoOpenGL
from tools.minari_io import env_id, import_minari


def open_finished(run: Path, device: str, threads: int) -> Problem:
    """The problem of a run's folder. UserError where it has no experts of its own to play again."""
    try:
        values = json.loads((run / "settings.json").read_text())
        kind = baselines.load(values["method"]).Settings
        settings = settings_module.from_dict(values, kind)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{run} holds no settings.json of a run of this version: name the "
                        f"folder of a finished run ({type(error).__name__})") from None
    if settings.experts == "demonstrations":
        raise UserError(f"{run} learned from demonstrations that it was given: export those of the "
                        "run that made them")
    needed = ["demonstrations.npz"] + ["experts.pt"] * (settings.experts != "scripted")
    for name in needed:
        if not (run / name).exists():
            raise UserError(f"no {run / name}: name the folder of a finished run whose method asks "
                            "experts")
    return Problem(settings, run, device, threads)


def play_again(problem: Problem) -> tuple[dict, np.ndarray]:
    """(episodes, labels (n E, T+1, act)) of a run, E episodes per task."""
    experts, tasks, each = problem.train_experts(), problem.tasks, (
        problem.settings.demonstration_episodes)
    written = read_demonstrations(problem.out / "demonstrations.npz", problem.family)[:2]
    env = make_batch(problem.family, len(tasks) * each, problem.threads)
    made, episodes = make_demonstrations(env, experts, tasks, problem.settings)
    env.close()
    if not same_demonstrations(written, (tasks, made)):
        raise UserError(f"{problem.out}: its experts do not play its demonstrations again: give "
                        "the --threads and --device of the run, on the machine that result.json "
                        "names")
    # The last observation was never labelled: no action follows it.
    last = episodes.get("states", episodes["observations"])[:, -1]
    last = experts(last.reshape(len(tasks), each, -1), tasks)
    labels = [array.reshape(len(tasks) * each, -1, array.shape[-1])
              for array in (made.actions, last[:, :, None])]
    return episodes, np.concatenate(labels, axis=1)


def episode_buffers(minari, episodes: dict, labels: np.ndarray, tasks: np.ndarray) -> list:
    """Minari's episodes. `tasks` (B, task) says each one's; what follows an early end is cut."""
    buffers = []
    for j, steps in enumerate(episodes["mask"].sum(1).astype(int)):
        seen = {name: episodes[name][j, :steps + 1]
                for name in ("observations", "images", "states") if name in episodes}
        infos = {"task": np.repeat(tasks[j:j + 1], steps + 1, axis=0),
                 "expert_action": labels[j, :steps + 1]}
        observations = seen["observations"]
        if "images" in seen:
            observations = {"hand": observations, "image": seen["images"]}
            infos["states"] = seen["states"]
        ended = np.arange(1, steps + 1) == steps
        terminated = ended & episodes["terminated"][j]
        buffers.append(minari.data_collector.EpisodeBuffer(
            observations=observations, infos=infos, rewards=episodes["rewards"][j, :steps],
            actions=np.clip(episodes["actions"][j, :steps], -1.0, 1.0),  # as the environment does
            terminations=terminated, truncations=ended & ~terminated))
    return buffers


def environment(family: TaskFamily) -> dict:
    """What tells Minari the environment: itself, or its spaces where gymnasium has no id of it."""
    if isinstance(family, MujocoFamily):
        return {"env": gymnasium.make(env_id(family), reward=family.reward)}
    vector = make_batch(family, 1).vector
    vector.close()
    return {"observation_space": vector.single_observation_space,
            "action_space": vector.single_action_space}


def export(run: Path, dataset_id: str | None, device: str, threads: int):
    """Write the dataset; returns it. Errors: UserError, NoOpenGL."""
    minari = import_minari()
    problem = open_finished(run, device, threads)
    settings, family = problem.settings, problem.family
    label = method_label(settings, family)
    dataset_id = dataset_id or f"gmps/{settings.task}/{label}-seed{settings.seed}-v0"
    try:
        minari.dataset.minari_dataset.parse_dataset_id(dataset_id)
    except (TypeError, ValueError):  # TypeError: without a version
        raise UserError(f"--id {dataset_id}: give one like mine/door-v0") from None
    folder = minari.storage.get_dataset_path(dataset_id)
    if folder.exists():
        raise UserError(f"{folder} exists: give another --id, or first `minari delete "
                        f"{dataset_id}`")
    episodes, labels = play_again(problem)
    problem.close()
    tasks = np.repeat(problem.tasks, settings.demonstration_episodes, axis=0)
    try:
        with warnings.catch_warnings():  # Minari asks for an author, e-mail, a link to the code
            warnings.simplefilter("ignore", UserWarning)
            return minari.create_dataset_from_buffers(
                dataset_id, episode_buffers(minari, episodes, labels, tasks),
                algorithm_name=f"Guided Meta-Policy Search: {settings.experts} experts",
                description=f"Demonstrations for {settings.task}: the experts' episodes, with "
                            "noise, on all training tasks. Infos hold the task of every step and "
                            "the action of the expert.",
                jpeg_encoding=False, **environment(family))  # JPEG would change images
    except BaseException as error:  # half a dataset looks like a whole one
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {folder}: {error}") from None
        raise


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--id", help="of the dataset (default: gmps/TASK/METHOD-seedSEED-v0)")
    parser.add_argument("--device", default="cpu", help="as in the run")
    parser.add_argument("--threads", type=int, default=cpu_count(), help="as in the run")
    options = parser.parse_args(arguments)
    try:
        # run.py's own checks
        command_line.parse(["--device", options.device, "--threads", str(options.threads)])
        torch.set_num_threads(options.threads)
        dataset = export(options.run, options.id, options.device, options.threads)
    except (UserError, NoOpenGL) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{dataset.id}: {dataset.total_episodes} episodes, {dataset.total_steps:,} steps, "
          f"{dataset.storage.get_size()} MB in {dataset.storage.data_path.parent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
