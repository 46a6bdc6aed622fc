"""Tests of the meta-learner: finite differences, closed forms, an independent reference, bits after a resume."""
import dataclasses
import math

import numpy as np
import pytest
import torch

import advantages
import gmps
import local_policies
import policy
from conftest import (
    PUSH,
    TINY,
    finite_difference,
    reference_forward,
    relative_error,
    scripted_expert,
    through_bytes,
)
from envs import BatchEnv, rollout, task_set
from settings import Settings

# ---------------------------------------------------------------- the meta-learner: gradients


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
                phi = {name: value - alpha[name] * gradient[name] for name, value in phi.items()}
                path.append(phi)
            observation, action = self.demonstration[i]
            means = [reference_forward(phi, observation)[0] for phi in path]
            losses = [((0.9 * np.clip(mean, -1, 1) + 0.1 * mean - action) ** 2).sum(1).mean() for mean in means]
            total += np.mean(losses[1:]) + TINY.pre_update_imitation * losses[0]
            self.paths.append(path)
        self.weights = self.weights or weights
        return total / self.n


@pytest.mark.parametrize("inner_steps", [1, 2, 3])
def test_meta_gradient_against_finite_differences(inner_steps):
    """Every element of theta and alpha, relative error per tensor at most 1e-6, w != 1, through 1 to 3 inner steps."""
    theta, alpha, batches, demonstration = meta_problem(inner_steps)
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


# ---------------------------------------------------------------- the meta-learner: training and evaluation
LEARN = Settings(training_tasks=3, episodes=3, hidden=16, bias_vector=2, collections=3, meta_steps=4, inner_steps=2,
                 aggregation_episodes=1, imitation_batch=20, imitation_steps=20)


def scripted_demonstrations(tasks, episodes=2, noise=0.3):
    settings = Settings(demonstration_episodes=episodes, demonstration_noise=noise)
    env = BatchEnv(len(tasks) * episodes)
    observations, actions, _ = local_policies.make_demonstrations(env, scripted_expert, tasks, settings)
    return gmps.Demonstrations(observations, actions)


def meta_trained(settings, experts=scripted_expert, state=None):
    """List of (state through bytes, metrics), one per collection, and the demonstrations as they ended."""
    tasks = task_set(PUSH, "train", settings.training_tasks)
    demonstrations = scripted_demonstrations(tasks)
    theta = policy.init_policy(PUSH, settings, torch.Generator().manual_seed(0))
    env = BatchEnv(len(tasks) * settings.episodes)
    training = gmps.meta_train(env, tasks, demonstrations, experts, theta, settings, state)
    return [(through_bytes(state), metrics) for state, metrics in training], demonstrations


def test_meta_training_resumed_ends_with_the_same_bits():
    """From each yielded state, through a file's bytes: theta, alpha, scales, counts and demonstrations are the same."""
    states, demonstrations = meta_trained(LEARN)
    last, metrics = states[-1]
    for state, _ in states[:-1]:
        resumed, regrown = meta_trained(LEARN, state=state)
        assert resumed[-1][1] == metrics
        for group in ("theta", "alpha"):
            assert all(torch.equal(resumed[-1][0][group][name], value) for name, value in last[group].items())
        assert resumed[-1][0]["scales"] == last["scales"]
        assert np.array_equal(regrown.observations, demonstrations.observations)
        assert np.array_equal(regrown.actions, demonstrations.actions)
    assert not torch.equal(states[0][0]["theta"]["w2"], last["theta"]["w2"])
    assert torch.equal(last["alpha"]["log_std"], torch.zeros(1, 3)), "exploration noise does not adapt"


def test_yielded_states_are_snapshots():
    """A state kept in memory neither changes as training goes on, nor when training is resumed from it, even twice."""
    tasks = task_set(PUSH, "train", LEARN.training_tasks)

    def finish(state=None):
        theta = policy.init_policy(PUSH, LEARN, torch.Generator().manual_seed(0))
        env = BatchEnv(len(tasks) * LEARN.episodes)
        training = gmps.meta_train(env, tasks, scripted_demonstrations(tasks), scripted_expert, theta, LEARN, state)
        return [new for new, _ in training]
    states = finish()
    for _ in range(2):
        last = finish(states[0])[-1]
        assert all(torch.equal(last["theta"][name], value) for name, value in states[-1]["theta"].items())


def test_imitation_loss_sees_actions_as_executed():
    """Against values by hand: inside [-1, 1] the plain square, outside a tenth of what is over."""
    phi = {"w1": torch.zeros(1, 8, 2), "b1": torch.zeros(1, 1, 2), "w2": torch.zeros(1, 2, 2), "b2": torch.zeros(1, 1, 2),
           "w3": torch.zeros(1, 2, 3), "b3": torch.tensor([[[0.5, 1.5, -3.0]]]), "z": torch.zeros(1, 1, 2)}
    loss = gmps.imitation_loss(phi, torch.zeros(1, 4, 6), torch.tensor([0.0, 1.0, 1.0]).expand(1, 4, 3))
    assert loss.item() == pytest.approx(0.5 ** 2 + 0.05 ** 2 + (-1.2 - 1.0) ** 2, rel=1e-6)


def test_warm_up_and_decay_of_the_learning_rates():
    """rate * min(1, (step + 1) / warm_up) * (1 - 0.9 progress), for theta and alpha."""
    settings = dataclasses.replace(LEARN, warm_up_steps=4, collections=2, meta_steps=5)
    learner = gmps.MetaLearner(policy.init_policy(PUSH, settings, torch.Generator().manual_seed(0)),
                               scripted_demonstrations(task_set(PUSH, "train", 3)), settings)
    for step, warm in ((0, 0.25), (3, 1.0), (9, 1.0)):
        learner.minimise(sum(value.square().sum() for value in (*learner.theta.values(), *learner.alpha.values())), step)
        rates = [group["lr"] for group in learner.optimiser.param_groups]
        expected = warm * (1 - 0.9 * step / 10)
        assert rates == pytest.approx([settings.learning_rate * expected, settings.step_size_learning_rate * expected])


def test_meta_training_counts_its_steps_and_grows_the_demonstrations():
    """3 tasks x 50 steps x (2 inner steps x 3 episodes + 1 of aggregation) a collection; labels are the expert's."""
    calls = []

    def expert(observations, tasks):
        calls.append(observations.copy())
        return scripted_expert(observations, tasks)

    states, demonstrations = meta_trained(LEARN, expert)
    assert [metrics["env_steps"] for _, metrics in states] == [1050, 2100, 3150]
    assert [metrics["iteration"] for _, metrics in states] == [1, 2, 3]
    assert [call.shape for call in calls] == [(3, 50, 6)] * 3
    assert demonstrations.observations.shape == (3, 100 + 150, 6)
    assert np.array_equal(demonstrations.observations[:, 100:], np.concatenate(calls, axis=1))
    labels = scripted_expert(demonstrations.observations, task_set(PUSH, "train", 3))
    assert np.array_equal(demonstrations.actions, labels)


def test_demonstrations_alone_need_no_expert():
    """Without experts, or without aggregation episodes: no step spent on it, no call, no new label, same theta."""
    def never(observations, tasks):
        raise AssertionError("the expert was called")

    alone, demonstrations = meta_trained(LEARN, None)
    unused, _ = meta_trained(dataclasses.replace(LEARN, aggregation_episodes=0), never)
    assert demonstrations.observations.shape == (3, 100, 6)
    assert [metrics["env_steps"] for _, metrics in alone] == [900, 1800, 2700]
    assert all(torch.equal(value, unused[-1][0]["theta"][name]) for name, value in alone[-1][0]["theta"].items())


def test_meta_training_refuses_numbers_that_are_not_finite():
    with pytest.raises(FloatingPointError, match="not finite"):
        meta_trained(LEARN, lambda observations, tasks: np.full((*observations.shape[:2], 3), np.nan, np.float32))


def unrevealing_demonstrations(tasks, count=400, seed=0):
    """The same states for every task, of random pushes, labelled by each task's scripted expert; and the least
    imitation loss of a policy that is not told the task, which is that of the labels' mean over tasks."""
    env, rng = BatchEnv(16), np.random.default_rng(seed)
    drift = rng.uniform(-1, 1, (16, 1))
    episodes = rollout(env, lambda o: np.c_[drift + rng.normal(0, 0.3, (16, 1)), rng.uniform(0.5, 1, (16, 1)),
                                            np.zeros(16)], np.tile(tasks[0], (16, 1)))
    states = rng.permutation(episodes["observations"][:, :-1].reshape(-1, 6))[:count]
    observations = np.tile(states, (len(tasks), 1, 1))
    actions = scripted_expert(observations, tasks)
    return gmps.Demonstrations(observations, actions), float(((actions - actions.mean(0)) ** 2).sum(-1).mean())


def loss_on(phi, demonstrations):
    observation = policy.scaled(PUSH, demonstrations.observations)
    return gmps.imitation_loss(phi, observation, torch.as_tensor(demonstrations.actions)).item()


def test_imitation_without_adaptation_nears_its_lower_bound():
    """Untold of the task, no policy does better than the mean label of a state; training comes within a tenth of it."""
    tasks = task_set(PUSH, "train", 4)
    demonstrations, bound = unrevealing_demonstrations(tasks)
    settings = dataclasses.replace(LEARN, imitation_steps=600, hidden=64, imitation_batch=100)
    theta = gmps.imitate(PUSH, demonstrations, settings)
    assert bound <= loss_on(policy.per_task(theta, 4), demonstrations) < 1.1 * bound


def taught_to_adapt(seed):
    """(loss after adaptation on the last collection's own rollouts, mean loss on four fresh ones, lower bound without).

    Scripted experts and states that do not show the goal: no policy passes the bound without adaptation.
    """
    settings = dataclasses.replace(LEARN, training_tasks=8, episodes=20, hidden=64, bias_vector=4, collections=8,
                                   meta_steps=40, inner_steps=1, imitation_steps=300, imitation_batch=100, seed=seed)
    tasks = task_set(PUSH, "train", 8)
    demonstrations, _ = unrevealing_demonstrations(tasks)
    held, bound = unrevealing_demonstrations(tasks, seed=1)
    imitation = gmps.imitate(PUSH, demonstrations, settings)
    env = BatchEnv(8 * settings.episodes)
    *_, (state, metrics) = gmps.meta_train(env, tasks, demonstrations, None, imitation, settings)
    assert loss_on(policy.per_task(state["theta"], 8), held) >= bound
    phi, losses = policy.per_task(state["theta"], 8), []
    for draw in range(4):
        episodes = policy.collect(env, tasks, phi, settings, torch.Generator().manual_seed(draw))
        batch, _ = advantages.policy_gradient_batch(episodes, phi, PUSH, settings, state["scales"][0])
        losses.append(loss_on(gmps.adapted(state["theta"], state["alpha"], [batch], settings, 8), held))
    return metrics["imitation_1"], np.mean(losses), bound


def test_meta_training_lowers_its_objective_below_what_no_adaptation_can_reach():
    """On the rollouts it was optimised on: optimisation, not generalisation."""
    own, _, bound = taught_to_adapt(seed=0)
    assert own < 0.9 * bound


@pytest.mark.slow
def test_meta_training_teaches_the_policy_to_adapt_on_fresh_rollouts():
    """By reward alone, mean over five runs: one run alone scatters by a quarter."""
    ratios = [fresh / bound for _, fresh, bound in map(taught_to_adapt, range(5))]
    assert np.mean(ratios) < 0.9, ratios


def evaluated(seed, theta=None):
    generator = torch.Generator().manual_seed(0)
    theta = theta or policy.init_policy(PUSH, TINY, generator)
    tasks = task_set(PUSH, "held_out", 2)
    return gmps.evaluate(PUSH, theta, gmps.init_step_sizes(theta, TINY), [5.0], tasks, 2, TINY, seed)


def test_evaluation_is_deterministic_under_its_seed():
    """Bit for bit the same under a seed; sampled rollouts and adapted parameters differ under another."""
    one, again, other = evaluated(3), evaluated(3), evaluated(4)
    for kind in ("mean", "sampled"):
        for key in ("return", "distance"):
            assert one[kind][key].shape == (3, 2) and np.array_equal(one[kind][key], again[kind][key])
    for phi, psi in zip(one["path"], again["path"], strict=True):
        assert all(torch.equal(phi[name], psi[name]) for name in phi)
    assert not np.array_equal(one["sampled"]["return"], other["sampled"]["return"])
    assert not torch.equal(one["path"][1]["w1"], other["path"][1]["w1"])
    assert np.array_equal(one["mean"]["return"][0], other["mean"]["return"][0]), "before adaptation nothing is random"
    assert one["env_steps"] == 3 * 2 * (2 + 1) * 50


def test_evaluation_leaves_theta_untouched_and_starts_from_it():
    theta = policy.init_policy(PUSH, TINY, torch.Generator().manual_seed(1))
    before = {name: value.clone() for name, value in theta.items()}
    path = evaluated(0, theta)["path"]
    assert all(torch.equal(theta[name], before[name]) for name in theta)
    assert all(torch.equal(path[0][name][1], before[name]) for name in theta)
    assert all(not torch.equal(path[1][name], path[0][name]) for name in theta if name != "log_std")


# ---------------------------------------------------------------- choices that tasks other than push make
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


def test_advantages_by_each_tasks_own_scale():
    """Rewards of one task a hundred times the other's: the same advantages. Rewards of 0: none, and nothing is 0 / 0."""
    settings = dataclasses.replace(TINY, advantage_scale="task")
    env = BatchEnv(6)
    tasks = np.repeat(task_set(PUSH, "train", 1), 3, axis=0)
    phi = policy.per_task(policy.init_policy(PUSH, settings, torch.Generator().manual_seed(0)), 3)
    episodes = policy.collect(env, tasks, phi, settings, torch.Generator().manual_seed(2))
    for name in episodes:
        episodes[name] = np.concatenate([episodes[name][:2], episodes[name][:2], episodes[name][:2]])
    episodes["rewards"] = episodes["rewards"] * np.array([1.0, 1.0, 100.0, 100.0, 0.0, 0.0])[:, None]
    batch, scale = advantages.policy_gradient_batch(episodes, phi, PUSH, settings)
    one, other, nothing = batch["advantage"]
    assert one.square().mean().sqrt().item() * scale == pytest.approx(1.0, rel=1e-4)
    assert torch.allclose(one, other, rtol=1e-3, atol=1e-4) and not nothing.any()


def test_noise_of_a_collection_lasts_where_it_is_asked_to():
    """Actions minus their mean, over std: correlation 0.9 from step to step, 0 by default; variance 1 either way."""
    for correlation in (0.0, 0.9):
        settings = dataclasses.replace(TINY, noise_correlation=correlation)
        phi = policy.per_task(policy.init_policy(PUSH, settings, torch.Generator().manual_seed(0)), 1)
        episodes = policy.collect(BatchEnv(100), PUSH.training_tasks(1), phi, settings, torch.Generator().manual_seed(3))
        mean = policy.policy_mean(phi, policy.scaled(PUSH, episodes["observations"][:, :-1].reshape(1, -1, 6)))
        noise = (episodes["actions"] - mean.view(100, 50, 3).numpy()) / policy.policy_std(phi, settings).numpy()
        # 15,000 numbers, a tenth as many independent ones where they last: five standard errors
        assert noise.var() == pytest.approx(1.0, abs=0.2 if correlation else 0.06)
        assert (noise[:, 1:] * noise[:, :-1]).mean() == pytest.approx(correlation, abs=0.2 if correlation else 0.06)


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


def test_exploring_tasks_are_the_last_ones():
    """`imitate(last=...)` and phi_0's own loss in meta-training ask for demonstrations of the last tasks alone."""
    class Watched(gmps.Demonstrations):
        asked = []

        def sample(self, family, generator, tasks, count, device="cpu"):
            self.asked.append((tuple(sorted(tasks)), count))
            return super().sample(family, generator, tasks, count, device)

    settings = dataclasses.replace(TINY, exploring_tasks=2, collections=1, meta_steps=3, meta_batch=4, inner_steps=1,
                                   imitation_steps=2, aggregation_episodes=0)
    tasks, rng = task_set(PUSH, "train", 5), np.random.default_rng(0)
    demonstrations = Watched(rng.normal(size=(5, 8, 6)), rng.uniform(-1, 1, (5, 8, 3)))
    theta = gmps.imitate(PUSH, demonstrations, settings, last=2)
    assert Watched.asked == [((3, 4), 40)] * 2, "as many labels as imitating all five takes"
    Watched.asked.clear()
    list(gmps.meta_train(BatchEnv(10), tasks, demonstrations, None, theta, settings))
    assert [tasks for tasks, _ in Watched.asked[1::2]] == [(3, 4)] * 3
    assert [len(tasks) for tasks, _ in Watched.asked[::2]] == [4] * 3


def test_later_steps_are_smaller_and_may_leave_out_negative_step_sizes(monkeypatch):
    """One trained step, then 0.8 x 0.5, 0.8 x 0.25, floor 0.15, 0.15 of alpha, and of its positive part where asked to."""
    used = []
    monkeypatch.setattr(gmps, "inner_step", lambda phi, alpha, *_, **__: used.append(alpha) or phi)
    for choice in ("learned", "positive"):
        settings = dataclasses.replace(TINY, inner_steps=1, later_steps=0.5, later_start=0.8, later_floor=0.15,
                                       later_alpha=choice, episodes=2)
        theta = policy.init_policy(PUSH, settings, torch.Generator().manual_seed(0))
        alpha = {name: torch.linspace(-1, 1, value.numel()).view(value.shape)
                 for name, value in gmps.init_step_sizes(theta, settings).items()}
        used.clear()
        gmps.evaluate(PUSH, theta, alpha, [1.0], PUSH.training_tasks(1), 5, settings, 0, 1)
        for k, (size, share) in enumerate(zip(used, (1.0, 0.4, 0.2, 0.15, 0.15), strict=True)):
            expected = alpha["w2"].clamp(min=0) if k and choice == "positive" else alpha["w2"]
            assert torch.allclose(size["w2"], share * expected)


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
