"""Tests of the memory that rl2.py and incontext.py share: what goes in, when it is emptied."""
import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from baselines import incontext, recurrent, rl2
from evaluate import evaluate
from settings import UserError, random_streams
from tests.conftest import (
    ARGUMENTS,
    FRAGILE,
    PUSH,
    make_problem,
    result_of,
    start,
    through_bytes,
)
from tests.point_task import CircleGoal, PointEnvironments, point_problem
from tests.test_meta_training import same

SMALL = dict(hidden=6, memory=5, trials=2, trial_episodes=3, init_std=0.8, min_std=0.1,
             expert_reward_scale=0.5)
POINT, FEW = CircleGoal(), rl2.Settings(**SMALL)


def random_policy(family, settings, seed=0):
    """Parameters of a policy whose outputs depend much on all that it sees and remembers."""
    generator = torch.Generator().manual_seed(seed)
    policy = recurrent.Policy(family, settings, generator)
    return {name: value if name == "log_std" else torch.randn(value.shape, generator=generator)
            for name, value in policy.state_dict().items()}


def make_agent(family=POINT, settings=FEW, seed=0):
    return recurrent.Adapter(random_policy(family, settings, seed), family, settings)


def play(agent, problem, settings=FEW, seed=1):
    """(steps, episodes) of every episode of a trial."""
    generator = torch.Generator().manual_seed(seed)
    return list(recurrent.play_trials(agent, problem, settings, generator,
                                      [agent.act] * settings.trial_episodes))


def numpy_gru(params, x):
    """(outputs (L, out), hidden state after every step (L, memory)) of one trial (L, inputs)."""
    p = {name: value.double().numpy() for name, value in params.items()}
    h, outputs, hidden = np.zeros(p["gru.weight_hh_l0"].shape[1]), [], []
    for row in x:
        encoded = np.maximum(p["encoder.weight"] @ row + p["encoder.bias"], 0)
        from_x = np.split(p["gru.weight_ih_l0"] @ encoded + p["gru.bias_ih_l0"], 3)
        from_h = np.split(p["gru.weight_hh_l0"] @ h + p["gru.bias_hh_l0"], 3)
        reset, keep = (1 / (1 + np.exp(-(from_x[i] + from_h[i]))) for i in (0, 1))
        h = (1 - keep) * np.tanh(from_x[2] + reset * from_h[2]) + keep * h
        head = np.maximum(p["head.weight"] @ np.r_[encoded, h] + p["head.bias"], 0)
        outputs.append(p["output.weight"] @ head + p["output.bias"])
        hidden.append(h)
    return np.array(outputs), np.array(hidden)


def inputs_by_hand(episodes, family, settings, row):
    """What the network must see of one trial, (L, inputs), from results of `envs.rollout`."""
    action, reward, ended, out = np.zeros(family.action_size), 0.0, 0.0, []
    for episode in episodes:
        for t in range(int(episode["mask"][row].sum())):
            seen = (episode["observations"][row, t] - family.observation_centre)
            out.append(np.r_[seen / family.observation_scale, action,
                             settings.expert_reward_scale * reward, ended])
            action = np.clip(episode["actions"][row, t], -1, 1)
            reward, ended = episode["rewards"][row, t], 0.0
        ended = 1.0
    return np.array(out)


# ---------------------------------------------------------------- memory
@pytest.mark.parametrize("family", [POINT, FRAGILE])
def test_memory_lasts_through_a_trial_and_is_empty_in_the_next(family):
    """Input, hidden state and mean action of every step, by hand; the second trial as a first one.

    With early ends, too: nothing of the steps after them is taken in.
    """
    problem = point_problem(3) if family is POINT else make_problem(
        PUSH.training_tasks(3), family=family)
    agent = make_agent(family)
    for seed in (1, 2):
        hidden = []
        played = []
        for steps, episodes in recurrent.play_trials(
                agent, problem, FEW, torch.Generator().manual_seed(seed), [agent.act] * 3):
            played.append((steps, episodes))
            hidden.append(agent.memory["hidden"])
        trials = recurrent.joined([steps for steps, _ in played])
        lengths = trials["mask"].sum(1).int().tolist()
        assert (min(lengths) < 3 * family.horizon) == (family is FRAGILE)
        ends = np.cumsum([episodes["mask"].sum(1) for _, episodes in played], axis=0).astype(int)
        for row in range(6):
            expected = inputs_by_hand([episodes for _, episodes in played], family, FEW, row)
            x = trials["input"][row, :lengths[row]].numpy()
            assert len(expected) == lengths[row] and np.allclose(x, expected, atol=1e-5)
            means, states = numpy_gru(agent.network.state_dict(), expected)
            found, _ = agent.network(trials["input"][row:row + 1])
            assert np.allclose(found[0, :lengths[row]].detach(), means, atol=2e-4)
            # The last update gives back what was held, the memory before the last episode.
            for episode in (0, 1):
                assert np.allclose(hidden[episode][row], states[ends[episode, row] - 1], atol=1e-4)
        assert (trials["input"][:, 0, family.observation_size:] == 0).all()


def test_an_empty_memory_is_that_of_a_new_adapter():
    """After a trial on other tasks, `begin` leaves nothing: the same actions as at the first time.
    """
    agent, problem = make_agent(), point_problem(3)
    first = [episodes["actions"] for _, episodes in play(agent, problem)]
    play(agent, point_problem(4), seed=2)
    again = [episodes["actions"] for _, episodes in play(agent, problem)]
    assert np.array_equal(first, again)
    assert not np.allclose(first[0], first[1]), "noise and memory differ from episode to episode"


def test_an_episodes_last_reward_is_remembered():
    """It reaches the memory through `update` alone: another one changes the next episode."""
    problem, agent = point_problem(3), make_agent()
    agent.begin(3, torch.Generator().manual_seed(0))
    episodes = problem.rollout(agent.act, problem.tasks, 1)
    observation, means = episodes["observations"][:, 0], []
    for reward in (-1.0, 2.0):
        taught = copy.deepcopy(agent)
        rewards = episodes["rewards"].copy()
        rewards[:, -1] = reward
        taught.update(episodes | {"rewards": rewards})
        means.append(taught.act(observation, explore=False))
        x = taught.seen[0].numpy()
        assert np.allclose(x[:, 4], 0.5 * reward) and (x[:, 5] == 1).all()
        assert np.allclose(x[:, 2:4], np.clip(episodes["actions"][:, -1], -1, 1))
    assert np.abs(means[0] - means[1]).max() > 1e-3


def test_the_action_recorded_is_the_one_sent_and_the_one_remembered_is_the_one_executed():
    """Samples reach beyond [-1, 1]: recorded as they are, remembered as the environment clips."""
    problem, agent, sent = point_problem(3), make_agent(), []

    def act(observation, last):
        sent.append(agent.act(observation, last))
        return sent[-1]
    agent.begin(6, torch.Generator().manual_seed(0))
    (steps, episodes), *_ = recurrent.play_trials(
        agent, problem, FEW, torch.Generator().manual_seed(0), [act])
    assert np.array_equal(steps["action"], np.stack(sent, 1)) and np.abs(sent).max() > 1.5
    moved = np.diff(episodes["observations"], axis=1) / 0.25
    assert np.allclose(moved, np.clip(sent, -1, 1).swapaxes(0, 1), atol=1e-6)
    assert np.allclose(steps["input"][:, 1:, 2:4], moved[:, :-1], atol=1e-6)


def test_noise_is_that_of_the_policy_and_mean_actions_have_none():
    """(action - mean) / std is standard normal, correlated as the settings say, new per episode."""
    settings = dataclasses.replace(FEW, trials=300, expert_noise_correlation=0.7)
    agent = make_agent(settings=settings)
    agent.network.log_std.data = torch.tensor([-1.0, 0.5])
    played = play(agent, point_problem(3), settings)
    trials = recurrent.joined([steps for steps, _ in played])
    noise = (trials["action"] - agent.network(trials["input"])[0]).detach()
    noise = (noise / torch.tensor([-1.0, 0.5]).exp()).numpy()
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    neighbours = [np.mean(noise[:, t] * noise[:, t + 1]) for t in range(29)]
    inside = [t not in (9, 19) for t in range(29)]
    assert np.allclose(neighbours, np.where(inside, 0.7, 0.0), atol=0.1)
    agent.begin(900, torch.Generator())
    quiet = agent.act(np.zeros((900, 2)), explore=False)
    assert np.allclose(quiet, agent.network(trials["input"][:, :1])[0][:, 0].detach(), atol=1e-6)


@pytest.mark.parametrize("choice", ["hold", "go on"])
def test_after_the_trial(choice):
    """"hold": every further episode starts with the memory that the last one of a trial had."""
    agent = make_agent(settings=dataclasses.replace(FEW, after_trial=choice))
    problem, starts = point_problem(3), []
    agent.begin(3, torch.Generator().manual_seed(0))
    for _ in range(6):
        starts.append(agent.memory)
        agent.update(problem.rollout(agent.act, problem.tasks, 1))
    for k in range(1, 6):
        alike = torch.equal(starts[k]["hidden"], starts[k - 1]["hidden"])
        assert alike == (choice == "hold" and k > 2)
    once = recurrent.Adapter(random_policy(POINT, FEW), POINT, dataclasses.replace(
        FEW, after_trial=choice, trial_episodes=1))
    once.begin(3, torch.Generator().manual_seed(0))
    once.update(problem.rollout(once.act, problem.tasks, 1))
    assert once.memory["hidden"].any() == (choice == "go on"), "a trial of one: nothing to remember"


def test_being_measured_does_not_disturb_memory():
    """After two rounds of evaluate.py's protocol: as if nobody had measured, or played a third."""
    problem, agent, lone = point_problem(3), make_agent(), make_agent()
    out = evaluate(PointEnvironments(POINT), agent, problem.tasks, 2, 1, seed=0)
    assert [row["gradient_steps"] for row in out.lists["held_out"][::3]] == [0, 1, 2]
    assert out.env_steps == 3 * 10 * (3 + 3)
    lone.begin(3, random_streams(0, "evaluation", 0)[1])
    for _ in range(2):
        lone.update(problem.rollout(lone.act, problem.tasks, 1))
    assert same(agent.memory, lone.memory) and agent.memory["hidden"].any()


# ---------------------------------------------------------------- trials as batches
def test_joined_keeps_every_visited_step_in_order():
    """Against a loop over trials; the last transition of every episode is there."""
    rng = np.random.default_rng(0)
    parts = []
    for _ in range(3):
        lengths = rng.integers(1, 5, size=4)
        parts.append({"reward": torch.as_tensor(rng.normal(size=(4, 4))),
                      "input": torch.as_tensor(rng.normal(size=(4, 4, 2))),
                      "mask": torch.as_tensor(np.arange(4) < lengths[:, None]).double()})
    trials = recurrent.joined(parts)
    for row in range(4):
        for name in ("reward", "input"):
            kept = np.concatenate([part[name][row][part["mask"][row] > 0] for part in parts])
            assert np.array_equal(trials[name][row, :len(kept)], kept)
        assert trials["mask"][row].tolist() == [1.0] * len(kept) + [0.0] * (12 - len(kept))
    some = recurrent.some_trials(trials, np.array([2, 0]), "cpu")
    longest = int(trials["mask"][[2, 0]].sum(1).max())
    assert torch.equal(some["input"], trials["input"][[2, 0], :longest])


def test_padding_changes_nothing_of_visited_steps():
    """Neither outputs nor gradients, whatever stands behind a trial's end."""
    agent = make_agent(FRAGILE)
    played = play(agent, make_problem(PUSH.training_tasks(3), family=FRAGILE))
    trials = recurrent.joined([steps for steps, _ in played])
    mask = trials["mask"]
    assert 0 < mask.mean() < 1
    found = []
    for padding in (0.0, 1e3):
        x = torch.where(mask[..., None] > 0, trials["input"], torch.tensor(padding))
        agent.network.zero_grad()
        outputs = agent.network(x)[0]
        recurrent.mean_over(outputs.sum(-1), mask).backward()
        found.append([outputs[mask > 0]] + [p.grad.clone() for p in agent.network.parameters()
                                            if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*found))


def test_weights_start_small_at_the_output_and_from_the_runs_seed_alone():
    policies = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(policies))  # torch's own generator must not matter
        policies.append(recurrent.Policy(POINT, FEW, torch.Generator().manual_seed(seed)))
    states = [policy.state_dict() for policy in policies]
    assert same(states[0], states[1]) and not same(states[0], states[2])
    bound = 1 / np.sqrt(5)
    assert 0.7 * bound < states[0]["gru.weight_hh_l0"].abs().max() <= bound
    assert states[0]["output.weight"].abs().max() <= 0.01 / np.sqrt(6)
    assert states[0]["log_std"].exp().tolist() == pytest.approx([0.8, 0.8])


# ---------------------------------------------------------------- training as a whole
BRIEF = SMALL | dict(iterations=3)
METHODS = {"rl2": (rl2, rl2.Settings(method="rl2", epochs=2, minibatches=2, **BRIEF)),
           "incontext": (incontext, incontext.Settings(method="incontext", meta_steps=3,
                                                       trial_batch=4, relabelled=1, **BRIEF))}


def train(name, state=None, problem=None, **changes):
    """([(state, its copy at once, metrics)], the adapter that meta-test got)."""
    method, settings = METHODS[name]
    settings, tested = dataclasses.replace(settings, **changes), []
    problem = problem or point_problem(3)
    problem.meta_test = tested.append
    yielded = [(state, copy.deepcopy(state), metrics)
               for state, metrics in method.train(problem, settings, state)]
    return yielded, tested[0]


@pytest.mark.parametrize("name", METHODS)
def test_training_goes_on_with_the_same_bits(name):
    """From each yielded state, in memory or from a file; such a state never changes."""
    yielded, tested = train(name)
    assert [metrics["iteration"] for *_, metrics in yielded] == [1, 2, 3]
    assert yielded[-1][2]["progress"] == 1
    for done, (state, kept, _) in enumerate(yielded, start=1):
        for resumed in (state, through_bytes(kept)):
            rest, adapter = train(name, resumed)
            assert same([one[1:] for one in rest], [one[1:] for one in yielded[done:]])
            assert same(adapter.network.state_dict(), tested.network.state_dict())
        assert same(state, kept)
    assert not same(yielded[0][0]["policy"], yielded[1][0]["policy"]), "it learns"
    finished, adapter = train(name, yielded[-1][0] | {"training": None})
    assert not finished and same(adapter.network.state_dict(), yielded[-1][0]["policy"])


@pytest.mark.parametrize("name", METHODS)
def test_all_steps_are_counted_and_each_episode_has_its_row(name):
    """With early ends: the sum of masks; returns of a trial's first and last episode."""
    problem, seen = make_problem(PUSH.training_tasks(2), family=FRAGILE, experts=lambda x, _: (
        np.zeros((*x.shape[:-1], 3), np.float32))), []
    rollout = problem.rollout

    def watched(policy, tasks, episodes):
        assert episodes == 2 and np.array_equal(tasks, problem.tasks)
        seen.append(rollout(policy, tasks, episodes))
        return seen[-1]
    problem.rollout = watched
    yielded, _ = train(name, problem=problem)
    assert len(seen) == 9
    steps = np.cumsum([episodes["mask"].sum() for episodes in seen])
    assert steps[-1] < 9 * 4 * FRAGILE.horizon
    for k, (*_, metrics) in enumerate(yielded):
        assert metrics["env_steps"] == steps[3 * k + 2] and metrics["divergences"] == 0
        for prefix, episodes in (("", seen[3 * k]), ("adapted_", seen[3 * k + 2])):
            assert metrics[f"{prefix}return"] == pytest.approx(episodes["rewards"].sum(1).mean())
            assert metrics[f"{prefix}distance"] == pytest.approx(
                episodes["distances"][:, -1].mean())


@pytest.mark.parametrize("name", METHODS)
def test_bad_input_is_refused_in_one_line(name):
    pictures = SimpleNamespace(image_shape=(2, 2, 3), name="pictures")
    with pytest.raises(UserError, match=f"{name} sees no images: choose another task than pict"):
        train(name, problem=SimpleNamespace(family=pictures))
    problem = point_problem(3)
    problem.rollout = lambda *_: pytest.fail("nothing may begin")
    problem.train_experts = lambda: None
    if name == "incontext":
        with pytest.raises(UserError, match="leave --demos out"):
            train(name, problem=problem)


@pytest.mark.parametrize("name", METHODS)
def test_numbers_that_are_not_finite_end_training(name):
    problem = point_problem(3)
    family = problem.family
    family.observation_scale = np.nan  # a broken task: every input is nan
    problem.family = family
    with pytest.raises(FloatingPointError, match="not finite in iteration 1"):
        train(name, problem=problem)


@pytest.mark.parametrize("name", METHODS)
def test_learning_rates_fall_and_the_noise_has_a_floor(name):
    yielded, _ = train(name, memory_rate=0.5, init_std=0.1, min_std=0.09, final_rate=0.2)
    rates = [state["training"]["optimiser"]["param_groups"][0]["lr"] for state, *_ in yielded]
    assert rates == pytest.approx([0.5, 0.5 * (1 - 0.8 / 3), 0.5 * (1 - 1.6 / 3)])
    smallest = min(state["policy"]["log_std"].min() for state, *_ in yielded)
    assert smallest >= np.log(0.09) - 1e-6


# ---------------------------------------------------------------- the whole command
@pytest.mark.parametrize("name", METHODS)
def test_the_command_runs_every_phase(tmp_path, name):
    """On push: its own setting, own --quick; steps of training and of every test round by hand."""
    out = tmp_path / "run"
    command = ["--method", name, *ARGUMENTS, "--set", "trial_episodes=2", "--out", out]
    assert start(*command) == 0
    result = result_of(out)
    settings = result["settings"]
    assert (settings["iterations"], settings["trials"], settings["memory"]) == (2, 2, 32)
    assert result["env_steps"]["meta_training"] == 50 * 2 * 2 * 2 * 2
    assert (result["env_steps"]["experts"] > 0) == (name == "incontext")
    experts = 2 * (name == "incontext")  # on held-out tasks and on training tasks
    assert result["env_steps"]["evaluation"] == 50 * 2 * (6 * 3 + 6 + experts)
    assert [row["gradient_steps"] for row in result["held_out"][::2]] == [0, 3, 6, 9, 12, 15]
    assert result["no_adaptation"] == [] and result["method"] == name
