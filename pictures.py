"""Plots and films of a run."""
import imageio.v3 as imageio
import numpy as np
import torch
from PIL import Image, ImageDraw

import policy
from envs import BatchEnv
from files import write_atomically
from vision import NoOpenGL


def draw_plot(run, lists):
    """learning.png: experts and meta-training against env steps, adaptation against gradient steps."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {phase: [row for row in run.rows if row["phase"] == phase] for phase in ("experts", "meta_training")}
    panels = 3 if rows["experts"] else 2  # scripted experts and a user's demonstrations have no learning to show
    figure, axes = plt.subplots(1, panels, figsize=(5 * panels, 4.2), constrained_layout=True)
    learning, adaptation = axes[-2:]
    if rows["experts"]:
        axes[0].plot([r["env_steps"] for r in rows["experts"]], [r["return"] for r in rows["experts"]], color="tab:gray")
        axes[0].set(title=f"{run.settings.experts} experts, sampled actions, training tasks", xlabel="environment steps",
                    ylabel="return per episode")
    if "adapted_return" in rows["meta_training"][0]:
        low, curves = None, {"return": "before adaptation (step 3a)", "adapted_return": "adapted (step 3c)"}
        learning.set(title="meta-training, sampled actions, training tasks", ylabel="return per episode")
    else:  # without aggregation nobody rolls the adapted policies out: what they imitate is all there is
        steps = run.settings.inner_steps
        widest = " (its own tasks)" if run.settings.exploring_tasks else ""
        low, curves = 0, {"imitation_0": f"before adaptation{widest}", f"imitation_{steps}": f"after inner step {steps}"}
        learning.set(title="meta-training, last meta-step of each collection", ylabel="imitation loss, training tasks")
    for (key, label), color in zip(curves.items(), ("tab:orange", "tab:blue")):
        learning.plot([r["env_steps"] for r in rows["meta_training"]], [r[key] for r in rows["meta_training"]], color=color,
                     label=label)
    learning.set(xlabel="environment steps", ylim=(low, None))
    learning.legend()
    for axis in axes[:-1]:
        axis.locator_params(axis="x", nbins=5)  # else long numbers touch
    steps = sorted({record["gradient_steps"] for record in lists["held_out"]})
    for name, label, color in (("held_out", "mean action", "tab:blue"), ("held_out_sampled", "sampled actions", "tab:cyan")):
        values = np.array([[r["final_distance"] for r in lists[name] if r["gradient_steps"] == k] for k in steps])
        half = 1.96 * values.std(axis=1) / np.sqrt(values.shape[1])
        adaptation.plot(steps, values.mean(1), "o-", color=color, label=f"adapted, {label}")
        adaptation.fill_between(steps, values.mean(1) - half, values.mean(1) + half, color=color, alpha=0.2, linewidth=0)
    for name, label, style in (("no_adaptation", "imitation, no adaptation", "--"),
                               ("experts_held_out", "experts (told the goal)", ":")):
        if lists[name]:
            level = np.mean([r["final_distance"] for r in lists[name]])
            adaptation.axhline(level, color="black", linestyle=style, label=label)
    adaptation.set(title=f"adaptation on {len(values[0])} held-out tasks, 95% interval", xlabel="gradient steps",
                   ylabel=("final angle error" if run.family.task_unit == "rad" else "final distance to goal")
                   + f" ({run.family.task_unit})", ylim=(0, None))
    adaptation.legend()
    write_atomically(run.out / "learning.png", lambda file: figure.savefig(file, format="png", dpi=110))
    plt.close(figure)


def draw_video(run, path, task):
    """before_after.gif: the mean action on one held-out task, before and after adaptation, side by side, goal in green."""
    env = BatchEnv(1, run.family, 1, render_mode="rgb_array")
    sides = []
    try:
        for steps in (0, 3):
            phi = path[steps]
            observation, _ = env.reset(options={"task": task})
            frames, ended = [env.render()], False
            for step in range(1, run.family.horizon + 1):
                with torch.no_grad():
                    action = policy.policy_mean(phi, policy.policy_input(run.family, phi, observation))[0].cpu().numpy()
                if not ended:  # autoreset would begin another episode: hold the last picture
                    observation, _, ended, *_ = env.step(action)
                if step % run.family.frames_every == 0:
                    frames.append(env.render())
            label = f"after {steps} gradient steps" if steps else "before adaptation"
            sides.append(np.array([labelled(frame[::2, ::2], label) for frame in frames]))
    except NoOpenGL as error:
        print(f"no video: {error}")
        return
    finally:
        env.close()
    film = np.concatenate(sides, axis=2)
    write_atomically(run.out / "before_after.gif",
                     lambda file: imageio.imwrite(file, film, extension=".gif", duration=50, loop=0))


def labelled(picture, text):
    """The picture (height, width, 3) with a line of text in its lower left corner, white on black."""
    image = Image.fromarray(picture)
    drawing = ImageDraw.Draw(image)
    place = 6, image.height - 20
    drawing.rectangle(drawing.textbbox(place, text, font_size=14), fill="black")
    drawing.text(place, text, fill="white", font_size=14)
    return np.array(image)


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
    axes[0].set(title="return of the mean action", xlabel="gradient steps", ylabel="return per episode")
    axes[1].set(title="final distance of the mean action", xlabel="gradient steps",
                ylabel=f"final distance to goal ({family.task_unit})", ylim=(0, None))
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    write_atomically(out / "extrapolation.png", lambda file: figure.savefig(file, format="png", dpi=110))
    plt.close(figure)
