"""Tests of meta-training and meta-test: bits after a resume, counts, what is learned, what further steps take."""
import dataclasses

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
    scripted_expert,
    through_bytes,
)
from envs import BatchEnv, rollout, task_set
from settings import Settings

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
