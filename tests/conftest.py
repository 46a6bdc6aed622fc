"""What the tests share: small helpers, a tiny run from start to end, a quiet folder for each."""
import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import phases
import run
from advantages import policy_gradient_batch
from envs import Environments
from policy import Actor, log_prob
from settings import Settings
from tasks import make_family

HERE = Path(__file__).parent.parent
REFERENCE = HERE.parent / "shared" / "reference"  # recorded episodes; users do not have them
PUSH = make_family("push")
HORIZON = PUSH.horizon
TINY = Settings(hidden=8, bias_vector=2, init_std=0.6, init_step_size=0.1,
                pre_update_imitation=0.3, episodes=2, shared_episodes=0, max_weight=1e6,
                imitation_batch=16, noise_hold=1)


@pytest.fixture(autouse=True)
def quiet_folder(tmp_path, monkeypatch):
    """Tests run in a folder of their own (MuJoCo leaves its log there), on one thread."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


# ---------------------------------------------------------------- environments
def random_actions(num_envs, seed=0, steps=HORIZON):
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (steps, num_envs, 3)).astype(np.float32)


def record(env, actions, task):
    """Observations (T+1, B, 6) and rewards (T, B) of `actions` (T, B, 3), stepped by hand."""
    observations, rewards = [env.reset(options={"task": task})[0]], []
    for action in actions:
        observation, reward, *_ = env.step(action)
        observations.append(observation)
        rewards.append(reward)
    return np.array(observations), np.array(rewards)


def replay(actions):
    """A policy that plays actions (B, T, act)."""
    steps = iter(np.swapaxes(actions, 0, 1))
    return lambda observation, last: next(steps)


def push_north(steps=HORIZON, num_envs=1):
    """Actions that push the block a decimetre or two in +y, with some x motion."""
    actions = np.zeros((steps, num_envs, 3), np.float32)
    actions[..., 1] = 0.8
    actions[..., 0] = 0.1 * np.sin(np.arange(steps))[:, None] + 0.05 * np.arange(num_envs)
    return actions


def scripted_expert(observations, tasks):
    """Pushes in +y until the block's y is the goal's, and steers x: (n, B, 6), (n, 2) -> (n, B, 3).
    """
    to_goal = tasks[:, None] - observations[..., 3:5]
    motion = np.concatenate([10 * to_goal, np.zeros_like(to_goal[..., :1])], axis=-1)
    return np.clip(motion, -1, 1).astype(np.float32)


def make_problem(tasks, demonstrations=None, experts=None, family=PUSH, meta_test=None):
    """A stand-in for phases.Problem: what a method's `train` is given."""
    environments = Environments(family, 1)
    return SimpleNamespace(
        family=family, tasks=tasks, device="cpu", train_experts=lambda: experts,
        demonstrate=lambda _: demonstrations, rollout=environments.rollout,
        meta_test=meta_test or (lambda adapter: None))


def explore(phi, problem, settings, episodes, generator):
    """Episodes of pi_phi_i on each task i: (what `rollout` gives, what `Actor.explored` gives)."""
    actor = Actor(phi, problem.family, settings, generator)
    raw = problem.rollout(actor, problem.tasks, episodes)
    return raw, actor.explored(raw)


def push_batch(explored, settings, scale=None, tasks=slice(None)):
    """(batch of an inner step, scale) from what was explored on some tasks of push."""
    explored = {name: value[tasks] for name, value in explored.items()}
    return policy_gradient_batch(explored, settings, scale)


def with_policy_gradient(phi, explored, settings):
    """phi with the gradient of mean log pi A: advantages over each task's root mean square."""
    batch, _ = push_batch(explored, settings, scale=1.0)
    advantage = batch["advantage"] / batch["advantage"].square().mean(1, keepdim=True).sqrt()
    phi = {name: value.detach().clone().requires_grad_() for name, value in phi.items()}
    log_p = log_prob(phi, batch["features"], batch["action"])
    (log_p * advantage).mean(1).sum().backward()
    return phi


class Fragile(type(PUSH)):
    """Push, but an episode ends when the arm's base has turned a little: mostly early."""

    def ended(self, state):
        return np.abs(state[:, 1] - 2.1) > 0.09


FRAGILE = Fragile()


# ---------------------------------------------------------------- numbers
def numpy_mlp(params, learner, x):
    """One vector through one learner's network; layer normalisation and ReLU between layers."""
    weights = [p[learner].detach().double().numpy() for p in params]
    for layer in range(0, len(weights), 2):
        x = x @ weights[layer] + weights[layer + 1][0]
        if layer < len(weights) - 2:
            x = np.maximum((x - x.mean()) / np.sqrt(x.var() + 1e-5), 0)
    return x


def reference_forward(phi, observation):
    """(mean, hidden layers) of one task's policy in numpy."""
    x = np.concatenate([observation, np.tile(phi["z"], (len(observation), 1))], axis=1)
    h1 = np.maximum(x @ phi["w1"] + phi["b1"], 0)
    h2 = np.maximum(h1 @ phi["w2"] + phi["b2"], 0)
    return h2 @ phi["w3"] + phi["b3"], (x, h1, h2)


def finite_difference(tensor, function, step=1e-5):
    """Central differences of `function()` by every element of `tensor`, changed in place."""
    out, flat = torch.zeros_like(tensor, requires_grad=False), tensor.detach().view(-1)
    for i in range(flat.numel()):
        saved = flat[i].item()
        values = []
        for sign in (1, -1):
            flat[i] = saved + sign * step
            values.append(function())
        flat[i] = saved
        out.view(-1)[i] = (values[0] - values[1]) / (2 * step)
    return out


def relative_error(value, reference):
    return float((value - reference).norm() / reference.norm())


def through_bytes(state):
    """What a checkpoint does to a state."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# ---------------------------------------------------------------- tiny runs of the whole command
BUDGET = dict(training_tasks=2, held_out_tasks=2, expert_iterations=8, expert_updates=2,
              expert_episodes=4, expert_width=8, expert_batch=16, demonstration_episodes=3,
              imitation_steps=3, hidden=8, episodes=3, shared_episodes=0,
              collections=3, meta_steps=2, aggregation_episodes=1, imitation_batch=10,
              test_episodes=3)
ARGUMENTS = ["--quick", "--threads", "1",
             *(f"--set={name}={value}" for name, value in BUDGET.items())]


def start(*arguments):
    """`run.main` in this process, without the film's seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phases, "draw_film", lambda *_: None)
        return run.main([str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a tiny run from start to end."""
    out = tmp_path_factory.mktemp("run") / "finished"
    assert start(*ARGUMENTS, "--out", out) == 0
    return out


def result_of(out):
    return json.loads((out / "result.json").read_text())


def refused(capsys, *arguments):
    """The one line on stderr of a command that must fail with exit code 2."""
    capsys.readouterr()
    assert start(*arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]
