"""Undo one deviation at a time, and measure what that costs.

    python tools/ablations.py --task push --seeds 3     # runs what is missing, two at a time
    python tools/ablations.py --task push --jobs 16     # sixteen at a time, for 16 cores
    python tools/ablations.py --show                    # a table and a picture of what is there

Every run is `run.py` on one thread with one setting changed. A run that does not change the experts
uses those of the recipe's run with the same seed, if runs/ablations/ still holds them; their steps
are counted all the same. Each policy then adapts to 40 validation goals, never to the held-out ones
(but for --preset paper, which is read from results/). Kept: results/ablations/TASK/NAME/seedS.json.
A command that was stopped goes on where it was. The picture is results/figures/ablations.png.
"""
import argparse
import json
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import run  # noqa: E402
from checkpoints import load_checkpoint, save_checkpoint, write_json  # noqa: E402
from evaluate import by_round, mean_of  # noqa: E402
from tasks import make_family, task_set  # noqa: E402
from tools.pictures import pyplot, save_figure  # noqa: E402

GOALS, ROUNDS = 40, 3
PAPER = "all but the experts: --preset paper"
# Name of the run: what it changes. "recipe" changes nothing.
ABLATIONS = {
    "push": {
        "recipe": {},
        "independent noise": {"noise": "independent"},
        "noise of one step": {"noise_hold": 1},
        "own episodes": {"shared_episodes": 0},
        "alpha from 0.5": {"init_step_size": 0.5},
        "slow alpha": {"step_size_learning_rate": 1e-3},
        "log-std adapts": {"adapt_std": "yes"},
        "full later steps": {"later_steps": 1.0},
        "long horizon": {"discount": 0.99, "gae_lambda": 1.0},
        "advantages per task": {"advantage_scale": "per task"},
        "w unbounded": {"max_weight": 1e30},
        "20 training goals": {"training_tasks": 20, "aggregation_episodes": 2},
        "random start": {"imitation_steps": 0},
        "mean action imitated": {"imitated_action": "mean"},
        "no pre-update loss": {"pre_update_imitation": 0.0},
        "learning rate 1e-3": {"learning_rate": 1e-3},
        "constant rates": {"final_rate": 1.0},
        "20 tasks per meta-step": {"meta_batch": 20, "meta_steps": 150},
        "300 meta-steps": {"meta_steps": 300},
        "std from 1": {"init_std": 1.0},
        "no aggregation": {"aggregation_episodes": 0},
        "clean demonstrations": {"demonstration_noise": 0.0},
        "raw observations": {"observations": "raw"},
        "experts: no relabelling": {"expert_relabelled": 0.0},
        "experts: discount 0.99": {"expert_discount": 0.99},
        "experts: tau 0.005": {"expert_target_rate": 0.005},
        "experts: learning rate 3e-4": {"expert_learning_rate": 3e-4},
        "experts: rewards as they are": {"expert_reward_scale": 1.0},
    },
    "ant": {
        "recipe": {},
        "independent noise": {"noise": "independent"},
        "noise of one step": {"noise_hold": 1},
        "experts: white noise": {"expert_noise_correlation": 0.0},
        "experts: one-step targets": {"expert_return_steps": 1},
        "short imitation": {"imitation_steps": 300},
        "strong pre-update loss": {"pre_update_imitation": 1.0},
    },
    "door": {
        "recipe": {},
        "no detours": {"demonstration_detours": 0},
        "less noise in demonstrations": {"demonstration_noise": 0.3},
        "pre-update policy: all angles": {"pre_update_tasks": 0},
        "noise of one step": {"noise_hold": 1},
        "one advantage scale": {"advantage_scale": "common"},
    },
}


def work_folder(task: str) -> Path:
    return ROOT / "runs" / "ablations" / task


def folder_name(name: str) -> str:
    """Without what a file system may not like."""
    return name.replace(":", "").replace(" ", "_")


def place(task: str, name: str, seed: int) -> Path:
    return work_folder(task) / folder_name(name) / f"seed{seed}"


def kept(task: str, name: str, seed: int) -> Path:
    return ROOT / "results" / "ablations" / task / folder_name(name) / f"seed{seed}.json"


def command(task: str, seed: int, changes: dict, out: Path) -> list[str]:
    """Arguments of run.py. Its own evaluation is as short as it can be: another one follows."""
    short = {"curve": 0, "held_out_tasks": 1}
    changed = [f"--set={key}={value}" for key, value in (changes | short).items()]
    return ["--task", task, "--seed", str(seed), "--threads", "1", "--out", str(out), *changed]


def kept_runs(task: str, name: str) -> list[dict]:
    """What is kept of an ablation, a dict for each seed."""
    files = kept(task, name, 0).parent.glob("seed*.json")
    return [json.loads(path.read_text()) for path in sorted(files)]


def lend_experts(task: str, name: str, seed: int) -> None:
    """Give a run the experts of the recipe's run, if it leaves them alone."""
    changes, out = ABLATIONS[task][name], place(task, name, seed)
    lender = place(task, "recipe", seed) / "experts.pt"
    if name == "recipe" or (out / "experts.pt").exists() or not lender.exists() or any(
            key.startswith(("expert_", "training_tasks")) for key in changes):
        return
    settings = run.choose_settings(run.parse(command(task, seed, changes, out)), task, seed)
    content = load_checkpoint(lender, "experts")
    content = {key: value for key, value in content.items()
               if key not in ("format", "kind", "settings")}
    out.mkdir(parents=True, exist_ok=True)
    save_checkpoint(out / "experts.pt", "experts", settings, content)


def one(task: str, name: str, seed: int) -> None:
    """One run and its validation, unless they are kept already."""
    out, target = place(task, name, seed), kept(task, name, seed)
    if target.exists():
        return
    lend_experts(task, name, seed)
    arguments = command(task, seed, ABLATIONS[task][name], out)
    validation = ["--task", task, "--evaluate", str(out), "--threads", "1",
                  "--goals", str(work_folder(task) / "goals.npy"), "--gradient-steps",
                  str(ROUNDS), "--out", str(out / "validation")]
    for part in (arguments, validation):
        done = subprocess.run([sys.executable, str(ROOT / "run.py"), *part], capture_output=True,
                              text=True)
        if done.returncode:
            print(f"{task}, {name}, seed {seed} failed: {done.stderr.strip().splitlines()[-1]}")
            return
    trained, tested = (json.loads((folder / "result.json").read_text())
                       for folder in (out, out / "validation"))
    rounds = by_round(tested["held_out"])
    shown = shlex.join(arguments).replace(f"{ROOT}/", "")  # no path of this machine
    row = {"command": f"python run.py {shown}", "task": task, "name": name,
           "changes": ABLATIONS[task][name], "seed": seed, "commit": trained["commit"],
           "machine": trained["machine"], "env_steps": trained["env_steps"],
           "wall_seconds": trained["wall_seconds"],
           **{key: [mean_of(entries, key) for entries in rounds]
              for key in ("return", "final_distance")}}
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, row)
    print(f"{task}, {name}, seed {seed}: return {row['return'][1]:.0f}, then "
          f"{row['return'][3]:.0f}", flush=True)


def effects(task: str, key: str, k: int) -> dict[str, np.ndarray]:
    """{name: differences to the recipe after k steps, one for each seed that both have}.

    PAPER is the difference between two sets of results/TASK, both of held-out goals.
    """
    def of(name):
        return {row["seed"]: row[key][k] for row in kept_runs(task, name)}

    def result_of(method):
        files = (ROOT / "results" / task / method).glob("seed*/result.json")
        lists = {file.parent.name: json.loads(file.read_text())["held_out"] for file in files}
        return {seed: mean_of(by_round(entries)[k], key) for seed, entries in lists.items()}

    recipe, out = of("recipe"), {}
    pairs = {name: (of(name), recipe) for name in ABLATIONS[task] if name != "recipe"}
    for name, (mine, other) in (pairs | {PAPER: (result_of("gmps-paper"),
                                                 result_of("gmps"))}).items():
        if seeds := sorted(mine.keys() & other.keys()):
            out[name] = np.array([mine[seed] - other[seed] for seed in seeds])
    return out


def show(task: str) -> str:
    """Table: the effect of every ablation, its mean and each seed's."""
    title, unit, digits = make_family(task).table
    first, third = (effects(task, "return", k) for k in (1, 3))
    near = [effects(task, "final_distance", k) for k in (1, 3)]
    if not first:
        return "Not measured yet."
    lines = ["| undone | setting | return after 1 step | after 3 steps "
             f"| {title} after 1 step | after 3 steps |", "|---|---|---|---|---|---|"]
    for name in sorted(first, key=lambda name: first[name].mean()):
        changes = {"preset": "paper"} if name == PAPER else kept_runs(task, name)[0]["changes"]
        setting = ", ".join(f"{key}={value}" for key, value in changes.items())
        cells = [f"{part[name].mean():+.0f} ({', '.join(f'{x:+.0f}' for x in part[name])})"
                 for part in (first, third)]
        cells += [f"{unit * part[name].mean():+.{digits}f}" for part in near]
        lines.append(f"| {name} | `{setting}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measured() -> list[str]:
    """Tasks of which at least one effect is kept."""
    return [task for task in ABLATIONS if effects(task, "return", 1)]


def picture(tasks: list[str], path: Path) -> None:
    """All effects on the return after one and three steps: a bar is the mean, a dot a seed."""
    shown = {task: [effects(task, "return", k) for k in (1, 3)] for task in tasks}
    heights = [1 + len(first) for first, _ in shown.values()]
    figure, axes = pyplot().subplots(len(tasks), 1, figsize=(10, 1.5 + 0.36 * sum(heights)),
                                     height_ratios=heights, squeeze=False, sharex=True,
                                     layout="constrained")
    for (task, parts), axis in zip(shown.items(), axes[:, 0]):
        names = sorted(parts[0], key=lambda name: -parts[0][name].mean())
        for part, shift, color, label in zip(parts, (0.2, -0.2), ("#D55E00", "#0072B2"),
                                             ("after 1 step", "after 3 steps")):
            rows = np.arange(len(names)) + shift
            axis.barh(rows, [part[name].mean() for name in names], 0.38, color=color, alpha=0.5,
                      label=label)
            for row, name in zip(rows, names):
                axis.plot(part[name], np.full(len(part[name]), row), ".", color=color)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(np.arange(len(names)), names)
        axis.set(title=task, xlabel="change of the return when it is undone "
                                    "(beyond 10: logarithmic axis)")
        axis.tick_params(labelbottom=True)
        axis.grid(axis="x", alpha=0.3)
    first, ticks = axes[0, 0], [-300, -100, -30, -10, -5, 0, 5, 10]
    first.set_xscale("symlog", linthresh=10)  # all panels share it
    first.set_xticks(ticks, ticks)
    first.minorticks_off()
    first.legend()
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=ABLATIONS, help="default: push")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N - 1")
    parser.add_argument("--only", nargs="*", help="names of ablations (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--show", action="store_true", help="run nothing")
    options = parser.parse_args()
    if not options.show:
        task = options.task or "push"
        names = [name for name in ABLATIONS[task] if name != "recipe"
                 and (not options.only or name in options.only)]
        work_folder(task).mkdir(parents=True, exist_ok=True)
        np.save(work_folder(task) / "goals.npy",
                task_set(make_family(task), "validation", GOALS))
        with ThreadPoolExecutor(options.jobs) as pool:  # each starts run.py and waits for it
            for part in (["recipe"], names):
                list(pool.map(lambda job: one(task, *job),
                              [(name, seed) for seed in range(options.seeds) for name in part]))
    tasks = measured()
    for task in tasks:
        print(f"{task}\n{show(task)}\n")
    if tasks:
        picture(tasks, ROOT / "results" / "figures" / "ablations.png")


if __name__ == "__main__":
    main()
