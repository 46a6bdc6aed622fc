"""Tests of PEARL: the posterior in closed form, whose transitions go where, gradients, learning."""
import copy
import math

import numpy as np
import pytest
import torch

import sac
from baselines import pearl
from envs import Environments
from evaluate import evaluate
from settings import UserError, random_streams
from tasks import make_family, task_set
from tests.conftest import (
    ARGUMENTS,
    PUSH,
    make_problem,
    numpy_mlp,
    relative_error,
    result_of,
    start,
    through_bytes,
)
from tests.test_meta_training import same

CENTRE = np.array([0, 0.6, 0.1, 0, 0.65, 0.02])
TASKS = task_set(PUSH, "train", 3)
TINY = pearl.Settings(training_tasks=3, expert_width=8, expert_noise_correlation=0.6, latent=2,
                      collections=3, trial_episodes=2, updates_per_step=0.05, meta_batch=2,
                      task_batch=16, context_batch=12, recent_trials=2, seed=3)


class Sturdy(type(PUSH)):
    """Push, but two episodes of three end early: when the arm's base has turned."""

    def ended(self, state):
        return np.abs(state[:, 1] - 2.1) > 0.13


STURDY = Sturdy()


def changed(**changes):
    return pearl.Settings(**(vars(TINY) | changes))


def recording(problem):
    """The problem, and a list that its rollouts go to."""
    kept, inner = [], problem.rollout
    problem.rollout = lambda *arguments: kept.append(inner(*arguments)) or kept[-1]
    return problem, kept


def collected(settings, collections=1):
    """A learner after some collections without gradient steps, and all episodes, on STURDY."""
    problem, kept = recording(make_problem(TASKS, family=STURDY))
    learner = pearl.Learner(problem, settings, None)
    for _ in range(collections):
        assert learner.begin_collection()
        pearl.collect(learner, problem)
    return learner, kept


def transitions(episodes, task, settings):
    """Every transition of a task's episode, scaled by hand: (length, c)."""
    T = int(episodes["mask"][task].sum())
    x = (episodes["observations"][task] - CENTRE) / 0.1
    reward = settings.expert_reward_scale * episodes["rewards"][task, :T, None]
    return np.concatenate([x[:T], episodes["actions"][task, :T], reward], axis=1)


def factors(encoder, context):
    """Mean and variance of every transition's factor, by loops in numpy."""
    rows = np.array([numpy_mlp(encoder, 0, c) for c in context])
    mean, raw = np.split(rows, 2, axis=1)
    return mean, np.log1p(np.exp(raw))


def product(mean, variance):
    """Mean and variance of a product of Gaussians (N, latent)."""
    precision = (1 / variance).sum(0)
    return (mean / variance).sum(0) / precision, 1 / precision


# ---------------------------------------------------------------- the encoder
def test_posterior_is_the_product_of_its_factors():
    """Against densities multiplied on a grid; no matter the order; parts add up; masks leave out.
    """
    generator = torch.Generator().manual_seed(0)
    encoder = [p.double() for p in sac.init_mlp([4, 8, 8, 6], 1, generator)]
    context = torch.randn(2, 9, 4, generator=generator, dtype=torch.float64)
    parts = pearl.evidence(encoder, context)
    mean, variance = pearl.posterior(*parts)
    grid = torch.linspace(-6, 6, 24001, dtype=torch.float64)
    for i in range(2):
        m, v = map(torch.as_tensor, factors(encoder, context[i].numpy()))
        normal = torch.distributions.Normal(m, v.sqrt())
        density = normal.log_prob(grid[:, None, None]).sum(1)  # (grid, latent)
        share = (density - density.amax(0)).exp()
        share = share / share.sum(0)
        expected = (share * grid[:, None]).sum(0)
        spread = (share * (grid[:, None] - expected).square()).sum(0)
        assert torch.allclose(mean[i], expected, rtol=1e-6, atol=1e-8)
        assert torch.allclose(variance[i], spread, rtol=1e-6)
    shuffled = pearl.evidence(encoder, context[:, torch.randperm(9, generator=generator)])
    halves = [pearl.evidence(encoder, context[:, part]) for part in (slice(4), slice(4, 9))]
    mask = (torch.arange(9) < 4).double().expand(2, 9)
    for some, equal in ((shuffled, parts), ([a + b for a, b in zip(*halves)], parts),
                       (pearl.evidence(encoder, context, mask), halves[0])):
        for one, other in zip(some, equal, strict=True):
            assert torch.allclose(one, other, rtol=1e-12)
    mean, variance = pearl.posterior(*pearl.evidence(encoder, context, 0 * mask))
    assert not mean.any() and (variance == 1).all(), "the prior"


def test_divergence_from_the_prior_and_samples():
    """Against torch.distributions; a sample's mean and spread."""
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(7, 5, generator=generator)
    variance = torch.rand(7, 5, generator=generator) * 2 + 0.01
    normal = torch.distributions.Normal(mean, variance.sqrt())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0, 1)).sum(-1)
    assert torch.allclose(pearl.kl_from_prior(mean, variance), kl, rtol=1e-5)
    z = pearl.draw(mean.expand(40000, 7, 5), variance, generator)
    assert torch.allclose(z.mean(0), mean, atol=0.05)
    assert torch.allclose(z.var(0), variance, rtol=0.05)


@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_the_encoders_gradient_is_of_the_critics_predictions_and_the_mean_divergence(beta):
    """By hand, Eq. 3 and the second term of Eq. 1; after Adam's first step, a tenth of it.

    Neither targets nor the actor's loss reach the encoder, though they depend on z.
    """
    learner, _ = collected(changed(kl_weight=beta))
    context, batch = learner.sample()
    old = learner.learner.state_dict()
    mean, variance = pearl.posterior(*pearl.evidence(learner.encoder, context))
    state = learner.generator.get_state()
    z = pearl.draw(mean, variance, learner.generator)
    noise = learner.generator.get_state()
    learner.minimise(pearl.given_z(batch, z), pearl.kl_from_prior(mean, variance))

    encoder = [p.detach().clone().requires_grad_() for p in learner.encoder]
    with torch.no_grad():  # the step that was just taken
        for own, p in zip(encoder, learner.encoder, strict=True):
            moment = learner.learner.optimiser.state[p]["exp_avg"] * 10
            own += 1e-3 * moment / (moment.abs() + 1e-8)
    rows = sac.mlp(encoder, context.flatten(0, 1)[None])[0].view(2, 12, 4)
    precision = 1 / torch.nn.functional.softplus(rows[..., 2:])
    mean = (rows[..., :2] * precision).sum(1) / precision.sum(1)
    normal = torch.distributions.Normal(mean, precision.sum(1) ** -0.5)
    epsilon = torch.randn(2, 2, generator=learner.generator.set_state(state))
    z = (normal.mean + normal.stddev * epsilon).repeat_interleave(16, 0)
    flat = {name: value.flatten(0, 1) for name, value in batch.items()}
    seen, after = (torch.cat([flat[name], told], 1)[None] for name, told in (
        ("observation", z), ("next_observation", z.detach())))
    next_noise, actor_noise = torch.randn(2, 1, 32, 3, generator=learner.generator.set_state(noise))
    data = {name: value[None] for name, value in flat.items()} | {
        "observation": seen, "next_observation": after}
    critic, actor, target = (old[name] for name in ("critic", "policy", "target_critic"))
    loss, _ = sac.critic_loss(critic, target, actor, torch.ones(1, 1), data, next_noise)
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0, 1)).sum(-1)
    total = loss + beta * (kl[0] + kl[1]) / 2
    by_hand = torch.autograd.grad(total, encoder, retain_graph=True)
    acting = sac.policy_loss(actor, critic, torch.ones(1, 1), data, actor_noise)[0]
    other = torch.autograd.grad(acting, encoder)
    for p, expected, wrong in zip(learner.encoder, by_hand, other, strict=True):
        moment = learner.learner.optimiser.state[p]["exp_avg"] * 10
        assert relative_error(moment, expected) < 1e-3
        assert wrong.norm() > 1e-3 * expected.norm(), "the actor's loss would tell"


# ---------------------------------------------------------------- whose transitions go where
def test_trials_sample_z_from_the_prior_and_then_from_the_posterior():
    """Uniform actions first. Then, by hand, a z that an episode keeps, and noise that lasts."""
    learner, kept = collected(TINY, collections=2)
    first = np.concatenate([part["actions"] for part in kept[:2]])
    assert 0.99 < np.abs(first).max() <= 1 and abs((first ** 2).mean() * 3 - 1) < 0.15
    generator, context = random_streams(3, "meta-training", 2)[1], [[], [], []]
    for episodes in kept[2:]:
        belief = [(np.zeros(2), np.ones(2)) if not seen else product(
            *factors(learner.encoder, np.concatenate(seen))) for seen in context]
        mean, variance = (torch.as_tensor(np.array(x), dtype=torch.float32) for x in zip(*belief))
        z, noise = mean + variance.sqrt() * torch.randn(3, 2, generator=generator), None
        for t in range(50):
            fresh = torch.randn(1, 3, 3, generator=generator)
            noise = fresh if noise is None else 0.6 * noise + 0.8 * fresh
            x = torch.as_tensor((episodes["observations"][:, t] - CENTRE) / 0.1)
            x = torch.cat([x.float(), z], dim=1)[None]
            action, _ = sac.squashed_sample(learner.learner.policy, x, noise)
            assert np.allclose(episodes["actions"][:, t], action[0].detach(), atol=1e-4)
        for task in range(3):
            context[task].append(transitions(episodes, task, TINY))


def test_everything_executed_is_remembered_and_nothing_else(monkeypatch):
    """Episodes end early. The action in the replay is the one that the environment executed, also
    of the last transition; the state after it is that of the recorded episode.
    """
    executed, inner = [], type(STURDY).next_control

    def spy(self, control, action):
        executed.append(action.copy())
        return inner(self, control, action)
    monkeypatch.setattr(type(STURDY), "next_control", spy)
    learner, kept = collected(TINY, collections=2)
    actions = np.stack(executed).reshape(4, 50, 3, 3)  # (episode, t, task, act)
    ends = set()
    for task in range(3):
        stored = {name: x[task, :learner.replay.sizes[task]]
                  for name, x in learner.replay.data.items()}
        first = 0
        for episode, episodes in enumerate(kept):
            T = int(episodes["mask"][task].sum())
            part = {name: x[first:first + T] for name, x in stored.items()}
            assert np.array_equal(part["action"], np.float32(actions[episode, :T, task]))
            observations = np.float32(episodes["observations"][task])
            assert np.array_equal(part["observation"], observations[:T])
            assert np.array_equal(part["next_observation"], observations[1:T + 1])
            assert np.array_equal(part["reward"][:, 0], np.float32(episodes["rewards"][task, :T]))
            ended = part["terminated"][:, 0]  # never at the time limit
            assert not ended[:-1].any() and ended[-1] == episodes["terminated"][task]
            assert ended[-1] == (T < 50)
            ends, first = ends | {T < 50}, first + T
        assert first == learner.replay.sizes[task]
    assert ends == {True, False}
    assert learner.env_steps == sum(part["mask"].sum() for part in kept) < 600


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_contexts_are_recent_trials_batches_are_not_and_rewards_are_the_tasks(share):
    """Each row is found by its action among all episodes. Relabelled rewards: those of the family.

    A context is of one trial, that of its task or, relabelled, maybe of another. Of a half that may
    be of any task, one in three is the task's own.
    """
    settings = changed(relabelled=share, task_batch=4000, context_batch=3000,
                       expert_discount=0.95)
    learner, kept = collected(settings, collections=3)
    place = {np.float32(part["actions"][task, t]).tobytes(): (k, task, t)
             for k, part in enumerate(kept) for task in range(3)
             for t in range(int(part["mask"][task].sum()))}

    def found(actions, rewards, task):
        """(episode, task, step) of each row; its reward must be that of `task`."""
        rows = np.array([place[action.tobytes()] for action in actions.numpy()])
        outcome, executed = (np.array([kept[k][name][s, t] for k, s, t in rows])
                             for name in ("outcomes", "actions"))
        paid = 0.1 * PUSH.rewards_of(outcome, executed, np.repeat(TASKS[[task]], len(rows), axis=0))
        assert np.allclose(rewards, paid, atol=1e-4)
        return rows.T

    def all_of(episodes, task):
        return {(k, s, t) for k, s, t in place.values() if k in episodes and s == task}
    some = copy.deepcopy(learner.rng).permutation(3)[:2]
    context, batch = learner.sample()
    assert context.shape == (2, 3000, 6 + 3 + 1) and batch["action"].shape == (2, 4000, 3)
    for action, reward, task in zip(batch["action"], batch["reward"], some):
        k, source, t = found(action, reward, task)
        own = {(k, s, t) for k, s, t in zip(k, source, t) if s == task}
        assert own == all_of(range(6), task), "all episodes, also their last transitions"
        expected = 1 - share * 2 / 3
        assert abs((source == task).mean() - expected) <= 4 * math.sqrt(
            expected * (1 - expected) / 4000)
    ended = [kept[k]["terminated"][s] and t == kept[k]["mask"][s].sum() - 1
             for k, s, t in zip(*found(batch["action"][1], batch["reward"][1], some[1]))]
    assert np.array_equal(batch["terminated"][1], ended) and np.allclose(batch["discount"], 0.95)
    sources = set()
    for _ in range(8):
        for c, task in zip(context, some):
            k, source, t = found(c[:, 6:9], c[:, 9], task)
            trial = {2 * (k[0] // 2), 2 * (k[0] // 2) + 1}
            assert len(set(source)) == 1 and set(zip(k, source, t)) == all_of(trial, source[0])
            x = [kept[a]["observations"][b, j] for a, b, j in zip(k, source, t)]
            assert np.allclose(c[:, :6], (np.array(x) - CENTRE) / 0.1, atol=1e-4)
            sources.add((k[0] // 2, source[0] == task))
        some, context = np.array([2, 0]), learner.context(np.array([2, 0]))
    assert sources == {(trial, own) for trial in (1, 2) for own in (True, False)[:1 + (share > 0)]}


def test_context_at_meta_test_comes_from_exploration_alone():
    """Two rounds of three episodes that end early: the posterior of all explored transitions.

    The measured ones never enter. They have mean actions for the posterior's mean.
    """
    settings = changed()
    policy = pearl.Learner(make_problem(TASKS, family=STURDY), settings, None).policy()
    environments, explored, measured = Environments(STURDY, 1), [], []
    adapter, inner = pearl.Adapter(policy, STURDY, settings), environments.rollout

    def rollout(act, tasks, episodes=1):
        exploring = act == adapter.act
        (explored if exploring else measured).append(inner(act, tasks, episodes))
        return (explored if exploring else measured)[-1]
    environments.rollout = rollout
    goals = task_set(PUSH, "held_out", 2)
    evaluate(environments, adapter, goals, 2, 3, seed=0, explore_last=False)
    assert len(explored) == 6 and len(measured) == 3
    assert sum(part["terminated"].sum() for part in explored) > 0
    mean, variance = pearl.posterior(*adapter.context)
    for task in range(2):
        for k, episodes in enumerate(measured):
            seen = [transitions(part, task, settings) for part in explored[:3 * k]]
            m, v = (product(*factors(policy["encoder"], np.concatenate(seen))) if seen
                    else (np.zeros(2), np.ones(2)))
            x = np.concatenate([(episodes["observations"][task, :-1] - CENTRE) / 0.1,
                                np.tile(m, (50, 1))], axis=1)
            actions = np.tanh([numpy_mlp(policy["actor"], 0, row)[:3] for row in x])
            assert np.allclose(episodes["actions"][task], actions, atol=1e-4)
        assert np.allclose(mean[task], m, atol=1e-4) and np.allclose(variance[task], v, rtol=1e-4)
    adapter.begin(2, torch.Generator())
    assert all(not part.any() for part in adapter.context), "new tasks: the prior again"


# ---------------------------------------------------------------- training
def test_training_resumes_with_the_same_bits_and_counts():
    """From a state of memory and from a file's, on episodes that end early. What follows changes
    no state. A finished run goes straight to meta-test.
    """
    met = []

    def run(state=None):
        problem, kept = recording(make_problem(TASKS, family=STURDY, meta_test=met.append))
        out = list(pearl.train(problem, TINY, state))
        return out, kept
    unbroken, kept = run()
    again = [through_bytes(state) for state, _ in unbroken]
    steps = np.cumsum([part["mask"].sum() for part in kept])[1::2]
    for k, (state, metrics) in enumerate(unbroken):
        learner = state["training"]["learner"]
        assert metrics["env_steps"] == state["training"]["env_steps"] == steps[k]
        assert metrics["iteration"] == k + 1 and metrics["progress"] == (k + 1) / 3
        assert learner["optimiser"]["state"][0]["step"] == int(0.05 * steps[k])
        assert learner["optimiser"]["param_groups"][0]["lr"] == 1e-3
        for name, episodes in (("prior_", kept[2 * k]), ("", kept[2 * k + 1])):
            assert metrics[f"{name}return"] == pytest.approx(episodes["rewards"].sum(1).mean())
            assert metrics[f"{name}distance"] == pytest.approx(episodes["distances"][:, -1].mean())
        replay = state["training"]["replay"]
        ends = replay["next_observation"]
        assert len(ends) == 6 * (k + 1) < replay["observation"].shape[1], "half as large"
    for load in (dict, through_bytes):
        resumed, _ = run(load(unbroken[0][0]))
        for (state, metrics), (expected, by_hand) in zip(resumed, unbroken[1:], strict=True):
            assert same(state, expected) and metrics == by_hand
    assert all(same(state, kept) for (state, _), kept in zip(unbroken, again))
    assert run({"policy": unbroken[-1][0]["policy"], "training": None})[0] == []
    assert len(met) == 4 and all(
        same(a.encoder + a.actor, met[0].encoder + met[0].actor) for a in met)
    assert same(met[0].actor, unbroken[-1][0]["policy"]["actor"])
    other = next(pearl.train(make_problem(TASKS), changed(seed=4)))[0]
    assert not same(other["policy"]["encoder"][0], unbroken[0][0]["policy"]["encoder"][0])


def test_what_it_cannot_do_is_said(monkeypatch):
    with pytest.raises(UserError, match="sees no images: .* than push-vision"):
        next(pearl.train(make_problem(TASKS, family=make_family("push-vision")), TINY))
    losses = {"critic_loss": torch.tensor(math.nan), "policy_loss": torch.tensor(1.0)}
    monkeypatch.setattr(sac.SoftActorCritic, "update", lambda *_: losses)
    with pytest.raises(FloatingPointError, match="not finite in collection 1"):
        next(pearl.train(make_problem(TASKS), TINY))


def test_a_run_from_the_command_line(tmp_path):
    """No expert is asked; every step is counted; a round of meta-test has an update per episode."""
    out = tmp_path / "run"
    own = ("latent=2", "kl_weight=0.2", "trial_episodes=3", "updates_per_step=0.01", "task_batch=8",
           "context_batch=8", "relabelled=0.5", "meta_batch=1", "recent_trials=1")
    assert start("--method", "pearl", *ARGUMENTS, *(f"--set={pair}" for pair in own),
                 "--out", out) == 0
    result = result_of(out)
    assert result["method"] == "pearl" and result["experts_held_out"] == []
    assert result["env_steps"]["experts"] == 0
    assert result["env_steps"]["meta_training"] == 3 * 2 * 3 * 50
    assert {row["gradient_steps"] for row in result["held_out"]} == {0, 3, 6, 9, 12, 15}
    assert not (out / "experts.pt").exists() and not (out / "demonstrations.npz").exists()
