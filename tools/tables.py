"""The tables of README.md and docs/, from the results that they report.

    python tools/tables.py    # rewrites them; nothing changes where they are up to date

A table is between a marker and "<!-- end -->". `<!-- SUMMARY -->`: a row per task and variant of
GMPS. `<!-- SUMMARY rivals -->`: the other methods, below GMPS.
`<!-- TABLE task/method -->`: one method in full. `<!-- CLOSING task/method/seed -->`: the last
lines of one run. These come from results/TASK/METHOD/seed*/result.json. `<!-- ABLATIONS task -->`:
the table of tools/ablations.py.
"""
import json
import re
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

from checkpoints import write_atomically
from evaluate import LEVELS, by_round, closing_counts, closing_table, mean_of, update_word
from settings import UserError
from tasks import TASKS, load
from tools import ablations
from tools.intervals import spread

PAGES = ("README.md", "docs/results.md", "docs/deviations.md", "docs/comparisons.md")


def results(folder: Path, pattern: str) -> list[dict]:
    """The result.json files of results/PATTERN, in the order of their seeds."""
    found = by_seed(folder / "results", f"{pattern}/result.json")
    if not found:
        raise UserError(f"no results/{pattern}/result.json: copy them from finished runs")
    return found


def by_seed(folder: Path, pattern: str) -> list[dict]:
    """The contents of files that match, in the order of the seeds in their paths.

    "seed" is that of the path, of training: an evaluation has one of its own.
    """
    def seed(file):
        return int((re.findall(r"seed(\d+)", str(file.relative_to(folder))) or [0])[-1])
    return [json.loads(file.read_text()) | {"seed": seed(file)}
            for file in sorted(folder.glob(pattern), key=seed)]


def seed_means(results: list[dict], name: str, key: str, number: int | None = None) -> np.ndarray:
    """(seeds,): each seed's mean over tasks, of all entries of a list or of one round's."""
    entries = [result[name] if number is None else by_round(result[name])[number]
               for result in results]
    return np.array([mean_of(seed, key) for seed in entries])


def markdown(rows: list[list[str]]) -> str:
    """A table; the first row is its head."""
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def training_steps(results: list[dict]) -> float:
    return np.mean([result["env_steps"]["experts"] + result["env_steps"]["meta_training"]
                    for result in results])


def minutes(results: list[dict]) -> list[float]:
    return [sum(result["wall_seconds"].values()) / 60 for result in results]


# ---------------------------------------------------------------- kinds of tables
def table(task: str, results: list[dict]) -> str:
    """One method on one task: means over its tasks, mean actions unless it says otherwise."""
    family = load(task)
    column, factor, digits = family.table

    def row(label, name, number=None):
        returns, distances, success = (seed_means(results, name, key, number)
                                       for key in ("return", "final_distance", "success"))
        return [label, spread(returns, 0), spread(factor * distances, digits),
                f"{100 * success.mean():.0f}%", family.published.get(name, "")]

    what = update_word(results[0])
    seeds = f"{len(results)} seed{'s' * (len(results) > 1)}"
    rows = [[seeds, "return", column, "success", "published"],
            row("before adaptation (pre-update policy)", "held_out", 0)]
    for name, kind, steps in (("held_out", "", (1, 2, 3, 5)),
                              ("held_out_sampled", ", sampled actions", (1, 3))):
        rows += [row(f"after {k} {what}{'s' * (k > 1)}{kind}", name, k) for k in steps]
    rows += [row(label, name) for name, label in LEVELS.items()
             if all(result.get(name) for result in results)]
    for phase in ("experts", "meta_training", "evaluation"):
        steps = np.mean([result["env_steps"][phase] for result in results])
        rows.append([f"environment steps: {phase.replace('_', '-')}", f"{steps:,.0f}", "", "",
                     family.published.get(phase, "")])
    times = ", ".join(f"{value:.0f}" for value in minutes(results))
    return markdown([*rows, ["wall time", f"{times} minutes", "", "", ""]])


def summary(folder: Path, rivals: bool = False) -> str:
    """A row for every task and variant of GMPS that has results; or for GMPS and its `rivals`.

    Rivals: with the interval over seeds, or every seed, after one round.
    """
    what = "round" if rivals else "step"  # a round of a rival may hold no gradient step, or many
    rows = [["task", "method", "seeds", "before", f"1 {what}", f"3 {what}s", "experts",
             "env steps", "wall time"]]
    for task in TASKS:
        column, factor, digits = load(task).table
        unit = "".join(re.findall(r"\((.*)\)", column)) or column
        methods = sorted({file.parent.parent.name for file in
                          (folder / "results" / task).glob("*/seed*/result.json")})
        own = [method for method in methods if method.split("-")[0] == "gmps"]
        others = [method for method in methods if method not in own]
        for method in ["gmps"] * bool(others) + others if rivals else own:
            seeds = results(folder, f"{task}/{method}/seed*")

            def distance(name, k=None, seeds=seeds):
                if not all(seed.get(name) for seed in seeds):
                    return "-"
                means = factor * seed_means(seeds, name, "final_distance", k)
                return spread(means, digits) if rivals and k == 1 else f"{means.mean():.{digits}f}"
            rows.append([f"{task} ({unit})", method, str(len(seeds)),
                         *(distance("held_out", k) for k in (0, 1, 3)),
                         distance("experts_held_out"), f"{training_steps(seeds):,.0f}",
                         f"{np.mean(minutes(seeds)):.0f} min"])
    return markdown(rows)


def closing(result: dict) -> str:
    """The last lines of one run, indented."""
    lines = closing_table(result, load(result["task"])).splitlines()
    return "\n" + "\n".join("    " + line for line in [*lines, closing_counts(result)]) + "\n"


# ---------------------------------------------------------------- pages
def fill(text: str, folder: Path = HERE) -> str:
    """A page brought up to date. UserError where a table has no results."""
    def filled(match):
        kind, name = match[2], match[3]
        if kind == "SUMMARY":
            body = summary(folder, name == "rivals")
        elif kind == "TABLE":
            body = table(name.split("/")[0], results(folder, f"{name}/seed*"))
        elif kind == "ABLATIONS":
            body = ablations.show(name)
        else:
            body = closing(results(folder, name)[0])
        return f"{match[1]}{body}\n{match[4]}"

    # Up to the next "<!-- end -->", and never over another marker.
    kinds = "SUMMARY|TABLE|CLOSING|ABLATIONS"
    marked = rf"(<!-- ({kinds}) ?([\w/-]*) -->\n)(?:(?!<!-- ).*\n)*?(<!-- end -->)"
    if len(re.findall(marked, text)) != len(re.findall(f"<!-- (?:{kinds})", text)):
        raise UserError('a marker of a table has no "<!-- end -->" of its own')
    return re.sub(marked, filled, text)


def main(folder: Path = HERE) -> int:
    """Rewrites the pages of `folder`; returns the exit code."""
    try:
        for page in (folder / name for name in PAGES):
            text = fill(page.read_text(), folder)
            write_atomically(page, lambda file, text=text: file.write(text), "w")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
