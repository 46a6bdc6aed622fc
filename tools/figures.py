"""The figures of the comparisons, from results/ alone.

    python tools/figures.py    # draws those whose results are there, and prints what they show

They read results/TASK/METHOD/seedS/result.json and further evaluations of the same policies in
folders beside it: few/ (small rounds), outside/ (the ant's goals outside the arc), long/
(scratch, many rounds). docs/comparisons.md has every command. A variant of a method has a folder of
its own, named METHOD-VARIANT. The pictures go to results/figures/.
"""
import sys
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evaluate import band_means, by_round, mean_of
from tasks import load
from tools import ablations
from tools.intervals import FEW, interval
from tools.pictures import pyplot, save_figure
from tools.tables import by_seed, training_steps

# Method: name, colour (Okabe and Ito's palette, told apart by the colour-blind), marker.
STYLES = {
    "gmps": ("GMPS", "#D55E00", "o"), "maml": ("MAML", "#0072B2", "s"),
    "rl2": ("RL²", "#009E73", "^"), "pearl": ("PEARL", "#CC79A7", "D"),
    "incontext": ("incontext", "#000000", "v"), "multitask": ("multitask", "#56B4E9", "P"),
    "regress": ("regress", "#999999", "X"),
    "scratch-sac": ("soft actor-critic from scratch", "#000000", "*"),
    "scratch-pg": ("policy gradient from scratch", "#56B4E9", "P")}
# Variant: what its label adds, marker, line. It has its method's colour.
VARIANTS = {"fixed": (", fixed step size", "p", "--"), "halved": (", half the updates", "d", "--"),
            "relabelled": (", relabelled", "<", ":"),
            "demonstrations": (", from demonstrations alone", "<", "--"),
            "finetuned": (", then gradient steps", ">", "--")}
BY_GRADIENT = ("gmps", "maml", "multitask")  # small rounds give them a worse gradient
NEAR = {"push": (0.03, 0.02), "ant": (0.5, 0.3)}  # final distances that `verdicts` asks about
REWARD_ALONE = ("maml", "rl2", "pearl")  # their training ends where it is flat, or by its budget
ENDED = " (ended by its budget)"
MEASURES = ("return", "final_distance")
LOOK = {"font.size": 13, "lines.linewidth": 2.2, "lines.markersize": 7, "axes.grid": True,
        "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}


# ---------------------------------------------------------------- reading
def seeds_of(results: Path, task: str, method: str, part: str = "") -> list[dict]:
    """result.json of every seed, in order; of an evaluation beside it if `part` names one."""
    return by_seed(results, str(Path(task, method, "seed*", part, "result.json")))


def found(results: Path, task: str, part: str = "") -> dict[str, list[dict]]:
    """{method: seeds} of GMPS and its rivals that have results, in the order of STYLES.

    Not GMPS's own variants (README's table has them), nor `oracle` and `scratch`, which do not
    train before they meet the new task.
    """
    names = {path.name for path in (results / task).glob("*") if path.is_dir()}
    ranks = {base(name): rank for rank, name in enumerate(STYLES)}
    order = sorted(names, key=lambda name: (ranks.get(base(name), len(ranks)), name))
    out = {name: seeds_of(results, task, name, part) for name in order
           if base(name) not in ("oracle", "scratch") and not name.startswith("gmps-")}
    return {name: seeds for name, seeds in out.items() if seeds}


def base(method: str) -> str:
    return method.partition("-")[0]


def against_episodes(seeds: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Test episodes (P,), and the mean over held-out tasks after so many: (seeds, P)."""
    rounds = [by_round(seed["held_out"]) for seed in seeds]
    P = min(map(len, rounds))
    x = np.array([entries[0]["adaptation_episodes"] for entries in rounds[0][:P]])
    return x, np.array([[mean_of(entries, key) for entries in seed[:P]] for seed in rounds])


def small_then_whole(few: list[dict], seeds: list[dict], key: str) -> tuple[np.ndarray, ...]:
    """As `against_episodes`: few/ as far as it goes, then whole rounds of the same seeds."""
    x, values = against_episodes(few, key)
    numbers = [part["seed"] for part in few]
    later, more = against_episodes([seed for seed in seeds if seed["seed"] in numbers], key)
    return np.append(x, later[later > x[-1]]), np.hstack([values, more[:, later > x[-1]]])


def against_steps(seeds: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Training's env steps (P,), and `key` after one round of test episodes then: (seeds, P).

    Point by point: x is the mean over seeds, whose early ends differ.
    """
    rows = [[row for row in seed["curve"]
             if row["adaptation_episodes"] == seed["settings"]["test_episodes"]] for seed in seeds]
    P = min(map(len, rows))
    x, y = (np.array([[row[name] for row in seed[:P]] for seed in rows])
            for name in ("env_steps", key))
    return x.mean(0), y


def with_curve(runs: dict) -> dict:
    """Without those whose curve has no point."""
    return {method: seeds for method, seeds in runs.items()
            if against_steps(seeds, "return")[1].size}


def counted_point(values: np.ndarray) -> int:
    """The first of P points within one standard error, over seeds, of the best: (seeds, P).

    A rival's steps are those of this point, so that a longer budget flatters nobody. One seed has
    no standard error: then it is the best point itself.
    """
    mean, n = values.mean(0), len(values)
    best = mean.argmax()
    error = values[:, best].std(ddof=1) / np.sqrt(n) if n > 1 else 0.0
    return int((mean >= mean[best] - error).argmax())


# ---------------------------------------------------------------- drawing
def style(method: str) -> dict:
    """Label, colour, marker, line."""
    name, variant = (method, "") if method in STYLES else method.partition("-")[::2]
    (label, color, marker), line = STYLES.get(name, (name, "#999999", ".")), "-"
    if variant:
        more, marker, line = VARIANTS.get(variant, (f", {variant}", marker, "--"))
        label += more
    look = {"label": label, "color": color, "marker": marker, "linestyle": line}
    return look | ({"zorder": 4, "linewidth": 4} if name == "gmps" else {"zorder": 3})


def in_few_rounds(look: dict) -> dict:
    """How few/ looks beside the same policies in whole rounds."""
    return look | {"label": look["label"] + ", in small rounds", "linestyle": "-.",
                   "linewidth": LOOK["lines.linewidth"], "markersize": 4}


def draw(axis, x, values: np.ndarray, **look) -> None:
    """Mean over seeds (seeds, P); a 95% interval over whole seeds, or each seed if they are few."""
    if len(values) >= FEW:
        low, high = zip(*(interval(column) for column in values.T))
        axis.fill_between(x, low, high, color=look["color"], alpha=0.2, linewidth=0)
    elif len(values) > 1:
        axis.plot(x, values.T, color=look["color"], linewidth=0.8, alpha=0.4)
    axis.plot(x, values.mean(0), **look)


def level(axes, factors, runs: dict, name: str, label: str, linestyle=":") -> None:
    """A horizontal line for a list of result.json that every seed of some method holds."""
    with_it = [seed for seeds in runs.values() for seed in seeds if seed.get(name)]
    if with_it:
        for axis, key, factor in zip(axes, MEASURES, factors):
            value = factor * np.mean([mean_of(seed[name], key) for seed in with_it])
            axis.axhline(value, color="black", linestyle=linestyle, linewidth=1.6, label=label)


def panels(task: str, count: int = 2, rows: int = 1):
    """A figure with room for a legend, its axes (rows, count), factors of MEASURES."""
    title, factor, _ = load(task).table
    figure, axes = pyplot().subplots(rows, count, figsize=(11, 1.5 + 4.2 * rows), squeeze=False,
                                     layout="constrained")
    for row in axes:
        for axis, label in zip(row, ("return", title)):
            axis.set_ylabel(label)
    return figure, axes, (1.0, factor)


def finish(figure, axes, title: str):
    """One legend for all panels."""
    figure.suptitle(title)
    labels = {label: handle for axis in axes.flat
              for handle, label in zip(*axis.get_legend_handles_labels())}
    labels = {label: handle for label, handle in labels.items() if label + ENDED not in labels}
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=3,
                  handlelength=3.5, fontsize=11)
    return figure


def draw_steps(axes, factors, runs: dict) -> None:
    """Curves on validation goals, a held-out point at the end of each, the point that counts."""
    runs = with_curve(runs)
    for axis, key, factor in zip(axes, MEASURES, factors):
        ends = []
        for method, seeds in runs.items():
            look, counted = style(method), counted_point(against_steps(seeds, "return")[1])
            x, values = against_steps(seeds, key)
            if base(method) in REWARD_ALONE and counted > 2 / 3 * (len(x) - 1):
                look["label"] += ENDED
            draw(axis, x, factor * values, **look | {"marker": "", "label": None})
            held_out = factor * against_episodes(seeds, key)[1][:, 1].mean()
            ends += [held_out, factor * values.mean(0)[-1]]
            axis.plot(x[counted], factor * values.mean(0)[counted], **look | {"label": None},
                      markersize=12, markerfacecolor="none", markeredgewidth=2)
            axis.plot(training_steps(seeds), held_out, **look, markersize=9,
                      markeredgecolor="black")
        # Ends fill the panel; a learner's first steps may lie far below.
        low, high = min(ends), max(ends)
        if key == "return":
            axis.set_ylim(bottom=max(axis.get_ylim()[0], low - (high - low)))
        else:
            axis.set_ylim(0, min(axis.get_ylim()[1], 1.5 * high))
        axis.set(xscale="log", xlabel="environment steps of training, experts' included")


def draw_episodes(axes, factors, runs: dict, few: dict) -> None:
    """Held-out tasks against test episodes, up to five whole rounds.

    few/, where measured: of those that adapt by gradient a line of its own, since small rounds give
    them another gradient; of others, which use every episode as it comes, the line's beginning.
    """
    for method, seeds in runs.items():
        look, last = style(method), 5 * seeds[0]["settings"]["test_episodes"]
        for axis, key, factor in zip(axes, MEASURES, factors):
            lines = [(*against_episodes(seeds, key), look)]
            if method in few and base(method) in BY_GRADIENT:
                lines += [(*against_episodes(few[method], key), in_few_rounds(look))]
            elif method in few:
                lines = [(*small_then_whole(few[method], seeds, key), look)]
            for x, values, own_look in lines:
                draw(axis, x[x <= last], factor * values[:, x <= last], **own_look)
    for axis in axes:
        axis.set_xlabel("episodes of the new task")
    axes[-1].set_ylim(bottom=0)


# ---------------------------------------------------------------- the figures
def against_training(task: str, results: Path):
    """Push or the ant, after one round, against environment steps of training."""
    runs = found(results, task)
    if not runs:
        return None
    figure, axes, factors = panels(task)
    level(axes[0], factors, runs, "experts_held_out", "experts, told the goal")
    draw_steps(axes[0], factors, runs)
    return finish(figure, axes, f"{task}: after one round of test episodes. Lines: validation "
                                "goals;\nfilled: held-out goals; open: the steps that count")


def against_experience(task: str, results: Path):
    """Held-out tasks against episodes of the new task."""
    runs, few = (found(results, task, part) for part in ("", "few"))
    if not runs:
        return None
    figure, axes, factors = panels(task)
    draw_episodes(axes[0], factors, runs, few)
    level(axes[0], factors, runs, "experts_held_out", "experts, told the goal")
    return finish(figure, axes, f"{task}: held-out goals, at the end of training")


def outside(results: Path):
    """The ant's goals by their distance from the arc."""
    runs = found(results, "ant", "outside")
    if not runs:
        return None
    family = load("ant")()
    bands = [label for label, _ in family.bands()]
    figure, axes, factors = panels("ant", len(bands), rows=2)
    for row, key, factor, label in zip(axes, MEASURES, factors, ("return", family.table[0])):
        for axis in row[1:]:
            axis.sharey(row[0])  # before anything is drawn: else only the first panel counts
        for method, seeds in runs.items():
            x, _ = against_episodes(seeds, key)
            means = [[values for _, values in band_means(family, seed, key)] for seed in seeds]
            marked = [k for k in (0, 1, 2, 4, 8, 16) if k < len(x)]  # evenly spaced on this axis
            for axis, values in zip(row, np.moveaxis(factor * np.array(means), 1, 0)):
                draw(axis, x, values, **style(method) | {"markevery": marked})
                axis.set_xscale("symlog", linthresh=x[1], linscale=0.4)
                axis.set_xticks([0, x[1], x[-1]], [0, x[1], x[-1]])
                axis.minorticks_off()
        for axis, band in zip(row, bands):
            axis.set(title=band if key == "return" else "", ylabel="",
                     xlabel="" if key == "return" else "episodes of the new task")
        row[0].set_ylabel(label)
    axes[1, 0].set_ylim(bottom=0)
    return finish(figure, axes, "ant: goals on and outside the arc of the training goals")


def door(results: Path):
    """The door: sparse reward, from demonstrations and from reward alone."""
    runs = found(results, "door")
    if not runs:
        return None
    figure, axes, factors = panels("door", rows=2)
    draw_steps(axes[0], factors, runs)
    level(axes[1], factors, runs, "experts_held_out", "experts, told the angle")
    draw_episodes(axes[1], factors, runs, found(results, "door", "few"))
    return finish(figure, axes, "door, sparse reward. Above: after one round; lines: validation "
                                "angles,\nwhich are wider; filled: held-out angles. Below: "
                                "held-out angles")


def images(results: Path):
    """Push from images."""
    runs = found(results, "push-vision")
    if not runs:
        return None
    figure, axes, factors = panels("push-vision")
    draw_episodes(axes[0], factors, runs, {})
    level(axes[0], factors, runs, "no_adaptation", "imitation, no adaptation", "--")
    level(axes[0], factors, runs, "experts_held_out", "experts: see the block, told the goal")
    return finish(figure, axes, "push from images: held-out goals")


def scratch(task: str, results: Path):
    """Env steps on one new task, learned alone or adapted to."""
    runs = {name: seeds for name in STYLES if base(name) == "scratch"
            and (seeds := seeds_of(results, task, name, "long"))}
    if not runs:
        return None
    figure, axes, factors = panels(task)
    gmps = style("gmps")
    lines = [*((seeds, style(name)) for name, seeds in runs.items()),
             (seeds_of(results, task, "gmps"), gmps | {"label": "GMPS (adapts)"}),
             (seeds_of(results, task, "gmps", "few"), in_few_rounds(gmps))]
    for axis, key, factor in zip(axes[0], MEASURES, factors):
        first = []
        for seeds, look in lines:
            if seeds:
                x, values = against_episodes(seeds, key)
                first.append(x[1] * load(task).horizon)
                marks = {"markersize": 5, "markevery": max(1, len(x) // 20)}
                draw(axis, x * load(task).horizon, factor * values, **look | marks)
        axis.set_xscale("symlog", linthresh=min(first), linscale=0.4)
        axis.set(xlabel="environment steps of the one new task", xlim=(0, None))
    axes[0, 1].set_ylim(bottom=0)
    level(axes[0], factors, {"all": seeds_of(results, task, "gmps")}, "experts_held_out",
          "experts, told the goal")
    return finish(figure, axes, f"{task}: a new task learned from scratch or adapted to, "
                                "held-out goals")


FIGURES = {
    "push_steps": partial(against_training, "push"), "ant_steps": partial(against_training, "ant"),
    "push_episodes": partial(against_experience, "push"),
    "ant_episodes": partial(against_experience, "ant"),
    "ant_outside": outside, "door": door, "push_vision": images,
    "push_scratch": partial(scratch, "push"), "ant_scratch": partial(scratch, "ant")}


# ---------------------------------------------------------------- what they show
def steps_to(x: np.ndarray, good: np.ndarray, of: float | None = None) -> str:
    """Env steps of the first of P points where `good` (P,) holds, and their share of `of`."""
    if not good.any():
        return "never"
    first = x[good.argmax()]
    return f"{first:,.0f}" + (f" ({first / of:.3f} of them)" if of else "")


def verdicts(task: str, results: Path) -> list[str]:
    """A line for each rival: its best level, the steps that count, and GMPS's steps to there."""
    runs, lines = with_curve(found(results, task)), []
    if "gmps" not in runs:
        return lines
    steps, returns = against_steps(runs["gmps"], "return")
    for method, seeds in runs.items():
        x, values = against_steps(seeds, "return")
        distance = against_steps(seeds, "final_distance")[1].mean(0)
        near = " and ".join(f"{level:g} m: {steps_to(x, distance <= level)}"
                            for level in NEAR[task])
        line = f"{task}, {style(method)['label']}: environment steps to {near}"
        if method != "gmps":
            best, theirs = values.mean(0).max(), x[counted_point(values)]
            ours = steps_to(steps, returns.mean(0) >= best, theirs)
            line += f"; best return {best:.0f} counts at {theirs:,.0f}, GMPS has it at {ours}"
        lines.append(line)
    return lines


def main(results: Path = ROOT / "results") -> None:
    """Draw what can be drawn, and say what is missing."""
    out = results / "figures"
    with pyplot().rc_context(LOOK):
        for name, function in FIGURES.items():
            figure = function(results)
            if figure is None:
                print(f"{name}: no results yet")
                continue
            out.mkdir(parents=True, exist_ok=True)
            save_figure(figure, out / f"{name}.png")
        if undone := ablations.measured():
            out.mkdir(parents=True, exist_ok=True)
            ablations.picture(undone, out / "ablations.png")
        else:
            print("ablations: no results yet")
    print("\n".join(line for task in ("push", "ant") for line in verdicts(task, results)))


if __name__ == "__main__":
    main()
