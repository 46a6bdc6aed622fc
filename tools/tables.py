"""The README's tables of results, its quick start's last lines, line numbers and line counts, from the files they come from.

    python tables.py    # rewrites README.md; nothing changes where it is up to date, which the tests check

Tables stand between "<!-- TABLE task -->" and "<!-- end -->" and are made of results/TASK/seed*/result.json, the last lines
of a run between "<!-- CLOSING task/seed -->" and "<!-- end -->". Other numbers are by hand.
"""
import json
import re
import sys
from pathlib import Path

import numpy as np

from envs import FAMILIES
from files import UserError, write_atomically
from phases import LEVELS, closing_counts, closing_table

HERE = Path(__file__).parent
# Released levels (authors' simulator) and counts, by task and list or phase of result.json
PUBLISHED = {
    ("push", "experts_training"): "670, 0.031 m (10 goals, authors' simulator)",
    ("push", "meta_training"): "about 120,000 in the released settings: *does not match*",
    ("ant", "experts_training"): "539, 0.32 m (10 goals, authors' simulator)",
    ("ant", "meta_training"): "about 2,000,000 in the released settings: *does not match*"}
# What `final_distance` is, how many of the table's units the task's unit is, digits
COLUMNS = {"push": ("final distance (m)", 1.0, 4), "push-vision": ("final distance (m)", 1.0, 4),
           "ant": ("final distance (m)", 1.0, 3), "door": ("angle error (degrees)", np.degrees(1.0), 1)}


def spread(values, digits):
    """Mean and, of several values, standard deviation (n - 1)."""
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def table(task, results):
    """Markdown table of a task: means over tasks, then mean ± deviation over seeds. `results`: each seed's result.json."""
    column, factor, digits = COLUMNS[task]

    def row(label, name, gradient_steps=None):
        seeds = [[r for r in result[name] if r.get("gradient_steps") == gradient_steps] for result in results]
        means = {key: [np.mean([r[key] for r in entries]) for entries in seeds]
                 for key in ("return", "final_distance", "success")}
        return [label, spread(means["return"], 0), spread(factor * np.array(means["final_distance"]), digits),
                f"{100 * np.mean(means['success']):.0f}%", PUBLISHED.get((task, name), "")]

    rows = [[f"{len(results)} seed{'s' * (len(results) > 1)}", "return", column, "success", "published"], ["---"] * 5,
            row("before adaptation (pre-update policy)", "held_out", 0)]
    for name, kind, steps in (("held_out", "", (1, 2, 3, 5)), ("held_out_sampled", ", sampled actions", (1, 3))):
        rows += [row(f"after {k} gradient step{'s' * (k > 1)}{kind}", name, k) for k in steps]
    rows += [row(label, name) for name, label in LEVELS.items() if all(result.get(name) for result in results)]
    for phase in ("experts", "meta_training", "evaluation"):
        steps = np.mean([result["env_steps"][phase] for result in results])
        label = f"environment steps: {phase.replace('_', '-')}"
        rows.append([label, f"{steps:,.0f}", "", "", PUBLISHED.get((task, phase), "")])
    minutes = ", ".join(f"{sum(result['wall_seconds'].values()) / 60:.0f}" for result in results)
    rows.append(["wall time", f"{minutes} minutes", "", "", ""])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def fill(text, folder=HERE):
    """README text brought up to date: tables, last lines of a run, "`words`, file.py:line" and the list of line counts.

    UserError where a table has no results, or the words stand on no line or on several.
    """
    def results(pattern):
        files = sorted((folder / "results").glob(f"{pattern}/result.json"))
        if not files:
            raise UserError(f"no results/{pattern}/result.json: copy them from the folders of finished runs")
        return [json.loads(file.read_text()) for file in files]

    def filled(match):
        return f"{match[1]}{table(match[2], results(f'{match[2]}/seed*'))}{match[3]}"

    def closing(match):
        result, = results(match[2])
        lines = [*closing_table(result, FAMILIES[result["task"]].task_unit).splitlines(), closing_counts(result)]
        return match[1] + "\n" + "\n".join("    " + content for content in lines) + "\n" + match[3]

    def line(match):
        hits = [number for number, content in enumerate((folder / match[2]).read_text().splitlines(), start=1)
                if match[1] in content]
        if len(hits) != 1:
            raise UserError(f"README: {match[1]!r} stands on {len(hits)} lines of {match[2]}: name words of one line")
        return f"`{match[1]}`, {match[2]}:{hits[0]}"

    def counts(match):
        return re.sub(r"`(\w+\.py)` \d+", lambda m: f"`{m[1]}` {len((folder / m[1]).read_text().splitlines())}", match[0])

    text = re.sub(r"(<!-- TABLE ([\w-]+) -->\n).*?(\n<!-- end -->)", filled, text, flags=re.DOTALL)
    text = re.sub(r"(<!-- CLOSING ([\w/-]+) -->\n).*?(\n<!-- end -->)", closing, text, flags=re.DOTALL)
    text = re.sub(r"`([^`]+)`, (\w+\.py):\d+", line, text)
    return re.sub(r"\(lines: [^)]*\)", counts, text)


def main(folder=HERE):
    """Rewrites the README of `folder`; returns the exit code."""
    readme = folder / "README.md"
    try:
        text = fill(readme.read_text(), folder)
        write_atomically(readme, lambda file: file.write(text), "w")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
