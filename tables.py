"""The README's numbers from the files they come from: its tables of results, line numbers and line counts.

    python tables.py    # rewrites README.md; nothing changes where it is up to date, which the tests check

Tables stand between "<!-- TABLE task -->" and "<!-- end -->" and are made of results/TASK/seed*/result.json.
"""
import json
import re
from pathlib import Path

import numpy as np

from files import write_atomically

HERE = Path(__file__).parent
# Released levels (authors' simulator) and counts, by task and row
PUBLISHED = {
    ("push", "experts, told the goal"): "670, 0.031 m (10 other goals, authors' simulator)",
    ("push", "meta_training"): "about 120,000 in the released settings: *does not match*",
    ("ant", "experts on their training goals"): "539, 0.32 m (10 training goals, authors' simulator)",
    ("ant", "meta_training"): "about 2,000,000 in the released settings: *does not match*"}
UNITS = {"door": ("angle error (degrees)", np.degrees(1.0), 1), "ant": ("final distance (m)", 1.0, 3),
         "push": ("final distance (m)", 1.0, 4), "push-vision": ("final distance (m)", 1.0, 4)}


def spread(values, digits):
    """Mean and, of several values, standard deviation (n - 1)."""
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def table(task, results):
    """The table of one task, means over each seed's tasks. `results`: contents of result.json, one for each seed."""
    column, factor, digits = UNITS[task]

    def row(label, name, gradient_steps=None):
        seeds = [[r for r in result[name] if r.get("gradient_steps") == gradient_steps] for result in results]
        means = {key: [np.mean([r[key] for r in records]) for records in seeds]
                 for key in ("return", "final_distance", "success")}
        return [label, spread(means["return"], 0), spread(factor * np.array(means["final_distance"]), digits),
                f"{100 * np.mean(means['success']):.0f}%", PUBLISHED.get((task, label), "")]

    rows = [[f"{len(results)} seed{'s' * (len(results) > 1)}", "return", column, "success", "published"], ["---"] * 5,
            row("before adaptation (pre-update policy)", "held_out", 0)]
    for name, kind, steps in (("held_out", "", (1, 2, 3, 5)), ("held_out_sampled", ", sampled actions", (1, 3))):
        rows += [row(f"after {k} gradient step{'s' * (k > 1)}{kind}", name, k) for k in steps]
    levels = {"no_adaptation": "imitates all experts, no adaptation", "experts_held_out": "experts, told the goal",
              "experts_training": "experts on their training goals"}
    rows += [row(label, name) for name, label in levels.items() if all(result.get(name) for result in results)]
    for phase in ("experts", "meta_training", "evaluation"):
        steps = np.mean([result["env_steps"][phase] for result in results])
        label = f"environment steps: {phase.replace('_', '-')}"
        rows.append([label, f"{steps:,.0f}", "", "", PUBLISHED.get((task, phase), "")])
    minutes = ", ".join(f"{sum(result['wall_seconds'].values()) / 60:.0f}" for result in results)
    rows.append(["wall time", f"{minutes} minutes", "", "", ""])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def fill(text, folder=HERE):
    """README text with its tables, "`words`, file.py:line" and "`file.py` count" in the list of lines brought up to date."""
    def filled(match):
        files = sorted((folder / "results" / match[1]).glob("seed*/result.json"))
        content = table(match[1], [json.loads(file.read_text()) for file in files])
        return f"<!-- TABLE {match[1]} -->\n{content}\n<!-- end -->"

    def line(match):
        lines = (folder / match[2]).read_text().splitlines()
        return f"`{match[1]}`, {match[2]}:{next(i for i, content in enumerate(lines, start=1) if match[1] in content)}"

    def counts(match):
        return re.sub(r"`(\w+\.py)` \d+", lambda m: f"`{m[1]}` {len((folder / m[1]).read_text().splitlines())}", match[0])

    text = re.sub(r"<!-- TABLE ([\w-]+) -->\n.*?<!-- end -->", filled, text, flags=re.DOTALL)
    text = re.sub(r"`([^`]+)`, (\w+\.py):\d+", line, text)
    return re.sub(r"\(lines: [^)]*\)", counts, text)


if __name__ == "__main__":
    readme = HERE / "README.md"
    write_atomically(readme, lambda file: file.write(fill(readme.read_text())), "w")
