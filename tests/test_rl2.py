"""Tests of RL^2's learner, PPO: densities, advantages, losses, one iteration; what it learns."""
import dataclasses
import math

import gymnasium
import numpy as np
import pytest
import torch

from baselines import recurrent, rl2
from policy import detached
from tests.conftest import FRAGILE, PUSH, finite_difference, make_problem, relative_error
from tests.point_task import (
    CircleGoal,
    PointBatch,
    new_goals,
    point_problem,
    returns_by_round,
)
from tests.test_recurrent import FEW, POINT, make_agent, numpy_gru, play

SETTINGS = rl2.Settings(hidden=6, memory=5, trial_episodes=3, trials=2,
                        expert_noise_correlation=0.6, trial_discount=0.9, trial_lambda=0.8,
                        expert_reward_scale=0.5, entropy_weight=0.3, clip=0.25)
WHITE = rl2.Settings(expert_noise_correlation=0.0)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def losses_of(seed=0):
    """(policy, critic, batch) in float64: ratios inside and outside the clip, a padded end."""
    generator = torch.Generator().manual_seed(seed)
    policy = recurrent.Policy(POINT, SETTINGS, generator).double()
    critic = recurrent.Network(6, 1, SETTINGS, generator).double()
    with torch.no_grad():
        for number, p in enumerate((*policy.parameters(), *critic.parameters())):
            p.copy_(0.6 * normal(*p.shape, seed=number))
        policy.log_std.copy_(torch.tensor([-0.3, 0.2]))
    batch = {"input": normal(3, 7, 6), "action": normal(3, 7, 2, seed=1),
             "advantage": normal(3, 7, seed=2), "target": normal(3, 7, seed=3),
             "mask": torch.ones(3, 7, dtype=torch.float64), "start": torch.zeros(3, 7).double()}
    batch["mask"][1, 5:], batch["start"][:, 0], batch["start"][:, 4] = 0, 1, 1
    with torch.no_grad():
        log_p = rl2.log_prob(policy(batch["input"])[0], policy.log_std, batch, SETTINGS)
    batch["old_log_prob"] = log_p + 0.3 * normal(3, 7, seed=4)
    return policy, critic, batch


# ---------------------------------------------------------------- densities
def test_log_prob_is_summed_over_action_dimensions():
    """Against torch's normal distribution, without correlation."""
    mean, action, log_std = normal(4, 5, 3), normal(4, 5, 3, seed=1), normal(3, seed=2)
    batch = {"action": action, "start": torch.zeros(4, 5)}
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(action).sum(-1)
    assert torch.allclose(rl2.log_prob(mean, log_std, batch, WHITE), expected)
    entropy = torch.distributions.Normal(mean, log_std.exp()).entropy().sum(-1)
    assert torch.allclose(rl2.entropy(log_std, batch, WHITE), entropy)


def test_log_prob_with_correlated_noise_is_exact():
    """An episode's sum is the joint normal density of its actions; episodes are independent."""
    mean, action = normal(2, 7, 1), normal(2, 7, 1, seed=1)
    log_std = torch.tensor([-0.4], dtype=torch.float64)
    start = torch.zeros(2, 7, dtype=torch.float64)
    start[:, 0] = start[:, 4] = 1
    batch = {"action": action, "start": start}
    log_p, entropy = (rl2.log_prob(mean, log_std, batch, SETTINGS),
                      rl2.entropy(log_std, batch, SETTINGS))
    for part in (slice(0, 4), slice(4, 7)):
        t = torch.arange(part.stop - part.start)
        covariance = math.exp(-0.8) * 0.6 ** (t[:, None] - t).abs().double()
        joint = torch.distributions.MultivariateNormal(mean[:, part, 0], covariance)
        assert torch.allclose(log_p[:, part].sum(1), joint.log_prob(action[:, part, 0]))
        assert torch.allclose(entropy[:, part].sum(1), joint.entropy())


def test_old_log_probabilities_are_those_of_the_actions_as_sampled():
    """The joint density of every episode's noise, with early ends; no ratio differs from 1 yet."""
    settings = dataclasses.replace(FEW, minibatches=3, expert_noise_correlation=0.6)
    agent = make_agent(FRAGILE, settings)
    played = play(agent, make_problem(PUSH.training_tasks(3), family=FRAGILE), settings)
    trials = recurrent.joined([steps for steps, _ in played])
    critic = recurrent.Network(recurrent.input_size(FRAGILE), 1, settings, torch.Generator())
    fixed = rl2.fixed_by_old_policy(agent.network, critic, trials, settings, "cpu")
    noise = (trials["action"] - agent.network(trials["input"])[0]).detach().double() / 0.8
    for row in range(6):
        begin = 0
        for _, episodes in played:
            t = torch.arange(int(episodes["mask"][row].sum()))
            joint = torch.distributions.MultivariateNormal(
                torch.zeros(len(t)).double(), 0.6 ** (t[:, None] - t).abs().double())
            by_hand = joint.log_prob(noise[row, begin + t].T).sum() - 3 * len(t) * math.log(0.8)
            found = fixed["old_log_prob"][row, begin + t].sum()
            assert float(found) == pytest.approx(float(by_hand), abs=0.02)
            begin += len(t)
    batch = recurrent.some_trials(trials | fixed, np.array([4, 1]), "cpu")
    _, info = rl2.ppo_loss(agent.network, critic, batch, settings)
    assert info["clipped"] == 0 and abs(info["kl"]) < 1e-6
    advantage, mask = fixed["advantage"], trials["mask"] > 0
    assert abs(advantage[mask].mean()) < 1e-5 and not advantage[~mask].any()
    assert float(advantage[mask].square().mean()) == pytest.approx(1, abs=1e-4)


# ---------------------------------------------------------------- advantages
def test_advantages_run_across_the_whole_trial():
    """Against loops: sum of (gamma lambda)^k delta, over the border of episodes, to the end."""
    value, reward, mask = normal(2, 8), normal(2, 8, seed=1), torch.ones(2, 8).double()
    mask[1, 5:] = 0
    reward = reward * mask
    advantage, target = rl2.trial_advantages(value, reward, mask, SETTINGS)
    for row, length in ((0, 8), (1, 5)):
        v = [*value[row, :length].tolist(), 0.0]
        r = (0.1 * 0.5 * reward[row]).tolist()
        delta = [r[t] + 0.9 * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            by_hand = sum((0.9 * 0.8) ** (s - t) * delta[s] for s in range(t, length))
            assert float(advantage[row, t]) == pytest.approx(by_hand)
            assert float(target[row, t]) == pytest.approx(by_hand + v[t])
        assert not advantage[row, length:].any()
    # lambda 1: the discounted sum of all that follows, less the value.
    plain = rl2.Settings(trial_discount=0.9, trial_lambda=1.0, expert_reward_scale=0.5)
    advantage, target = rl2.trial_advantages(value, reward, mask, plain)
    returns = sum(0.9 ** s * 0.05 * reward[0, s] for s in range(8))
    assert float(target[0, 0]) == pytest.approx(float(returns))


def test_values_are_of_the_size_of_rewards():
    """A reward that never changes: with a long trial the value target is that reward, scaled."""
    reward = torch.full((1, 2000), 3.0, dtype=torch.float64)
    settings = rl2.Settings(trial_discount=0.99, trial_lambda=1.0, expert_reward_scale=0.5)
    _, target = rl2.trial_advantages(0 * reward, reward, torch.ones_like(reward), settings)
    assert float(target[0, 0]) == pytest.approx(1.5, abs=1e-6)


# ---------------------------------------------------------------- losses
@pytest.mark.parametrize("ratio, advantage, expected", [
    (1.5, 2.0, 2.5), (0.5, 2.0, 1.0), (1.5, -2.0, -3.0), (0.5, -2.0, -1.5), (1.1, 2.0, 2.2),
    (1.0, -2.0, -2.0)])
def test_clipped_surrogate_by_hand(ratio, advantage, expected):
    """Eq. 7 with epsilon 0.25: what is gained by going far is not counted, what is lost is."""
    log_p = torch.tensor([[math.log(ratio) - 1.0]])
    batch = {"old_log_prob": torch.tensor([[-1.0]]), "advantage": torch.tensor([[advantage]]),
             "mask": torch.ones(1, 1)}
    found = rl2.clipped_surrogate(log_p, batch, SETTINGS)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_loss_by_hand():
    """Eq. 9 in numpy, from the GRU's own equations to the number; means over visited steps."""
    policy, critic, batch = losses_of()
    loss, info = rl2.ppo_loss(policy, critic, batch, SETTINGS)
    surrogate, squares, kl, outside = [], [], [], []
    std = np.exp([-0.3, 0.2])
    for row in range(3):
        x, action = batch["input"][row].numpy(), batch["action"][row].numpy()
        mean = numpy_gru(policy.state_dict(), x)[0]
        value = numpy_gru(critic.state_dict(), x)[0][:, 0]
        noise = (action - mean) / std
        for t in range(int(batch["mask"][row].sum())):
            kept = 0.0 if t in (0, 4) else 0.6
            rest = math.sqrt(1 - kept ** 2)
            fresh = (noise[t] - kept * noise[t - 1]) / rest
            log_p = np.sum(-fresh ** 2 / 2 - np.log(std * rest) - np.log(2 * np.pi) / 2)
            ratio = math.exp(log_p - batch["old_log_prob"][row, t])
            advantage = float(batch["advantage"][row, t])
            surrogate.append(min(ratio * advantage, min(max(ratio, 0.75), 1.25) * advantage))
            squares.append((value[t] - float(batch["target"][row, t])) ** 2)
            kl.append(ratio - 1 - math.log(ratio))
            outside.append(abs(ratio - 1) > 0.25)
    entropy = np.log(std).sum() + np.log(2 * np.pi * np.e) + np.mean(
        [2 * 0.5 * np.log(1 - 0.36) * (t not in (0, 4)) for length in (7, 5, 7)
         for t in range(length)])
    assert 0.2 < np.mean(outside) < 0.8
    assert float(loss.detach()) == pytest.approx(
        -np.mean(surrogate) + np.mean(squares) - 0.3 * entropy)
    assert {name: float(value) for name, value in info.items()} == pytest.approx({
        "policy_loss": -np.mean(surrogate), "critic_loss": np.mean(squares), "entropy": entropy,
        "clipped": np.mean(outside), "kl": np.mean(kl)})


def test_gradient_against_finite_differences():
    """Every parameter of policy and critic, back through time to the start of the trial."""
    policy, critic, batch = losses_of()
    rl2.ppo_loss(policy, critic, batch, SETTINGS)[0].backward()
    for network in (policy, critic):
        for name, parameter in network.named_parameters():
            with torch.no_grad():
                numeric = finite_difference(
                    parameter, lambda: float(rl2.ppo_loss(policy, critic, batch, SETTINGS)[0]))
            assert relative_error(parameter.grad, numeric) < 1e-6, name
    # The first step's input reaches the last step's loss, over the border of two episodes.
    x = batch["input"].clone().requires_grad_()
    policy(x)[0][:, -1].sum().backward()
    assert (x.grad[:, 0].abs().sum(-1) > 0).all()


def test_padded_steps_change_nothing():
    """Whatever they hold, loss and gradients are the same."""
    policy, critic, batch = losses_of()
    found = []
    for junk in (1.0, -50.0):
        other = {name: value.clone() for name, value in batch.items()}
        for name in ("input", "action", "advantage", "target", "old_log_prob"):
            other[name][1, 5:] = junk
        for network in (policy, critic):
            network.zero_grad()
        loss, info = rl2.ppo_loss(policy, critic, other, SETTINGS)
        loss.backward()
        found.append([loss, *info.values(), *(p.grad.clone() for network in (policy, critic)
                                              for p in network.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found))


# ---------------------------------------------------------------- an iteration
def test_every_epoch_sees_every_trial_once(monkeypatch):
    """In an order of its own, against what the acting policy fixed before the first step."""
    seen, fixed = [], []
    some_trials = recurrent.some_trials

    def watched(trials, which, device):
        seen.append(which.tolist())
        fixed.append(trials["old_log_prob"].clone())
        return some_trials(trials, which, device)
    monkeypatch.setattr(rl2, "some_trials", watched)
    settings = rl2.Settings(hidden=6, memory=5, trials=3, trial_episodes=2, iterations=1, epochs=3,
                            minibatches=4)
    list(rl2.train(point_problem(3), settings))
    epochs = [sum(seen[k:k + 4], []) for k in (0, 4, 8)]
    assert len(seen) == 12 and all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert all(torch.equal(one, fixed[0]) for one in fixed)


# ---------------------------------------------------------------- what is learned
LEARN = rl2.Settings(hidden=32, memory=32, trial_episodes=2, trials=10, iterations=150,
                     expert_reward_scale=1.0)
GOALS = new_goals(5, 40)


class Shuffled(recurrent.Adapter):
    """Every reward that it is told is that of another task's episode, chosen anew at each step."""
    order = np.random.default_rng(0)

    def act(self, observation, last=None, explore=True):
        if last is not None:
            last = last | {"reward": self.order.permutation(last["reward"])}
        return super().act(observation, last, explore)

    def update(self, episodes):
        super().update(episodes | {"rewards": self.order.permutation(episodes["rewards"])})


def first_and_second(adapter):
    """Mean returns of mean actions in the first and in the second episode, on new goals."""
    return returns_by_round(adapter, 1, 1, GOALS)


def learned(method, settings, count=20):
    """(returns with the task's own rewards, with shuffled ones) of a trained adapter."""
    tested = []
    for _ in method.train(point_problem(count, tested.append), settings):
        pass
    policy = detached(tested[0].network.state_dict())
    return first_and_second(tested[0]), first_and_second(Shuffled(policy, CircleGoal(), settings))


@pytest.mark.slow
def test_the_second_episode_is_better_by_what_the_first_found_out():
    """Who knows the goal gets -1.3, who stays -10. With shuffled rewards the gain is gone."""
    (first, second), shuffled = learned(rl2, LEARN)
    assert second > -2.5 and second > first + 1, (first, second)
    assert shuffled[1] < -6, shuffled


class TrialEnv(gymnasium.Env):
    """A trial of two episodes as one episode, with RL^2's input as observation."""
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (6,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, goals):
        self.batch, self.goals = PointBatch(1, CircleGoal()), goals

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.goal, self.episode = self.goals[self.np_random.integers(len(self.goals))], 0
        return self._begin(np.zeros(4)), {}

    def _begin(self, context):
        place, _ = self.batch.reset(options={"task": self.goal[None]})
        return np.r_[place[0], context].astype(np.float32)

    def step(self, action):
        place, reward, _, over, _ = self.batch.step(action[None])
        context = np.r_[np.clip(action, -1, 1), reward, over].astype(np.float32)
        self.episode += int(over[0])
        done = self.episode == 2
        observation = np.r_[place[0], context].astype(np.float32)
        if over[0] and not done:
            observation = self._begin(context)
        return observation, float(reward[0]), done, False, {}


def test_the_trial_as_one_episode_gives_the_same_inputs():
    """What another library's learner would be given is what ours sees."""
    problem, agent = point_problem(3), make_agent(settings=rl2.Settings(
        hidden=6, memory=5, trials=1, trial_episodes=2, expert_reward_scale=1.0))
    trials = recurrent.joined([steps for steps, _ in play(agent, problem, agent.settings)])
    for row in range(3):
        env = TrialEnv(problem.tasks[row:row + 1])
        found = [env.reset(seed=0)[0]]
        for t, action in enumerate(trials["action"][row].numpy()):
            observation, reward, done, *_ = env.step(action)
            assert done == (t == 19) and reward == pytest.approx(float(trials["reward"][row, t]))
            found.append(observation)
        assert np.allclose(found[:-1], trials["input"][row], atol=1e-5)


@pytest.mark.slow
def test_against_recurrent_ppo_of_sb3_contrib():
    """The same trials, as many steps, comparable sizes: ours is at most 1 behind in episode two."""
    sb3_contrib = pytest.importorskip("sb3_contrib")
    from stable_baselines3.common.vec_env import DummyVecEnv
    problem = point_problem(20)
    (_, ours), _ = learned(rl2, LEARN)
    envs = DummyVecEnv([lambda: TrialEnv(problem.tasks)] * 200)
    model = sb3_contrib.RecurrentPPO(
        "MlpLstmPolicy", envs, n_steps=20, batch_size=1000, n_epochs=LEARN.epochs, seed=0,
        learning_rate=LEARN.memory_rate, gamma=LEARN.trial_discount, clip_range=LEARN.clip,
        gae_lambda=LEARN.trial_lambda, ent_coef=LEARN.entropy_weight, device="cpu",
        policy_kwargs=dict(lstm_hidden_size=32, net_arch=[32], log_std_init=math.log(0.5)))
    model.learn(LEARN.iterations * 200 * 20)
    # Two episodes with mean actions, its memory kept, on goals that neither was trained on.
    trials = [TrialEnv(goal[None]) for goal in GOALS]
    observation = np.stack([trial.reset(seed=0)[0] for trial in trials])
    state, start, returns = None, np.ones(len(GOALS), bool), np.zeros((20, len(GOALS)))
    for t in range(20):
        action, state = model.predict(observation, state, start, deterministic=True)
        steps = [trial.step(one) for trial, one in zip(trials, action)]
        observation, start = np.stack([step[0] for step in steps]), np.zeros(len(GOALS), bool)
        returns[t] = [step[1] for step in steps]
    theirs = returns[10:].sum(0).mean()
    assert ours > theirs - 1, (ours, theirs)
