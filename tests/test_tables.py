"""Tests of tools/tables.py and tools/intervals.py: results made by hand; the committed pages."""
import json

import numpy as np
import pytest

from tests.conftest import HERE
from tools import intervals, tables


def made_up(distances, success, steps, seconds):
    """result.json of one seed, two tasks, with these distances (rad) after 0, 1, ... steps."""
    entry = {"return": 100.0 + steps, "success": success, "task": [0.5]}
    rounds = [entry | {"gradient_steps": k, "final_distance": distance + shift}
              for k, distance in enumerate(distances) for shift in (-0.01, 0.01)]
    level = [entry | {"final_distance": 0.5}]
    return {"held_out": rounds, "held_out_sampled": rounds, "no_adaptation": level,
            "experts_held_out": level, "experts_training": [], "task": "door",
            "env_steps": {"experts": steps, "meta_training": 2, "evaluation": 3},
            "wall_seconds": {"experts": seconds, "evaluation": 30.0}, "machine": "m"}


SEEDS = [made_up([0.3, 0.2, 0.15, 0.1, 0.1, 0.05], True, 10, 90.0),
         made_up([0.5, 0.1, 0.15, 0.1, 0.1, 0.05], False, 20, 150.0)]


def rows_of(text):
    lines = text.splitlines()
    assert set(lines[1]) == {"|", "-"}
    return dict(line.strip("| ").split(" | ", 1) for line in [lines[0], *lines[2:]])


def test_table_of_results_made_by_hand():
    """Radians become degrees, few seeds are shown one by one, empty lists are left out."""
    rows = rows_of(tables.table("door", SEEDS))
    assert rows["2 seeds"] == "return | angle error (degrees) | success | published"
    assert rows["before adaptation (pre-update policy)"] == (
        "115 (110, 120) | 22.9 (17.2, 28.6) | 50%")
    assert rows["after 1 gradient step"].startswith("115 (110, 120) | 8.6 (11.5, 5.7) |")
    assert rows["after 3 gradient steps, sampled actions"].split(" | ")[1] == "5.7 (5.7, 5.7)"
    assert rows["experts (told the goal)"].split(" | ")[1] == "28.6 (28.6, 28.6)"
    assert rows["environment steps: experts"].split()[0] == "15"
    assert rows["wall time"].startswith("2, 3 minutes")
    assert "experts on the training tasks" not in rows


def test_summary_has_a_row_per_task_and_method(tmp_path):
    for method, seeds in (("gmps", SEEDS), ("gmps-x", SEEDS), ("other", SEEDS[:1])):
        for seed, result in enumerate(seeds):
            folder = tmp_path / "results" / "door" / method / f"seed{seed}"
            folder.mkdir(parents=True)
            (folder / "result.json").write_text(json.dumps(result))
    own, rivals = ([[cell.strip() for cell in line.strip("|").split("|")]
                    for line in tables.summary(tmp_path, rivals).splitlines()]
                   for rivals in (False, True))
    numbers = ["2", "22.9", "8.6", "5.7", "28.6", "17", "2 min"]
    assert own[2:] == [["door (degrees)", method, *numbers] for method in ("gmps", "gmps-x")]
    other = ["door (degrees)", "other", "1", "17.2", "11.5", "5.7", "28.6", "12", "2 min"]
    every_seed = [*own[2][:4], "8.6 (11.5, 5.7)", *own[2][5:]]
    assert rivals[2:] == [every_seed, other] and rivals[0][4] == "1 round"


def test_interval_resamples_whole_seeds():
    """Of many normal seeds it is mean +- 1.96 standard errors; few seeds are shown instead."""
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = intervals.interval(values)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert intervals.interval([2.0] * 5) == (2.0, 2.0)
    assert intervals.spread([1.0, 2.0, 4.5], 1) == "2.5 (1.0, 2.0, 4.5)"
    assert intervals.spread([1.234], 2) == "1.23"
    low, high = intervals.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert intervals.spread([1.0, 2.0, 3.0, 4.0, 5.0], 2) == f"3.00 [{low:.2f}, {high:.2f}]"
    assert 1.0 < low < 2.5 and 3.5 < high < 5.0


def test_pages_are_up_to_date():
    """`python tools/tables.py` leaves them as they are, and mends a changed digit."""
    for page, kinds in (("README.md", {"SUMMARY": 1}), ("docs/results.md", {"TABLE": 4,
                                                                             "CLOSING": 1})):
        text = (HERE / page).read_text()
        for kind, count in kinds.items():
            assert text.count(f"<!-- {kind}") >= count
        assert tables.fill(text) == text
        spoilt = text.replace("| ant (m)", "| ants").replace("| after 1 gradient step |", "| 1 |")
        assert spoilt != text and tables.fill(spoilt) == text


def test_missing_results_are_refused(tmp_path, capsys):
    """One line, exit code 2, and the pages are left as they were."""
    (tmp_path / "docs").mkdir()
    text = "<!-- TABLE push/gmps -->\nold\n<!-- end -->"
    for page in tables.PAGES:
        (tmp_path / page).write_text(text)
    assert tables.main(tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no results/push/gmps") and error.count("\n") == 1
    assert all((tmp_path / page).read_text() == text for page in tables.PAGES)


def test_a_marker_without_an_end_is_refused_and_nothing_is_lost():
    text = "<!-- TABLE door/gmps -->\nmine\n<!-- SUMMARY -->\n<!-- end -->\n"
    with pytest.raises(tables.UserError, match="no \"<!-- end -->\""):
        tables.fill(text)
