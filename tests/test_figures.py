"""Tests of tools/figures.py, on results made by hand: what is read, the steps that count, drawing.
"""
import json

import numpy as np
import pytest
from PIL import Image

from tasks import load
from tools import ablations, figures
from tools.intervals import interval


def result(returns, steps=(100, 200, 400), episodes=10, goals=2, rounds=3):
    """result.json whose curve has these returns after one round; distances are 1 / return.

    After k rounds goal i has a return of k + 10 i.
    """
    curve = [{"env_steps": x, "adaptation_episodes": k * episodes, "return": y * k,
              "final_distance": 1 / (y * max(k, 1))}
             for x, y in zip(steps, returns) for k in range(3)]
    held_out = [{"gradient_steps": k, "adaptation_episodes": k * episodes, "return": k + 10.0 * i,
                 "final_distance": (1 + i) / (1 + k)}
                for i in range(goals) for k in range(rounds + 1)]
    return {"settings": {"test_episodes": episodes}, "curve": curve, "held_out": held_out,
            "env_steps": {"experts": 60, "meta_training": 340, "curve": 7, "evaluation": 9},
            "experts_held_out": [{"return": 30.0, "final_distance": 0.01}]}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    return tmp_path / "results"


def put(results, place, content):
    path = results / place / "result.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


# ---------------------------------------------------------------- reading
def test_methods_and_seeds_in_order(results):
    """Known methods first, rivals' variants beside them. Not the ceiling, nor GMPS's variants."""
    for method in ("zebra", "pearl-relabelled", "oracle", "pearl", "scratch-pg", "gmps",
                   "gmps-paper"):
        put(results, f"push/{method}/seed0", result([1, 2, 3]))
    for seed in (10, 2):
        put(results, f"push/gmps/seed{seed}", result([1, 2, 3]))
    put(results, "push/gmps/seed2/few", result([1, 2, 3]) | {"seed": 7})
    found = figures.found(results, "push")
    assert list(found) == ["gmps", "pearl", "pearl-relabelled", "zebra"]
    assert [seed["seed"] for seed in found["gmps"]] == [0, 2, 10]
    few = figures.found(results, "push", "few")
    assert [[seed["seed"] for seed in seeds] for seeds in few.values()] == [[2]]
    assert figures.found(results, "ant") == {}
    label = figures.style("pearl-relabelled")["label"]
    assert label == "PEARL, relabelled" and figures.style("zebra-x")["label"] == "zebra, x"


def test_curves_after_one_round_seed_by_seed():
    """The row of one round of test episodes; x is the mean over seeds; the shorter curve decides.
    """
    seeds = [result([3, 4, 5]), result([6, 8], steps=(300, 600))]
    x, values = figures.against_steps(seeds, "return")
    assert x.tolist() == [200, 400] and values.tolist() == [[3, 4], [6, 8]]
    assert figures.training_steps(seeds) == 400
    assert figures.against_steps([seeds[0] | {"curve": []}], "return")[1].size == 0


def test_held_out_goals_against_test_episodes():
    x, values = figures.against_episodes([result([1]), result([1], goals=1, rounds=2)], "return")
    assert x.tolist() == [0, 10, 20] and values.tolist() == [[5, 6, 7], [0, 1, 2]]


def test_the_steps_that_count():
    """The first point within one standard error of the best; alone, a seed's best point."""
    assert figures.counted_point(np.array([[1.0, 5.0, 4.0, 5.5, 5.2]])) == 3
    assert figures.counted_point(np.array([[1.0, 5.0, 4.0, 4.5, 4.2]])) == 1
    # Means 1, 5, 6; at the best point the standard error is std(5, 7) / sqrt(2) = 1.
    values = np.array([[1.0, 5.0, 5.0], [1.0, 5.0, 7.0]])
    assert figures.counted_point(values) == 1
    assert figures.counted_point(values - [0, 0.01, 0]) == 2


def test_verdicts_by_hand(results, monkeypatch):
    monkeypatch.setitem(figures.NEAR, "push", (0.3, 0.01))
    put(results, "push/gmps/seed0", result([2, 6, 7], steps=(100, 200, 300)))
    put(results, "push/rl2/seed0", result([3, 5, 4], steps=(1000, 5000, 6000)))
    put(results, "push/regress/seed0", result([9], steps=(50,)))
    lines = figures.verdicts("push", results)
    assert lines == [
        "push, GMPS: environment steps to 0.3 m: 200 and 0.01 m: never",
        "push, RL²: environment steps to 0.3 m: 5,000 and 0.01 m: never; best return 5 counts at "
        "5,000, GMPS has it at 200 (0.040 of them)",
        "push, regress: environment steps to 0.3 m: 50 and 0.01 m: never; best return 9 "
        "counts at 50, GMPS has it at never"]


# ---------------------------------------------------------------- drawing
def test_five_seeds_have_an_interval_and_fewer_are_shown():
    values = np.random.default_rng(0).normal(size=(5, 3))
    figure, axis = figures.pyplot().subplots()
    figures.draw(axis, [1, 2, 3], values, color="black")
    edge = {tuple(point) for point in axis.collections[0].get_paths()[0].vertices.round(6)}
    for x, column in zip((1, 2, 3), values.T):
        assert {(x, round(bound, 6)) for bound in interval(column)} <= edge
    assert np.allclose(axis.lines[0].get_ydata(), values.mean(0)) and len(axis.lines) == 1
    figures.draw(axis, [1, 2, 3], values[:4], color="black")
    assert [np.allclose(line.get_ydata(), row) for line, row in
            zip(axis.lines[1:], [*values[:4], values[:4].mean(0)])] == [True] * 5
    assert len(axis.collections) == 1
    figures.pyplot().close(figure)


def test_only_figures_whose_results_exist_are_drawn(results, capsys):
    """Nothing at all; then push and what belongs to it; nothing is written elsewhere."""
    figures.main(results)
    assert not list(results.iterdir()) and capsys.readouterr().out.count("no results yet") == 10
    for method in ("gmps", "rl2", "regress"):
        put(results, f"push/{method}/seed0", result([3, 4, 5]))
    put(results, "push/gmps/seed0/few", result([3, 4, 5], episodes=5, rounds=20))
    put(results, "push/scratch-sac/seed0/long", result([], episodes=5, rounds=20))
    before = sorted(results.rglob("result.json"))
    figures.main(results)
    drawn = sorted(path.name for path in (results / "figures").iterdir())
    assert drawn == ["push_episodes.png", "push_scratch.png", "push_steps.png"]
    assert sorted(path for path in results.rglob("*.json")) == before
    for name in drawn:
        assert Image.open(results / "figures" / name).width > 1000


def test_what_is_drawn_against_training_steps(results):
    """Lines are the curves; the filled point is held out, after one round; who ended by its budget.

    Ended: the steps that count are in the last third of the curve. Of five points: the last two.
    """
    steps = (100, 200, 300, 400, 500)
    for method, best in (("maml", 2), ("rl2", 3), ("incontext", 4)):
        returns = [5 + 4 * (k == best) for k in range(5)]
        put(results, f"push/{method}/seed0", result(returns, steps=steps))
    figure = figures.against_training("push", results)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["experts, told the goal", "MAML", "RL² (ended by its budget)", "incontext"]
    lines = [(line.get_xdata(), line.get_ydata()) for line in figure.axes[0].lines[1:]]
    curve, counted, held_out = ([np.ravel(part).tolist() for part in line] for line in lines[:3])
    assert curve == [list(steps), [5, 5, 9, 5, 5]] and counted == [[300], [9]]
    assert held_out == [[400], [6]], "goals return 1 and 11 after one round"
    figures.pyplot().close(figure)


def test_what_is_drawn_against_test_episodes(results):
    """A method without gradient: every episode of few/, then whole rounds. GMPS: both, apart."""
    for method in ("gmps", "pearl"):
        put(results, f"push/{method}/seed0", result([5]))
        put(results, f"push/{method}/seed0/few", result([5], episodes=2, rounds=5))
    put(results, "push/pearl/seed1", result([5], goals=1, rounds=3))  # no few/: not in that line
    figure = figures.against_experience("push", results)
    lines = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].lines}
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert lines["GMPS"] == [0, 10, 20, 30]
    assert lines["GMPS, in small rounds"] == [0, 2, 4, 6, 8, 10]
    assert labels.count("PEARL") == 1 and lines["PEARL"] == [0, 2, 4, 6, 8, 10, 20, 30]
    returns = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert returns["PEARL"] == [5, 6, 7, 8, 9, 10, 7, 8]
    figures.pyplot().close(figure)


def test_the_other_figures(results):
    """Outside the arc, door, images, ablations: lines where they belong."""
    bands = load("ant")().bands()
    goals = sum(len(goals) for _, goals in bands)
    for seed in range(2):
        put(results, f"ant/gmps/seed{seed}/outside", result([], goals=goals, rounds=4))
        put(results, f"door/gmps/seed{seed}", result([2, 3]))
        put(results, f"push-vision/gmps/seed{seed}", result([2]))
    figure = figures.outside(results)
    axis = figure.axes[1]  # the second band: its first goal comes after all of the first band's
    first = len(bands[0][1])
    own = np.arange(first, first + len(bands[1][1]))
    assert np.allclose(axis.lines[-1].get_ydata(), np.arange(5) + 10 * own.mean())
    assert axis.get_title() == bands[1][0]
    figures.pyplot().close(figure)
    put(results, "door/maml/seed0", result([2, 3], steps=(100, 900)))
    figures.main(results)
    assert {path.stem for path in (results / "figures").iterdir()} == {
        "ant_outside", "door", "push_vision"}
    figure = figures.door(results)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["GMPS", "MAML (ended by its budget)", "experts, told the angle"]
    degrees = figure.axes[3].lines[0].get_ydata()
    assert degrees == pytest.approx(np.degrees([0.01, 0.01])), "radians become degrees"
    figures.pyplot().close(figure)
