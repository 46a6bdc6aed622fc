"""One command from nothing to an evaluated meta-policy.

    python run.py --task push                       # experts, demonstrations, meta-training, evaluation, plot, video
    python run.py --task push --quick               # the same phases on tiny budgets, under a minute
    python run.py --task push --evaluate DIR --goals goals.npy --gradient-steps 3 --rollouts 20 --out DIR2

A run goes on from its last checkpoint when it is started again with the same command. This file holds what is not
research: the command line, the phases in order, files, tables, plot and video.
"""
import argparse
import contextlib
import csv
import dataclasses
import io
import json
import os
import pickle
import platform
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import gmps
import settings as settings_module
from envs import FAMILIES, BatchEnv, check_tasks, make_family, task_set
from local_policies import Experts, make_demonstrations, run_experts, save_demonstrations, train_experts

FORMAT = "gmps checkpoint 1"
TABLE_STEPS = (0, 1, 2, 3, 5)  # gradient steps shown in the closing table
EXPERT_CHECKPOINT_EVERY = 5    # iterations; the checkpoint holds the whole replay
METRICS = ("phase", "iteration", "env_steps", "return", "distance", "adapted_return", "adapted_distance", "loss",
           "imitation_0", "imitation_1", "temperature")


class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2."""


# ---------------------------------------------------------------- files
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
        raise UserError(f"{path} is truncated or not a checkpoint of this program: delete it to train anew") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("kind") != kind:
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
        goals = np.load(path, allow_pickle=False)
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


def commit():
    """Commit of the code, "-dirty" where a module that this program uses differs from it, "unknown" outside a checkout."""
    folder = Path(__file__).parent
    names = ("ant", "envs", "gmps", "local_policies", "run", "sawyer", "settings", "vision")
    modules = [folder / f"{name}.py" for name in names]

    def git(*arguments):
        return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", *modules) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---------------------------------------------------------------- a run and its phases
class Run:
    """Settings, folder, metrics rows, step and time counts of one run; they travel inside every checkpoint."""

    def __init__(self, settings, out, device, threads):
        self.settings, self.out, self.device, self.threads = settings, out, device, threads
        self.family = make_family(settings.task, settings.reward)
        self.training_tasks = task_set(self.family, "train", settings.training_tasks)
        self.rows, self.env_steps, self.wall_seconds = [], {}, {}
        self.phase, self.started = None, None

    def batch_env(self, num_envs):
        return BatchEnv(num_envs, self.family, self.threads)

    def begin(self, phase):
        self.phase, self.started = phase, time.perf_counter() - self.wall_seconds.get(phase, 0.0)

    def tick(self, env_steps=None, metrics=None):
        """Bring the phase's counts up to date; a row of metrics goes to metrics.csv."""
        self.wall_seconds[self.phase] = time.perf_counter() - self.started
        if env_steps is not None:
            self.env_steps[self.phase] = env_steps
        if metrics is not None:
            self.rows.append({"phase": self.phase} | {key: metrics[key] for key in METRICS if key in metrics})

    def counts(self):
        return {"rows": self.rows, "env_steps": self.env_steps, "wall_seconds": self.wall_seconds}

    def restore(self, content):
        self.rows, self.env_steps = content["rows"], content["env_steps"]
        self.wall_seconds = content["wall_seconds"]

    def save(self, name, kind, content):
        self.tick()
        save_checkpoint(self.out / name, kind, self.settings, content | self.counts())
        write_atomically(self.out / "metrics.csv", self.write_metrics, "w")

    def write_metrics(self, file):
        writer = csv.DictWriter(file, METRICS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
                         for row in self.rows)

    def load(self, name, kind):
        """A checkpoint of this run, its counts restored, or None where there is none yet."""
        if not (self.out / name).exists():
            return None
        content = load_checkpoint(self.out / name, kind)
        if content["settings"] != self.settings:
            raise UserError(f"{self.out / name} belongs to another run: choose another folder with --out")
        self.restore(content)
        return content


def progress_bar(description, total, done):
    return tqdm(total=total, initial=done, desc=f"{description:<22}", unit="it", dynamic_ncols=True, mininterval=0.5)


def describe(metrics):
    shown = {"steps": f"{metrics['env_steps']:,}", "return": f"{metrics['return']:.0f}",
             "dist": f"{metrics['distance']:.3f}"}
    if "adapted_return" in metrics:
        shown |= {"adapted": f"{metrics['adapted_return']:.0f}", "adapted dist": f"{metrics['adapted_distance']:.3f}"}
    return shown


def experts_phase(run):
    """Step 1. Leaves experts.pt with the policies; the learners' whole state, replay included, is dropped when done."""
    final, partial, settings = "experts.pt", "experts_partial.pt", run.settings
    content = run.load(final, "experts")
    if content is None:
        content = run.load(partial, "experts in training")
        state = content and content["state"]
        run.begin("experts")
        env = run.batch_env(settings.training_tasks * settings.expert_episodes)
        done = state["iteration"] if state else 0
        with progress_bar(f"experts ({settings.experts})", settings.expert_iterations, done) as bar:
            for experts, snapshot, metrics in train_experts(env, run.training_tasks, settings, state, run.device):
                run.tick(metrics["env_steps"], metrics)
                bar.set_postfix(describe(metrics), refresh=False)
                bar.update()
                if metrics["iteration"] == settings.expert_iterations:
                    run.save(final, "experts", {"policy": [p.cpu() for p in experts.policy]})
                elif metrics["iteration"] % EXPERT_CHECKPOINT_EVERY == 0:
                    run.save(partial, "experts in training", {"state": snapshot()})
        env.close()
        content = load_checkpoint(run.out / final, "experts")
    (run.out / partial).unlink(missing_ok=True)
    return expert_policies(content, run.device)


def expert_policies(content, device="cpu"):
    """`Experts` from the content of experts.pt."""
    settings = content["settings"]
    family = make_family(settings.task, settings.reward)
    return Experts(family, [p.to(device) for p in content["policy"]], task_set(family, "train", settings.training_tasks),
                   settings.experts == "contextual")


def demonstrations_phase(run, experts):
    """Step 2. Leaves demonstrations.npz; its env steps count as the experts'."""
    path = run.out / "demonstrations.npz"
    env = run.batch_env(run.settings.training_tasks * run.settings.demonstration_episodes)
    *arrays, env_steps = make_demonstrations(env, experts, run.training_tasks, run.settings)
    env.close()
    if not path.exists():
        write_atomically(path, lambda file: save_demonstrations(file, run.training_tasks, *arrays))
    return gmps.Demonstrations(*arrays), env_steps


def meta_training_phase(run, experts, demonstrations, demonstration_steps):
    """Step 3. Leaves policy.pt: theta, alpha, advantage scales and the policy without adaptation."""
    final, partial, settings = "policy.pt", "policy_partial.pt", run.settings
    content = run.load(final, "policy")
    if content is None:
        content = run.load(partial, "policy in training")
        state = content and content["state"]
        run.begin("meta_training")
        if content is None:
            run.env_steps["experts"] += demonstration_steps
            imitation = gmps.imitate(run.family, demonstrations, settings, run.device)
            run.save(partial, "policy in training", {"state": None, "no_adaptation": imitation})
        else:
            imitation = content["no_adaptation"]
        env = run.batch_env(settings.training_tasks * settings.episodes)
        with progress_bar("meta-training", settings.collections, state["collection"] if state else 0) as bar:
            training = gmps.meta_train(env, run.training_tasks, demonstrations, experts, imitation, settings, state,
                                       run.device)
            for state, metrics in training:
                run.tick(metrics["env_steps"], metrics)
                bar.set_postfix(describe(metrics), refresh=False)
                bar.update()
                if state["collection"] == settings.collections:
                    kept = {name: state[name] for name in ("theta", "alpha", "scales")}
                    run.save(final, "policy", kept | {"no_adaptation": imitation})
                else:
                    run.save(partial, "policy in training", {"state": state, "no_adaptation": imitation})
        env.close()
        content = load_checkpoint(run.out / final, "policy")
    (run.out / partial).unlink(missing_ok=True)
    return content


# ---------------------------------------------------------------- evaluation
def evaluate_policy(family, policy, experts, tasks, gradient_steps, rollouts, settings, seed, threads, device="cpu"):
    """Adapt to `tasks` and measure. Returns the lists of result.json, env steps, and the adapted parameters of task 0."""
    settings = dataclasses.replace(settings, episodes=rollouts)
    theta, alpha, imitation = ({name: value.to(device) for name, value in policy[key].items()}
                               for key in ("theta", "alpha", "no_adaptation"))
    lists = {"held_out": [], "held_out_sampled": [], "experts_held_out": [], "no_adaptation": []}
    env_steps, path = 0, None

    def records(tasks, returns, distances, **extra):
        return [{"task": task.tolist(), **extra, "return": float(r), "final_distance": float(d),
                 "success": bool(d <= family.success_distance)} for task, r, d in zip(tasks, returns, distances)]

    chunks = np.array_split(tasks, -(-len(tasks) // 50))  # bounds memory, whatever the number of goals
    with progress_bar("evaluation", len(tasks), 0) as bar:
        for number, chunk in enumerate(chunks):
            result = gmps.evaluate(family, theta, alpha, policy["scales"], chunk, gradient_steps, settings, seed,
                                   threads, number)
            path = path or [gmps.one_task(phi, 0) for phi in result["path"]]
            for name, kind in (("held_out", "mean"), ("held_out_sampled", "sampled")):
                for k in range(gradient_steps + 1):
                    lists[name] += records(chunk, result[kind]["return"][k], result[kind]["distance"][k], gradient_steps=k)
            env = BatchEnv(len(chunk), family, threads)
            without = gmps.collect(env, chunk, gmps.per_task(imitation, len(chunk)), settings, None)
            rolled = [("no_adaptation", without)]
            if experts is not None and getattr(experts, "contextual", False):
                rolled.append(("experts_held_out", run_experts(env, experts, chunk)))
            for name, episodes in rolled:
                lists[name] += records(chunk, episodes["rewards"].sum(1), episodes["distances"][:, -1])
                env_steps += int(episodes["mask"].sum())
            env.close()
            env_steps += result["env_steps"]
            bar.set_postfix({"steps": f"{env_steps:,}", "return": f"{result['mean']['return'][-1].mean():.0f}",
                             "dist": f"{result['mean']['distance'][-1].mean():.3f}"}, refresh=False)
            bar.update(len(chunk))
    return lists, env_steps, path


def closing_table(lists, unit):
    """Aligned text table of means over tasks."""
    def row(label, records):
        if not records:
            return f"{label:<34}{'-':>8}{'-':>12}{'-':>10}"
        mean = {key: np.mean([record[key] for record in records]) for key in ("return", "final_distance", "success")}
        return f"{label:<34}{mean['return']:>8.1f}{mean['final_distance']:>12.4f}{100 * mean['success']:>9.0f}%"

    steps = sorted({record["gradient_steps"] for record in lists["held_out"]})
    shown = [k for k in steps if k in TABLE_STEPS or k == steps[-1]]
    lines = [f"{'held-out tasks':<34}{'return':>8}{f'distance {unit}':>12}{'success':>10}"]
    for name, label in (("held_out", "mean action"), ("held_out_sampled", "sampled actions")):
        lines += [row(f"adapted, {k} step{'s' * (k != 1)}, {label}",
                      [r for r in lists[name] if r["gradient_steps"] == k]) for k in shown]
    return "\n".join([*lines, row("imitation, no adaptation", lists["no_adaptation"]),
                      row("experts (told the goal)", lists["experts_held_out"])])


def evaluation_phase(run, policy, experts):
    """Evaluate on the held-out tasks; writes result.json, plot and video."""
    run.begin("evaluation")
    settings = run.settings
    tasks = task_set(run.family, "held_out", settings.held_out_tasks)
    lists, env_steps, path = evaluate_policy(run.family, policy, experts, tasks, max(TABLE_STEPS), settings.episodes,
                                             settings, settings.seed, run.threads, run.device)
    run.tick(env_steps)
    result = {"task": settings.task, "method": "gmps", "seed": settings.seed, "commit": commit(),
              "env_steps": run.env_steps, "wall_seconds": run.wall_seconds, "machine": machine(run.threads)} | lists
    write_json(run.out / "result.json", result)
    print(closing_table(lists, run.family.task_unit))
    counted = ", ".join(f"{name.replace('_', '-')} {steps:,}" for name, steps in run.env_steps.items())
    print(f"environment steps: {counted}; wall time {sum(run.wall_seconds.values()):.0f} s on {result['machine']}")
    draw_plot(run, lists)
    draw_video(run, path, tasks[0])
    print(f"results in {run.out}")


def machine(threads):
    return f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores, {threads} threads, torch {torch.__version__}"


# ---------------------------------------------------------------- pictures
def draw_plot(run, lists):
    """learning.png: experts and meta-training against env steps, adaptation against gradient steps."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), constrained_layout=True)
    rows = {phase: [row for row in run.rows if row["phase"] == phase] for phase in ("experts", "meta_training")}
    axes[0].plot([r["env_steps"] for r in rows["experts"]], [r["return"] for r in rows["experts"]], color="tab:gray")
    axes[0].set(title=f"{run.settings.experts} experts, sampled actions, training tasks", xlabel="environment steps",
                ylabel="return per episode")
    for key, label, color in (("return", "before adaptation (step 3a)", "tab:orange"),
                              ("adapted_return", "adapted (step 3c)", "tab:blue")):
        axes[1].plot([r["env_steps"] for r in rows["meta_training"]], [r.get(key, np.nan) for r in rows["meta_training"]],
                     color=color, label=label)
    axes[1].set(title="meta-training, sampled actions, training tasks", xlabel="environment steps",
                ylabel="return per episode")
    axes[1].legend()
    steps = sorted({record["gradient_steps"] for record in lists["held_out"]})
    for name, label, color in (("held_out", "mean action", "tab:blue"), ("held_out_sampled", "sampled actions", "tab:cyan")):
        values = np.array([[r["final_distance"] for r in lists[name] if r["gradient_steps"] == k] for k in steps])
        half = 1.96 * values.std(axis=1) / np.sqrt(values.shape[1])
        axes[2].plot(steps, values.mean(1), "o-", color=color, label=f"adapted, {label}")
        axes[2].fill_between(steps, values.mean(1) - half, values.mean(1) + half, color=color, alpha=0.2, linewidth=0)
    for name, label, style in (("no_adaptation", "imitation, no adaptation", "--"),
                               ("experts_held_out", "experts (told the goal)", ":")):
        if lists[name]:
            level = np.mean([r["final_distance"] for r in lists[name]])
            axes[2].axhline(level, color="black", linestyle=style, label=label)
    axes[2].set(title=f"adaptation on {len(values[0])} held-out tasks, 95% interval", xlabel="gradient steps",
                ylabel=f"final distance to goal ({run.family.task_unit})", ylim=(0, None))
    axes[2].legend()
    write_atomically(run.out / "learning.png", lambda file: figure.savefig(file, format="png", dpi=110))
    plt.close(figure)


def draw_video(run, path, task):
    """before_after.gif: the mean action on one held-out task, before and after adaptation, side by side, goal in green."""
    import imageio.v3 as imageio
    env = BatchEnv(1, run.family, 1, render_mode="rgb_array")
    sides = []
    try:
        for phi in (path[0], path[3]):
            observation, _ = env.reset(options={"task": task})
            frames = [env.render()]
            for _ in range(run.family.horizon):
                with torch.no_grad():
                    action = gmps.policy_mean(phi, gmps.policy_input(run.family, phi, observation))[0].cpu().numpy()
                observation, *_ = env.step(action)
                frames.append(env.render())
            sides.append(np.array(frames)[:, ::2, ::2])
    except RuntimeError as error:
        print(f"no video: {error}")
        return
    finally:
        env.close()
    film = np.concatenate(sides, axis=2)
    write_atomically(run.out / "before_after.gif",
                     lambda file: imageio.imwrite(file, film, extension=".gif", duration=50, loop=0))


# ---------------------------------------------------------------- command line
class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (python run.py --help lists what there is)")


def parse(arguments):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="push", help=f"one of {', '.join(FAMILIES)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--experts", choices=("contextual", "local"), default="contextual",
                        help="one expert that is told the goal, or one learner per training task")
    parser.add_argument("--out", type=Path, help="output folder (default runs/TASK/gmps/seedSEED)")
    parser.add_argument("--device", default="cpu", help="for the networks: cpu or cuda")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of simulator and networks (default: all)")
    parser.add_argument("--quick", action="store_true", help="every phase on tiny budgets, under a minute")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting of settings.py")
    parser.add_argument("--evaluate", type=Path, metavar="DIR", help="adapt the trained policy in DIR instead of training")
    parser.add_argument("--goals", type=Path,
                        help="with --evaluate: npy file of goals, (n, 2) in metres for push (default: the held-out goals)")
    parser.add_argument("--gradient-steps", type=int, help="with --evaluate (default 5)")
    parser.add_argument("--rollouts", type=int, help="with --evaluate: per task and gradient step (default 20)")
    options = parser.parse_args(arguments)
    if options.task not in FAMILIES:
        raise UserError(f"unknown task {options.task!r}: choose one of {', '.join(FAMILIES)}")
    for name, value, low, high in (("--seed", options.seed, 0, 2 ** 31 - 1), ("--threads", options.threads, 1, 1024),
                                   ("--rollouts", options.rollouts, 2, 10_000),
                                   ("--gradient-steps", options.gradient_steps, 0, 1000)):
        if value is not None and not low <= value <= high:
            raise UserError(f"{name} must be between {low} and {high}, not {value}")
    if options.evaluate is None:
        for name in ("goals", "gradient_steps", "rollouts"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} goes with --evaluate DIR; training has --set NAME=VALUE")
    options.gradient_steps = 5 if options.gradient_steps is None else options.gradient_steps
    options.rollouts = options.rollouts or 20
    if options.evaluate is not None and (options.quick or options.set):
        raise UserError("--quick and --set are for training: leave them out beside --evaluate")
    try:
        if torch.device(options.device).type not in ("cpu", "cuda"):
            raise RuntimeError
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError):
        raise UserError(f"no device {options.device!r} here: use --device cpu") from None
    return options


def train(options):
    try:
        preset = settings_module.LOCAL if options.experts == "local" else {}
        preset = preset | (settings_module.QUICK if options.quick else {})
        changed = settings_module.from_strings(options.set)
        for name in ("task", "seed", "experts"):
            if name in changed:
                raise UserError(f"--set {name}: use --{name}")
        given = {"task": options.task, "seed": options.seed, "experts": options.experts}
        chosen = settings_module.Settings(**(preset | given | changed))
    except ValueError as error:
        raise UserError(str(error)) from None
    kind = ("_local" if chosen.experts == "local" else "") + ("_quick" if options.quick else "")
    default = f"runs/{chosen.task}/gmps/seed{chosen.seed}{kind}"
    run = Run(chosen, options.out or Path(default), options.device, options.threads)
    open_folder(run.out, chosen)
    print("settings: " + ", ".join(f"{name}={value}" for name, value in dataclasses.asdict(chosen).items()))
    experts = experts_phase(run)
    demonstrations, demonstration_steps = demonstrations_phase(run, experts)
    policy = meta_training_phase(run, experts, demonstrations, demonstration_steps)
    evaluation_phase(run, policy, experts)


def evaluate(options):
    """Adapt the policy in a folder to the user's goals."""
    policy = load_checkpoint(options.evaluate / "policy.pt", "policy")
    settings = policy["settings"]
    if settings.task != options.task:
        raise UserError(f"{options.evaluate} holds a policy for {settings.task}: give --task {settings.task}")
    family = make_family(settings.task, settings.reward)
    goals = read_goals(options.goals, family) if options.goals else task_set(family, "held_out", settings.held_out_tasks)
    experts_file = options.evaluate / "experts.pt"
    experts = expert_policies(load_checkpoint(experts_file, "experts"), options.device) if experts_file.exists() else None
    out = options.out or options.evaluate / "evaluation"
    if (out / "settings.json").exists():
        raise UserError(f"{out} holds a training run: choose another folder with --out")
    make_folder(out)
    started = time.perf_counter()
    lists, env_steps, _ = evaluate_policy(family, policy, experts, goals, options.gradient_steps, options.rollouts,
                                          settings, options.seed, options.threads, options.device)
    seconds = policy["wall_seconds"] | {"evaluation": time.perf_counter() - started}
    write_json(out / "result.json", {
        "task": settings.task, "method": "gmps", "seed": options.seed, "commit": commit(), "trained_seed": settings.seed,
        "env_steps": policy["env_steps"] | {"evaluation": env_steps}, "wall_seconds": seconds, "rollouts": options.rollouts,
        "machine": machine(options.threads)} | lists)
    print(closing_table(lists, family.task_unit))
    print(f"results in {out}")


def main(arguments=None):
    try:
        options = parse(arguments)
        torch.set_num_threads(options.threads)
        (evaluate if options.evaluate else train)(options)
    except (UserError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
