"""Tests of meta-training beyond single steps: resume, what it learns, precision and device."""
import dataclasses

import numpy as np
import pytest
import torch

import gmps
import policy
from envs import Environments
from local_policies import Demonstrations
from policy import imitate, imitation_loss, normalised, per_task
from settings import Settings
from tasks import task_set
from test_gmps import STEPS, equations, meta_loss, named, watched
from tests.conftest import (
    PUSH,
    TINY,
    explore,
    make_problem,
    push_batch,
    relative_error,
    scripted_expert,
    through_bytes,
)


def test_step_sizes_of_every_gradient_step():
    """alpha, then 0.4 of what is positive in it, or alpha again; less on fewer episodes than 3."""
    theta = policy.init_policy(PUSH, TINY, torch.Generator().manual_seed(0))
    start = gmps.init_step_sizes(theta | {"conv1_w": torch.zeros(2, 3, 5, 5)}, TINY)
    assert start.keys() == theta.keys() and not start["log_std"].any()
    for name, value in start.items():
        assert value.shape == theta[name].shape
        assert name == "log_std" or (value == np.float32(0.1)).all()
    alpha = {"b3": torch.tensor([[0.8, -0.4]])}
    for choice, episodes, later in ((0.4, 3, [0.32, 0.0]), (0.4, 1, [0.32 / 3 ** 0.5, 0.0]),
                                    (0.4, 6, [0.32, 0.0]), (1.0, 1, [0.8, -0.4])):
        settings = dataclasses.replace(TINY, later_steps=choice, test_episodes=3)
        for k, expected in enumerate([[0.8, -0.4], later, later]):
            size = gmps.step_sizes(alpha, k, episodes, settings)["b3"]
            assert size.shape == (1, 2) and size[0].tolist() == pytest.approx(expected)


def same(one, other):
    """Bit for bit, whatever is nested in what."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, (torch.Tensor, np.ndarray)):
        return torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    return one == other


def bits(events):
    """(states and metrics, who collected, what meta-test got) of what `watched` saw."""
    adapter = named(events, "meta-test")[0]
    return ([yielded[:2] for yielded in named(events, "yield")],
            [phi for phi, *_ in named(events, "rollout")],
            (adapter.theta, adapter.alpha, adapter.scale))


@pytest.mark.parametrize("shared", [0, 7])
def test_meta_training_goes_on_with_the_same_bits(shared):
    """From each yielded state, in memory or from a file; and such a state never changes.

    Batches are drawn where there are shared episodes, and those of the collection before.
    """
    events = watched(settings := dataclasses.replace(
        STEPS, collections=3, shared_episodes=shared))
    yielded, phis, policy = bits(events)
    for done, (kept, _, saved) in enumerate(named(events, "yield"), start=1):
        for state in (kept, through_bytes(saved)):
            assert same(bits(watched(settings, state)), (yielded[done:], phis[2 * done:], policy))
        assert same(kept, saved)


def test_a_finished_run_goes_straight_to_meta_test():
    """Its state has no "training"; the policy is tested as it is."""
    state = named(watched(), "yield")[-1][0]
    *events, (_, adapter) = watched(state=state | {"training": None})
    assert [event for event, _ in events] == ["experts", "demonstrations"]
    assert same(state["policy"], {
        "theta": adapter.theta, "alpha": adapter.alpha, "scale": adapter.scale,
        "no_adaptation": adapter.references["no_adaptation"].theta})


def test_demonstrations_alone_need_no_expert():
    """Without experts, or without aggregation: no such rollout, no question, the same theta."""
    alone = watched(experts=None)
    unused = watched(dataclasses.replace(STEPS, aggregation_episodes=0))
    assert same(bits(alone), bits(unused))
    for events in (alone, unused):
        assert [count for *_, count in named(events, "rollout")] == [3, 3]
        assert not named(events, "expert")
        assert [row["env_steps"] for _, row, _ in named(events, "yield")] == [420, 840]


def test_the_pre_update_policy_may_imitate_the_last_tasks_only():
    """Where meta-training starts and in every meta-step. The baseline imitates all tasks."""
    settings = dataclasses.replace(STEPS, pre_update_tasks=2, training_tasks=5, meta_batch=4,
                                   imitation_batch=10, collections=1)
    events = watched(settings)
    asked = [(sorted(tasks), x.shape[1]) for tasks, x, _ in named(events, "labels")]
    everyone, last = ([0, 1, 2, 3, 4], 10), ([3, 4], 25)  # as many labels for two tasks as for five
    assert asked[:4] == [everyone, everyone, last, last]
    assert asked[5::2] == [([3, 4], 10)] * 3 and all(len(tasks) == 4 for tasks, _ in asked[4::2])
    for run, alike in ((events, False), (watched(dataclasses.replace(
            settings, pre_update_tasks=0)), True)):
        baseline = bits(run)[0][0][0]["policy"]["no_adaptation"]
        assert same(baseline, bits(events)[0][0][0]["policy"]["no_adaptation"])
        assert same(per_task(baseline, 5), bits(run)[1][0]) == alike


def test_meta_training_refuses_numbers_that_are_not_finite():
    with pytest.raises(FloatingPointError, match="not finite in collection 2"):
        watched(experts=lambda observations, _: np.full_like(observations[..., :3], np.nan))


# ---------------------------------------------------------------- what is learned
LEARN = Settings(training_tasks=8, episodes=10, shared_episodes=100, hidden=32,
                 collections=5, meta_steps=60, meta_batch=8, learning_rate=3e-3,
                 imitation_steps=300, imitation_batch=50)


def unrevealing_demonstrations(tasks, seed=0):
    """The same 400 states for every task, of random pushes, with each task's own labels.

    And the least loss of a policy that is not told the task: that of the labels' mean over tasks.
    """
    rng = np.random.default_rng(seed)
    drift = rng.uniform(-1, 1, (16, 1))
    episodes = Environments(PUSH, 1).rollout(
        lambda *_: np.c_[drift + rng.normal(0, 0.3, (16, 1)), rng.uniform(0.5, 1, (16, 1)),
                         np.zeros(16)], tasks[:1], 16)
    states = rng.permutation(episodes["observations"][:, :-1].reshape(-1, 6))[:400]
    observations = np.tile(states, (len(tasks), 1, 1))
    actions = scripted_expert(observations, tasks)
    return Demonstrations(observations, actions), ((actions - actions.mean(0)) ** 2).sum(-1).mean()


def loss_on(phi, demonstrations):
    x = normalised(PUSH, demonstrations.observations)
    return imitation_loss(phi, x, torch.as_tensor(demonstrations.actions), LEARN).item()


def test_imitation_without_adaptation_nears_its_lower_bound():
    """No policy that is not told the task passes the bound; training comes within a tenth."""
    demonstrations, bound = unrevealing_demonstrations(task_set(PUSH, "train", 4))
    theta = imitate(PUSH, demonstrations, dataclasses.replace(
        LEARN, imitation_steps=600, imitation_batch=100, hidden=64))
    assert bound <= loss_on(per_task(theta, 4), demonstrations) < 1.1 * bound


def test_meta_training_teaches_the_policy_to_adapt():
    """By reward alone, on twenty fresh rollouts, to below what no adaptation can reach.

    States do not show the goal. This seed reaches 0.65 of the bound; others need more meta-steps.
    """
    tasks = task_set(PUSH, "train", 8)
    problem = make_problem(tasks, unrevealing_demonstrations(tasks)[0])
    *_, (state, metrics) = gmps.train(problem, LEARN)
    theta, alpha, scale = (state["policy"][key] for key in ("theta", "alpha", "scale"))
    held, bound = unrevealing_demonstrations(tasks, seed=1)
    phi, losses = per_task(theta, 8), []
    for draw in range(4):
        _, explored = explore(phi, problem, LEARN, 20, torch.Generator().manual_seed(draw))
        batch, _ = push_batch(explored, LEARN, scale)
        losses.append(loss_on(gmps.adapt(theta, alpha, batch, LEARN, True), held))
    assert metrics["imitation_1"] < 0.9 * bound and np.mean(losses) < 0.9 * bound
    assert loss_on(phi, held) >= bound


# ---------------------------------------------------------------- precision and device
def meta_gradient(device, dtype):
    """Gradient of theta and alpha, computed on `device` in `dtype`: one float64 vector."""
    theta, alpha, batch, labels = equations()

    def moved(value):
        return value.detach().to(device, dtype)
    theta, alpha = ({name: moved(value).requires_grad_() for name, value in part.items()}
                    for part in (theta, alpha))
    batch = {name: moved(value) for name, value in batch.items()}
    meta_loss(theta, alpha, batch, {"adapted": [moved(x) for x in labels["adapted"]]})[0].backward()
    gradients = [value.grad for value in (*theta.values(), *alpha.values())]
    return torch.cat([g.flatten().double().cpu() for g in gradients if g is not None])


@pytest.mark.parametrize("device, dtype, error", [
    ("cpu", torch.float32, 1e-5), ("cuda", torch.float64, 1e-10), ("cuda", torch.float32, 1e-5)])
def test_meta_gradient_in_single_precision_and_on_a_gpu(device, dtype, error):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA here")
    expected = meta_gradient("cpu", torch.float64)
    assert relative_error(meta_gradient(device, dtype), expected) <= error
