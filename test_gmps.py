"""Tests of the inner step and the outer objective: finite differences, closed forms, an independent reference."""
import dataclasses
import math

import numpy as np
import pytest
import torch

import gmps
import policy
from conftest import (
    PUSH,
    TINY,
    finite_difference,
    reference_forward,
    relative_error,
)


def meta_problem(inner_steps, seed=0, n=2, size=12):
    """theta, alpha, random batches with w != 1 and a masked tail, demonstrations: float64 tensors."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    theta = policy.init_policy(PUSH, TINY, generator, torch.float64)
    theta["z"] = 0.5 * normal(1, 2)
    theta["log_std"] = theta["log_std"] + 0.2 * normal(1, 3).abs()
    alpha = {name: 0.1 + 0.05 * normal(*value.shape) for name, value in theta.items()}
    batches = []
    for _ in range(inner_steps):
        batch = {"observation": normal(n, size, 6), "action": 0.7 * normal(n, size, 3),
                 "advantage": normal(n, size), "mask": torch.ones(n, size, dtype=torch.float64)}
        batch["mask"][0, -3:] = 0
        behaviour = policy.log_prob(policy.per_task(theta, n), batch["observation"], batch["action"], TINY)
        batch["log_prob"] = behaviour + 0.3 * normal(n, size)
        batches.append(batch)
    demonstration = normal(n, 10, 6), normal(n, 10, 3)
    return theta, alpha, batches, demonstration


def reference_log_prob(phi, batch):
    mean, _ = reference_forward(phi, batch["observation"])
    std = np.exp(phi["log_std"])
    return (-((batch["action"] - mean) / std) ** 2 / 2 - np.log(std) - np.log(2 * np.pi) / 2).sum(1)


def reference_inner_gradient(phi, batch, weight):
    """Gradient of -mean(log pi * weight * A) over the unmasked samples of one task, by hand-written backpropagation."""
    mean, (x, h1, h2) = reference_forward(phi, batch["observation"])
    deviation = (batch["action"] - mean) / np.exp(phi["log_std"])
    share = (-weight * batch["advantage"] * batch["mask"] / batch["mask"].sum())[:, None]
    d3 = share * deviation / np.exp(phi["log_std"])
    d2 = d3 @ phi["w3"].T * (h2 > 0)
    d1 = d2 @ phi["w2"].T * (h1 > 0)
    total = dict(w3=h2.T @ d3, b3=d3.sum(0), w2=h1.T @ d2, b2=d2.sum(0), w1=x.T @ d1, b1=d1.sum(0),
                 z=(d1 @ phi["w1"].T)[:, 6:].sum(0), log_std=(share * (deviation ** 2 - 1)).sum(0))
    return {name: value.reshape(phi[name].shape) for name, value in total.items()}


class ReferenceMetaLoss:
    """The meta-objective in numpy, task by task, with the importance weights w of every inner step held fixed.

    w = stopgrad(pi_phi) / pi_behaviour: for the gradient, of both orders, w is a number and not a function of theta.
    Finite differences of the plain objective would differentiate through w as well, and differ. So the weights are
    computed once, along the path of the parameters given here, and stay as they are when those are perturbed.
    """

    def __init__(self, theta, alpha, batches, demonstration):
        self.n = len(demonstration[0])
        self.batches = [[{k: v[i].numpy() for k, v in batch.items()} for batch in batches] for i in range(self.n)]
        self.demonstration = [[part[i].numpy() for part in demonstration] for i in range(self.n)]
        self.weights = None
        self(theta, alpha)

    def __call__(self, theta, alpha):
        theta, alpha = ({k: v.detach().numpy() for k, v in params.items()} for params in (theta, alpha))
        total, weights, self.paths = 0.0, [], []
        for i in range(self.n):
            phi, path = theta, [theta]
            for k, batch in enumerate(self.batches[i]):
                if self.weights is None:
                    weights.append(np.exp(reference_log_prob(phi, batch) - batch["log_prob"]))
                weight = weights[-1] if self.weights is None else self.weights[i * len(self.batches[i]) + k]
                gradient = reference_inner_gradient(phi, batch, weight)
                own = {name: value[k] if value.ndim == 3 else value for name, value in alpha.items()}
                phi = {name: value - own[name] * gradient[name] for name, value in phi.items()}
                path.append(phi)
            observation, action = self.demonstration[i]
            means = [reference_forward(phi, observation)[0] for phi in path]
            losses = [((0.9 * np.clip(mean, -1, 1) + 0.1 * mean - action) ** 2).sum(1).mean() for mean in means]
            total += np.mean(losses[1:]) + TINY.pre_update_imitation * losses[0]
            self.paths.append(path)
        self.weights = self.weights or weights
        return total / self.n


@pytest.mark.parametrize("inner_steps, step_sizes", [(1, "shared"), (2, "shared"), (3, "shared"), (3, "per step")])
def test_meta_gradient_against_finite_differences(inner_steps, step_sizes):
    """Every element of theta and alpha, relative error per tensor at most 1e-6, w != 1, through 1 to 3 inner steps."""
    theta, alpha, batches, demonstration = meta_problem(inner_steps)
    if step_sizes == "per step":
        alpha = {name: torch.stack([value, 0.5 * value, 0.2 * value]) for name, value in alpha.items()}
    reference = ReferenceMetaLoss(theta, alpha, batches, demonstration)
    assert all(np.abs(w - 1).max() > 0.2 for w in reference.weights), "importance weights must matter here"
    assert min(phi["log_std"].min() for path in reference.paths for phi in path) > math.log(TINY.min_std)
    for params in (theta, alpha):
        for value in params.values():
            value.requires_grad_()
    loss, info = gmps.meta_loss(theta, alpha, batches, demonstration, TINY)
    assert loss.item() == pytest.approx(reference(theta, alpha), rel=1e-12)
    assert len(info) == inner_steps + 1
    loss.backward()
    for params in (theta, alpha):
        for name, value in params.items():
            estimate = finite_difference(value, lambda: reference(theta, alpha))
            if params is alpha and name == "log_std" and inner_steps == 1:
                assert not estimate.any() and (value.grad is None or not value.grad.any()), "no path to mean actions"
            else:
                assert value.grad.shape == value.shape and estimate.norm() > 1e-6
                assert relative_error(value.grad, estimate) <= 1e-6, name


def test_adapted_parameters_are_those_of_the_task_by_task_reference():
    theta, alpha, batches, demonstration = meta_problem(3, seed=1, n=3)
    reference = ReferenceMetaLoss(theta, alpha, batches, demonstration)
    for value in theta.values():
        value.requires_grad_()
    for first_order in (False, True):
        path = gmps.adapt(theta, alpha, batches, TINY, 3, first_order)
        assert len(path) == 4
        for k, phi in enumerate(path):
            for i in range(3):
                for name, value in phi.items():
                    assert np.allclose(value[i].detach().numpy(), reference.paths[i][k][name], rtol=1e-11, atol=1e-13)


def test_stop_gradient_on_w_is_felt():
    """The meta-gradient differs from finite differences in which w moves with theta: so the test above can fail."""
    theta, alpha, batches, demonstration = meta_problem(1)
    for value in theta.values():
        value.requires_grad_()
    exact, = torch.autograd.grad(gmps.meta_loss(theta, alpha, batches, demonstration, TINY)[0], theta["b3"])

    def moving_w():
        return gmps.meta_loss(theta, alpha, batches, demonstration, TINY)[0].item()

    assert relative_error(exact, finite_difference(theta["b3"], moving_w)) > 1e-3


def test_inner_step_in_closed_form():
    """d/d b3 = -mean(w A (a - mu) / std^2), d/d log std = -mean(w A ((a - mu)^2 / std^2 - 1))."""
    theta, alpha, (batch,), _ = meta_problem(1, seed=2)
    phi = {name: value.clone().requires_grad_() for name, value in policy.per_task(theta, 2).items()}
    after = gmps.inner_step(phi, alpha, batch, TINY)
    x = torch.cat([batch["observation"], theta["z"].expand(2, 12, 2)], dim=-1)
    mean = torch.relu(torch.relu(x @ theta["w1"] + theta["b1"]) @ theta["w2"] + theta["b2"]) @ theta["w3"] + theta["b3"]
    std = theta["log_std"].exp()
    deviation = batch["action"] - mean
    log_prob = (-0.5 * (deviation / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
    wA = (torch.exp(log_prob - batch["log_prob"]) * batch["advantage"] * batch["mask"])[..., None]
    count = torch.tensor([9.0, 12.0]).view(2, 1, 1)  # unmasked samples of either task
    for name, gradient in (("b3", -(wA * deviation / std ** 2).sum(1, keepdim=True) / count),
                           ("log_std", -(wA * (deviation ** 2 / std ** 2 - 1)).sum(1, keepdim=True) / count)):
        assert torch.allclose(after[name], theta[name] - alpha[name] * gradient, rtol=1e-12, atol=1e-14)
        assert (after[name] - theta[name]).abs().max() > 1e-3


def log_std_meta_gradient(second_order):
    """Meta-gradient of theta after one inner step whose gradient is, or is not, cut off from theta."""
    theta, alpha, (batch,), demonstration = meta_problem(1)
    for value in theta.values():
        value.requires_grad_()
    phi = policy.per_task(theta, 2)
    loss = gmps.inner_loss(phi, batch, TINY).sum()
    gradient = torch.autograd.grad(loss, list(phi.values()), create_graph=second_order)
    phi = {name: value - alpha[name] * g for (name, value), g in zip(phi.items(), gradient, strict=True)}
    loss = gmps.imitation_loss(phi, *demonstration)
    return dict(zip(theta, torch.autograd.grad(loss, list(theta.values()), allow_unused=True), strict=True))


def test_log_std_has_a_meta_gradient_at_second_order_only():
    """Mean actions know nothing of log-std: it reaches the outer loss through the inner step's gradient alone.

    The first-order step is emulated here (theta - alpha * constant), as `first_order=True` in gmps serves rollouts and
    gives theta no gradient at all. The same step with its graph kept equals `meta_loss`'s own gradient.
    """
    first, second = log_std_meta_gradient(False), log_std_meta_gradient(True)
    assert first["log_std"] is None or not first["log_std"].any()
    assert first["w1"].norm() > 1e-3
    assert second["log_std"].norm() > 1e-4
    theta, alpha, batches, demonstration = meta_problem(1)
    for value in theta.values():
        value.requires_grad_()
    settings = dataclasses.replace(TINY, pre_update_imitation=0.0)
    gmps.meta_loss(theta, alpha, batches, demonstration, settings)[0].backward()
    for name, value in theta.items():
        assert torch.allclose(value.grad, second[name], rtol=1e-9, atol=1e-13)


def test_log_std_floor():
    """Below the floor std is the floor, and the log-probability no longer moves log-std."""
    theta, _, (batch,), _ = meta_problem(1)
    theta["log_std"] = torch.full_like(theta["log_std"], math.log(0.1)).requires_grad_()
    phi = policy.per_task(theta, 2)
    assert torch.allclose(policy.policy_std(phi, TINY), torch.tensor(0.3, dtype=torch.float64), rtol=1e-12, atol=0)
    gradient, = torch.autograd.grad(gmps.inner_loss(phi, batch, TINY).sum(), theta["log_std"])
    assert not gradient.any()


def test_adaptation_leaves_theta_untouched():
    """Bit for bit, in second and first order, and phi_0 is theta for every task."""
    theta, alpha, batches, demonstration = meta_problem(2)
    before = {name: value.clone() for name, value in theta.items()}
    for value in theta.values():
        value.requires_grad_()
    for first_order in (False, True):
        path = gmps.adapt(theta, alpha, batches, TINY, 2, first_order)
        gmps.meta_loss(theta, alpha, batches, demonstration, TINY)[0].backward()
    assert all(torch.equal(theta[name], before[name]) for name in theta)
    assert all(torch.equal(path[0][name][i], before[name]) for name in theta for i in range(2))
    assert all((path[1][name] - before[name]).abs().max() > 1e-6 for name in theta)


def test_tasks_adapt_independently():
    """Changing task 1's rollouts changes phi_1 and no bit of phi_0."""
    theta, alpha, batches, _ = meta_problem(2)
    for value in theta.values():
        value.requires_grad_()
    one = gmps.adapt(theta, alpha, batches, TINY, 2)[-1]
    for batch in batches:
        batch["advantage"][1] += 1.0
    two = gmps.adapt(theta, alpha, batches, TINY, 2)[-1]
    assert all(torch.equal(one[name][0], two[name][0]) for name in theta)
    assert all(not torch.equal(one[name][1], two[name][1]) for name in theta)


def test_weights_of_the_inner_step_are_bounded():
    """w = e^2 counts as max_weight = 3, w = 1/e as it is: the loss by hand."""
    settings = dataclasses.replace(TINY, max_weight=3.0)
    phi = policy.per_task(policy.init_policy(PUSH, settings, torch.Generator().manual_seed(0)), 1)
    generator = torch.Generator().manual_seed(1)
    batch = {"observation": torch.randn(1, 4, 6, generator=generator), "action": torch.randn(1, 4, 3, generator=generator),
             "advantage": torch.tensor([[1.0, -2.0, 3.0, 0.5]]), "mask": torch.ones(1, 4)}
    log_prob = policy.log_prob(phi, batch["observation"], batch["action"], settings)
    batch["log_prob"] = log_prob - torch.tensor([[2.0, -1.0, 0.0, 2.0]])
    weight = torch.tensor([[3.0, math.exp(-1.0), 1.0, 3.0]])
    expected = -(log_prob * weight * batch["advantage"]).mean()
    assert gmps.inner_loss(phi, batch, settings).item() == pytest.approx(expected.item(), rel=1e-5)


def test_pre_update_policy_may_imitate_other_tasks():
    """With `exploration`, phi_0's loss is that on those pairs; the adapted policies' losses are as without."""
    theta = policy.init_policy(PUSH, TINY, torch.Generator().manual_seed(0))
    theta = {name: value.requires_grad_() for name, value in theta.items()}
    alpha = gmps.init_step_sizes(theta, TINY)
    generator = torch.Generator().manual_seed(4)

    def pairs(n):
        return torch.randn(n, 5, 6, generator=generator), torch.rand(n, 5, 3, generator=generator)
    batch = {"observation": torch.randn(2, 7, 6, generator=generator), "action": torch.randn(2, 7, 3, generator=generator),
             "advantage": torch.randn(2, 7, generator=generator), "mask": torch.ones(2, 7)}
    phi = policy.per_task(theta, 2)
    batch["log_prob"] = policy.log_prob(phi, batch["observation"], batch["action"], TINY).detach()
    demonstration, exploration = pairs(2), pairs(3)
    loss, info = gmps.meta_loss(theta, alpha, [batch], demonstration, TINY)
    other, other_info = gmps.meta_loss(theta, alpha, [batch], demonstration, TINY, exploration)
    expected = gmps.imitation_loss(policy.per_task(theta, 3), *exploration)
    assert torch.equal(info["imitation_1"], other_info["imitation_1"])
    assert other_info["imitation_0"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert (other - loss).item() == pytest.approx(0.3 * (expected - info["imitation_0"]).item(), rel=1e-4)


def test_every_inner_step_may_have_its_own_step_sizes():
    """Two steps by hand with alpha_0 = 0.1 and alpha_1 = 0.02; past the last step, its own again."""
    settings = dataclasses.replace(TINY, step_sizes="per step", inner_steps=2)
    theta = policy.init_policy(PUSH, settings, torch.Generator().manual_seed(0))
    alpha = gmps.init_step_sizes(theta, settings)
    assert all(value.shape == (2, *theta[name].shape) for name, value in alpha.items())
    alpha = {name: value * torch.tensor([1.0, 0.2]).view(2, 1, 1) for name, value in alpha.items()}
    generator = torch.Generator().manual_seed(5)
    batch = {"observation": torch.randn(1, 6, 6, generator=generator), "action": torch.randn(1, 6, 3, generator=generator),
             "advantage": torch.randn(1, 6, generator=generator), "mask": torch.ones(1, 6), "log_prob": torch.zeros(1, 6)}
    path = gmps.adapt(theta, alpha, [batch] * 3, settings, 1, first_order=True)
    for k, size in enumerate((0.1, 0.02, 0.02)):
        phi = {name: value.detach().requires_grad_() for name, value in path[k].items()}
        gmps.inner_loss(phi, batch, settings).sum().backward()
        for name in ("w1", "b3", "z"):
            assert torch.allclose(path[k + 1][name], phi[name] - size * phi[name].grad, atol=1e-6)
