"""Tests of the equations of baselines/maml.py: the meta-gradient, and the step of TRPO."""
import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

import gmps
from baselines import maml
from policy import action_std, detached, init_policy, log_prob, mean_action, per_task
from test_gmps import reference_inner_gradient
from tests.conftest import PUSH, finite_difference, reference_forward, relative_error

EQUATIONS = maml.Settings(hidden=5, bias_vector=2, max_weight=1e6)
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
            phi, batch["features"], batch["action"])
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
    loss = maml.surrogate_loss(phi, after)
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
    batch["behaviour_log_prob"] = log_prob(per_task(theta, 2), batch["features"],
                                           batch["action"]).detach()
    expected = gmps.adapt(theta, alpha, batch, EQUATIONS)
    gradients = []
    for objective in OBJECTIVES:
        settings = dataclasses.replace(EQUATIONS, inner_objective=objective)
        phi = maml.adapt(theta, alpha, [batch], settings)
        assert all(torch.allclose(phi[name], expected[name], rtol=1e-12) for name in theta)
        gradients.append(torch.autograd.grad(maml.surrogate_loss(phi, after),
                                             theta["b3"])[0])
    assert relative_error(*gradients) > 1e-2


def test_surrogate_and_kl_against_torch_distributions():
    """Summed over action dimensions; means over samples before an early end, then over tasks."""
    theta, alpha, adaptation, after = equations(1)
    old, new = per_task(theta, 2), maml.adapt(theta, alpha, adaptation, EQUATIONS)
    gaussians = [torch.distributions.Normal(mean_action(phi, after["features"]),
                                            action_std(phi)) for phi in (old, new)]
    kl = torch.distributions.kl_divergence(*gaussians).sum(-1)
    ratio = (gaussians[1].log_prob(after["action"]).sum(-1) - after["behaviour_log_prob"]).exp()
    for found, each in ((maml.mean_kl(old, new, after), kl),
                        (maml.surrogate_loss(new, after), -ratio * after["advantage"])):
        expected = (each[0, :9].mean() + each[1].mean()) / 2
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    assert maml.mean_kl(new, new, after).item() == pytest.approx(0, abs=1e-15)


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
    kl = maml.mean_kl(detached(phi), phi, after)
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
    return parameters, evaluate, matrix, g


def test_trust_region_step_in_closed_form():
    """x = -length sqrt(2 max_kl / g' F^-1 g) F^-1 g, whatever the size of the gradient."""
    for slope in (1.0, 100.0):
        parameters, evaluate, matrix, g = quadratic(slope=slope)
        settings = maml.Settings(cg_iterations=50, damping=0.0, max_kl=0.02)
        info = maml.trust_region_step(parameters, evaluate, settings)
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
    parameters, evaluate, *_ = quadratic()
    settings = maml.Settings(cg_iterations=50, damping=0.0, max_kl=0.02)

    def worse(first_order):
        loss, kl = evaluate(first_order)
        if first_order:
            size = (maml.flat(parameters) - 1).norm()
            kl = kl + 10 * size ** 4 if fault == "kl" else kl
            loss = loss + 12 * size ** 2 if fault == "loss" else loss
            loss = loss + math.nan if fault == "not a number" else loss
        return loss, kl
    info = maml.trust_region_step(parameters, worse, settings)
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
    parameters, evaluate, *_ = quadratic(slope=0.0)
    assert maml.trust_region_step(parameters, evaluate, settings)["length"] == 0
    assert bool((maml.flat(parameters) == 1).all())
    for fault in (dict(slope=math.nan), dict(curvature=math.nan)):
        parameters, evaluate, *_ = quadratic(**fault)
        with pytest.raises(FloatingPointError, match="not finite: start anew"):
            maml.trust_region_step(parameters, evaluate, settings)


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
    info = maml.trust_region_step(actor(policy), evaluate, maml.Settings(damping=0.1))
    ours, theirs = (maml.flat(actor(of)).detach() - start for of in (policy, model.policy))
    assert info["length"] > 0 and torch.cosine_similarity(ours, theirs, dim=0) > 0.999
    assert 0.79 < (ours.norm() / theirs.norm()).item() < 1.27
