"""Tests of soft actor-critic: by hand, by finite differences, against a Riccati solution."""
import dataclasses
import math

import numpy as np
import pytest
import torch

import sac
from policy import init_policy
from sac import SoftActorCritic
from settings import Settings
from tasks import make_family
from tests.conftest import finite_difference, numpy_mlp, relative_error

SAC = Settings(expert_width=16, expert_learning_rate=3e-3, expert_target_rate=0.05)


def sac_batch(learners, size, observation_size, action_size, generator):
    """Random transitions, a third of them terminated."""
    def normal(*last):
        return torch.randn(learners, size, *last, generator=generator)
    return {"observation": normal(observation_size), "next_observation": normal(observation_size),
            "action": normal(action_size).tanh(), "reward": normal(),
            "discount": 0.7 + 0.2 * normal().tanh(), "terminated": (normal() < -0.4).float()}


def test_initial_weights_are_uniform_within_one_over_the_root_of_fan_in():
    """As torch's layers draw theirs: experts, policies and convolutions; largest, mean, spread."""
    generator = torch.Generator().manual_seed(0)
    weights = sac.init_mlp([4, 300, 50], 3, generator)
    assert [list(p.shape) for p in weights] == [[3, 4, 300], [3, 1, 300], [3, 300, 50], [3, 1, 50]]
    theta = init_policy(make_family("push-vision"), Settings(hidden=200, init_std=0.7), generator)
    assert torch.allclose(theta.pop("log_std").exp(), torch.full((1, 3), 0.7))
    assert torch.equal(theta.pop("z"), torch.zeros(1, 4))
    hand = 3 + 32 + 4  # the MLP sees the hand, points in the image, and z
    fans = 4, 4, 300, 300, 3 * 25, 3 * 25, 16 * 9, 16 * 9, 16 * 9, hand, hand, 200, 200, 200, 200
    for param, fan_in in zip([*weights, *theta.values()], fans, strict=True):
        unit, count = param * math.sqrt(fan_in), param.numel()
        assert 1 - 8 / count <= unit.abs().max() <= 1 + 1e-6
        assert unit.mean().abs() < 3 / math.sqrt(count)
        assert abs(unit.square().mean() * 3 - 1) < 4 / math.sqrt(count)


# ---------------------------------------------------------------- policy and objectives
def test_log_probability_is_that_of_torchs_tanh_gaussian():
    """Mean and std are read off the network. Far out it is finite: log N(u) - 2 (log 2 - |u|)."""
    generator = torch.Generator().manual_seed(0)
    params = [p.double() for p in sac.init_mlp([4, 8, 8, 6], 2, generator)]
    observation = 3 * torch.randn(2, 50, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, 50, 3, generator=generator, dtype=torch.float64)
    action, log_prob = sac.squashed_sample(params, observation, noise)
    mean, raw = sac.mlp(params, observation).chunk(2, dim=-1)
    std = (-5 + 3.5 * (raw.tanh() + 1)).exp()  # log-std squashed into [-5, 2]
    normal = torch.distributions.Normal(mean, std)
    squashed = torch.distributions.TransformedDistribution(
        normal, torch.distributions.TanhTransform(cache_size=0))
    clear = action.abs().amax(-1) < 0.9999  # beyond, atanh in torch's inverse loses the digits
    assert clear.sum() > 60
    expected = squashed.log_prob(action).sum(-1)
    assert torch.allclose(log_prob[clear], expected[clear], rtol=1e-7, atol=1e-7)
    assert torch.allclose(torch.atanh(action)[clear], (mean + std * noise)[clear], 1e-6, 1e-7)
    assert torch.equal(sac.squashed_mean(params, observation), mean.tanh())
    params[-1] += torch.tensor([-40.0, 40.0, 0, 0, 0, 0])  # where 1 - tanh(u)^2 rounds to 0
    far = sac.squashed_sample(params, observation, noise)[1]
    near, expected = mean + std * noise, normal.log_prob(mean + std * noise)
    expected = expected - 2 * torch.where(torch.tensor([True, True, False]), math.log(2) - (
        near + torch.tensor([-40.0, 40.0, 0.0])).abs(), -near.cosh().log())
    assert torch.allclose(far, expected.sum(-1), rtol=1e-7)


def test_critic_and_policy_loss_by_hand_and_the_policys_gradient_by_differences():
    """Loops in numpy: target r + discount (min Q' - temperature log pi'), none after an end."""
    generator = torch.Generator().manual_seed(1)
    policy, critic, target = ([p.double() for p in sac.init_mlp(sizes, learners, generator)]
                              for sizes, learners in (([3, 5, 5, 2], 2), *[([4, 5, 1], 4)] * 2))
    batch = {name: x.double() for name, x in sac_batch(2, 9, 3, 1, generator).items()}
    noise = torch.randn(2, 9, 1, generator=generator, dtype=torch.float64)
    temperature = torch.tensor([[0.3], [1.7]], dtype=torch.float64)
    data = {name: value.numpy() for name, value in batch.items()}

    def act(i, j, name):
        """Action and log-probability: change of variables, log N(u) - log(1 - tanh(u)^2)."""
        mean, log_std = numpy_mlp(policy, i, data[name][i, j])
        log_std, xi = -5 + 3.5 * (np.tanh(log_std) + 1), noise[i, j].item()
        action = np.tanh(mean + np.exp(log_std) * xi)
        log_normal = -0.5 * xi ** 2 - log_std - 0.5 * np.log(2 * np.pi)
        return action, log_normal - np.log(1 - action ** 2)

    def values(params, i, j, name, action):
        """Both critics of learner i: rows i and 2 + i."""
        x = np.append(data[name][i, j], action)
        return [numpy_mlp(params, row, x)[0] for row in (i, 2 + i)]

    critic_total, policy_total, learned = 0.0, 0.0, []
    for i, alpha in enumerate((0.3, 1.7)):
        for j in range(9):
            aim = data["reward"][i, j]
            if not data["terminated"][i, j]:
                action, log_prob = act(i, j, "next_observation")
                after = min(values(target, i, j, "next_observation", action))
                aim += data["discount"][i, j] * (after - alpha * log_prob)
            both = values(critic, i, j, "observation", data["action"][i, j])
            critic_total += sum(0.5 * (value - aim) ** 2 for value in both) / 9
            learned += both
            action, log_prob = act(i, j, "observation")
            after = min(values(critic, i, j, "observation", action))
            policy_total += (alpha * log_prob - after) / 9
    assert set(data["terminated"].flat) == {0.0, 1.0}
    loss, info = sac.critic_loss(critic, target, policy, temperature, batch, noise)
    assert loss.item() == pytest.approx(critic_total) and info["value"] == pytest.approx(
        np.mean(learned))

    def policy_loss():
        return sac.policy_loss(policy, critic, temperature, batch, noise)[0]

    policy = [p.requires_grad_() for p in policy]
    assert policy_loss().item() == pytest.approx(policy_total)
    gradient = torch.autograd.grad(policy_loss(), policy)
    for param, exact in zip(policy, gradient, strict=True):
        assert relative_error(exact, finite_difference(param, lambda: policy_loss().item())) < 1e-6


# ---------------------------------------------------------------- the learner
def test_update_steps_on_each_objective_and_the_targets_follow():
    """All three at once: policies against the old critics; the temperatures' gradient is by hand.

    After Adam's first step its moments are a tenth of the gradients, and weights have moved by
    about their rate. A state that was saved before does not change.
    """
    generator, learner = torch.Generator().manual_seed(5), SoftActorCritic(2, 3, 2, SAC)
    other = SoftActorCritic(2, 3, 2, dataclasses.replace(SAC, seed=1))
    assert not torch.equal(learner.policy[0], other.policy[0])
    shapes = [list(p.shape[1:]) for p in learner.policy]
    assert shapes == [[3, 16], [1, 16], [16, 16], [1, 16], [16, 4], [1, 4]]
    [own.copy_(new) for own, new in zip(learner.target_critic, other.target_critic, strict=True)]
    with torch.no_grad():
        learner.log_temperature.copy_(torch.tensor([[0.5], [-1.0]]))
    old, batch = learner.state_dict(), sac_batch(2, 8, 3, 2, generator)
    noise = torch.randn(2, 2, 8, 2, generator=generator.manual_seed(7))
    learner.set_learning_rate(0.5)  # halfway to a tenth: 0.55
    info = learner.update(batch, generator.manual_seed(7))

    policy, critic = ([p.requires_grad_() for p in old[name]] for name in ("policy", "critic"))
    temperature = old["log_temperature"].exp()
    critics, _ = sac.critic_loss(critic, old["target_critic"], policy, temperature, batch, noise[0])
    actors, actor_info = sac.policy_loss(policy, critic, temperature, batch, noise[1])
    entropy = -1.0 * 2  # minus the number of action dimensions
    by_temperature = -temperature * (actor_info["log_prob"].mean(1, keepdim=True) + entropy)
    for name, params, own, gradient in (
            ("critic", critic, learner.critic, torch.autograd.grad(critics, critic)),
            ("policy", policy, learner.policy, torch.autograd.grad(actors, policy)),
            ("temperature", [old["log_temperature"]], [learner.log_temperature], [by_temperature])):
        for before, after, g in zip(params, own, gradient, strict=True):
            moment = learner.optimiser.state[after]["exp_avg"]
            assert torch.allclose(moment, 0.1 * g, rtol=1e-4, atol=1e-7), name
            step = 0.55 * 3e-3 * g / (g.abs() + 1e-8)
            assert torch.allclose(after, before - step, rtol=0, atol=1e-5), name
    for before, after, new in zip(old["target_critic"], learner.target_critic, learner.critic,
                                  strict=True):
        assert torch.allclose(after, 0.95 * before + 0.05 * new, rtol=0, atol=1e-6)
    means = zip(("critic_loss", "policy_loss", "temperature"),
                (critics / 4, actors / 2, temperature.mean()))
    assert all(info[name] == pytest.approx(mean.item(), rel=1e-5) for name, mean in means)


@pytest.mark.parametrize("a, b, width, entropy, updates, learners", [
    ([[1.0]], [[0.5]], 32, -3.0, 1500, 3),
    pytest.param([[1.0, 0.3], [0.0, 0.9]], [[0.0], [0.5]], 64, -3.5, 6000, 10,
                 marks=pytest.mark.slow)])
def test_soft_actor_critic_solves_a_linear_quadratic_problem(
        a, b, width, entropy, updates, learners):
    """Cost within 5% of Riccati's solution, critics near the exact Q.

    x' = ax + bu, cost x'x + 0.6 u'u, one state, or position and velocity. The learner sees random
    states and actions. Costs are those of its mean actions over 150 steps from 200 states.
    """
    a, b, discount = np.array(a), np.array(b), 0.9
    states, controls = b.shape
    P = np.eye(states)
    for _ in range(1000):  # cost-to-go x'Px
        K = np.linalg.solve(0.6 * np.eye(controls) + discount * b.T @ P @ b, b.T @ P @ a)
        P = np.eye(states) + discount * a.T @ P @ (a - discount * b @ K)
    settings = dataclasses.replace(SAC, expert_width=width, expert_entropy=entropy)
    learner = SoftActorCritic(learners, states, controls, settings)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)

    def tensor(x):
        return torch.as_tensor(x, dtype=torch.float32)

    def cost(x, u):
        return (x ** 2).sum(-1) + 0.6 * (u ** 2).sum(-1)

    for update in range(updates):
        x = rng.uniform(-1.5, 1.5, (learners, 128, states))
        u = rng.uniform(-1, 1, (learners, 128, controls))
        learner.set_learning_rate(update / updates)
        learner.update({"observation": tensor(x), "action": tensor(u),
                        "next_observation": tensor(x @ a.T + u @ b.T),
                        "reward": tensor(-cost(x, u)), "terminated": torch.zeros(learners, 128),
                        "discount": torch.full((learners, 128), discount)}, generator)

    start = rng.uniform(-1, 1, (200, states))

    def ratio(policy):
        x, total = np.tile(start, (learners, 1, 1)), np.zeros(learners)
        for t in range(150):
            u = policy(x)
            total += discount ** t * cost(x, u).sum(1)
            x = x @ a.T + u @ b.T
        return total / np.einsum("ni,ij,nj", start, P, start)

    u = rng.uniform(-0.8, 0.8, (200, controls))
    after = start @ a.T + u @ b.T
    exact = -cost(start, u) - discount * np.einsum("ni,ij,nj->n", after, P, after)
    with torch.no_grad():
        learned = sac.critic_values(learner.critic, tensor(start).expand(learners, -1, -1),
                                    tensor(u).expand(learners, -1, -1)).numpy()
    assert (ratio(lambda x: 0 * x @ b) > 1.3).all(), "the problem must need control"
    found = ratio(lambda x: learner.act(tensor(x)).numpy())
    assert (found > 0.999).all() and (found < 1.05).all()
    # The soft value holds the entropy bonus too, about the same in every state: not counted.
    assert ((learned - exact).std((0, 2)) / exact.std() < 0.15).all()
