"""Tests of soft actor-critic, replay, experts and demonstrations: hand-computed losses, torch.distributions, Riccati."""
import dataclasses
import math

import numpy as np
import pytest
import torch

import local_policies
from conftest import (
    PUSH,
    finite_difference,
    push_north,
    random_actions,
    relative_error,
    scripted_expert,
    through_bytes,
)
from envs import BatchEnv, correlated_noise, rollout, task_set
from local_policies import Experts, Replay, SoftActorCritic
from settings import Settings

# ---------------------------------------------------------------- local policies: soft actor-critic
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
    params = [p.double() for p in local_policies.init_mlp([4, 8, 8, 6], 2, generator)]
    observation = 3 * torch.randn(2, 50, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, 50, 3, generator=generator, dtype=torch.float64)
    action, log_prob = local_policies.policy_sample(params, observation, noise)
    mean, raw = local_policies.mlp(params, observation).chunk(2, dim=-1)
    std = (-5 + 3.5 * (raw.tanh() + 1)).exp()  # log-std squashed into [-5, 2]
    normal = torch.distributions.Normal(mean, std)
    squashed = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform(cache_size=0))
    clear = action.abs().amax(-1) < 0.9999  # beyond, atanh in torch's inverse loses the digits, not our formula
    assert clear.sum() > 60
    assert torch.allclose(log_prob[clear], squashed.log_prob(action).sum(-1)[clear], rtol=1e-7, atol=1e-7)
    assert torch.allclose(torch.atanh(action)[clear], (mean + std * noise)[clear], rtol=1e-6, atol=1e-7)
    assert torch.equal(local_policies.policy_mean(params, observation), mean.tanh())


def test_log_probability_stays_finite_far_out():
    """u = +-40, where 1 - tanh(u)^2 is 0 in floating point: log p = log N(u) - 2 (log 2 - |u|), exactly the limit."""
    params = [torch.zeros(1, 1, 2), torch.tensor([[[40.0, 0.0]]])]
    action, log_prob = local_policies.policy_sample(params, torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))
    log_std = -1.5  # tanh(0) in the middle of [-5, 2]
    expected = -log_std - 0.5 * math.log(2 * math.pi) - 2 * (math.log(2) - 40.0)
    assert action.item() == 1.0 and log_prob.item() == pytest.approx(expected, rel=1e-6)


def numpy_mlp(params, learner, x):
    """One vector through one learner's network, in plain loops over layers."""
    weights = [p[learner].detach().double().numpy() for p in params]
    for layer in range(0, len(weights), 2):
        x = x @ weights[layer] + weights[layer + 1][0]
        if layer < len(weights) - 2:
            x = np.maximum(x, 0)
    return x


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
    make = local_policies.init_mlp
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
    loss, _ = local_policies.critic_loss(nets["critic"], nets["target"], nets["policy"], temperature, batch, noise)
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_terminated_transitions_do_not_bootstrap(tiny_sac):
    """All terminated: the loss knows neither next observation nor discount. None terminated: it knows both."""
    nets, batch, noise, temperature = tiny_sac

    def loss(terminated, discount, shift):
        changed = batch | {"terminated": torch.full_like(batch["reward"], terminated),
                           "discount": torch.full_like(batch["reward"], discount),
                           "next_observation": batch["next_observation"] + shift}
        return local_policies.critic_loss(nets["critic"], nets["target"], nets["policy"], temperature, changed,
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
    loss, _ = local_policies.policy_loss(nets["policy"], nets["critic"], temperature, batch, noise)
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_temperature_loss_by_hand():
    """Value and gradient: d/d log t of -t * mean(log pi + H) is the loss itself, one entry per learner."""
    log_temperature = torch.tensor([[0.2], [-0.7]], requires_grad=True)
    log_prob = torch.tensor([[1.0, -2.0, 0.5], [4.0, 3.0, 2.0]])
    loss = local_policies.temperature_loss(log_temperature, log_prob, -1.5)
    each = [-math.exp(0.2) * (-0.5 / 3 - 1.5), -math.exp(-0.7) * (3.0 - 1.5)]
    assert loss.item() == pytest.approx(sum(each), rel=1e-6)
    loss.backward()
    assert log_temperature.grad.flatten().tolist() == pytest.approx(each, rel=1e-6)


def test_policy_gradient_against_finite_differences():
    """The reparametrised gradient of the policy's loss, in float64."""
    generator = torch.Generator().manual_seed(3)
    policy = [p.double().requires_grad_() for p in local_policies.init_mlp([3, 6, 4], 2, generator)]
    critic = [p.double() for p in local_policies.init_mlp([5, 6, 1], 4, generator)]
    batch = {k: v.double() for k, v in sac_batch(2, 7, 3, 2, generator).items()}
    noise = torch.randn(2, 7, 2, generator=generator, dtype=torch.float64)
    temperature = torch.tensor([[0.5], [1.5]], dtype=torch.float64)

    def loss():
        return local_policies.policy_loss(policy, critic, temperature, batch, noise)[0]

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
        learned = local_policies.critic_values(learner.critic, tensor(start).expand(learners, -1, -1),
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


# ---------------------------------------------------------------- local policies: replay, experts, demonstrations
@pytest.fixture(scope="module")
def filled():
    """(tasks, episodes of 2 environments per task) of three tasks with random pushes."""
    tasks = task_set(PUSH, "train", 3)
    actions = iter(0.3 * random_actions(6, seed=9) + 0.7 * push_north(num_envs=6))
    return tasks, rollout(BatchEnv(6), lambda observation: next(actions), np.repeat(tasks, 2, axis=0))


def sampled_with_sources(filled, learners, share):
    """A batch of `Replay.sample` and, for each transition, its stream and index, found by its action's bits."""
    tasks, episodes = filled
    replay = Replay(PUSH, tasks, 200)
    replay.add(episodes)
    settings = Settings(expert_batch=400, expert_relabelled=share, expert_reward_scale=0.25)
    batch = replay.sample(np.random.default_rng(0), learners, settings)
    place = {replay.data["action"][s, i].tobytes(): (s, i) for s in range(3) for i in range(100)}
    assert replay.size == 100 and len(place) == 300
    found = np.array([[place[action.tobytes()] for action in row] for row in batch["action"].numpy()])
    return replay, batch, found[..., 0], found[..., 1]


def check_transition(replay, batch, stream, index, goal):
    """Reward by hand for `goal` (N, B, 2), and (scaled) observations those of the stored transition."""
    outcome = replay.data["outcome"][stream, index].astype(float)
    block, tips = outcome[..., :3], outcome[..., 3:]
    gain = np.linalg.norm(goal - [0, 0.52], axis=-1) - np.linalg.norm(goal - block[..., :2], axis=-1)
    reward = 0.25 * (-np.linalg.norm(block - tips, axis=-1) + 100 * np.maximum(0, gain))
    assert np.abs(batch["reward"].numpy() - reward).max() < 1e-4
    for name in ("observation", "next_observation"):
        seen = batch[name][..., :6].numpy() * 0.1 + [0, 0.6, 0.1, 0, 0.65, 0.02]
        assert np.abs(seen - replay.data[name][stream, index]).max() < 1e-6


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_contextual_replay_rewards_are_those_of_the_goal_in_the_input(filled, share):
    replay, batch, stream, index = sampled_with_sources(filled, 1, share)
    assert batch["observation"].shape == (1, 400, 8)
    goal = batch["observation"][..., 6:].numpy() * [0.1, 0.05] + [0.0, 0.75]
    assert np.array_equal(batch["observation"][..., 6:], batch["next_observation"][..., 6:])
    which = np.linalg.norm(goal[..., None, :] - replay.tasks, axis=-1)
    assert which.min(-1).max() < 1e-7, "only training goals"
    check_transition(replay, batch, stream, index, goal)
    # A relabelled transition keeps its goal one time in three: 1 - 2/3 share keep theirs; four standard errors of 400
    kept, expected = (which.argmin(-1) == stream).mean(), 1 - share * 2 / 3
    assert abs(kept - expected) <= 4 * math.sqrt(expected * (1 - expected) / 400)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_local_replay_keeps_each_learners_own_task(filled, share):
    replay, batch, stream, index = sampled_with_sources(filled, 3, share)
    assert batch["observation"].shape == (3, 400, 6)
    check_transition(replay, batch, stream, index, np.broadcast_to(replay.tasks[:, None], (3, 400, 2)))
    kept, expected = (stream == np.arange(3)[:, None]).mean(), 1 - share * 2 / 3
    assert abs(kept - expected) <= 4 * math.sqrt(expected * (1 - expected) / 1200)


def test_replay_stores_episodes_by_task(filled):
    """Row s holds task s's episodes in order, and what follows a transition is its next observation."""
    tasks, episodes = filled
    replay = Replay(PUSH, tasks, 150)
    replay.add(episodes)
    for s in range(3):
        assert np.array_equal(replay.data["action"][s, :50], episodes["actions"][2 * s])
        following = episodes["observations"][2 * s + 1, 1:]
        assert np.allclose(replay.data["next_observation"][s, 50:100], following, atol=1e-7)
        assert np.allclose(replay.data["outcome"][s, 50:100], episodes["outcomes"][2 * s + 1], atol=1e-7)
    assert not replay.data["terminated"].any(), "a time limit is no end"
    with pytest.raises(ValueError, match="full"):
        replay.add(episodes)


def replay_with_an_early_end(filled):
    """(replay, episodes) in which environment 2 (task 1) ends at step 31."""
    tasks, episodes = filled
    episodes = {key: value.copy() for key, value in episodes.items()}
    episodes["mask"][2, 31:] = 0
    episodes["terminated"][2] = True
    replay = Replay(PUSH, tasks, 150)
    replay.add(episodes)
    return replay, episodes


def test_replay_drops_what_follows_an_early_end(filled):
    """Flagged where it ends, 81 transitions in every stream."""
    replay, episodes = replay_with_an_early_end(filled)
    assert replay.size == 81
    assert np.argwhere(replay.data["terminated"][..., 0]).tolist() == [[1, 30]]
    assert np.array_equal(replay.data["action"][1, 31:81], episodes["actions"][3])


def test_replay_sums_rewards_over_several_steps(filled):
    """Five steps by a loop: discounted rewards up to the end of the episode, and what is left of the value after them."""
    replay, episodes = replay_with_an_early_end(filled)
    settings = Settings(expert_batch=600, expert_relabelled=0.0, expert_reward_scale=1.0, expert_discount=0.9,
                        expert_return_steps=5)
    batch = replay.sample(np.random.default_rng(0), 1, settings)
    place = {replay.data["action"][s, i].tobytes(): (s, i) for s in range(3) for i in range(replay.size)}
    spans, ended = set(), set()
    for i in range(600):
        stream, index = place[batch["action"][0, i].numpy().tobytes()]
        length = [50, 31][stream == 1]  # of the stream's first episode
        environment, t, last = 2 * stream, index, length
        if index >= length:  # second episode; its stream was cut to the shortest one's 81 transitions
            environment, t, last = 2 * stream + 1, index - length, min(50, 81 - length)
        span = min(5, last - t)
        rewards = episodes["rewards"][environment, t:t + span]
        assert batch["reward"][0, i].item() == pytest.approx((0.9 ** np.arange(span)) @ rewards, abs=2e-3)
        assert batch["discount"][0, i].item() == pytest.approx(0.9 ** span)
        seen = batch["next_observation"][0, i, :6].numpy() * 0.1 + [0, 0.6, 0.1, 0, 0.65, 0.02]
        assert np.abs(seen - episodes["observations"][environment, t + span]).max() < 1e-6
        assert batch["terminated"][0, i] == (environment == 2 and t + span == 31)
        spans.add(span)
        ended.add(bool(batch["terminated"][0, i]))
    assert spans == {1, 2, 3, 4, 5} and ended == {True, False}


def test_exploration_noise_is_standard_normal_and_lasts():
    """Variance 1 at every step, correlation rho^k between noises k steps apart; six standard errors."""
    noise = correlated_noise((40_000,), 0.8, torch.Generator().manual_seed(0))
    rows = torch.stack([next(noise) for _ in range(6)]).double()
    moments = rows @ rows.T / 40_000
    expected = 0.8 ** (torch.arange(6)[:, None] - torch.arange(6)).abs().double()
    assert (moments - expected).abs().max() < 6 * math.sqrt(2 / 40_000)


def test_learner_and_replay_go_on_from_a_checkpoint_with_the_same_bits(filled):
    tasks, episodes = filled
    settings = dataclasses.replace(SAC, expert_batch=16)

    def train(learner, replay, seed):
        rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        for _ in range(4):
            learner.update(replay.sample(rng, 1, settings), generator)

    def fresh(seed):
        return SoftActorCritic(1, 8, 3, dataclasses.replace(settings, seed=seed)), Replay(PUSH, tasks, 300)

    learner, replay = fresh(0)
    replay.add(episodes)
    train(learner, replay, 1)
    saved = through_bytes({"learner": learner.state_dict(), "replay": replay.state_dict()})
    other, other_replay = fresh(1)
    other.load_state_dict(saved["learner"])
    other_replay.load_state_dict(saved["replay"])
    for pair in ((learner, replay), (other, other_replay)):
        pair[1].add(episodes)
        train(*pair, 2)
    for name in ("policy", "critic", "target_critic"):
        assert all(torch.equal(p, q) for p, q in zip(getattr(learner, name), getattr(other, name), strict=True))
    assert torch.equal(learner.log_temperature, other.log_temperature)
    assert other_replay.size == 200


@pytest.mark.parametrize("kind", ["contextual", "local"])
def test_expert_training_resumed_ends_with_the_same_bits(kind):
    """Snapshot after iteration 2 of 4, through bytes, into a fresh generator; and env steps counted exactly."""
    tasks = task_set(PUSH, "train", 2)
    settings = Settings(training_tasks=2, expert_iterations=4, expert_episodes=2, expert_updates=3, expert_width=8,
                        expert_batch=16, experts=kind)
    env = BatchEnv(4)
    saved = None
    for experts, snapshot, metrics in local_policies.train_experts(env, tasks, settings):  # noqa: B007
        if metrics["iteration"] == 2:
            saved = through_bytes(snapshot())
    unbroken = [p.clone() for p in experts.policy]
    resumed = list(local_policies.train_experts(env, tasks, settings, saved))
    assert [metrics["env_steps"] for *_, metrics in resumed] == [3 * 200, 4 * 200]
    assert all(torch.equal(p, q) for p, q in zip(unbroken, resumed[-1][0].policy, strict=True))
    assert resumed[-1][2] == metrics


def test_experts_see_their_own_task():
    """A contextual call equals the network on [scaled observation, scaled goal]; local experts refuse other tasks."""
    tasks, rng = task_set(PUSH, "train", 3), np.random.default_rng(0)
    observations = rng.uniform(-0.2, 0.8, (3, 5, 6))
    learner = SoftActorCritic(1, 8, 3, SAC)
    actions = Experts(PUSH, learner.policy, tasks, True)(observations, tasks)
    for i in range(3):
        for j in range(5):
            x = np.r_[(observations[i, j] - [0, 0.6, 0.1, 0, 0.65, 0.02]) / 0.1, (tasks[i] - [0, 0.75]) / [0.1, 0.05]]
            assert np.allclose(actions[i, j], np.tanh(numpy_mlp(learner.policy, 0, x)[:3]), atol=1e-5)
    learners = SoftActorCritic(3, 6, 3, SAC)
    local = Experts(PUSH, learners.policy, tasks, False)
    x = (observations[2, 4] - [0, 0.6, 0.1, 0, 0.65, 0.02]) / 0.1
    assert np.allclose(local(observations, tasks)[2, 4], np.tanh(numpy_mlp(learners.policy, 2, x)[:3]), atol=1e-5)
    with pytest.raises(ValueError, match="own training tasks"):
        local(observations, tasks[::-1])


def test_demonstrations_are_visited_states_with_clean_labels():
    """First episode of a task: the expert's own path. Others: off it by noise, labels still the expert's mean."""
    tasks, settings = task_set(PUSH, "train", 2), Settings(demonstration_episodes=2, demonstration_noise=0.5)
    env = BatchEnv(4)
    observations, actions, env_steps = local_policies.make_demonstrations(env, scripted_expert, tasks, settings)
    assert observations.shape == (2, 100, 6) and actions.shape == (2, 100, 3) and env_steps == 200
    assert np.array_equal(actions, scripted_expert(observations, tasks))
    clean = rollout(BatchEnv(2), lambda o: scripted_expert(o[:, None], tasks)[:, 0], tasks)
    assert np.array_equal(observations[:, :50], clean["observations"][:, :50])
    assert np.abs(observations[:, 50:, :3] - observations[:, :50, :3]).max() > 0.01


def test_demonstrations_file_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    tasks, observations, actions = rng.normal(size=(2, 2)), rng.normal(size=(2, 7, 6)), rng.normal(size=(2, 7, 3))
    local_policies.save_demonstrations(tmp_path / "d.npz", tasks, (observations, actions), 150)
    loaded = local_policies.load_demonstrations(tmp_path / "d.npz", PUSH)
    assert np.array_equal(loaded[0], tasks) and loaded[2] == 150
    assert all(np.array_equal(a, b) for a, b in zip(loaded[1], (observations, actions), strict=True))


@pytest.mark.parametrize("change", [
    {"tasks": np.zeros((2, 3))}, {"tasks": np.zeros((3, 2))}, {"tasks": np.zeros(2)}, {"actions": np.zeros((2, 7, 2))},
    {"actions": np.zeros((2, 6, 3))}, {"observations": np.zeros((2, 7, 5))}, {"observations": np.zeros((2, 6))},
    {"observations": None}, {"tasks": None}])
def test_demonstrations_of_wrong_shape_are_refused(tmp_path, change):
    arrays = {"tasks": np.zeros((2, 2)), "observations": np.zeros((2, 7, 6)), "actions": np.zeros((2, 7, 3))} | change
    np.savez(tmp_path / "d.npz", **{key: value for key, value in arrays.items() if value is not None})
    with pytest.raises(ValueError, match="demonstrations"):
        local_policies.load_demonstrations(tmp_path / "d.npz", PUSH)


def test_detours_are_other_tasks_paths_with_the_tasks_own_labels():
    """A scripted expert that is sent elsewhere in each task's last episode: its states, labelled for the task itself."""
    settings = Settings(demonstration_episodes=3, demonstration_noise=0.0, demonstration_detours=1)
    tasks = np.array([[-0.1, 0.7], [0.1, 0.8], [0.0, 0.75]])
    observations, actions, _ = local_policies.make_demonstrations(BatchEnv(9), scripted_expert, tasks, settings)
    assert np.array_equal(actions, scripted_expert(observations, tasks)), "labels are those of the task"
    by_episode = observations.reshape(3, 3, 50, 6)
    assert np.array_equal(by_episode[:, 0], by_episode[:, 1])
    own = by_episode[:, 0]
    matches = [[np.array_equal(by_episode[i, 2], own[j]) for j in range(3)] for i in range(3)]
    assert np.sum(matches, axis=1).tolist() == [1, 1, 1] and not np.array_equal(matches, np.eye(3))
