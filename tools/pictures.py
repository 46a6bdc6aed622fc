"""Plots and films of a run: learning.png, before_after.gif, extrapolation.png."""
from functools import partial
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
from PIL import Image, ImageDraw

from checkpoints import write_atomically
from envs import make_batch
from evaluate import band_means, by_round, mean_of, update_word
from tasks.rendering import NoOpenGL


def pyplot():
    """matplotlib without a window; imported late, since it takes a second."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def save_figure(figure, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))
    pyplot().close(figure)


# ---------------------------------------------------------------- learning.png
def draw_plot(out: Path, family, settings, rows: list[dict], lists: dict) -> None:
    """Experts and meta-training against env steps; adaptation against gradient steps."""
    phases = {phase: [row for row in rows if row["phase"] == phase]
              for phase in ("experts", "meta_training")}
    drawn = [draw for draw, wanted in (
        (partial(draw_experts, phases["experts"], settings), phases["experts"]),
        (partial(draw_meta_training, phases["meta_training"], settings),
         len(phases["meta_training"]) > 1),
        (partial(draw_adaptation, family, lists), True)) if wanted]
    figure, axes = pyplot().subplots(1, len(drawn), figsize=(5 * len(drawn), 4.2),
                                     constrained_layout=True, squeeze=False)
    for axis, draw in zip(axes[0], drawn):
        draw(axis)
    save_figure(figure, out / "learning.png")


def draw_experts(rows, settings, axis) -> None:
    axis.plot([row["env_steps"] for row in rows], [row["return"] for row in rows], color="tab:gray")
    axis.set(title=f"{settings.experts} experts, sampled actions, training tasks",
             xlabel="environment steps", ylabel="return per episode")
    axis.locator_params(axis="x", nbins=5)  # else long numbers touch


def draw_meta_training(rows, settings, axis) -> None:
    """Return before and after adaptation or, where nobody rolls adapted policies out, losses.

    The policy is rolled out at a collection's start, the adapted ones at its end: each stands at
    the env steps of its own moment.
    """
    ends = [row["env_steps"] for row in rows]
    starts, lowest = [0, *ends[:-1]], None
    if "adapted_return" in rows[0]:
        curves = (("return", "before adaptation", starts),
                  ("adapted_return", "adapted", ends))
        axis.set(title="meta-training, sampled actions, training tasks",
                 ylabel="return per episode")
    elif "imitation_0" in rows[0]:
        own, lowest = " (its own tasks)" if settings.pre_update_tasks else "", 0
        curves = (("imitation_0", f"before adaptation{own}", ends),
                  ("imitation_1", "after the inner step", ends))
        axis.set(title="meta-training, last meta-step of each collection",
                 ylabel="imitation loss, training tasks")
    else:
        curves = (("return", "training tasks", ends),)
        axis.set(title="meta-training, sampled actions", ylabel="return per episode")
    for (key, label, x), color in zip(curves, ("tab:orange", "tab:blue")):
        axis.plot(x, [row[key] for row in rows], color=color, label=label)
    axis.set(xlabel="environment steps")
    if lowest is not None:
        axis.set_ylim(bottom=lowest)  # after the curves, else it would be 1 at the top
    axis.locator_params(axis="x", nbins=5)
    axis.legend()


def draw_adaptation(family, lists, axis) -> None:
    """Final distance of every held-out task (thin) and their mean (thick).

    One run has no interval: its tasks share one trained policy.
    """
    column, factor, _ = family.table
    for name, label, color in (("held_out", "mean action", "tab:blue"),
                               ("held_out_sampled", "sampled actions", "tab:cyan")):
        rounds = by_round(lists[name])
        steps = range(len(rounds))
        values = factor * np.array([[entry["final_distance"] for entry in entries]
                                    for entries in rounds])
        if name == "held_out":
            axis.plot(steps, values, color=color, linewidth=0.5, alpha=0.3)
        axis.plot(steps, values.mean(1), "o-", color=color, label=f"adapted, {label}")
    for name, label, style in (("no_adaptation", "imitation, no adaptation", "--"),
                               ("experts_held_out", "experts (told the goal)", ":")):
        if lists.get(name):
            level = factor * mean_of(lists[name], "final_distance")
            axis.axhline(level, color="black", linestyle=style, label=label)
    axis.set(title=f"adaptation to {len(values[0])} held-out tasks (thin: each)",
             xlabel=f"{update_word(lists)}s", ylabel=column, ylim=(0, None))
    axis.locator_params(axis="x", integer=True)
    axis.legend()


# ---------------------------------------------------------------- before_after.gif
def draw_film(out: Path, family, stages: dict, tasks: np.ndarray) -> None:
    """The mean action on the first task, before and after adaptation, side by side.

    `stages` and `tasks`: those of `evaluate.Evaluation`. A MuJoCo family's pictures have 240 x 320
    pixels, a gymnasium environment's its own number. Without OpenGL there is no film.
    """
    env = make_batch(family, len(tasks), 1, render_mode="rgb_array")
    env.picture_size, sides = (240, 320), []
    try:
        for k, adapter in stages.items():
            frames = film(env, partial(adapter.act, explore=False), tasks)
            what = "rounds" if adapter.sequential else "gradient steps"
            label = f"after {k} {what}" if k else "before adaptation"
            sides.append(np.array([labelled(frame, label) for frame in frames]))
    except NoOpenGL as error:
        print(f"no video: {error}")
        return
    finally:
        env.close()
    both = np.concatenate(sides, axis=2)
    write_atomically(out / "before_after.gif", lambda file: imageio.imwrite(
        file, both, extension=".gif", duration=50, loop=0))


def film(env, act, tasks: np.ndarray) -> list[np.ndarray]:
    """Pictures of the first environment, every so many steps."""
    observation, _ = env.reset(options={"task": tasks})
    frames, ended, last = [env.render()], False, None
    for step in range(1, env.family.horizon + 1):
        if not ended:  # autoreset would begin another episode: hold the last picture
            observation, reward, terminated, truncated, _ = env.step(act(observation, last))
            ended = terminated[0] or truncated[0]
            last = {"reward": reward, "alive": ~(terminated | truncated)}
        if step % env.family.frames_every == 0:
            frames.append(env.render())
    return frames


def labelled(picture: np.ndarray, text: str) -> np.ndarray:
    """The picture with a line of text in its lower left corner, white on black."""
    image = Image.fromarray(picture)
    drawing = ImageDraw.Draw(image)
    place = 6, image.height - 20
    drawing.rectangle(drawing.textbbox(place, text, font_size=14), fill="black")
    drawing.text(place, text, fill="white", font_size=14)
    return np.array(image)


# ---------------------------------------------------------------- extrapolation.png
def draw_extrapolation(out: Path, family, lists: dict) -> None:
    """Return and distance against gradient steps, a line per band of goals."""
    figure, axes = pyplot().subplots(1, 2, figsize=(11, 4.4), constrained_layout=True)
    for axis, key in zip(axes, ("return", "final_distance")):
        for label, means in band_means(family, lists, key):
            axis.plot(means, "o-", markersize=3, label=label)
        axis.locator_params(axis="x", integer=True)
    axes[0].set(title="return of the mean action", xlabel="gradient steps",
                ylabel="return per episode")
    axes[1].set(title="final distance of the mean action", xlabel="gradient steps",
                ylabel=f"final distance to goal ({family.task_unit})", ylim=(0, None))
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save_figure(figure, out / "extrapolation.png")
