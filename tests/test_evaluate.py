"""Tests of meta-test: adapters written by hand, on walks along a line; a baseline; tables."""
import gymnasium
import numpy as np
import pytest
import torch

from baselines import multitask
from envs import Environments
from evaluate import (
    Evaluation,
    band_means,
    band_table,
    by_round,
    closing_table,
    curve_points,
    evaluate,
)
from local_policies import Demonstrations
from policy import imitate, per_task
from tasks import load, task_set
from tasks.base import GymnasiumFamily
from tests.conftest import PUSH, make_problem, with_policy_gradient


class Walk(gymnasium.Env):
    """Observation: place on a line. Action: motion. Beyond 2.5 it ends, and counts as diverged."""
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float64)

    def reset(self, *, seed=None, options=None):
        self.goal, self.place = float(options["task"][0]), 0.0
        return np.zeros(1), {}

    def step(self, action):
        self.place += float(action[0])
        distance, beyond = abs(self.place - self.goal), self.place > 2.5
        return (np.array([self.place]), -distance, beyond, False,
                {"goal_distance": distance, "diverged": beyond})


class Line(GymnasiumFamily):
    name, horizon, success_distance = "line", 4, 0.25
    observation_size = action_size = task_size = 1
    task_low, task_high = np.array([0.0]), np.array([4.0])

    def make_env(self, render_mode=None):
        return Walk()

    def bands(self):
        return [("near", np.array([[1.0], [2.0]])), ("far", np.array([[3.0]]))]


LINE, GOALS = Environments(Line()), np.array([[1.0], [2.0]])


class Marcher:
    """Walks by what it remembers: its steps, and episodes learned from. Task 1 is twice as fast."""
    references = {}

    def __init__(self, sequential):
        self.sequential = sequential

    def begin(self, count, generator):
        self.count, self.steps, self.learned, self.calls = count, 0, 0, []

    def act(self, observation, last=None, explore=True):
        self.calls.append((len(observation), last, explore))
        self.steps += 1
        action = 0.005 * self.steps + 0.07 * self.learned + 0.05 * explore
        speed = np.repeat([1.0, 2.0], len(observation) // self.count)
        return (action * speed)[:, None]

    def update(self, episodes):
        self.learned += len(episodes["rewards"]) // self.count


def march(steps, learned, explore, goal, speed):
    """(rewards, final distance, env steps, diverged) of one episode of a Marcher, by hand."""
    action = 0.005 * (steps + np.arange(1, 5)) + 0.07 * learned + 0.05 * explore
    place = np.cumsum(np.minimum(speed * action, 1.0))
    count = 1 + sum(place[:3] <= 2.5)
    rewards = -abs(place - goal) * (np.arange(4) < count)
    return rewards, abs(place[count - 1] - goal), count, place[count - 1] > 2.5


def entry(goal, walks, **counts):
    """The row of result.json for a task's walks, by hand."""
    distance = np.mean([distance for _, distance, *_ in walks])
    return counts | {"task": [goal], "return": np.mean([rewards.sum() for rewards, *_ in walks]),
                     "final_distance": distance, "success": distance <= 0.25}


def agree(rows, expected):
    return all(row["task"] == by_hand["task"] and {**row, "task": 0} == pytest.approx(
        {**by_hand, "task": 0}) for row, by_hand in zip(rows, expected, strict=True))


@pytest.mark.parametrize("sequential, explore_last", [(True, True), (False, True), (True, False)])
def test_protocol(sequential, explore_last):
    """Two rounds of three episodes: every row, count and call of both kinds of adapter by hand.

    K episodes one after the other, each with an update, or side by side, then one. An adapter's
    memory lasts over episodes. Being measured does not change it, and a copy plays the last round.
    """
    adapter = Marcher(sequential)
    out = evaluate(LINE, adapter, GOALS, 2, 3, seed=0, explore_last=explore_last)
    parts, alike = (3, 1) if sequential else (1, 3)
    steps, learned, walks, explored, mean, sampled = 0, 0, [], [], [], []

    def march_both(explore):
        return [march(steps, learned, explore, *task) for task in ((1.0, 1.0), (2.0, 2.0))]
    for k in range(3):
        counts = {"gradient_steps": parts * k, "adaptation_episodes": 3 * k}
        walks += (both := march_both(False))
        mean += [entry(goal, [walk], **counts) for goal, walk in zip((1.0, 2.0), both)]
        at_last = steps, learned
        if k == 2 and not explore_last:
            break
        for part in range(parts):
            explored.append(march_both(True))
            steps, learned = steps + 4, learned + alike * (k < 2 or part < parts - 1)
        sampled += [entry(goal, own, **counts) for goal, own in zip(
            (1.0, 2.0), zip(*explored[-parts:]))]
    assert agree(out.lists["held_out"], mean) and agree(out.lists["held_out_sampled"], sampled)
    walks += [walk for both in explored for walk in both] * alike
    assert out.env_steps == sum(count for _, _, count, _ in walks)
    assert out.divergences == sum(diverged for *_, diverged in walks) > 0
    assert {row["success"] for row in mean} == {True, False}
    # The adapter itself is asked to explore, never measured. It hears of the step before.
    assert (adapter.steps, adapter.learned) == at_last and len(adapter.calls) == at_last[0]
    for j, (size, last, explore) in enumerate(adapter.calls):
        assert size == 2 * alike and explore and (last is None) == (j % 4 == 0)
        if last is not None:
            rewards, _, counts, _ = zip(*(one for one in explored[j // 4] for _ in range(alike)))
            assert last["reward"] == pytest.approx([each[j % 4 - 1] for each in rewards])
            assert last["alive"].tolist() == [j % 4 < count for count in counts]


class Posterior:
    """Goes where it guesses the goal: the mean over a context that grows with every episode."""
    def __init__(self, sequential=True, **references):
        self.sequential, self.references, self.counts = sequential, references, []

    def begin(self, count, generator):
        self.counts.append(count)
        self.context = np.zeros((count, 0))

    def act(self, observation, last=None, explore=True):
        guess = self.context.sum(1) / max(1, self.context.shape[1])
        goal = np.repeat(guess, len(observation) // len(guess))[:, None]
        return np.clip(goal - observation, -1.0, 1.0)

    def update(self, episodes):
        seen = (episodes["observations"][:, -1, 0] - episodes["rewards"][:, -1])
        self.context = np.c_[self.context, seen.reshape(len(self.context), -1)]


@pytest.mark.parametrize("sequential", [True, False])
def test_a_posterior_fits(sequential):
    """61 tasks, two chunks: a goal is known after one episode; rows stand in the tasks' order.

    In the first round two of three episodes know it already, if one follows the other.
    """
    goals = np.r_[0.25, np.linspace(0.3, 2.4, 60)]
    adapter = Posterior(sequential, lazy=Posterior())
    out = evaluate(LINE, adapter, goals[:, None], 3, 3, seed=0)
    assert adapter.counts == [31, 30] and adapter.context.shape == (30, 9)
    assert adapter.references["lazy"].counts == [31, 30]
    for name, first in (("held_out", 1.0), ("held_out_sampled", 1 / 3 if sequential else 1.0)):
        for k, rows in enumerate(by_round(out.lists[name])):
            assert [row["task"][0] for row in rows] == goals.tolist()
            assert [row["final_distance"] for row in rows] == pytest.approx(
                first * goals * (k == 0))
    assert [row["return"] for row in out.lists["lazy"]] == pytest.approx(-4 * goals)
    assert [row["success"] for row in out.lists["lazy"]] == [True] + [False] * 60
    assert set(out.lists["lazy"][0]) == {"task", "return", "final_distance", "success"}
    assert out.env_steps == 61 * 4 * (4 + 4 * 3 + 1)
    widths = {k: kept.context.shape for k, kept in out.stages.items()}
    assert widths == {0: (31, 0), 3: (31, 9)} and out.stages[0].counts == [31]


def test_experts_are_measured_where_they_know_the_goal():
    def expert(observations, tasks):
        return np.clip(tasks[:, None] - observations, -1, 1)
    out = evaluate(LINE, Posterior(), GOALS, 0, 1, 0, experts=expert)
    assert [row["return"] for row in out.lists["experts_held_out"]] == [0.0, -1.0]
    assert out.env_steps == 2 * 4 * 3 and out.lists["no_adaptation"] == []
    expert.contextual = False
    for experts in (expert, None):
        out = evaluate(LINE, Posterior(), GOALS, 0, 1, 0, experts=experts)
        assert out.lists["experts_held_out"] == [] and out.env_steps == 2 * 4 * 2


class Drifter(Posterior):
    """Explores at random, and then goes where that led it."""
    def begin(self, count, generator):
        super().begin(count, generator)
        self.generator = generator

    def act(self, observation, last=None, explore=True):
        noise = torch.rand(observation.shape, generator=self.generator).numpy() if explore else 0
        return 0.1 * super().act(observation) + 0.5 * noise


def test_evaluation_is_deterministic_under_its_seed():
    """Other numbers with another seed, purpose or stream, and in every chunk; the same again."""
    tasks = np.ones((60, 1))

    def returns(seed=0, **stream):
        lists = evaluate(LINE, Drifter(), tasks, 1, 2, seed, **stream).lists
        return [row["return"] for name in ("held_out_sampled", "held_out") for row in lists[name]]
    runs = [returns(), returns(1), returns(purpose="curve"), returns(stream=7)]
    assert runs[0] == returns() and len(set(map(tuple, runs))) == 4
    assert len(set(runs[0][:120])) == 120, "no two tasks of two chunks and rounds"


# ---------------------------------------------------------------- tables
def hand_made(rounds, per_round=1):
    """Lists of three tasks: in round k task i has return 10 i + k and distance i + k / 10."""
    held_out = [{"task": [i], "gradient_steps": per_round * k, "adaptation_episodes": 5 * k,
                 "return": 10.0 * i + k, "final_distance": i + k / 10, "success": i == 0}
                for i in range(3) for k in range(rounds + 1)]
    return {"held_out": held_out, "held_out_sampled": held_out[:2], "no_adaptation": [],
            "experts_held_out": held_out[-1:]}


def test_curve_points_are_means_of_each_round():
    points = curve_points(Evaluation(hand_made(2, per_round=5)), env_steps=700)
    assert [point.pop("adaptation_episodes") for point in points] == [0, 5, 10]
    for k, point in enumerate(points):
        assert point == pytest.approx({"env_steps": 700, "return": 10.0 + k,
                                       "final_distance": 1 + k / 10, "success": 1 / 3})


def test_closing_table():
    """Rounds 0, 1, 2, 3, 5 and the last; then the levels to compare with."""
    lines = closing_table(hand_made(7), load("push"), "goals").splitlines()
    assert [line.split() for line in lines] == [
        ["goals", "return", "final", "distance", "(m)", "success"],
        *(["adapted,", str(k), "step," if k == 1 else "steps,", "mean", "action", f"{10 + k}.0",
           f"{1 + k / 10:.4f}", "33%"] for k in (0, 1, 2, 3, 5, 7)),
        ["adapted,", "0", "steps,", "sampled", "actions", "0.0", "0.0000", "100%"],
        ["adapted,", "1", "step,", "sampled", "actions", "1.0", "0.1000", "100%"],
        ["imitation,", "no", "adaptation", "-", "-", "-"],
        ["experts", "(told", "the", "goal)", "27.0", "2.7000", "0%"]]
    assert len({len(line) for line in lines}) == 1


def test_bands():
    """Goals of each band by their place in the list."""
    lists = hand_made(4)
    near, far = band_means(Line(), lists, "final_distance")
    assert near[0] == "near" and near[1] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
    assert far[0] == "far" and far[1] == pytest.approx([2.0, 2.1, 2.2, 2.3, 2.4])
    assert [line.split()[-4:] for line in band_table(Line(), lists).splitlines()] == [
        ["0", "1", "2", "3"], ["0.500", "0.600", "0.700", "0.800"],
        ["2.000", "2.100", "2.200", "2.300"]]


# ---------------------------------------------------------------- a baseline
def test_multitask_imitation():
    """One collection without a step; at test time theta - step_size * gradient, twice, by hand.

    Each task's advantages are divided by their own root mean square.
    """
    settings = multitask.Settings(hidden=8, imitation_steps=2, step_size=0.2, noise_hold=1)
    tasks, rng, met = task_set(PUSH, "train", 2), np.random.default_rng(0), []
    given = Demonstrations(rng.normal(size=(2, 9, 6)), rng.uniform(-1, 1, (2, 9, 3)))
    problem = make_problem(tasks, given, meta_test=met.append)
    (state, metrics), = multitask.train(problem, settings)
    assert metrics == {"iteration": 1, "progress": 1.0, "env_steps": 0}
    theta = imitate(PUSH, given, settings)
    given.sample = None  # a finished run imitates no more
    assert list(multitask.train(problem, settings, state)) == []
    assert all(torch.equal(adapter.theta[name], theta[name]) for adapter in met for name in theta)
    adapter, phi = met[1], per_task(theta, 2)
    adapter.begin(2, torch.Generator().manual_seed(0))
    for _ in range(2):
        episodes = problem.rollout(adapter.act, tasks, 3)
        phi = with_policy_gradient(phi, adapter.actor.explored(episodes), settings)
        adapter.update(episodes)
        for name, value in phi.items():
            step = 0.0 if name == "log_std" else 0.2 * value.grad
            assert torch.allclose(adapter.actor.phi[name], value + step, atol=1e-5), name
        assert (adapter.actor.phi["b3"] - phi["b3"]).abs().max() > 1e-3
        phi = adapter.actor.phi
