"""Tests of baselines/maml.py: its equations, the step of TRPO, an iteration, what it learns."""
import copy
import dataclasses
import math
from functools import partial
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
from test_gmps import named, reference_inner_gradient
from tests.conftest import (
    ARGUMENTS,
    PUSH,
    finite_difference,
    reference_forward,
    refused,
    relative_error,
    result_of,
    start,
    through_bytes,
)
from tests.point_task import PointEnvironments
from tests.test_checkpoints import EVALUATE, stopped, timeless
from tests.test_meta_training import same

EQUATIONS = maml.Settings(hidden=5, bias_vector=2, min_std=0.3, max_weight=1e6)
OBJECTIVES = ("ratio", "log-likelihood")


# ---------------------------------------------------------------- the outer objective
def equations(inner_steps):
    """theta, alpha, one random batch for each inner step and one after them: float64, two tasks.

    w is not 1, and one episode has ended early.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)
    theta = init_policy(PUSH, dataclasses.replace(EQUATIONS, init_std=0.6), generator,
                        torch.float64)
    theta |= {"z": 0.5 * normal(1, 2), "log_std": theta["log_std"] + 0.2 * normal(1, 3).abs()}
    alpha = {name: 0.1 + 0.05 * normal(*value.shape) for name, value in theta.items()}
    batches, phi = [], per_task(theta, 2)
    for _ in range(inner_steps + 1):
        batch = {"features": normal(2, 12, 6), "action": 0.7 * normal(2, 12, 3),
                 "advantage": normal(2, 12), "mask": torch.ones(2, 12, dtype=torch.float64)}
        batch["mask"][0, -3:] = 0
        batch["behaviour_log_prob"] = 0.1 * normal(2, 12) + log_prob(
            phi, batch["features"], batch["action"], EQUATIONS)
        batches.append(batch)
        phi = detached(gmps.inner_step(phi, alpha, batch, EQUATIONS, first_order=True))
    for value in (*theta.values(), *alpha.values()):
        value.requires_grad_()
    return theta, alpha, batches[:-1], batches[-1]


def reference_log_prob(phi, own):
    deviation = own["action"] - reference_forward(phi, own["features"])[0]
    return (-(deviation / np.exp(phi["log_std"])) ** 2 / 2 - phi["log_std"]
            - np.log(2 * np.pi) / 2).sum(1)


def reference_adapt(theta, alpha, adaptation, objective):
    """phi of both tasks in numpy: w moves with theta, or is 1."""
    theta, alpha = ({k: v.detach().numpy() for k, v in part.items()} for part in (theta, alpha))
    phis = []
    for i in range(2):
        phi = theta
        for batch in adaptation:
            own = {name: value[i].numpy() for name, value in batch.items()}
            weight = np.ones(12)
            if objective == "ratio":
                weight = np.exp(reference_log_prob(phi, own) - own["behaviour_log_prob"])
            gradient = reference_inner_gradient(phi, own, weight)
            phi = {name: value - alpha[name] * gradient[name] for name, value in phi.items()}
        phis.append(phi)
    return phis


def reference_loss(theta, alpha, adaptation, after, objective):
    losses = []
    for i, phi in enumerate(reference_adapt(theta, alpha, adaptation, objective)):
        own = {name: value[i].numpy() for name, value in after.items()}
        ratio = np.exp(reference_log_prob(phi, own) - own["behaviour_log_prob"])
        losses.append(-(ratio * own["advantage"] * own["mask"]).sum() / own["mask"].sum())
    return np.mean(losses)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("inner_steps", [1, 2])
def test_meta_gradient_against_finite_differences(objective, inner_steps):
    """Every element of theta and alpha to 1e-6, w != 1; and phi, with and without a graph."""
    theta, alpha, adaptation, after = equations(inner_steps)
    settings = dataclasses.replace(EQUATIONS, inner_objective=objective)
    phis = reference_adapt(theta, alpha, adaptation, objective)
    assert min(phi["log_std"].min() for phi in phis) > math.log(0.3)
    for first_order in (False, True):
        phi = maml.adapt(theta, alpha, adaptation, settings, first_order)
        assert all(np.allclose(phi[name][i].detach(), by_hand[name], rtol=1e-11, atol=1e-13)
                   for i, by_hand in enumerate(phis) for name in theta)
    phi = maml.adapt(theta, alpha, adaptation, settings)
    loss = maml.surrogate_loss(phi, after, settings)
    assert loss.item() == pytest.approx(
        reference_loss(theta, alpha, adaptation, after, objective), rel=1e-12)
    loss.backward()
    for value in (*theta.values(), *alpha.values()):
        estimate = finite_difference(
            value, lambda: reference_loss(theta, alpha, adaptation, after, objective))
        assert estimate.norm() > 1e-6 and relative_error(value.grad, estimate) <= 1e-6


def test_inner_objectives_agree_in_the_inner_step_and_differ_in_the_outer_gradient():
    """Where the policy is the one that acted. The inner step is then that of GMPS."""
    theta, alpha, (batch,), after = equations(1)
    batch["behaviour_log_prob"] = log_prob(per_task(theta, 2), batch["features"], batch["action"],
                                           EQUATIONS).detach()
    expected = gmps.adapt(theta, alpha, batch, EQUATIONS)
    gradients = []
    for objective in OBJECTIVES:
        settings = dataclasses.replace(EQUATIONS, inner_objective=objective)
        phi = maml.adapt(theta, alpha, [batch], settings)
        assert all(torch.allclose(phi[name], expected[name], rtol=1e-12) for name in theta)
        gradients.append(torch.autograd.grad(maml.surrogate_loss(phi, after, settings),
                                             theta["b3"])[0])
    assert relative_error(*gradients) > 1e-2


def test_surrogate_and_kl_against_torch_distributions():
    """Summed over action dimensions; means over samples before an early end, then over tasks."""
    theta, alpha, adaptation, after = equations(1)
    old, new = per_task(theta, 2), maml.adapt(theta, alpha, adaptation, EQUATIONS)
    gaussians = [torch.distributions.Normal(mean_action(phi, after["features"]),
                                            action_std(phi, EQUATIONS)) for phi in (old, new)]
    kl = torch.distributions.kl_divergence(*gaussians).sum(-1)
    ratio = (gaussians[1].log_prob(after["action"]).sum(-1) - after["behaviour_log_prob"]).exp()
    for found, each in ((maml.mean_kl(old, new, after, EQUATIONS), kl),
                        (maml.surrogate_loss(new, after, EQUATIONS), -ratio * after["advantage"])):
        expected = (each[0, :9].mean() + each[1].mean()) / 2
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    assert maml.mean_kl(new, new, after, EQUATIONS).item() == pytest.approx(0, abs=1e-15)


# ---------------------------------------------------------------- TRPO
def reference_fisher(theta, alpha, adaptation, after, objective):
    """The full matrix J' F J: J of the adapted means and log-stds by differences, F of a Gaussian.
    """
    tensors = [*theta.values(), *alpha.values()]

    def outputs():
        phis = reference_adapt(theta, alpha, adaptation, objective)
        return np.stack([np.concatenate([reference_forward(phi, x.numpy())[0],
                                         phi["log_std"]]).ravel()
                         for phi, x in zip(phis, after["features"])])  # (task, 13 * 3)
    columns = []
    for flat in (tensor.detach().view(-1) for tensor in tensors):
        for i in range(flat.numel()):
            saved, found = flat[i].item(), []
            for step in (1e-6, -1e-6):
                flat[i] = saved + step
                found.append(outputs())
            flat[i] = saved
            columns.append((found[0] - found[1]) / 2e-6)
    jacobian, total = np.stack(columns, axis=-1), 0
    for i, phi in enumerate(reference_adapt(theta, alpha, adaptation, objective)):
        mask = after["mask"][i].numpy()
        per_mean = (mask / mask.sum())[:, None] / np.exp(2 * phi["log_std"])
        weight = np.concatenate([per_mean.ravel(), [2.0] * 3])  # KL'' by log-std is 2
        total = total + jacobian[i].T @ (weight[:, None] * jacobian[i]) / 2
    return torch.as_tensor(total)


@pytest.mark.parametrize("objective, inner_steps", [("ratio", 1), ("log-likelihood", 2)])
def test_fisher_products_against_the_full_matrix(objective, inner_steps):
    """Of the adapted policies' KL, by theta and alpha together: every column, with damping."""
    theta, alpha, adaptation, after = equations(inner_steps)
    settings = dataclasses.replace(EQUATIONS, inner_objective=objective)
    parameters = [*theta.values(), *alpha.values()]
    phi = maml.adapt(theta, alpha, adaptation, settings)
    kl = maml.mean_kl(detached(phi), phi, after, settings)
    product = maml.fisher_product(kl, parameters, damping=0.5)
    identity = torch.eye(maml.flat(parameters).numel(), dtype=torch.float64)
    matrix = torch.stack([product(column) for column in identity])
    expected = reference_fisher(theta, alpha, adaptation, after, objective)
    assert relative_error(matrix - 0.5 * identity, expected) < 1e-6
    assert expected[-3:].norm() > 1e-6 < expected[:3].norm(), "both ends are felt"


def positive_definite(size):
    generator = torch.Generator().manual_seed(3)
    factor = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return (factor @ factor.T + 0.5 * torch.eye(size, dtype=torch.float64),
            torch.randn(size, generator=generator, dtype=torch.float64))


def test_conjugate_gradient_is_the_best_of_its_krylov_space():
    """After k iterations: span of b, A b .. A^(k-1) b; after all of them the solution."""
    matrix, b = positive_definite(12)
    for k in (1, 2, 5):
        found = maml.conjugate_gradient(lambda v: matrix @ v, b, k)
        powers = torch.stack([torch.linalg.matrix_power(matrix, i) @ b for i in range(k)], dim=1)
        basis = torch.linalg.qr(powers)[0]
        best = basis @ torch.linalg.solve(basis.T @ matrix @ basis, basis.T @ b)
        assert torch.allclose(found, best, rtol=1e-7)
        assert relative_error(found, torch.linalg.solve(matrix, b)) > 1e-3
    solved = maml.conjugate_gradient(lambda v: matrix @ v, b, 100)
    assert torch.allclose(matrix @ solved, b, atol=1e-4)
    nothing = maml.conjugate_gradient(lambda v: matrix @ v, 0 * b, 10)
    assert not nothing.any()


def quadratic(curvature=1.0, slope=1.0):
    """Parameters (2,) and (3, 1), a linear loss and a quadratic KL around them, and their step."""
    matrix, g = positive_definite(5)
    parameters = [torch.ones(2, dtype=torch.float64, requires_grad=True),
                  torch.ones(3, 1, dtype=torch.float64, requires_grad=True)]

    def evaluate(first_order):
        moved = maml.flat(parameters) - 1
        return slope * (g @ moved), curvature * 0.5 * moved @ matrix @ moved
    return parameters, evaluate, partial(maml.place, parameters=parameters), matrix, g


def test_trust_region_step_in_closed_form():
    """x = -length sqrt(2 max_kl / g' F^-1 g) F^-1 g, whatever the size of the gradient."""
    for slope in (1.0, 100.0):
        parameters, evaluate, move, matrix, g = quadratic(slope=slope)
        settings = maml.Settings(cg_iterations=50, damping=0.0, max_kl=0.02)
        info = maml.trust_region_step(parameters, evaluate, move, settings)
        direction = torch.linalg.solve(matrix, g)
        expected = -info["length"] * math.sqrt(0.04 / (g @ direction)) * direction
        assert torch.allclose(maml.flat(parameters) - 1, expected, rtol=1e-4)
        assert info["length"] in (1.0, 0.8) and info["kl"] <= 0.02
        assert info["kl"] == pytest.approx(info["length"] ** 2 * 0.02, rel=1e-4)
        assert info["improvement"] == pytest.approx(-slope * (g @ expected).item(), rel=1e-4)
        assert info["gradient_norm"] == pytest.approx(slope * g.norm().item())


@pytest.mark.parametrize("fault", ["kl", "loss", "not a number"])
def test_line_search_keeps_the_bound_and_lowers_the_loss_or_stays(fault):
    """The KL or the loss rises faster than at the start: shorter steps, or none at all."""
    parameters, evaluate, move, *_ = quadratic()
    settings = maml.Settings(cg_iterations=50, damping=0.0, max_kl=0.02)

    def worse(first_order):
        loss, kl = evaluate(first_order)
        if first_order:
            size = (maml.flat(parameters) - 1).norm()
            kl = kl + 10 * size ** 4 if fault == "kl" else kl
            loss = loss + 12 * size ** 2 if fault == "loss" else loss
            loss = loss + math.nan if fault == "not a number" else loss
        return loss, kl
    info = maml.trust_region_step(parameters, worse, move, settings)
    if fault == "not a number":
        assert info["length"] == 0 and bool((maml.flat(parameters) == 1).all())
    else:
        loss, kl = (value.item() for value in worse(True))
        assert kl <= 0.02 and loss < 0 and info["length"] < 0.8
        assert (info["kl"], info["improvement"]) == pytest.approx((kl, -loss))
        with torch.no_grad():  # the length before was too long
            maml.place(1 + (maml.flat(parameters) - 1) / 0.8, parameters)
        loss, kl = (value.item() for value in worse(True))
        assert kl > 0.02 if fault == "kl" else loss >= 0


def test_a_gradient_of_zero_moves_nothing_and_one_that_is_no_number_stops_the_run():
    settings = maml.Settings()
    parameters, evaluate, move, *_ = quadratic(slope=0.0)
    assert maml.trust_region_step(parameters, evaluate, move, settings)["length"] == 0
    assert bool((maml.flat(parameters) == 1).all())
    for fault in (dict(slope=math.nan), dict(curvature=math.nan)):
        parameters, evaluate, move, *_ = quadratic(**fault)
        with pytest.raises(FloatingPointError, match="not finite: start anew"):
            maml.trust_region_step(parameters, evaluate, move, settings)


# ---------------------------------------------------------------- the algorithm, step by step
STEPS = maml.Settings(seed=1, hidden=8, bias_vector=2, training_tasks=5, meta_batch=3, episodes=4,
                      inner_steps=2, collections=3)
POINTS = PointEnvironments()


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
        batches = [policy_gradient_batch(explored, [0, 1], STEPS)[0]
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
            own, old = (log_prob(p, batch["features"], batch["action"], STEPS)[batch["mask"] > 0]
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
                                                        action_std(phi, STEPS)))
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
    """Alpha, but for log-std's, or nothing of it. log-std stays above its floor."""
    first = dataclasses.replace(STEPS, collections=2, min_std=1.0)
    start = gmps.init_step_sizes(init_policy(POINTS.family, first, torch.Generator()), first)
    for learn, adapt_std in (("yes", "yes"), ("yes", "no"), ("no", "yes")):
        settings = dataclasses.replace(first, learn_step_sizes=learn, adapt_std=adapt_std)
        policy = named(watched(settings), "yield")[-1][0]["policy"]
        for name, value in policy["alpha"].items():
            fixed = learn == "no" or (name == "log_std" and adapt_std == "no")
            expected = 0 * start[name] if adapt_std == "no" and name == "log_std" else start[name]
            assert fixed == torch.equal(value, expected), (learn, adapt_std, name)
        assert (policy["theta"]["log_std"] >= 0).all()
    images = SimpleNamespace(observation_size=3, action_size=3, image_shape=(48, 64, 3),
                             baseline_products=())
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
            sizes = adapter.step_size(k)
            trained = k < inner_steps
            assert sizes["b3"].unique().item() == (pytest.approx(-0.2) if trained else 0)
            assert sizes["w1"].unique().item() == pytest.approx(0.1 if trained else 0.05)


# ---------------------------------------------------------------- the command
def test_its_own_defaults_win_over_a_familys_and_give_way_to_options():
    """A family's settings are for GMPS. What MAML says nothing of stays the family's."""
    def chosen(*arguments):
        options = run.parse(["--method", "maml", *arguments])
        return run.choose_settings(options, options.task, 0)
    ant, door = chosen("--task", "ant"), chosen("--task", "door")
    assert (ant.episodes, ant.meta_batch, ant.collections) == (20, 20, 125)
    assert (ant.noise_correlation, ant.discount) == (0.9, 0.99)
    assert (door.collections, door.later_steps, door.experts) == (125, 0.5, "scripted")
    assert chosen("--task", "ant", "--quick", "--set", "inner_steps=2").episodes == 4
    assert chosen("--task", "ant", "--preset", "paper").episodes == 50
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


@pytest.mark.slow
def test_trust_region_step_is_that_of_sb3_contrib():
    """The same policy and the same rollout of Pendulum: the same step, but for the line search.

    sb3 averages KL over action dimensions, of which Pendulum has one. Its line search measures
    KL(new || old), so it may stop one length earlier or later.
    """
    sb3_contrib = pytest.importorskip("sb3_contrib")
    model = sb3_contrib.TRPO("MlpPolicy", "Pendulum-v1", n_steps=1024, batch_size=1024,
                             cg_max_steps=10, cg_damping=0.1, target_kl=0.01, seed=0, device="cpu")
    policy = copy.deepcopy(model.policy)
    model.learn(1024)  # one rollout, one step
    rollout = next(model.rollout_buffer.get(batch_size=None))
    advantage = (rollout.advantages - rollout.advantages.mean()) / rollout.advantages.std()

    def actor(of):
        return [value for name, value in of.named_parameters() if "value" not in name]
    with torch.no_grad():
        old = policy.get_distribution(rollout.observations).distribution
        old = torch.distributions.Normal(old.mean.clone(), old.stddev.clone())

    def evaluate(first_order):
        new = policy.get_distribution(rollout.observations)
        ratio = (new.log_prob(rollout.actions) - rollout.old_log_prob).exp()
        kl = torch.distributions.kl_divergence(old, new.distribution).sum(-1)
        return -(ratio * advantage).mean(), kl.mean()
    start = maml.flat(actor(policy)).detach().clone()
    info = maml.trust_region_step(actor(policy), evaluate,
                                  partial(maml.place, parameters=actor(policy)),
                                  maml.Settings(damping=0.1))
    ours, theirs = (maml.flat(actor(of)).detach() - start for of in (policy, model.policy))
    assert info["length"] > 0 and torch.cosine_similarity(ours, theirs, dim=0) > 0.999
    assert 0.79 < (ours.norm() / theirs.norm()).item() < 1.27
