"""The phases of a run in order: experts, demonstrations, meta-training, evaluation. Each leaves its file, from which a run
that is started again goes on. This file holds what is not research: checkpoints, counts, the closing table.
"""
import csv
import dataclasses
import os
import platform
import time

import numpy as np
import torch
from tqdm import tqdm

import gmps
from envs import BatchEnv, make_family, task_set
from files import (
    UserError,
    commit,
    load_checkpoint,
    read_demonstrations,
    save_checkpoint,
    write_atomically,
    write_json,
)
from local_policies import Experts, make_demonstrations, run_experts, save_demonstrations, train_experts
from pictures import band_means, draw_plot, draw_video
from policy import collect, one_task, per_task

TABLE_STEPS = (0, 1, 2, 3, 5)  # gradient steps shown in the closing table
LEVELS = {"no_adaptation": "imitation, no adaptation", "experts_held_out": "experts (told the goal)",
          "experts_training": "experts on the training tasks"}  # rows of that table beside the adapted policy's
EXPERT_CHECKPOINT_EVERY = 5    # iterations; the checkpoint holds the whole replay


# ---------------------------------------------------------------- a run and its phases
class Run:
    """Settings, folder, metrics rows, step and time counts and commits of one run; they travel inside every checkpoint."""

    def __init__(self, settings, out, device, threads, demos=None):
        self.settings, self.out, self.device, self.threads, self.demos = settings, out, device, threads, demos
        self.family = make_family(settings.task, settings.reward)
        self.training_tasks = task_set(self.family, "train", settings.training_tasks) if demos is None else demos[0]
        self.rows, self.env_steps, self.wall_seconds, self.commits = [], {}, {}, {}
        self.phase, self.started = None, None

    def batch_env(self, num_envs):
        return BatchEnv(num_envs, self.family, self.threads)

    def begin(self, phase):
        self.phase, self.started = phase, time.perf_counter() - self.wall_seconds.get(phase, 0.0)
        commits, now = self.commits.setdefault(phase, []), commit()
        if now not in commits[-1:]:  # more than one where a run went on with other code
            commits.append(now)

    def tick(self, env_steps=None, metrics=None):
        """Bring the phase's counts up to date; a row of metrics goes to metrics.csv."""
        self.wall_seconds[self.phase] = time.perf_counter() - self.started
        if env_steps is not None:
            self.env_steps[self.phase] = env_steps
        if metrics is not None:
            self.rows.append({"phase": self.phase} | {key: metrics[key] for key in self.columns if key in metrics})

    def counts(self):
        return {"rows": self.rows, "env_steps": self.env_steps, "wall_seconds": self.wall_seconds, "commits": self.commits}

    def restore(self, content):
        self.rows, self.env_steps = content["rows"], content["env_steps"]
        self.wall_seconds, self.commits = content["wall_seconds"], content["commits"]

    def save(self, name, kind, content):
        self.tick()
        save_checkpoint(self.out / name, kind, self.settings, content | self.counts())
        write_atomically(self.out / "metrics.csv", self.write_metrics, "w")

    @property
    def columns(self):
        """Of metrics.csv. imitation_k: the last meta-step's imitation loss after k inner steps, over that step's tasks; with
        settings.exploring_tasks imitation_0 is over those."""
        losses = [f"imitation_{k}" for k in range(max(3, self.settings.inner_steps) + 1)]
        return ["phase", "iteration", "env_steps", "return", "distance", "adapted_return", "adapted_distance", *losses,
                "temperature"]

    def write_metrics(self, file):
        writer = csv.DictWriter(file, self.columns, restval="", lineterminator="\n")
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
    """Step 1. Leaves experts.pt with the policies; the learners' whole state, replay included, is dropped when done.

    A scripted expert needs no learning, and with the user's demonstrations there is none (None).
    """
    final, partial, settings = "experts.pt", "experts_partial.pt", run.settings
    if settings.experts in ("scripted", "demonstrations"):
        run.env_steps.setdefault("experts", 0)
        run.wall_seconds.setdefault("experts", 0.0)
        return run.family.expert if settings.experts == "scripted" else None
    content = run.load(final, "experts")
    if content is None:
        content = run.load(partial, "experts in training")
        state = content and content["state"]
        run.begin("experts")
        env = BatchEnv(settings.training_tasks * settings.expert_episodes, run.family.expert_family, run.threads)
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
    family = make_family(settings.task, settings.reward).expert_family
    return Experts(family, [p.to(device) for p in content["policy"]], task_set(family, "train", settings.training_tasks),
                   settings.experts == "contextual")


def demonstrations_phase(run, experts):
    """Step 2. Leaves demonstrations.npz, from which a run that goes on reads them; returns them and their env steps."""
    path, settings = run.out / "demonstrations.npz", run.settings
    if not path.exists():
        if run.demos is None:
            run.begin("experts")
            env = run.batch_env(settings.training_tasks * settings.demonstration_episodes)
            *arrays, env_steps = make_demonstrations(env, experts, run.training_tasks, settings)
            env.close()
            run.tick()
        else:
            arrays, env_steps = run.demos[1], 0
        write_atomically(path, lambda file: save_demonstrations(file, run.training_tasks, arrays, env_steps))
    try:
        tasks, arrays, env_steps = read_demonstrations(path, run.family)
    except UserError as error:
        raise UserError(f"{error} (delete it, and the run makes it again)") from None
    if run.demos is not None and not all(map(np.array_equal, (run.demos[0], *run.demos[1]), (tasks, *arrays))):
        raise UserError(f"{path} holds other demonstrations: choose another folder with --out")
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
            run.env_steps["experts"] += demonstration_steps  # counted as the experts', like the time they take
            imitation = gmps.imitate(run.family, demonstrations, settings, run.device)
            run.save(partial, "policy in training", {"state": None, "no_adaptation": imitation})
        else:
            imitation = content["no_adaptation"]
        start, some = imitation, min(settings.exploring_tasks, settings.training_tasks)
        if some and state is None:  # (a state brings its own theta)
            start = gmps.imitate(run.family, demonstrations, settings, run.device, some)
        env = run.batch_env(settings.training_tasks * settings.episodes)
        with progress_bar("meta-training", settings.collections, state["collection"] if state else 0) as bar:
            training = gmps.meta_train(env, run.training_tasks, demonstrations, experts, start, settings, state,
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
def records(family, tasks, returns, distances, **extra):
    """Entries of result.json, one for each task. Distances in the family's `task_unit`; `extra` goes into every entry."""
    return [{"task": task.tolist(), **extra, "return": float(r), "final_distance": float(d),
             "success": bool(d <= family.success_distance)} for task, r, d in zip(tasks, returns, distances)]


def measure_experts(family, experts, tasks, threads):
    """Entries of result.json of the experts' mean actions, one episode a task, and its env steps."""
    env = BatchEnv(len(tasks), family, threads)
    episodes = run_experts(env, experts, tasks)
    env.close()
    return records(family, tasks, episodes["rewards"].sum(1), episodes["distances"][:, -1]), int(episodes["mask"].sum())


def evaluate_policy(family, policy, experts, tasks, gradient_steps, rollouts, settings, seed, threads, device="cpu"):
    """Adapt to `tasks` and measure. Returns the lists of result.json, env steps, and the adapted parameters of task 0."""
    settings = dataclasses.replace(settings, episodes=rollouts)
    theta, alpha, imitation = ({name: value.to(device) for name, value in policy[key].items()}
                               for key in ("theta", "alpha", "no_adaptation"))
    lists = {"held_out": [], "held_out_sampled": [], "experts_held_out": [], "no_adaptation": []}
    env_steps, path = 0, None

    chunks = np.array_split(tasks, -(-len(tasks) // 50))  # bounds memory, whatever the number of goals
    with progress_bar("evaluation", len(tasks), 0) as bar:
        for number, chunk in enumerate(chunks):
            result = gmps.evaluate(family, theta, alpha, policy["scales"], chunk, gradient_steps, settings, seed,
                                   threads, number)
            path = path or [one_task(phi, 0) for phi in result["path"]]
            for name, kind in (("held_out", "mean"), ("held_out_sampled", "sampled")):
                for k in range(gradient_steps + 1):
                    lists[name] += records(family, chunk, result[kind]["return"][k], result[kind]["distance"][k],
                                           gradient_steps=k)
            env = BatchEnv(len(chunk), family, threads)
            without = collect(env, chunk, per_task(imitation, len(chunk)), settings, None)
            env.close()
            lists["no_adaptation"] += records(family, chunk, without["rewards"].sum(1), without["distances"][:, -1])
            env_steps += result["env_steps"] + int(without["mask"].sum())
            if getattr(experts, "contextual", False):
                entries, steps = measure_experts(family, experts, chunk, threads)
                lists["experts_held_out"] += entries
                env_steps += steps
            bar.set_postfix({"steps": f"{env_steps:,}", "return": f"{result['mean']['return'][-1].mean():.0f}",
                             "dist": f"{result['mean']['distance'][-1].mean():.3f}"}, refresh=False)
            bar.update(len(chunk))
    return lists, env_steps, path


def closing_table(lists, unit, title="held-out tasks"):
    """Aligned text table of means over tasks."""
    def row(label, records):
        if not records:
            return f"{label:<34}{'-':>8}{'-':>14}{'-':>10}"
        mean = {key: np.mean([record[key] for record in records]) for key in ("return", "final_distance", "success")}
        return f"{label:<34}{mean['return']:>8.1f}{mean['final_distance']:>14.4f}{100 * mean['success']:>9.0f}%"

    steps = sorted({record["gradient_steps"] for record in lists["held_out"]})
    shown = [k for k in steps if k in TABLE_STEPS or k == steps[-1]]
    lines = [f"{title:<34}{'return':>8}{f'distance {unit}':>14}{'success':>10}"]
    for name, label in (("held_out", "mean action"), ("held_out_sampled", "sampled actions")):
        lines += [row(f"adapted, {k} step{'s' * (k != 1)}, {label}",
                      [r for r in lists[name] if r["gradient_steps"] == k]) for k in shown]
    return "\n".join([*lines, *(row(label, lists[name]) for name, label in LEVELS.items() if name in lists)])


def closing_counts(result):
    """The line below the closing table."""
    counted = ", ".join(f"{phase.replace('_', '-')} {steps:,}" for phase, steps in result["env_steps"].items())
    return f"environment steps: {counted}; wall time {sum(result['wall_seconds'].values()):.0f} s on {result['machine']}"


def print_bands(family, lists):
    """Final distance of the mean action after each gradient step, a row for each band of goals."""
    shown = [k for k in (0, 1, 2, 3, 5, 10, 15, 20) if k <= lists["held_out"][-1]["gradient_steps"]]
    print(f"{'final distance after steps':<28}" + "".join(f"{k:>8}" for k in shown))
    for label, means in band_means(family, lists, "final_distance"):
        print(f"{label:<28}" + "".join(f"{means[k]:>8.3f}" for k in shown))


def evaluation_phase(run, policy, experts):
    """Evaluate on the held-out tasks; writes result.json, plot and video."""
    run.begin("evaluation")
    settings = run.settings
    tasks = task_set(run.family, "held_out", settings.held_out_tasks)
    lists, env_steps, path = evaluate_policy(run.family, policy, experts, tasks, max(TABLE_STEPS),
                                             settings.test_episodes, settings, settings.seed, run.threads, run.device)
    lists["experts_training"] = []
    if experts is not None:
        lists["experts_training"], steps = measure_experts(run.family, experts, run.training_tasks, run.threads)
        env_steps += steps
    run.tick(env_steps)
    result = {"task": settings.task, "method": "gmps", "seed": settings.seed, "commit": commit(),
              "commits": run.commits, "env_steps": run.env_steps, "wall_seconds": run.wall_seconds,
              "machine": machine(run.threads)} | lists
    write_json(run.out / "result.json", result)
    print(closing_table(lists, run.family.task_unit))
    print(closing_counts(result))
    draw_plot(run, lists)
    draw_video(run, path, tasks[0])
    print(f"results in {run.out}")


def machine(threads):
    return f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores, {threads} threads, torch {torch.__version__}"
