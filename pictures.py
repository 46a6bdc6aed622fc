"""Plots and films of a run."""
import imageio.v3 as imageio
import numpy as np
import torch

import policy
from envs import BatchEnv
from files import write_atomically
from vision import NoOpenGL


def draw_plot(run, lists):
    """learning.png: experts and meta-training against env steps, adaptation against gradient steps."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), constrained_layout=True)
    rows = {phase: [row for row in run.rows if row["phase"] == phase] for phase in ("experts", "meta_training")}
    if rows["experts"]:
        axes[0].plot([r["env_steps"] for r in rows["experts"]], [r["return"] for r in rows["experts"]], color="tab:gray")
        axes[0].set(title=f"{run.settings.experts} experts, sampled actions, training tasks", xlabel="environment steps",
                    ylabel="return per episode")
    else:
        axes[0].axis("off")
        axes[0].text(0.5, 0.5, f"experts: {run.settings.experts}, no learning", ha="center")
    for key, label, color in (("return", "before adaptation (step 3a)", "tab:orange"),
                              ("adapted_return", "adapted (step 3c)", "tab:blue")):
        if key in rows["meta_training"][0]:
            axes[1].plot([r["env_steps"] for r in rows["meta_training"]], [r[key] for r in rows["meta_training"]],
                         color=color, label=label)
    axes[1].set(title="meta-training, sampled actions, training tasks", xlabel="environment steps",
                ylabel="return per episode")
    axes[1].legend()
    for axis in axes[:2]:
        axis.locator_params(axis="x", nbins=5)  # else long numbers touch
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
                ylabel=("final angle error" if run.family.task_unit == "rad" else "final distance to goal")
                + f" ({run.family.task_unit})", ylim=(0, None))
    axes[2].legend()
    write_atomically(run.out / "learning.png", lambda file: figure.savefig(file, format="png", dpi=110))
    plt.close(figure)


def draw_video(run, path, task):
    """before_after.gif: the mean action on one held-out task, before and after adaptation, side by side, goal in green."""
    env = BatchEnv(1, run.family, 1, render_mode="rgb_array")
    sides = []
    try:
        for phi in (path[0], path[3]):
            observation, _ = env.reset(options={"task": task})
            frames, ended = [env.render()], False
            for step in range(1, run.family.horizon + 1):
                with torch.no_grad():
                    action = policy.policy_mean(phi, policy.policy_input(run.family, phi, observation))[0].cpu().numpy()
                if not ended:  # autoreset would begin another episode: hold the last picture
                    observation, _, ended, *_ = env.step(action)
                if step % run.family.frames_every == 0:
                    frames.append(env.render())
            sides.append(np.array(frames)[:, ::2, ::2])
    except NoOpenGL as error:
        print(f"no video: {error}")
        return
    finally:
        env.close()
    film = np.concatenate(sides, axis=2)
    write_atomically(run.out / "before_after.gif",
                     lambda file: imageio.imwrite(file, film, extension=".gif", duration=50, loop=0))


def band_means(family, lists, key):
    """[(label, means over the band's goals of `key` after 0, 1, .. gradient steps)] of an extrapolation's mean actions."""
    out, first, steps = [], 0, range(lists["held_out"][-1]["gradient_steps"] + 1)
    for label, goals in family.bands():
        rows = [[r[key] for r in lists["held_out"] if r["gradient_steps"] == k] for k in steps]
        out.append((label, [np.mean(row[first:first + len(goals)]) for row in rows]))
        first += len(goals)
    return out


def draw_extrapolation(out, family, lists):
    """extrapolation.png: return and distance against gradient steps, one line per band of goals outside the arc."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), constrained_layout=True)
    for axis, key in zip(axes, ("return", "final_distance")):
        for label, means in band_means(family, lists, key):
            axis.plot(means, "o-", markersize=3, label=label)
        axis.locator_params(axis="x", integer=True)
    axes[0].set(title="goals outside the training arc, mean action", xlabel="gradient steps", ylabel="return per episode")
    axes[1].set(title="the same", xlabel="gradient steps", ylabel=f"final distance to goal ({family.task_unit})",
                ylim=(0, None))
    axes[1].legend()
    write_atomically(out / "extrapolation.png", lambda file: figure.savefig(file, format="png", dpi=110))
    plt.close(figure)
