"""One command from nothing to an evaluated meta-policy.

    python run.py --task push                       # experts, demonstrations, meta-training, test
    python run.py --task push --quick               # the same phases on tiny budgets, in a minute
    python run.py --task all --seeds 3              # every task, seeds 0, 1, 2, one after the other
    python run.py --task push --method multitask    # another method, see baselines/
    python run.py --task push --evaluate DIR --goals goals.npy --gradient-steps 3 --out DIR2
    python run.py --task ant --evaluate DIR --extrapolate --out DIR2    # goals outside the arc
    python run.py --task door --demos demonstrations.npz                # demonstrations alone
    python run.py --task push --view DIR            # a page in the browser: set goals and watch

A run that is started again by the same command goes on from its last checkpoint. This file is the
command line; what happens then is in phases.py.
"""
import os

# Threads of torch that wait keep their core busy for a while. A short while leaves it to MuJoCo's.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # read when torch is imported

import argparse
import dataclasses
import inspect
import sys
from pathlib import Path

import numpy as np
import torch
from loky import cpu_count

import baselines
import settings as settings_module
from baselines import METHODS
from checkpoints import (
    commit,
    load_checkpoint,
    locked,
    open_evaluation,
    open_run,
    read_demonstrations,
    read_goals,
    write_json,
)
from evaluate import band_table, closing_table, evaluate
from local_policies import Demonstrations
from phases import (
    Problem,
    load_adapter,
    load_experts,
    method_label,
    result_of,
    train_and_test,
)
from settings import UserError
from tasks import TASKS, make_family, task_set
from tasks.rendering import Camera, NoOpenGL
from tools.minari_io import names_minari, read_minari
from tools.pictures import draw_extrapolation
from tools.track import TRACKERS, check_installed, tracking


# ---------------------------------------------------------------- options
class Parser(argparse.ArgumentParser):
    """argparse prints its usage before an error; here an error is one line."""

    def error(self, message):
        raise UserError(f"{message} (python run.py --help lists what there is)")


def make_parser(method: str) -> Parser:
    """The parser; its help ends with the settings of that method."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    epilog=settings_module.help_text(baselines.load(method).Settings))
    option = parser.add_argument
    option("--task", default="push", help=f"one of {', '.join(TASKS)}, or all")
    option("--method", help=f"one of {', '.join(METHODS)} (default gmps)")
    option("--seed", type=int, default=0)
    option("--seeds", type=int, metavar="N", help="seeds 0 to N - 1, one after the other")
    option("--preset", choices=("ours", "paper"),
           help="paper: the settings of the paper and of the authors' release (default ours)")
    option("--reward", help="default: the task's usual one")
    option("--experts", choices=("contextual", "local"),
           help="one expert that is told the goal, or one learner per training task")
    option("--demos", type=Path, metavar="FILE", help="demonstrations: npz, Minari (docs/fork.md)")
    option("--out", type=Path, help="output folder (default: runs/TASK/METHOD/seedSEED; with "
           "--evaluate: DIR/evaluation; with --view, for films: runs/view/TASK)")
    option("--device", default="cpu", help="for the networks: cpu or cuda")
    option("--threads", type=int, default=cpu_count(),
           help="of simulator and networks (default: all cores that this process may use)")
    option("--quick", action="store_true", help="every phase on tiny budgets, under a minute")
    option("--track", choices=tuple(TRACKERS), help="also send the rows of metrics.csv there")
    option("--set", action="append", default=[], metavar="NAME=VALUE",
           help="change a setting; they are listed below")
    option("--evaluate", type=Path, metavar="DIR", help="adapt the policy in DIR, train nothing")
    option("--goals", type=Path, help="with --evaluate: npy file of goals (n, task), in metres or "
           "radians (default: the held-out goals)")
    option("--gradient-steps", type=int,
           help="with --evaluate: rounds of adaptation (default 5; 20 with --extrapolate)")
    option("--rollouts", type=int, help="with --evaluate: episodes per task and round")
    option("--extrapolate", action="store_true",
           help="with --evaluate: goals outside the training range, and the figure (ant)")
    option("--view", type=Path, metavar="DIR",
           help="serve a page on which the policy in DIR adapts to goals that you set")
    option("--host", help="with --view: address to serve on (default 127.0.0.1, this machine only)")
    option("--port", type=int, help="with --view: port to serve on (default 8080)")
    return parser


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options; UserError where they do not go together."""
    # Which settings --help shows depends on the method, so that is read first.
    first = Parser(add_help=False)
    first.add_argument("--method", default="gmps")
    try:
        parser = make_parser(first.parse_known_args(arguments)[0].method)
    except ValueError as error:
        raise UserError(str(error)) from None
    options = parser.parse_args(arguments)
    # Values out of range. argparse knows types only.
    if options.task not in (*TASKS, "all"):
        raise UserError(f"unknown task {options.task!r}: choose one of {', '.join(TASKS)}, or all")
    for name, low, high in (("seed", 0, 2 ** 31 - 1), ("threads", 1, 1024), ("seeds", 1, 1000),
                            ("rollouts", 2, 10_000), ("gradient_steps", 0, 1000),
                            ("port", 0, 65535)):
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"{flag(name)} must be between {low} and {high}, not {value}")
    # Options of one command beside the other. Silence would let a user believe that they count.
    for command, names in (("evaluate", ("goals", "gradient_steps", "rollouts", "extrapolate")),
                           ("view", ("host", "port"))):
        for name in names:
            if not getattr(options, command) and getattr(options, name) not in (None, False):
                raise UserError(f"{flag(name)} goes with --{command} DIR: leave it out")
    if options.evaluate and options.view:
        raise UserError("--evaluate and --view are two commands: give one of them")
    for name in ("quick", "set", "seeds", "reward", "experts", "demos", "preset", "track"):
        if (options.evaluate or options.view) and getattr(options, name):
            raise UserError(f"{flag(name)} is for training: leave it out here")
    # Options that contradict each other.
    if options.seeds and options.seed:
        raise UserError("--seeds N runs seeds 0 to N - 1: leave --seed out")
    if options.task == "all" and (options.evaluate or options.view or options.demos
                                  or options.reward or options.experts):
        raise UserError("--task all takes no --evaluate, --view, --demos, --reward or --experts: "
                        "name one task")
    if options.demos and options.experts:
        raise UserError("--demos asks no experts: leave --experts out")
    if options.extrapolate and options.goals:
        raise UserError("--extrapolate has its own goals: leave --goals out")
    check_installed(options.track)
    try:  # allocate, since torch.device("cuda") succeeds where there is no GPU
        if torch.device(options.device).type not in ("cpu", "cuda"):
            raise RuntimeError
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError):
        raise UserError(f"no device {options.device!r} here: use --device cpu") from None
    return options


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# ---------------------------------------------------------------- settings
Demos = tuple[np.ndarray, Demonstrations]


def choose_settings(options, task: str, seed: int,
                    demos: Demos | None = None) -> settings_module.Settings:
    """Settings of one run: the defaults, then the task family's, then those of the options.

    UserError for whatever does not fit: it is cheaper to say so now than after the experts.
    """
    method = options.method or "gmps"
    kind = baselines.load(method).Settings
    try:
        family = make_family(task, options.reward)
        given = {"preset": options.preset or "ours", "task": task, "method": method, "seed": seed,
                 "reward": family.reward}
        if options.experts is not None:
            given["experts"] = options.experts
        # Later ones win: family, --preset, the method's `on_task`, local experts, --quick, --set,
        # options. The first two are for GMPS: a default of the method's own class comes before.
        own = set() if kind is settings_module.Settings else inspect.get_annotations(kind).keys()
        paper = settings_module.PAPER | family.paper_settings if options.preset == "paper" else {}
        preset = {name: value for name, value in (family.settings | paper).items()
                  if name not in own} | kind.on_task.get(task, {})
        if options.experts == "local":
            preset |= family.local_settings
        if options.quick:
            preset |= settings_module.QUICK | kind.quick
        # What has an option of its own also names the folder, so --set must not change it.
        changed = settings_module.from_strings(options.set, kind)
        for name in ("preset", "task", "method", "seed", "experts", "reward"):
            if name in changed:
                raise UserError(f"--set {name}: use --{name}")
        # A user's demonstrations bring their tasks, and no expert that could label more states.
        if demos is not None:
            baselines.refuse_demonstrations(method)
            for name in changed.keys() & {"training_tasks", "aggregation_episodes"}:
                raise UserError(f"--set {name}: --demos brings its own tasks, but no expert for "
                                "further labels")
            given |= {"experts": "demonstrations", "training_tasks": len(demos[0])}
            preset |= {"aggregation_episodes": 0}
            if "pre_update_tasks" in preset:  # keep its share of all tasks
                usual = family.settings.get("training_tasks", kind.training_tasks)
                share = preset["pre_update_tasks"] / usual
                preset["pre_update_tasks"] = round(share * len(demos[0]))
        chosen = kind(**(preset | changed | given))
    except ValueError as error:
        raise UserError(str(error)) from None
    # What a task family cannot do.
    if chosen.experts != "demonstrations" and (
            (chosen.experts == "scripted") != (family.expert is not None)):
        advice = "" if family.expert is None else (
            ": its expert is scripted, which its settings must say (experts=\"scripted\")")
        raise UserError(f"{task} has no {chosen.experts} experts{advice}")
    if chosen.experts == "local" and chosen.expert_episodes % chosen.training_tasks:
        raise UserError("local experts explore on their own tasks alone: make expert_episodes a "
                        f"multiple of the {chosen.training_tasks} training tasks")
    if chosen.experts == "local" and chosen.demonstration_detours:
        raise UserError("local experts know their own task only: leave demonstration_detours at 0")
    check_camera(family)
    return chosen


def check_camera(family) -> None:
    """UserError, before any work, where a family's pictures cannot be taken."""
    if family.image_shape:
        try:
            Camera(family).close()
        except (NoOpenGL, ValueError) as error:
            raise UserError(str(error)) from None


def sorted_demonstrations(path: Path, task: str) -> Demos:
    """The user's demonstrations, by task: settings.pre_update_tasks counts from the last."""
    if names_minari(path):
        tasks, given = read_minari(path, make_family(task))
    else:
        tasks, given, _ = read_demonstrations(path, make_family(task))
    order = np.lexsort(tasks.T[::-1])
    return tasks[order], Demonstrations(**{name: array[order]
                                           for name, array in given.arrays().items()})


# ---------------------------------------------------------------- the three commands
def train(options) -> None:
    """The runs that the command line names, one after the other.

    Among several, finished ones are skipped. So `--task all --seeds 3` can be stopped at any time
    and started again. A single finished run is evaluated again.
    """
    tasks = list(TASKS) if options.task == "all" else [options.task]
    seeds = [options.seed] if options.seeds is None else list(range(options.seeds))
    several = len(tasks) * len(seeds) > 1
    demos = sorted_demonstrations(options.demos, options.task) if options.demos else None
    # Check every task's settings before the first run, which may take hours.
    chosen = {task: choose_settings(options, task, options.seed, demos) for task in tasks}
    for task in tasks:
        for seed in seeds:
            settings = dataclasses.replace(chosen[task], seed=seed)
            out = options.out or Path("runs") / usual_folder(settings, options.quick)
            if options.out and several:
                out = options.out / task / f"seed{seed}"
            if several:
                print(f"---- {task}, seed {seed}: {out}", flush=True)
            with locked(out):
                open_run(out, settings)
                if several and (out / "result.json").exists():
                    print("finished before")
                else:
                    problem = Problem(settings, out, options.device, options.threads, demos)
                    with tracking(options.track, settings, out) as problem.journal.track:
                        train_one(problem)


def usual_folder(settings: settings_module.Settings, quick: bool) -> Path:
    """TASK/METHOD/seedSEED: all that tells one run from another, but for --set."""
    label = method_label(settings, make_family(settings.task))
    return Path(settings.task) / label / (f"seed{settings.seed}" + "_quick" * quick)


def train_one(problem: Problem) -> None:
    """One run. It says what is unusual about it; settings.json has the rest."""
    changed = [f"{spec.name}={getattr(problem.settings, spec.name)}"
               for spec in dataclasses.fields(problem.settings)
               if getattr(problem.settings, spec.name) != spec.default]
    print(f"settings other than the defaults: {', '.join(changed) or 'none'} (all of them in "
          f"{problem.out / 'settings.json'})")
    train_and_test(problem)


def load_policy(folder: Path, options):
    """`load_adapter`, and UserError where the folder does not fit the options."""
    if folder.is_file():
        raise UserError(f"--{'view' if options.view else 'evaluate'} takes the folder that holds "
                        f"policy.pt: {folder} is a file")
    family, adapter, content = load_adapter(folder, options.device)
    settings = content["settings"]
    if settings.task != options.task:
        raise UserError(f"{folder} holds a policy for {settings.task}: give --task {settings.task}")
    if options.method not in (None, settings.method):
        raise UserError(f"{folder} holds a policy of {settings.method}: leave --method out")
    check_camera(family)
    return family, adapter, content


def evaluate_saved(options, wrap=lambda adapter, K: adapter, **noted) -> None:
    """Adapt the policy in a folder, with its own settings, to the user's goals or the held-out.

    `wrap` may change how it adapts, in rounds of K episodes; `noted` goes into result.json.
    """
    source = options.evaluate
    family, adapter, content = load_policy(source, options)
    settings = content["settings"]
    # Which goals: those outside the training range, the user's, or the held-out ones.
    bands = family.bands()
    if options.extrapolate and not bands:
        raise UserError(f"{settings.task} defines no goals outside its training range (bands() in "
                        "tasks/base.py): --extrapolate goes with --task ant")
    if options.extrapolate:
        goals = np.concatenate([goals for _, goals in bands])
    elif options.goals:
        goals = read_goals(options.goals, family)
    else:
        goals = task_set(family, "held_out", settings.held_out_tasks)
    rounds, episodes = options.gradient_steps, options.rollouts or settings.test_episodes
    if rounds is None:
        rounds = 20 if options.extrapolate else 5
    # The counts of training travel with the policy into the result of its evaluation.
    out = options.out or source / "evaluation"
    with locked(out):
        open_evaluation(out)
        problem = Problem(settings, out, options.device, options.threads)
        problem.journal.restore(content)
        with problem.journal.timing("evaluation"):
            evaluation = evaluate(problem.environments, wrap(adapter, episodes), goals, rounds,
                                  episodes, options.seed,
                                  experts_beside(source, family, content, options), progress=True)
        problem.close()
        lists = evaluation.lists
        write_json(out / "result.json", result_of(problem, evaluation, options.seed) | {
            "trained_seed": settings.seed, "rollouts": episodes, **noted} | lists)
        if options.extrapolate:
            print(band_table(family, lists))
            draw_extrapolation(out, family, lists)
        else:
            title = "your goals" if options.goals else "held-out tasks"
            print(closing_table(lists, family, title))
    print(f"results in {out}")


def experts_beside(folder: Path, family, content: dict, options):
    """The experts of the same run, or None: their level shows what can be reached on a goal."""
    path = folder / "experts.pt"
    if content["settings"].experts == "scripted":
        return family.expert
    if not path.exists():
        return None
    experts = load_checkpoint(path, "experts")
    if experts["settings"] != content["settings"]:
        raise UserError(f"{path} is of another run than the policy beside it: put the policy's "
                        "own experts there, or none")
    return load_experts(experts, options.device)


def view_saved(options) -> None:
    """A page on which the policy in a folder adapts to goals that a user sets, step by step."""
    try:
        from tools.view import view  # optional packages, and they take a second
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] not in ("viser", "mjviser", "trimesh"):
            raise
        raise UserError(f"--view needs {error.name}: pip install -r requirements-extra.txt"
                        ) from None
    family, adapter, content = load_policy(options.view, options)
    settings = content["settings"]
    title = f"**{settings.task}**, {method_label(settings, family)}"
    view(adapter, family, title, options, settings.test_episodes)


def main(arguments: list[str] | None = None, evaluating=evaluate_saved) -> int:
    """The command line; returns the exit code. `evaluating(options)` serves --evaluate."""
    try:
        options = parse(arguments)
        torch.set_num_threads(options.threads)
        commit()  # ask now: files may change during a long run
        (evaluating if options.evaluate else view_saved if options.view else train)(options)
    except (UserError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: a run goes on from its last checkpoint by the same command",
              file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
