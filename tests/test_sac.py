"""Tests of soft actor-critic: by hand, by finite differences, against a Riccati solution."""
import dataclasses
import math

import numpy as np
import pytest
import torch

import sac
from conftest import (
    finite_difference,
    numpy_mlp,
    relative_error,
)
from sac import SoftActorCritic
from settings import Settings

SAC = Settings(expert_width=16, expert_learning_rate=3e-3, expert_discount=0.9, expert_target_rate=0.05)


def sac_batch(learners, size, observation_size, action_size, generator):
    """Random transitions, a third of them terminated."""
    shape = (learners, size)
    return {"observation": torch.randn(*shape, observation_size, generator=generator),
            "action": torch.rand(*shape, action_size, generator=generator) * 2 - 1,
            "next_observation": torch.randn(*shape, observation_size, generator=generator),
            "reward": torch.randn(shape, generator=generator),
            "discount": 0.5 + 0.4 * torch.rand(shape, generator=generator),
            "terminated": (torch.rand(shape, generator=generator) < 1 / 3).float()}


def test_log_probability_is_that_of_torchs_tanh_gaussian():
    """Against TransformedDistribution(Normal, TanhTransform) with mean and std read off the network."""
    generator = torch.Generator().manual_seed(0)
    params = [p.double() for p in sac.init_mlp([4, 8, 8, 6], 2, generator)]
    observation = 3 * torch.randn(2, 50, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, 50, 3, generator=generator, dtype=torch.float64)
    action, log_prob = sac.policy_sample(params, observation, noise)
    mean, raw = sac.mlp(params, observation).chunk(2, dim=-1)
    std = (-5 + 3.5 * (raw.tanh() + 1)).exp()  # log-std squashed into [-5, 2]
    normal = torch.distributions.Normal(mean, std)
    squashed = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform(cache_size=0))
    clear = action.abs().amax(-1) < 0.9999  # beyond, atanh in torch's inverse loses the digits, not our formula
    assert clear.sum() > 60
    assert torch.allclose(log_prob[clear], squashed.log_prob(action).sum(-1)[clear], rtol=1e-7, atol=1e-7)
    assert torch.allclose(torch.atanh(action)[clear], (mean + std * noise)[clear], rtol=1e-6, atol=1e-7)
    assert torch.equal(sac.policy_mean(params, observation), mean.tanh())


def test_log_probability_stays_finite_far_out():
    """u = +-40, where 1 - tanh(u)^2 is 0 in floating point: log p = log N(u) - 2 (log 2 - |u|), exactly the limit."""
    params = [torch.zeros(1, 1, 2), torch.tensor([[[40.0, 0.0]]])]
    action, log_prob = sac.policy_sample(params, torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))
    log_std = -1.5  # tanh(0) in the middle of [-5, 2]
    expected = -log_std - 0.5 * math.log(2 * math.pi) - 2 * (math.log(2) - 40.0)
    assert action.item() == 1.0 and log_prob.item() == pytest.approx(expected, rel=1e-6)


def numpy_policy(params, learner, observation, noise):
    """Action and log-probability of one observation, by the change of variables log N(u) - sum log(1 - tanh(u)^2)."""
    out = numpy_mlp(params, learner, observation)
    mean, log_std = out[:len(noise)], -5 + 3.5 * (np.tanh(out[len(noise):]) + 1)
    u = mean + np.exp(log_std) * noise
    log_normal = -0.5 * noise ** 2 - log_std - 0.5 * np.log(2 * np.pi)
    return np.tanh(u), np.sum(log_normal - np.log(1 - np.tanh(u) ** 2))


@pytest.fixture
def tiny_sac():
    """Two double-critic learners with one action, their batch and noise, and per-learner temperatures."""
    generator = torch.Generator().manual_seed(1)
    make = sac.init_mlp
    nets = {"policy": make([3, 5, 2], 2, generator), "critic": make([4, 5, 1], 4, generator),
            "target": make([4, 5, 1], 4, generator)}
    batch = sac_batch(2, 9, 3, 1, generator)
    noise = torch.randn(2, 9, 1, generator=generator)
    return nets, batch, noise, torch.tensor([[0.3], [1.7]])


def numpy_values(critic, learner, observation, action):
    """Both critics of `learner` (of two): rows `learner` and 2 + `learner` of the critic weights."""
    x = np.concatenate([observation, action])
    return [numpy_mlp(critic, learner + 2 * which, x)[0] for which in (0, 1)]


def test_critic_loss_by_hand(tiny_sac):
    """Loops in numpy: target r + gamma (min Q' - temperature log pi'), no bootstrap from terminated transitions."""
    nets, batch, noise, temperature = tiny_sac
    data = {key: value.double().numpy() for key, value in batch.items()}
    total, endings = 0.0, set()
    for i in range(2):
        for j in range(9):
            next_action, log_prob = numpy_policy(nets["policy"], i, data["next_observation"][i, j], noise[i, j].numpy())
            next_value = min(numpy_values(nets["target"], i, data["next_observation"][i, j], next_action))
            target = data["reward"][i, j]
            if not data["terminated"][i, j]:
                target += data["discount"][i, j] * (next_value - temperature[i, 0].item() * log_prob)
            values = numpy_values(nets["critic"], i, data["observation"][i, j], data["action"][i, j])
            total += sum(0.5 * (value - target) ** 2 for value in values) / 9
            endings.add(bool(data["terminated"][i, j]))
    assert endings == {True, False}
    loss, _ = sac.critic_loss(nets["critic"], nets["target"], nets["policy"], temperature, batch, noise)
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_terminated_transitions_do_not_bootstrap(tiny_sac):
    """All terminated: the loss knows neither next observation nor discount. None terminated: it knows both."""
    nets, batch, noise, temperature = tiny_sac

    def loss(terminated, discount, shift):
        changed = batch | {"terminated": torch.full_like(batch["reward"], terminated),
                           "discount": torch.full_like(batch["reward"], discount),
                           "next_observation": batch["next_observation"] + shift}
        return sac.critic_loss(nets["critic"], nets["target"], nets["policy"], temperature, changed,
                                          noise)[0].item()

    assert loss(1.0, 0.9, 0.0) == loss(1.0, 0.1, 5.0)
    assert abs(loss(0.0, 0.9, 0.0) - loss(0.0, 0.1, 0.0)) > 1e-3
    assert abs(loss(0.0, 0.9, 0.0) - loss(0.0, 0.9, 5.0)) > 1e-3


def test_policy_loss_by_hand(tiny_sac):
    nets, batch, noise, temperature = tiny_sac
    total = 0.0
    for i in range(2):
        for j in range(9):
            observation = batch["observation"][i, j].double().numpy()
            action, log_prob = numpy_policy(nets["policy"], i, observation, noise[i, j].numpy())
            value = min(numpy_values(nets["critic"], i, observation, action))
            total += (temperature[i, 0].item() * log_prob - value) / 9
    loss, _ = sac.policy_loss(nets["policy"], nets["critic"], temperature, batch, noise)
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_temperature_loss_by_hand():
    """Value and gradient: d/d log t of -t * mean(log pi + H) is the loss itself, one entry per learner."""
    log_temperature = torch.tensor([[0.2], [-0.7]], requires_grad=True)
    log_prob = torch.tensor([[1.0, -2.0, 0.5], [4.0, 3.0, 2.0]])
    loss = sac.temperature_loss(log_temperature, log_prob, -1.5)
    each = [-math.exp(0.2) * (-0.5 / 3 - 1.5), -math.exp(-0.7) * (3.0 - 1.5)]
    assert loss.item() == pytest.approx(sum(each), rel=1e-6)
    loss.backward()
    assert log_temperature.grad.flatten().tolist() == pytest.approx(each, rel=1e-6)


def test_policy_gradient_against_finite_differences():
    """The reparametrised gradient of the policy's loss, in float64."""
    generator = torch.Generator().manual_seed(3)
    policy = [p.double().requires_grad_() for p in sac.init_mlp([3, 6, 4], 2, generator)]
    critic = [p.double() for p in sac.init_mlp([5, 6, 1], 4, generator)]
    batch = {k: v.double() for k, v in sac_batch(2, 7, 3, 2, generator).items()}
    noise = torch.randn(2, 7, 2, generator=generator, dtype=torch.float64)
    temperature = torch.tensor([[0.5], [1.5]], dtype=torch.float64)

    def loss():
        return sac.policy_loss(policy, critic, temperature, batch, noise)[0]

    gradient = torch.autograd.grad(loss(), policy)
    for param, exact in zip(policy, gradient, strict=True):
        estimate = finite_difference(param, lambda: loss().item())
        assert relative_error(exact, estimate) < 1e-6


def test_batched_learners_are_separate_learners(monkeypatch):
    """Three learners in one batch, five updates: the same numbers as three learners on their own."""
    generator = torch.Generator().manual_seed(4)
    together = SoftActorCritic(3, 4, 2, SAC)
    alone = [SoftActorCritic(1, 4, 2, SAC) for _ in range(3)]
    with torch.no_grad():
        for i, learner in enumerate(alone):
            for own, source in zip(learner.policy, together.policy, strict=True):
                own.copy_(source[i:i + 1])
            for own, target, source in zip(learner.critic, learner.target_critic, together.critic, strict=True):
                own.copy_(source[[i, 3 + i]])
                target.copy_(source[[i, 3 + i]])
    before = [p.detach().clone() for p in together.policy]
    for _ in range(5):
        batch, noise = sac_batch(3, 8, 4, 2, generator), torch.randn(2, 3, 8, 2, generator=generator)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn", lambda *shape, generator, noise=noise: noise)
            together.update(batch, None)
        for i, learner in enumerate(alone):
            with monkeypatch.context() as patch:
                patch.setattr(torch, "randn", lambda *shape, generator, noise=noise, i=i: noise[:, i:i + 1])
                learner.update({key: value[i:i + 1] for key, value in batch.items()}, None)
    assert all((p - q).abs().max() > 1e-3 for p, q in zip(together.policy, before, strict=True))
    for i, learner in enumerate(alone):
        for name, rows in (("policy", [i]), ("critic", [i, 3 + i]), ("target_critic", [i, 3 + i])):
            for own, source in zip(getattr(learner, name), getattr(together, name), strict=True):
                assert torch.allclose(own, source[rows], rtol=0, atol=1e-6)
        assert torch.allclose(learner.log_temperature, together.log_temperature[[i]], rtol=0, atol=1e-6)


def test_target_critic_is_a_polyak_average():
    learner = SoftActorCritic(1, 3, 1, SAC)
    generator = torch.Generator().manual_seed(5)
    before = [p.clone() for p in learner.target_critic]
    learner.update(sac_batch(1, 8, 3, 1, generator), generator)
    for old, new, critic in zip(before, learner.target_critic, learner.critic, strict=True):
        assert torch.allclose(new, 0.95 * old + 0.05 * critic, rtol=0, atol=1e-7)
        assert not torch.equal(critic, old)


def linear_quadratic(a, b, q, r, discount):
    """Cost-to-go matrix P and gain K of min sum discount^t (x'qx + u'ru), x' = ax + bu, by Riccati iteration."""
    P = q
    for _ in range(1000):
        K = discount * np.linalg.solve(r + discount * b.T @ P @ b, b.T @ P @ a)
        P = q + discount * a.T @ P @ (a - b @ K)
    return P, K


def sac_on_linear_quadratic(a, b, q, r, updates, learners, settings):
    """Learn from uniformly random states and actions; returns per-learner cost ratios, values' errors, the no-control
    policy's ratio. Costs are of the mean policy (or zero actions) from the same 200 start states over 150 steps."""
    discount, states = settings.expert_discount, a.shape[0]
    P, _ = linear_quadratic(a, b, q, r, discount)
    learner = SoftActorCritic(learners, states, b.shape[1], settings)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)

    def tensor(x):
        return torch.as_tensor(x, dtype=torch.float32)

    def cost(x, u):
        return np.einsum("...i,ij,...j", x, q, x) + np.einsum("...i,ij,...j", u, r, u)

    for update in range(updates):
        x = rng.uniform(-1.5, 1.5, (learners, 128, states))
        u = rng.uniform(-1, 1, (learners, 128, b.shape[1]))
        learner.set_learning_rate(update / updates)
        learner.update({"observation": tensor(x), "action": tensor(u), "next_observation": tensor(x @ a.T + u @ b.T),
                        "reward": tensor(-cost(x, u)), "terminated": torch.zeros(learners, 128),
                        "discount": torch.full((learners, 128), settings.expert_discount)}, generator)

    start = rng.uniform(-1, 1, (200, states))
    best = np.einsum("ni,ij,nj", start, P, start)

    def ratio(policy):
        x, total = np.tile(start, (learners, 1, 1)), np.zeros(learners)
        for t in range(150):
            u = policy(x)
            total += discount ** t * cost(x, u).sum(1)
            x = x @ a.T + u @ b.T
        return total / best

    u = rng.uniform(-0.8, 0.8, (200, b.shape[1]))
    after = start @ a.T + u @ b.T
    exact = -cost(start, u) - discount * np.einsum("ni,ij,nj->n", after, P, after)
    with torch.no_grad():
        learned = sac.critic_values(learner.critic, tensor(start).expand(learners, -1, -1),
                                               tensor(u).expand(learners, -1, -1)).numpy()
    # The soft value holds the entropy bonus too, about the same in every state: a constant, not counted
    value_error = (learned - exact).std((0, 2)) / exact.std()
    return ratio(lambda x: learner.act(tensor(x)).numpy()), value_error, ratio(lambda x: 0 * x[..., :b.shape[1]])


def test_soft_actor_critic_solves_a_linear_quadratic_problem():
    """One state, three learners: cost within 5% of the Riccati solution and critics near the exact Q."""
    settings = dataclasses.replace(SAC, expert_width=32, expert_entropy=-3.0)
    a, b, q, r = (np.array([[x]]) for x in (1.0, 0.5, 1.0, 0.6))
    ratios, value_errors, idle = sac_on_linear_quadratic(a, b, q, r, 1500, 3, settings)
    assert (idle > 1.5).all(), "the problem must need control"
    assert (ratios > 0.999).all() and (ratios < 1.05).all()
    assert (value_errors < 0.15).all()


@pytest.mark.slow
def test_soft_actor_critic_solves_a_double_integrator():
    """Two states, position and velocity, ten learners: cost within 5% of the Riccati solution."""
    settings = dataclasses.replace(SAC, expert_width=64, expert_entropy=-3.5)
    a, b = np.array([[1.0, 0.3], [0.0, 0.9]]), np.array([[0.0], [0.5]])
    ratios, value_errors, idle = sac_on_linear_quadratic(a, b, np.eye(2), np.array([[0.6]]), 6000, 10, settings)
    assert (idle > 1.3).all() and (ratios > 0.999).all() and (ratios < 1.05).all() and (value_errors < 0.15).all()
