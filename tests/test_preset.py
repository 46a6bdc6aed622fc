"""Tests of --preset paper and of the settings that it switches: each does what its help says."""
import dataclasses
import math

import numpy as np
import pytest
import torch

import gmps
import phases
import policy
import run
from checkpoints import load_checkpoint
from settings import PAPER, Settings
from tests.conftest import ARGUMENTS, PUSH, TINY, explore, make_problem, push_batch, refused, start

GOALS = np.array([[0.0, 0.75], [0.05, 0.72]])


def chosen(*arguments):
    options = run.parse([str(argument) for argument in arguments])
    return run.choose_settings(options, options.task, options.seed)


def test_preset_sets_what_it_lists_and_names_the_folder():
    ours, paper = chosen(), chosen("--preset", "paper")
    assert all(getattr(paper, name) == value for name, value in PAPER.items())
    differ = {spec.name for spec in dataclasses.fields(Settings)
              if getattr(ours, spec.name) != getattr(paper, spec.name)}
    same = {name for name, value in PAPER.items() if getattr(ours, name) == value}
    assert differ == ({*PAPER} - same) | {"preset"}
    assert phases.method_label(paper, PUSH) == "gmps-paper"
    ant = chosen("--task", "ant", "--preset", "paper")
    assert (ant.training_tasks, ant.episodes, ant.test_episodes) == (40, 50, 50)
    assert ant.noise_hold == 1 and ant.expert_noise_correlation == 0.9


def test_preset_gives_way_to_set_and_goes_with_training_alone(capsys):
    assert chosen("--preset", "paper", "--set", "meta_steps=7").meta_steps == 7
    assert "--preset is for training" in refused(capsys, "--preset", "paper", "--evaluate", "x")
    assert "use --preset" in refused(capsys, "--set", "preset=paper")


def test_raw_observations_reach_the_policy_and_not_the_experts():
    settings = dataclasses.replace(TINY, observations="raw")
    family, state = phases.policy_family(settings), np.array([[0.1, 0.5, 0.05, 0, 0.6, 0.02]])
    assert torch.allclose(policy.normalised(family, state).double(), torch.as_tensor(state))
    assert np.allclose(policy.normalised(PUSH, state)[0, 1], (0.5 - 0.6) / 0.1)
    assert family.name == "push" and PUSH.observation_scale[0] == 0.1, "a family of its own"


@pytest.mark.parametrize("choice", ["no", "yes"])
def test_log_std_adapts_only_on_request(choice):
    settings = dataclasses.replace(TINY, adapt_std=choice)
    theta = policy.init_policy(PUSH, settings, torch.Generator().manual_seed(0))
    alpha = gmps.init_step_sizes(theta, settings)
    problem = make_problem(GOALS)
    _, explored = explore(policy.per_task(theta, 2), problem, settings, 4,
                          torch.Generator().manual_seed(1))
    batch, _ = push_batch(explored, settings)
    phi = gmps.adapt(theta, alpha, batch, settings, first_order=True)
    assert (phi["log_std"] != theta["log_std"]).all() == (choice == "yes")
    assert (phi["b3"] != theta["b3"]).any()


@pytest.mark.parametrize("choice", ["no", "yes"])
def test_log_std_is_learned_only_on_request(choice, tmp_path):
    assert start("--task", "push", *ARGUMENTS, f"--set=adapt_std={choice}", "--out", tmp_path) == 0
    learned = load_checkpoint(tmp_path / "policy.pt", "policy")["policy"]["theta"]["log_std"]
    assert torch.allclose(learned, torch.tensor(math.log(0.5))) == (choice == "no")


def test_std_has_the_floor_of_the_release():
    log_std = torch.tensor([[[0.0, -1.0, -50.0]]])
    assert torch.allclose(policy.action_std({"log_std": log_std}),
                          torch.tensor([[[1.0, math.exp(-1), 1e-6]]]))


def test_imitated_action_is_the_executed_one_or_the_mean():
    """A mean of 1.2 beside an expert's 1: 0.02^2 with the slope of 0.1 outside, or 0.2^2."""
    phi = policy.per_task(policy.init_policy(PUSH, TINY, torch.Generator().manual_seed(0)), 1)
    phi = {name: torch.zeros_like(value) for name, value in phi.items()}
    phi["b3"] = torch.full_like(phi["b3"], 1.2)
    x, label = torch.zeros(1, 4, 6), torch.ones(1, 4, 3)
    for choice, miss in (("executed", 0.02), ("mean", 0.2)):
        loss = policy.imitation_loss(phi, x, label, dataclasses.replace(
            TINY, imitated_action=choice))
        assert loss.item() == pytest.approx(3 * miss ** 2, rel=1e-4)


def test_rates():
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    for final, expected in ((1.0, 2.0), (0.1, 1.1)):
        policy.set_rates(optimiser, [2.0], 0.5, final)
        assert optimiser.param_groups[0]["lr"] == pytest.approx(expected)
