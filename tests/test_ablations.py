"""Tests of tools/ablations.py: every ablation changes the recipe; effects by hand; lent experts."""
import dataclasses
import json

import numpy as np
import pytest

import run
from checkpoints import load_checkpoint, save_checkpoint
from tools import ablations


def settings_of(task, name, out, seed=0):
    arguments = ablations.command(task, seed, ablations.ABLATIONS[task][name], out)
    return run.choose_settings(run.parse(arguments), task, seed)


@pytest.mark.parametrize("task", ablations.ABLATIONS)
def test_every_ablation_changes_just_what_it_names(task, tmp_path):
    recipe = dataclasses.asdict(settings_of(task, "recipe", tmp_path))
    for name, changes in ablations.ABLATIONS[task].items():
        settings = dataclasses.asdict(settings_of(task, name, tmp_path))
        assert {key for key in settings if settings[key] != recipe[key]} == set(changes), name
        assert all(settings[key] == value for key, value in changes.items())


def test_effects_are_differences_between_runs_of_the_same_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "ROOT", tmp_path)
    kept = {"recipe": {0: 700, 1: 650, 2: 690}, "w unbounded": {2: 660, 0: 680}}
    for name, returns in kept.items():
        for seed, value in returns.items():
            path = ablations.kept("push", name, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"seed": seed, "return": [0, value, 0, value + 10],
                                        "final_distance": [0, value / 2e3, 0, value / 1e4],
                                        "changes": ablations.ABLATIONS["push"][name]}))
    found = ablations.effects("push", "return", 1)
    assert list(found) == ["w unbounded"] and np.array_equal(found["w unbounded"], [-20, -30])
    assert ablations.show("push").endswith(
        "| w unbounded | `max_weight=1e+30` | -25 (-20, -30) | -25 (-20, -30) | -0.0125 | -0.0025 |"
    )


def test_experts_are_lent_to_runs_that_leave_them_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "ROOT", tmp_path)
    lender = ablations.place("push", "recipe", 0) / "experts.pt"
    lender.parent.mkdir(parents=True)
    content = {"policy": [], "env_steps": {"experts": 30_000}}
    save_checkpoint(lender, "experts", settings_of("push", "recipe", lender.parent), content)
    for name, lent in (("w unbounded", True), ("experts: tau 0.005", False),
                       ("20 training goals", False)):
        ablations.lend_experts("push", name, 0)
        path = ablations.place("push", name, 0) / "experts.pt"
        assert path.exists() == lent
        if lent:
            found = load_checkpoint(path, "experts")
            assert found["settings"] == settings_of("push", name, path.parent)
            assert found["env_steps"] == {"experts": 30_000}
