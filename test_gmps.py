"""The algorithm of the paper, checked by numbers, in the order of gmps.py.

First the equations: finite differences, closed forms, a reference in numpy. Then `gmps.train` and
meta-test, step by step: a stand-in problem writes down who acts and what is drawn, and every number
is computed again. Nothing is replaced.
"""
import dataclasses
import math

import numpy as np
import pytest
import torch

import gmps
import policy
from envs import Environments
from evaluate import by_round, evaluate
from local_policies import Demonstrations
from policy import imitation_loss
from settings import random_streams
from tasks import task_set
from tests.conftest import (
    PUSH,
    TINY,
    explore,
    finite_difference,
    make_problem,
    push_batch,
    quiet_folder,  # noqa: F401
    reference_forward,
    relative_error,
    scripted_expert,
    through_bytes,
)


# ---------------------------------------------------------------- the equations
def equations(pre_update=False):
    """theta, alpha, a random batch with w != 1 and a masked tail, labels of two tasks: float64."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)
    theta = policy.init_policy(PUSH, TINY, generator, torch.float64)
    theta |= {"z": 0.5 * normal(1, 2), "log_std": theta["log_std"] + 0.2 * normal(1, 3).abs()}
    alpha = {name: 0.1 + 0.05 * normal(*value.shape) for name, value in theta.items()}
    batch = {"features": normal(2, 12, 6), "action": 0.7 * normal(2, 12, 3),
             "advantage": normal(2, 12), "mask": torch.ones(2, 12, dtype=torch.float64)}
    batch["mask"][0, -3:] = 0
    log_p = policy.log_prob(policy.per_task(theta, 2), batch["features"], batch["action"])
    batch["behaviour_log_prob"] = log_p + 0.3 * normal(2, 12)
    labels = {"adapted": (normal(2, 10, 6), normal(2, 10, 3))}
    labels |= {"pre_update": (normal(3, 7, 6), normal(3, 7, 3))} if pre_update else {}
    for value in (*theta.values(), *alpha.values()):
        value.requires_grad_()
    return theta, alpha, batch, labels


def meta_loss(theta, alpha, batch, labels, settings=TINY):
    return gmps.outer_loss(theta, gmps.adapt(theta, alpha, batch, settings), labels, settings)


def reference_inner_gradient(phi, batch, weight):
    """Gradient of -mean(log pi * weight * A) of one task, by hand-written backpropagation."""
    mean, (x, h1, h2) = reference_forward(phi, batch["features"])
    deviation = (batch["action"] - mean) / np.exp(phi["log_std"])
    share = (-weight * batch["advantage"] * batch["mask"] / batch["mask"].sum())[:, None]
    d3 = share * deviation / np.exp(phi["log_std"])
    d2 = d3 @ phi["w3"].T * (h2 > 0)
    d1 = d2 @ phi["w2"].T * (h1 > 0)
    total = dict(w3=h2.T @ d3, b3=d3.sum(0), w2=h1.T @ d2, b2=d2.sum(0), w1=x.T @ d1,
                 b1=d1.sum(0), z=(d1 @ phi["w1"].T)[:, 6:].sum(0),
                 log_std=(share * (deviation ** 2 - 1)).sum(0))
    return {name: value.reshape(phi[name].shape) for name, value in total.items()}


def reference_meta_loss(theta, alpha, batch, labels, weights):
    """(meta-objective, phi of every task) in numpy.

    For the gradient w = stopgrad(pi_theta) / pi_behaviour is a number. So `weights`, at first {},
    are computed once, and stay when finite differences move theta.
    """
    theta, alpha = ({k: v.detach().numpy() for k, v in part.items()} for part in (theta, alpha))
    phis = []
    for i in range(2):
        own = {name: value[i].numpy() for name, value in batch.items()}
        if i not in weights:
            deviation = own["action"] - reference_forward(theta, own["features"])[0]
            log_p = (-(deviation / np.exp(theta["log_std"])) ** 2 / 2 - theta["log_std"]
                     - np.log(2 * np.pi) / 2).sum(1)
            weights[i] = np.exp(log_p - own["behaviour_log_prob"])
        gradient = reference_inner_gradient(theta, own, weights[i])
        phis.append({name: value - alpha[name] * gradient[name] for name, value in theta.items()})

    def imitation(phi, pair, i):
        mean, _ = reference_forward(phi, pair[0][i].numpy())
        return ((0.9 * np.clip(mean, -1, 1) + 0.1 * mean - pair[1][i].numpy()) ** 2).sum(1).mean()
    before = labels.get("pre_update", labels["adapted"])
    before = np.mean([imitation(theta, before, i) for i in range(len(before[0]))])
    after = np.mean([imitation(phi, labels["adapted"], i) for i, phi in enumerate(phis)])
    return after + TINY.pre_update_imitation * before, phis


@pytest.mark.parametrize("pre_update", [False, True])
def test_meta_gradient_against_finite_differences(pre_update):
    """Every element of theta and alpha to 1e-6, w != 1, and phi. alpha of log-std has none."""
    theta, alpha, batch, labels = equations(pre_update)
    expected, phis = reference_meta_loss(theta, alpha, batch, labels, weights := {})
    assert all(np.abs(w - 1).max() > 0.2 for w in weights.values())
    given = policy.detached(theta)
    for first_order in (False, True):
        phi = gmps.adapt(theta, alpha, batch, TINY, first_order)
        assert all(np.allclose(phi[name][i].detach(), by_hand[name], rtol=1e-11, atol=1e-13)
                   for i, by_hand in enumerate(phis) for name in theta)
    loss, info = meta_loss(theta, alpha, batch, labels)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    weighted = info["imitation_1"] + TINY.pre_update_imitation * info["imitation_0"]
    assert len(info) == 2 and loss.item() == pytest.approx(weighted.item(), rel=1e-12)
    loss.backward()
    for params in (theta, alpha):
        for name, value in params.items():
            estimate = finite_difference(value, lambda: reference_meta_loss(
                theta, alpha, batch, labels, weights)[0])
            if params is alpha and name == "log_std":
                assert not estimate.any() and (value.grad is None or not value.grad.any())
            else:
                assert estimate.norm() > 1e-6 and relative_error(value.grad, estimate) <= 1e-6
    assert all(torch.equal(theta[name], given[name]) for name in theta)


def test_stop_gradient_on_w_is_felt():
    """Finite differences in which w moves with theta differ: the test above can fail."""
    theta, alpha, batch, labels = equations()
    exact, = torch.autograd.grad(meta_loss(theta, alpha, batch, labels)[0], theta["b3"])
    moving_w = finite_difference(
        theta["b3"], lambda: meta_loss(theta, alpha, batch, labels)[0].item())
    assert relative_error(exact, moving_w) > 1e-3


def test_log_std_has_a_meta_gradient_at_second_order_only():
    """Mean actions do not see log-std. It reaches the outer loss through the inner gradient."""
    theta, alpha, batch, labels = equations()
    settings = dataclasses.replace(TINY, pre_update_imitation=0.0)
    exact, start = gmps.adapt(theta, alpha, batch, settings), policy.per_task(theta, 2)
    cut = {name: value + (exact[name] - value).detach() for name, value in start.items()}
    for phi, felt in ((exact, True), (cut, False)):
        loss, _ = gmps.outer_loss(theta, phi, labels, settings)
        log_std, b1 = torch.autograd.grad(loss, [theta["log_std"], theta["b1"]], retain_graph=True,
                                          allow_unused=True)
        assert (log_std is not None and log_std.norm() > 1e-4) == felt and b1.norm() > 1e-3


def test_inner_step_in_closed_form():
    """d/d b3 = -mean(w A (a - mu) / std^2), d/d log-std = -mean(w A ((a - mu)^2 / std^2 - 1)).

    With w = min(pi_phi / pi_behaviour, max_weight), and the mean over samples before an early end.
    """
    theta, alpha, batch, _ = equations()
    after = gmps.inner_step(policy.per_task(theta, 2), alpha, batch,
                            dataclasses.replace(TINY, max_weight=1.2))
    x = torch.cat([batch["features"], theta["z"].expand(2, 12, 2)], dim=-1)
    hidden = torch.relu(torch.relu(x @ theta["w1"] + theta["b1"]) @ theta["w2"] + theta["b2"])
    std = theta["log_std"].exp()
    deviation = batch["action"] - hidden @ theta["w3"] - theta["b3"]
    log_prob = torch.distributions.Normal(0.0, std).log_prob(deviation).sum(-1)
    w = (log_prob - batch["behaviour_log_prob"]).exp()
    assert w.min() < 0.9 and (w > 1.2).any()
    w_a = (w.clamp(max=1.2) * batch["advantage"] * batch["mask"])[..., None]
    count = torch.tensor([9.0, 12.0]).view(2, 1, 1)
    for name, each in (("b3", deviation / std ** 2),
                       ("log_std", deviation ** 2 / std ** 2 - 1)):
        gradient = -(w_a * each).sum(1, keepdim=True) / count
        expected = theta[name] - alpha[name] * gradient
        assert torch.allclose(after[name], expected, rtol=1e-12, atol=1e-14)
        assert (after[name] - theta[name]).abs().max() > 1e-3


def test_imitation_loss_by_hand():
    """Plain squares inside [-1, 1], outside a tenth of what is over; mean over states and tasks."""
    zeros = {"w1": (8, 2), "b1": (1, 2), "w2": (2, 2), "b2": (1, 2), "w3": (2, 3), "z": (1, 2)}
    phi = {name: torch.zeros(2, *shape) for name, shape in zeros.items()}
    phi["b3"] = torch.tensor([[[0.5, 1.5, -3.0]], [[0.0, 1.0, 1.0]]])
    action = torch.tensor([0.0, 1.0, 1.0]).expand(2, 4, 3)
    loss = imitation_loss(phi, torch.zeros(2, 4, 6), action, TINY).item()
    assert loss == pytest.approx((0.5 ** 2 + 0.05 ** 2 + 2.2 ** 2) / 2, rel=1e-6)


# ---------------------------------------------------------------- the algorithm, step by step
STEPS = dataclasses.replace(
    TINY, seed=1, training_tasks=3, episodes=3, collections=2, meta_steps=3, meta_batch=2,
    aggregation_episodes=1, imitation_steps=2, learning_rate=0.02, init_std=0.3,
    pre_update_imitation=0.1)


def watched(settings=STEPS, state=None, experts=scripted_expert):
    """What `train` does, in order: [(event, what it brings)].

    In every rollout environment 1 ends after 20 steps, and nothing behind that may be seen.
    """
    events, rng = [], np.random.default_rng(0)

    def note(event, value):
        events.append((event, value))
        return value

    class Drawn(Demonstrations):
        def sample(self, family, generator, tasks, count, device="cpu"):
            drawn = super().sample(family, generator, tasks, count, device)
            return note("labels", (tasks, *drawn))[1:]

    def rollout(actor, tasks, count):
        result = environments.rollout(actor, tasks, count)
        result["diverged"][1], result["observations"][1, 21:] = True, 1e6
        result["mask"][1, 20:] = result["rewards"][1, 20:] = 0
        note("rollout", (policy.detached(actor.phi), result, actor.explored(result), tasks, count))
        return result

    def ask(observations, tasks):
        return note("expert", (observations, experts(observations, tasks)))[1]
    tasks, environments = task_set(PUSH, "train", settings.training_tasks), Environments(PUSH, 1)
    n, asked = len(tasks), None if experts is None else ask
    given = Drawn(rng.normal(PUSH.observation_centre, 0.1, (n, 40, 6)),
                  rng.uniform(-1, 1, (n, 40, 3)))
    problem = make_problem(tasks, meta_test=lambda adapter: note("meta-test", adapter))
    problem.train_experts = lambda: note("experts", asked)
    problem.demonstrate = lambda experts: (note("demonstrations", experts), given)[1]
    problem.rollout = rollout
    for new, metrics in gmps.train(problem, settings, state):
        note("yield", (new, metrics, through_bytes(new)))
    return events


def named(events, name):
    return [value for event, value in events if event == name]


@pytest.fixture(scope="module")
def steps():
    return watched()


@pytest.fixture(scope="module")
def collections(steps):
    """Of each collection: (theta, alpha) before and after, the batch of 3a, rollouts, metrics.

    The tasks of the very first meta-step fix the advantages' scale.
    """
    out, rollouts = [], named(steps, "rollout")
    first_tasks = named(steps, "labels")[2][0]
    scale = push_batch(rollouts[0][2], STEPS, tasks=first_tasks)[1]
    theta = named(steps, "yield")[0][0]["policy"]["no_adaptation"]
    before = theta, gmps.init_step_sizes(theta, STEPS)
    for c, (state, metrics, _) in enumerate(named(steps, "yield")):
        own, learned = rollouts[2 * c:2 * c + 2], state["policy"]
        batch = push_batch(own[0][2], STEPS, scale)[0]
        assert learned["scale"] == pytest.approx(scale, rel=1e-5)
        after = learned["theta"], learned["alpha"]
        out.append((before, after, batch, own, metrics))
        before = after
    return out


def close(params, expected, atol=1e-5):
    return all(torch.allclose(params[name], expected[name], rtol=0, atol=atol) for name in expected)


def test_order_of_the_algorithm(steps):
    """Steps 1 and 2, two steps of imitation; twice 3a, 3b, 3c; meta-test last."""
    collection = ["rollout", *["labels"] * 3, "rollout", "expert", "yield"]
    assert [event for event, _ in steps] == ["experts", "demonstrations", "labels", "labels",
                                             *collection, *collection, "meta-test"]
    assert named(steps, "demonstrations") == named(steps, "experts") != [None]
    tasks = task_set(PUSH, "train", 3).tolist()
    assert [(on.tolist(), episodes) for *_, on, episodes in named(steps, "rollout")] == [
        (tasks, 3), (tasks, 1)] * 2


def test_who_collects(collections):
    """3a: pi_theta. 3c: pi_phi of the new theta on the same D_i."""
    noises = set()
    for before, after, batch, rollouts, _ in collections:
        stale, adapted = (gmps.adapt(*params, batch, STEPS, first_order=True)
                          for params in (before, after))
        for (phi, episodes, explored, *_), acting in zip(
                rollouts, (policy.per_task(before[0], 3), adapted), strict=True):
            assert close(phi, acting)
            mean = policy.mean_action(phi, explored["features"].flatten(1, 2))
            noise = torch.as_tensor(episodes["actions"]).view(mean.shape) - mean
            noise = noise / phi["log_std"].exp()
            assert abs(noise.square().mean().item() - 1) < 4 * math.sqrt(2 / noise.numel())
            noises.add(round(noise[0, 0, 0].item(), 3))
            observation = policy.normalised(PUSH, episodes["observations"][:, :20])
            assert torch.equal(explored["features"][:, :, :20].flatten(0, 1), observation)
        for other in (stale, policy.per_task(after[0], 3)):
            assert not close(adapted, other, atol=1e-3), "an old theta, or no inner step, shows"
    assert len(noises) == 4, "each rollout has noise of its own"


def test_w_is_one_at_the_first_meta_step(collections):
    """When theta is the policy that collected; later it is not."""
    for before, after, batch, *_ in collections:
        for (theta, _), first in ((before, True), (after, False)):
            log_p = policy.log_prob(policy.per_task(theta, 3), batch["features"], batch["action"])
            w = gmps.importance_weights(log_p, batch, STEPS)
            assert ((w - 1).abs().max().item() < 1e-4) == first


def test_meta_steps_by_hand(steps, collections):
    """3b: Adam on theta and alpha, its gradients and rates; metrics of that moment.

    Log-std stays as it began. Rates fall to a tenth over all six meta-steps.
    """
    labels = iter(named(steps, "labels")[2:])
    theta, alpha = ({name: value.clone() for name, value in part.items()}
                    for part in collections[0][0])
    groups = [[part[name] for name in part if name != "log_std"] for part in (theta, alpha)]
    for value in (*sum(groups, []), theta["log_std"]):
        value.requires_grad_()
    adam, step = torch.optim.Adam([{"params": group} for group in groups]), 0
    for _, after, batch, rollouts, metrics in collections:
        for _ in range(3):
            tasks, x, action = next(labels)
            assert len(set(tasks)) == 2
            inner = {name: value[tasks] for name, value in batch.items()}
            loss, info = meta_loss(theta, alpha, inner, {"adapted": (x, action)}, STEPS)
            gradient = torch.autograd.grad(loss, sum(groups, []))
            norm = math.sqrt(sum(g.square().sum().item() for g in gradient))
            for value, g in zip(sum(groups, []), gradient):
                value.grad = g
            factor = 1 - 0.9 * step / 6
            for group, rate in zip(adam.param_groups, (0.02, 0.01)):
                group["lr"] = rate * factor
            adam.step()
            step += 1
        assert close(after[0], theta) and close(after[1], alpha)
        log_p = policy.log_prob(policy.per_task(theta, 2), inner["features"], inner["action"])
        w = (log_p - inner["behaviour_log_prob"]).exp()[inner["mask"] > 0]
        first, adapted = (episodes for _, episodes, *_ in rollouts)
        expected = {
            "iteration": step // 3, "progress": step / 6, "env_steps": step // 3 * (600 - 60),
            "gradient_norm": norm, "weight_mean": w.mean().item(), "weight_max": w.max().item(),
            "divergences": 2, "return": first["rewards"].sum(1).mean(),
            "distance": first["distances"][:, -1].mean(),
            "adapted_return": adapted["rewards"].sum(1).mean(),
            "adapted_distance": adapted["distances"][:, -1].mean(),
            **{name: value.item() for name, value in info.items()}}
        assert metrics == pytest.approx(expected, rel=3e-5) and w.max() > 1.001


def test_aggregation(steps):
    """3c: visited states, none from behind an early end, with pi*_i's actions there, join D*_i."""
    for c, (observations, actions) in enumerate(named(steps, "expert")):
        _, episodes, _, tasks, _ = named(steps, "rollout")[2 * c + 1]
        assert np.array_equal(observations, episodes["observations"][:, :-1])
        x, labels, mask = (part[:, 50 * c:50 * (c + 1)] for part in
                           named(steps, "yield")[1][0]["training"]["aggregated"])
        assert mask.dtype == torch.bool and mask.sum(1).tolist() == [50, 20, 50]
        assert mask[1, :20].all()
        assert torch.equal(x[mask], policy.normalised(PUSH, observations)[mask])
        assert np.array_equal(labels, actions)
        assert np.array_equal(actions, scripted_expert(observations, tasks))
    visited = policy.normalised(PUSH, named(steps, "expert")[0][0]).flatten(0, 1)
    later = torch.cat([x.flatten(0, 1) for _, x, _ in named(steps, "labels")[-3:]])
    assert later.abs().max() < 1e3
    assert 0.2 < (torch.cdist(later, visited).amin(1) < 1e-5).float().mean() < 0.8


def test_meta_test_by_hand(steps):
    """Two new tasks, 4 episodes a step instead of 20, later steps smaller: every row of both lists.
    """
    adapter, problem = named(steps, "meta-test")[0], make_problem(task_set(PUSH, "held_out", 2))
    state = named(steps, "yield")[-1][0]["policy"]
    lists = evaluate(Environments(PUSH, 1), adapter, problem.tasks, 3, 4, seed=7).lists
    generator, phi = random_streams(7, "evaluation", 0)[1], policy.per_task(state["theta"], 2)
    for k in range(4):
        mean = problem.rollout(policy.Actor(phi, PUSH, STEPS), problem.tasks, 1)
        sampled, explored = explore(phi, problem, STEPS, 4, generator)
        for name, episodes in (("held_out", mean), ("held_out_sampled", sampled)):
            rows = by_round(lists[name])[k]
            for key, values in (("return", episodes["rewards"].sum(1)),
                                ("final_distance", episodes["distances"][:, -1])):
                expected = values.reshape(2, -1).mean(1)
                assert [row[key] for row in rows] == pytest.approx(expected, rel=1e-5)
        batch, _ = push_batch(explored, STEPS, state["scale"])
        alpha = {name: (0.3 * 0.2 ** 0.5 * value).clamp(min=0) if k else value
                 for name, value in state["alpha"].items()}
        phi = gmps.inner_step(phi, alpha, batch, STEPS, first_order=True)
    assert len({round(row["return"], 3) for row in lists["held_out"]}) >= 7, "every step shows"
