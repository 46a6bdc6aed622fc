"""Tests of baselines/maml.py beyond its equations (test_trpo.py): iterations, runs, learning."""
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import gmps
import phases
import run
from advantages import policy_gradient_batch
from baselines import maml
from checkpoints import load_checkpoint
from evaluate import by_round, evaluate, mean_of
from policy import action_std, detached, init_policy, log_prob, mean_action, per_task
from tasks import task_set
from test_gmps import named
from tests.conftest import ARGUMENTS, refused, result_of, start, through_bytes
from tests.point_task import PointEnvironments, PointGoal
from tests.test_checkpoints import EVALUATE, stopped, timeless
from tests.test_meta_training import same

# ---------------------------------------------------------------- the algorithm, step by step
STEPS = maml.Settings(seed=1, init_step_size=0.1, hidden=8, bias_vector=2, training_tasks=5,
                      meta_batch=3, episodes=4, inner_steps=2, collections=3)
POINTS = PointEnvironments(PointGoal())


def watched(settings=STEPS, state=None):
    """What `train` does on the point task: [(event, what it brings)].

    In every rollout environment 1 ends after 7 steps, and nothing behind that may be seen.
    """
    events = []

    def rollout(actor, tasks, count):
        result = POINTS.rollout(actor, tasks, count)
        result["observations"][1, 8:] = 1e6
        result["mask"][1, 7:] = result["rewards"][1, 7:] = 0
        events.append(("rollout", (detached(actor.phi), actor.explored(result), result, tasks,
                                   count)))
        return result
    problem = SimpleNamespace(
        family=POINTS.family, tasks=task_set(POINTS.family, "train", 5), device="cpu",
        rollout=rollout, meta_test=lambda adapter: events.append(("meta-test", adapter)))
    for new, metrics in maml.train(problem, settings, state):
        events.append(("yield", (new, metrics, through_bytes(new))))
    return events


@pytest.fixture(scope="module")
def iterations():
    """Of each: (theta, alpha) before and after, its rollouts, their batches, its metrics."""
    events, out = watched(), []
    start = watched(dataclasses.replace(STEPS, max_kl=1e-8))[0][1][0]  # rollout: phi = theta
    theta = {name: value[0] for name, value in start.items()}
    before = theta, gmps.init_step_sizes(theta, STEPS)
    for k, (state, metrics, _) in enumerate(named(events, "yield")):
        rollouts = named(events, "rollout")[3 * k:3 * k + 3]
        batches = [policy_gradient_batch(explored, STEPS)[0]
                   for _, explored, *_ in rollouts]
        after = state["policy"]["theta"], state["policy"]["alpha"]
        out.append((before, after, rollouts, batches, metrics))
        before = after
    return out


def close(params, expected, atol=1e-5):
    return all(torch.allclose(params[name], expected[name], rtol=0, atol=atol) for name in expected)


def test_who_explores_what(iterations):
    """theta, phi_1, phi_2: each K episodes on the same random tasks, with noise of its own.

    The log-probabilities in each batch are those of the policy that acted, not of theta.
    """
    drawn = []
    for (theta, alpha), _, rollouts, batches, _ in iterations:
        phi = per_task(theta, 3)
        for k, ((acting, explored, _, tasks, count), batch) in enumerate(zip(rollouts, batches)):
            assert close(acting, phi) and count == 4
            assert tasks.shape == (3, 2) and len(np.unique(tasks, axis=0)) == 3
            assert np.array_equal(tasks, rollouts[0][3])
            own, old = (log_prob(p, batch["features"], batch["action"])[batch["mask"] > 0]
                        for p in (phi, per_task(theta, 3)))
            found = batch["behaviour_log_prob"][batch["mask"] > 0]
            assert torch.allclose(found, own, atol=1e-4)
            assert (k == 0) == torch.allclose(found, old, atol=1e-2)
            drawn.append(explored["action"][0, 0, 0, 0].item())
            phi = gmps.inner_step(phi, alpha, batch, STEPS, first_order=True)
    assert len(set(drawn)) == 9
    assert len({rollouts[0][3].tobytes() for *_, rollouts, _, _ in iterations}) > 1, "random tasks"


def test_outer_step_keeps_the_bound_and_improves_the_surrogate(iterations):
    """By torch's distributions, between the policies that acted and those adapted from the new
    theta and alpha on the same episodes; so say the metrics."""
    for before, after, rollouts, batches, metrics in iterations:
        adaptation, last, weight = batches[:-1], batches[-1], batches[-1]["mask"] / 3
        weight = weight / weight.sum(1, keepdim=True) / 3
        gaussians, losses = [], []
        for params in (before, after):
            phi = maml.adapt(*params, adaptation, STEPS, first_order=True)
            gaussians.append(torch.distributions.Normal(mean_action(phi, last["features"]),
                                                        action_std(phi)))
            log_p = gaussians[-1].log_prob(last["action"]).sum(-1)
            ratio = torch.where(weight > 0, log_p - last["behaviour_log_prob"], 0).exp()
            losses.append(-(ratio * last["advantage"] * weight).sum().item())
        assert close(maml.adapt(*before, adaptation, STEPS, True), rollouts[2][0])
        kl = torch.distributions.kl_divergence(*gaussians).sum(-1)
        kl = torch.where(weight > 0, kl * weight, 0).sum().item()
        assert 0.002 < kl <= 0.01 and metrics["kl"] == pytest.approx(kl, rel=1e-2)
        assert abs(losses[0]) < 1e-4, "advantages are centred"
        improvement = losses[0] - losses[1]
        assert improvement > 0.01
        assert metrics["improvement"] == pytest.approx(improvement, rel=1e-2)
        for old, new in zip(before, after):
            assert not close(old, new, atol=1e-3)


def test_metrics_and_counts(iterations):
    """All three rollouts count; "return" is theta's, "adapted_return" that of the last."""
    for k, (*_, after, rollouts, _, metrics) in enumerate(iterations, start=1):
        expected = {"iteration": k, "progress": k / 3, "env_steps": k * 3 * (12 * 20 - 13),
                    "divergences": 0, "std": after[0]["log_std"].exp().mean().item()}
        for name, (_, _, episodes, *_) in (("", rollouts[0]), ("adapted_", rollouts[2])):
            expected |= {f"{name}return": episodes["rewards"].sum(1).mean(),
                         f"{name}distance": episodes["distances"][:, -1].mean()}
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)
        assert set(metrics) - set(expected) == {"gradient_norm", "improvement", "kl", "length"}


def test_training_goes_on_with_the_same_bits():
    """From each yielded state, in memory or from a file; and such a state never changes."""
    def bits(events):
        adapter = named(events, "meta-test")[0]
        return ([yielded[:2] for yielded in named(events, "yield")],
                [phi for phi, *_ in named(events, "rollout")],
                (adapter.theta, adapter.alpha, adapter.scale))
    settings = dataclasses.replace(STEPS, advantage_scale="common")  # its scale is kept
    events = watched(settings)
    yielded, phis, last = bits(events)
    assert yielded[0][0]["policy"]["scale"] not in (None, 1.0)
    for done, (kept, _, saved) in enumerate(named(events, "yield"), start=1):
        for state in (kept, through_bytes(saved)):
            again = bits(watched(settings, state))
            assert same(again, (yielded[done:], phis[3 * done:], last))
        assert same(kept, saved)
    finished = watched(settings, yielded[-1][0] | {"training": None})
    assert [event for event, _ in finished] == ["meta-test"]
    assert same(bits(finished)[2], last)


def test_what_the_outer_step_moves():
    """Alpha, but for log-std's, or nothing of it."""
    first = dataclasses.replace(STEPS, collections=2)
    start = gmps.init_step_sizes(init_policy(POINTS.family, first, torch.Generator()), first)
    for learn, adapt_std in (("yes", "yes"), ("yes", "no"), ("no", "yes")):
        settings = dataclasses.replace(first, learn_step_sizes=learn, adapt_std=adapt_std)
        policy = named(watched(settings), "yield")[-1][0]["policy"]
        for name, value in policy["alpha"].items():
            fixed = learn == "no" or (name == "log_std" and adapt_std == "no")
            expected = 0 * start[name] if adapt_std == "no" and name == "log_std" else start[name]
            assert fixed == torch.equal(value, expected), (learn, adapt_std, name)
    images = SimpleNamespace(observation_size=3, action_size=3, image_shape=(48, 64, 3))
    learner = maml.MetaLearner(SimpleNamespace(family=images, device="cpu"), STEPS)
    for name, value in (*learner.theta.items(), *learner.alpha.items()):
        assert value.requires_grad != name.startswith("conv")


def test_meta_test_takes_the_steps_of_meta_training_first():
    """alpha as often as there were inner steps, then half of what is positive in it."""
    theta = init_policy(POINTS.family, STEPS, torch.Generator())
    alpha = {name: value - 0.3 * (name == "b3") for name, value in
             gmps.init_step_sizes(theta, STEPS).items()}
    for inner_steps in (1, 2):
        settings = dataclasses.replace(STEPS, inner_steps=inner_steps)
        adapter = maml.Adapter({"theta": theta, "alpha": alpha, "scale": None}, POINTS.family,
                               settings)
        assert adapter.references == {}
        for k in range(4):
            sizes = adapter.step_size(k, STEPS.test_episodes)
            trained = k < inner_steps
            assert sizes["b3"].unique().item() == (pytest.approx(-0.2) if trained else 0)
            assert sizes["w1"].unique().item() == pytest.approx(0.1 if trained else 0.05)


def test_without_a_scale_from_training_new_tasks_do_not_mix():
    """Sparse rewards may leave no common scale. Then no task's step depends on another's rewards.
    """
    settings = dataclasses.replace(STEPS, advantage_scale="common", imitation_steps=0)
    theta = init_policy(POINTS.family, settings, torch.Generator())
    policy = {"theta": theta, "alpha": gmps.init_step_sizes(theta, settings), "scale": None}

    def first_after(factor):
        adapter = gmps.Adapter(policy, POINTS.family, settings)
        adapter.begin(2, torch.Generator().manual_seed(3))
        episodes = POINTS.rollout(adapter.act, task_set(POINTS.family, "train", 2), 4)
        episodes["rewards"][4:] *= factor  # the second task's
        adapter.update(episodes)
        return {name: value[0] for name, value in adapter.actor.phi.items()}
    assert same(first_after(1.0), first_after(100.0))


# ---------------------------------------------------------------- the command
def test_its_own_defaults_win_over_a_familys_and_give_way_to_options():
    """A family's settings and the paper's are for GMPS: MAML's own come before them.

    So do those that it has on the ant and on the door.
    """
    def chosen(*arguments):
        options = run.parse(["--method", "maml", *arguments])
        return run.choose_settings(options, options.task, 0)
    ant, door = chosen("--task", "ant"), chosen("--task", "door")
    assert (ant.episodes, ant.meta_batch, ant.collections) == (20, 20, 63)
    assert (ant.noise_hold, ant.discount) == (8, 0.99)
    assert (chosen().collections, chosen().noise_hold) == (125, 1)
    assert (door.collections, door.later_steps, door.experts) == (31, 0.5, "scripted")
    quick = chosen("--task", "ant", "--quick", "--set", "noise_hold=3")
    assert (quick.episodes, quick.collections, quick.noise_hold) == (4, 2, 3)
    paper = chosen("--task", "ant", "--preset", "paper")
    assert (paper.episodes, paper.collections, paper.noise) == (20, 63, "independent")
    assert chosen("--set", "episodes=7").episodes == 7
    options = run.parse(["--task", "ant"])
    assert run.choose_settings(options, "ant", 0).episodes == 50, "GMPS's own"


def test_runs_goes_on_after_a_kill_and_is_evaluated(tmp_path, monkeypatch):
    """No expert, no demonstration; steps before, between and after two inner steps count."""
    monkeypatch.setattr(phases, "draw_plot", lambda *_: None)
    command = [*ARGUMENTS, "--method", "maml", "--set", "inner_steps=2"]
    folder, killed = Path("runs/push/maml/seed0_quick"), tmp_path / "killed"
    with stopped("baselines.maml", "conjugate_gradient", 3, *command, "--out", killed):
        assert (killed / "policy_partial.pt").exists()
    assert start(*command) == start(*command, "--out", killed) == 0
    assert timeless(folder) == timeless(killed)
    result = result_of(folder)
    assert result["env_steps"]["experts"] == 0 and not (folder / "demonstrations.npz").exists()
    assert result["env_steps"]["meta_training"] == 3 * 50 * 2 * 3 * 3
    assert result["experts_held_out"] == result["no_adaptation"] == []
    states = [load_checkpoint(out / "policy.pt", "policy")["policy"] for out in (folder, killed)]
    assert same(*states)
    assert start(*EVALUATE, folder, "--gradient-steps", 1, "--rollouts", 2) == 0


def test_bad_settings_are_refused_in_one_line(capsys):
    for setting in ("inner_steps=0", "max_kl=0", "learn_step_sizes=maybe", "backtrack_ratio=1"):
        line = refused(capsys, "--method", "maml", "--set", setting)
        assert setting.split("=")[0] in line


# ---------------------------------------------------------------- what it learns
LEARN = maml.Settings(hidden=32, training_tasks=20, collections=30)


def point_problem(settings):
    return SimpleNamespace(
        family=POINTS.family, tasks=task_set(POINTS.family, "train", settings.training_tasks),
        device="cpu", rollout=POINTS.rollout, meta_test=lambda adapter: None)


@pytest.mark.slow
def test_it_learns_to_find_a_hidden_goal_and_exchanged_rewards_undo_it():
    """Returns of 20 held-out goals: before, and after three steps. Staying returns -15."""
    *_, (state, metrics) = maml.train(point_problem(LEARN), LEARN)
    assert metrics["adapted_return"] > -7 and metrics["return"] < -12

    def returns(exchange):
        adapter = maml.Adapter(state["policy"], POINTS.family, LEARN)
        update = adapter.update

        def exchanged(episodes):
            """Task i is given the rewards of task i + 7, rollout by rollout."""
            update(episodes | {"rewards": np.roll(episodes["rewards"], 7 * 20, axis=0)})
        adapter.update = exchanged if exchange else update
        evaluation = evaluate(POINTS, adapter, task_set(POINTS.family, "held_out", 20), 3, 20, 0)
        return [mean_of(entries, "return") for entries in by_round(evaluation.lists["held_out"])]
    own, others = returns(False), returns(True)
    assert own[0] == others[0] and own[1] > own[0] + 6
    assert own[1] > -9 and own[3] > own[1]
    assert max(others[1:]) < others[0]


@pytest.mark.slow
def test_two_inner_steps_reach_more_than_the_first_of_them():
    settings = dataclasses.replace(LEARN, inner_steps=2, collections=20)
    *_, (state, metrics) = maml.train(point_problem(settings), settings)
    adapter = maml.Adapter(state["policy"], POINTS.family, settings)
    evaluation = evaluate(POINTS, adapter, task_set(POINTS.family, "held_out", 20), 2, 20, 0)
    zero, one, two = (mean_of(rows, "return") for rows in by_round(evaluation.lists["held_out"]))
    assert metrics["adapted_return"] > -7 and zero + 5 < one < two - 1
