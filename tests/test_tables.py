"""Tests of tables.py: results made by hand; the committed README; what does not fit is refused."""
import pytest

import tables
from conftest import HERE


def made_up(distances, success, steps, seconds):
    """result.json of one seed, two tasks with the same distance (rad) at every gradient step."""
    entry = {"return": 100.0 + steps, "success": success, "task": [0.5]}
    lists = {name: [entry | {"gradient_steps": k, "final_distance": distance + shift} for k, distance in enumerate(distances)
                    for shift in (-0.01, 0.01)] for name in ("held_out", "held_out_sampled")}
    level = [entry | {"final_distance": 0.5}]
    return lists | {"no_adaptation": level, "experts_held_out": level, "experts_training": [],
                    "env_steps": {"experts": steps, "meta_training": 2, "evaluation": 3},
                    "wall_seconds": {"experts": seconds, "evaluation": 30.0}}


def test_table_of_results_made_by_hand():
    """Radians become degrees, deviations are over seeds, rows without entries are left out."""
    one = made_up([0.3, 0.2, 0.15, 0.1, 0.1, 0.05], True, 10, 90.0)
    two = made_up([0.5, 0.1, 0.15, 0.1, 0.1, 0.05], False, 20, 150.0)
    rows = dict(line.strip("| ").split(" | ", 1) for line in tables.table("door", [one, two]).splitlines())
    assert rows["2 seeds"] == "return | angle error (degrees) | success | published"
    assert rows["before adaptation (pre-update policy)"] == "115 ± 7 | 22.9 ± 8.1 | 50%"
    assert rows["after 1 gradient step"].startswith("115 ± 7 | 8.6 ± 4.1 |")
    assert rows["after 3 gradient steps, sampled actions"].startswith("115 ± 7 | 5.7 ± 0.0 |")
    assert rows["experts (told the goal)"].startswith("115 ± 7 | 28.6 ± 0.0 |")
    assert rows["environment steps: experts"].split()[0] == "15" and rows["wall time"].startswith("2, 3 minutes")
    assert "experts on the training tasks" not in rows


def test_readme_is_up_to_date():
    """`python tables.py` leaves it as it is."""
    text = (HERE / "README.md").read_text()
    assert text.count("<!-- TABLE ") == 4 and text.count("<!-- CLOSING ") == 1
    assert tables.fill(text) == text
    assert tables.fill(text.replace("| after 1 gradient step | ", "| after 1 gradient step | 1")) == text


@pytest.mark.parametrize("text, problem", [
    ("<!-- TABLE push -->\nold\n<!-- end -->", "no results/push"), ("`def fill`, tables.py:1", "0 lines"),
    ("`return`, tables.py:1", "3 lines")])
def test_what_does_not_fit_is_refused(tmp_path, capsys, text, problem):
    """One line, exit code 2, and the README is left as it was."""
    (tmp_path / "tables.py").write_text("return\n" * 3)
    (tmp_path / "README.md").write_text(text)
    assert tables.main(tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and problem in error
    assert (tmp_path / "README.md").read_text() == text
