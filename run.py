"""One command from nothing to an evaluated meta-policy.

    python run.py --task push                       # experts, demonstrations, meta-training, evaluation, plot, video
    python run.py --task push --quick               # the same phases on tiny budgets, under a minute
    python run.py --task all --seeds 3              # every task and seeds 0, 1, 2, one after the other
    python run.py --task push --evaluate DIR --goals goals.npy --gradient-steps 3 --rollouts 20 --out DIR2
    python run.py --task ant --evaluate DIR --extrapolate --out DIR2    # goals outside the arc, 20 gradient steps
    python run.py --task door --demos demonstrations.npz                # from demonstrations alone

A run goes on from its last checkpoint when it is started again with the same command. This file is the
command line; the phases are in phases.py.
"""
import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

import settings as settings_module
from envs import FAMILIES, make_family, task_set
from files import (
    UserError,
    commit,
    load_checkpoint,
    open_evaluation,
    open_folder,
    read_demonstrations,
    read_goals,
    write_json,
)
from phases import (
    Run,
    closing_table,
    demonstrations_phase,
    evaluate_policy,
    evaluation_phase,
    expert_policies,
    experts_phase,
    machine,
    meta_training_phase,
    print_bands,
)
from pictures import draw_extrapolation
from vision import Camera, NoOpenGL


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (python run.py --help lists what there is)")


def parse(arguments):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="push", help=f"one of {', '.join(FAMILIES)}, or all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N - 1, one after the other")
    parser.add_argument("--reward", choices=("dense", "sparse"), help="default: the task's usual one")
    parser.add_argument("--experts", choices=("contextual", "local"),
                        help="one expert that is told the goal, or one learner per training task (door: scripted)")
    parser.add_argument("--demos", type=Path, metavar="FILE",
                        help="npz file of demonstrations (tasks, observations, actions): meta-train from them alone")
    parser.add_argument("--out", type=Path,
                        help="output folder (default runs/TASK/gmps/seedSEED; with --evaluate DIR/evaluation)")
    parser.add_argument("--device", default="cpu", help="for the networks: cpu or cuda")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of simulator and networks (default: all)")
    parser.add_argument("--quick", action="store_true", help="every phase on tiny budgets, under a minute")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting of settings.py")
    parser.add_argument("--evaluate", type=Path, metavar="DIR", help="adapt the trained policy in DIR instead of training")
    parser.add_argument("--goals", type=Path, help="with --evaluate: npy file of goals (default: the held-out goals), "
                        "(n, 2) in metres for push, push-vision and ant, (n, 1) in radians for door")
    parser.add_argument("--gradient-steps", type=int, help="with --evaluate (default 5; 20 with --extrapolate)")
    parser.add_argument("--rollouts", type=int,
                        help="with --evaluate: per task and gradient step (default 20, for the ant 50)")
    parser.add_argument("--extrapolate", action="store_true",
                        help="with --evaluate, ant: goals 15, 30 and 45 degrees outside the training arc, and the figure")
    options = parser.parse_args(arguments)
    if options.task not in (*FAMILIES, "all"):
        raise UserError(f"unknown task {options.task!r}: choose one of {', '.join(FAMILIES)}, or all")
    for name, value, low, high in (("--seed", options.seed, 0, 2 ** 31 - 1), ("--threads", options.threads, 1, 1024),
                                   ("--seeds", options.seeds, 1, 1000), ("--rollouts", options.rollouts, 2, 10_000),
                                   ("--gradient-steps", options.gradient_steps, 0, 1000)):
        if value is not None and not low <= value <= high:
            raise UserError(f"{name} must be between {low} and {high}, not {value}")
    only_evaluation = ("goals", "gradient_steps", "rollouts", "extrapolate")
    only_training = ("quick", "set", "seeds", "reward", "experts", "demos")
    if options.evaluate is None:
        for name in only_evaluation:
            if getattr(options, name) not in (None, False):
                raise UserError(f"--{name.replace('_', '-')} goes with --evaluate DIR: train without it")
    else:
        for name in only_training:
            if getattr(options, name):
                raise UserError(f"--{name} is for training: leave it out beside --evaluate")
    if options.seeds and options.seed:
        raise UserError("--seeds N runs seeds 0 to N - 1: leave --seed out")
    if options.task == "all" and (options.evaluate or options.demos or options.reward or options.experts):
        raise UserError("--task all takes no --evaluate, --demos, --reward or --experts: name one task")
    if options.demos and options.experts:
        raise UserError("--demos asks no experts: leave --experts out")
    if options.extrapolate and options.task != "ant":
        raise UserError("--extrapolate goes with --task ant alone")
    if options.extrapolate and options.goals:
        raise UserError("--extrapolate has its own goals: leave --goals out")
    try:
        if torch.device(options.device).type not in ("cpu", "cuda"):
            raise RuntimeError
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError):
        raise UserError(f"no device {options.device!r} here: use --device cpu") from None
    return options


def choose_settings(options, task, seed, demos=None):
    """Settings of one run from the command line: the defaults, then the task's, then those of the options."""
    try:
        given = {"task": task, "seed": seed} | {name: getattr(options, name) for name in ("reward", "experts")
                                                if getattr(options, name) is not None}
        if demos is not None:
            given |= {"experts": "demonstrations", "training_tasks": len(demos[0])}
        local = options.experts == "local" and task != "ant"  # its numbers are push's
        preset = settings_module.TASKS[task] | (settings_module.LOCAL if local else {})
        preset = preset | (settings_module.QUICK if options.quick else {})
        changed = settings_module.from_strings(options.set)
        if demos is not None:
            for name in changed.keys() & {"training_tasks", "aggregation_episodes"}:
                raise UserError(f"--set {name}: --demos brings its own tasks, and nobody to label further states")
            preset = preset | {"aggregation_episodes": 0}
            usual = settings_module.TASKS[task]
            if "exploring_tasks" in usual:  # the same share of the user's tasks
                preset["exploring_tasks"] = round(usual["exploring_tasks"] * len(demos[0]) / usual["training_tasks"])
        for name in ("task", "seed", "experts", "reward"):
            if name in changed:
                raise UserError(f"--set {name}: use --{name}")
        chosen = settings_module.Settings(**(preset | changed | given))
        family = make_family(task, chosen.reward)
    except ValueError as error:
        raise UserError(str(error)) from None
    if (chosen.experts == "scripted") != hasattr(family, "expert") and chosen.experts != "demonstrations":
        raise UserError(f"{task} has no {chosen.experts} experts")
    if family.image_shape and chosen.aggregation_episodes:
        raise UserError(f"{task} learns from demonstrations alone: leave aggregation_episodes at 0")
    if chosen.experts == "local" and chosen.demonstration_detours:
        raise UserError("local experts know their own task only: leave demonstration_detours at 0")
    check_camera(family)
    return chosen


def check_camera(family):
    """UserError, before any work, where a family's pictures cannot be taken."""
    if family.image_shape:
        try:
            Camera(family).close()
        except NoOpenGL as error:
            raise UserError(str(error)) from None


def train(options):
    """The runs that the command line names, one after the other; of several, those that are finished are left alone."""
    tasks = list(FAMILIES) if options.task == "all" else [options.task]
    seeds = [options.seed] if options.seeds is None else list(range(options.seeds))
    several = len(tasks) * len(seeds) > 1
    demos = None
    if options.demos:
        tasks_there, arrays, _ = read_demonstrations(options.demos, make_family(options.task))
        order = np.lexsort(tasks_there.T[::-1])  # settings.exploring_tasks counts from the last
        demos = tasks_there[order], tuple(array[order] for array in arrays)
    chosen = {task: choose_settings(options, task, options.seed, demos) for task in tasks}  # bad ones end it before any run
    for task in tasks:
        for seed in seeds:
            settings = dataclasses.replace(chosen[task], seed=seed)
            kind = {"local": "_local", "demonstrations": "_demos"}.get(settings.experts, "")
            kind += f"_{settings.reward}" if settings.reward != FAMILIES[task].rewards[0] else ""
            kind += "_quick" if options.quick else ""
            out = options.out or Path("runs") / task / "gmps" / f"seed{seed}{kind}"
            if options.out and several:
                out = options.out / task / f"seed{seed}"
            if several:
                print(f"---- {task}, seed {seed}: {out}", flush=True)
            run = Run(settings, out, options.device, options.threads, demos)
            open_folder(out, settings)
            if several and (out / "result.json").exists():
                print("finished before")
                continue
            train_one(run)


def train_one(run):
    """All phases of one run."""
    print("settings: " + ", ".join(f"{name}={value}" for name, value in dataclasses.asdict(run.settings).items()))
    experts = experts_phase(run)
    demonstrations, demonstration_steps = demonstrations_phase(run, experts)
    policy = meta_training_phase(run, experts, demonstrations, demonstration_steps)
    evaluation_phase(run, policy, experts)


def evaluate(options):
    """Adapt the policy in a folder to the user's goals."""
    if options.evaluate.is_file():
        raise UserError(f"--evaluate takes the folder that holds policy.pt: {options.evaluate} is a file")
    policy = load_checkpoint(options.evaluate / "policy.pt", "policy")
    settings = policy["settings"]
    if settings.task != options.task:
        raise UserError(f"{options.evaluate} holds a policy for {settings.task}: give --task {settings.task}")
    family = make_family(settings.task, settings.reward)
    check_camera(family)
    rollouts = options.rollouts or settings.test_episodes
    gradient_steps = (20 if options.extrapolate else 5) if options.gradient_steps is None else options.gradient_steps
    if options.extrapolate:
        goals = np.concatenate([goals for _, goals in family.bands()])
    elif options.goals:
        goals = read_goals(options.goals, family)
    else:
        goals = task_set(family, "held_out", settings.held_out_tasks)
    experts, experts_file = None, options.evaluate / "experts.pt"
    if settings.experts == "scripted":
        experts = family.expert
    elif experts_file.exists():
        content = load_checkpoint(experts_file, "experts")
        if content["settings"] != settings:
            raise UserError(f"{experts_file} is of another run than the policy beside it: bring its own, or none")
        experts = expert_policies(content, options.device)
    out = options.out or options.evaluate / "evaluation"
    open_evaluation(out)
    started = time.perf_counter()
    lists, env_steps, _ = evaluate_policy(family, policy, experts, goals, gradient_steps, rollouts, settings, options.seed,
                                          options.threads, options.device)
    seconds = policy["wall_seconds"] | {"evaluation": time.perf_counter() - started}
    write_json(out / "result.json", {
        "task": settings.task, "method": "gmps", "seed": options.seed, "commit": commit(), "trained_seed": settings.seed,
        "commits": policy["commits"] | {"evaluation": [commit()]},
        "env_steps": policy["env_steps"] | {"evaluation": env_steps}, "wall_seconds": seconds, "rollouts": rollouts,
        "machine": machine(options.threads)} | lists)
    if options.extrapolate:
        print_bands(family, lists)
        draw_extrapolation(out, family, lists)
    else:
        print(closing_table(lists, family.task_unit, "your goals" if options.goals else "held-out tasks"))
    print(f"results in {out}")


def main(arguments=None):
    try:
        options = parse(arguments)
        torch.set_num_threads(options.threads)
        commit()  # that of the code as loaded; files may change under a long run
        (evaluate if options.evaluate else train)(options)
    except (UserError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: a run goes on from its last checkpoint by the same command", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
