"""Tests of replay, experts and demonstrations."""
import copy
import math

import numpy as np
import pytest
import torch

import local_policies
from envs import BatchEnv, rollout
from local_policies import Replay
from policy import CorrelatedNoise, normalised
from sac import squashed_mean, squashed_sample
from settings import Settings, random_streams
from tasks import task_set
from tests.conftest import FRAGILE, PUSH, random_actions, scripted_expert, through_bytes

CENTRE = [0, 0.6, 0.1, 0, 0.65, 0.02]
STREAMS = np.array([[0, 1, 1, 1, 2, 2], [2, 0, 1, 2, 1, 0]])  # in collections of six episodes


@pytest.fixture
def recorded(monkeypatch):
    """Episodes and tasks of every rollout of local_policies; one of each is said to have diverged.
    """
    kept = []

    def recording(env, act, tasks, **options):
        kept.append(rollout(env, act, tasks, **options) | {"tasks": tasks})
        kept[-1]["diverged"][0] = True
        return kept[-1]
    monkeypatch.setattr(local_policies, "rollout", recording)
    return kept


# ---------------------------------------------------------------- replay
@pytest.fixture(scope="module")
def collected():
    """(tasks, episodes): three tasks, two collections of six episodes; most end early."""
    tasks, env, parts = task_set(PUSH, "train", 3), BatchEnv(6, FRAGILE), []
    for seed, streams in enumerate(STREAMS):
        actions = iter(random_actions(6, seed))
        parts.append(rollout(env, lambda *_: next(actions), tasks[streams]))
    return tasks, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("share, outcome_size", [(0.0, 6), (0.5, 6), (1.0, 6), (0.5, 0)])
@pytest.mark.parametrize("learners", [1, 3])
def test_replay_samples_all_that_was_collected_with_the_rewards_of_the_task(
        collected, learners, share, outcome_size):
    """Sums over five steps, by hand. One learner sees the task; of three each has its own.

    Without an outcome_size a transition keeps the reward that it was stored with, and its task.
    """
    tasks, episodes = collected
    lengths, family = episodes["mask"].sum(1).astype(int), copy.copy(PUSH)
    if not outcome_size:
        family.outcome_size = 0
        rewards = np.random.default_rng(1).normal(size=(12, 50))
        episodes = episodes | {"outcomes": np.zeros((12, 50, 0)), "rewards": rewards}
    sizes = np.bincount(STREAMS.ravel(), lengths).astype(int)
    replay = Replay(family, tasks, sizes.max())
    for part, streams in zip((slice(6), slice(6, 12)), STREAMS):
        replay.add({name: value[part] for name, value in episodes.items()}, streams)
    with pytest.raises(ValueError, match=f"replay of {sizes.max()} transitions per task is full"):
        replay.add({name: value[:1] for name, value in episodes.items()}, [sizes.argmax()])
    assert replay.sizes.tolist() == sizes.tolist() and len(set(sizes)) == 3
    settings = Settings(expert_batch=9000 // learners, expert_relabelled=share,
                        expert_return_steps=5, expert_reward_scale=0.25, expert_discount=0.9)
    batch = replay.sample(np.random.default_rng(0), learners, settings)
    assert batch["observation"].shape == (learners, 9000 // learners, 6 + 2 * (learners == 1))
    batch = {name: value.flatten(0, 1).double().numpy() for name, value in batch.items()}
    place = {episodes["actions"][e, t].tobytes(): (e, t)
             for e in range(12) for t in range(lengths[e])}
    drawn = [place[action.tobytes()] for action in np.float32(batch["action"])]
    assert set(drawn) == set(place.values()), "every transition, also the last of a stream"
    e, t = np.array(drawn).T
    span, stream = np.minimum(5, lengths[e] - t), STREAMS.ravel()[e]
    task = tasks[np.arange(9000) // 3000]
    assert np.abs(np.bincount(stream) - 3000).max() < 5 * math.sqrt(9000 * 2 / 9)
    if learners == 1:
        assert np.array_equal(batch["observation"][:, 6:], batch["next_observation"][:, 6:])
        task = batch["observation"][:, 6:] * [0.1, 0.05] + [0.0, 0.75]
    distance = np.linalg.norm(tasks - task[:, None], axis=-1)
    assert distance.min(1).max() < 1e-7, "training tasks only"
    # Of relabelled transitions one in three keeps its task.
    expected = 1 - share * 2 / 3 * bool(outcome_size)
    kept = (distance.argmin(1) == stream).mean()
    assert abs(kept - expected) <= 4 * math.sqrt(expected * (1 - expected) / 9000)

    total = np.zeros(9000)
    for k in range(5):
        step = e, np.minimum(t + k, 49)
        reward = episodes["rewards"][step]
        if outcome_size:
            block, tips = np.split(episodes["outcomes"][step], 2, axis=-1)
            gain = np.hypot(*(task - [0, 0.52]).T) - np.hypot(*(task - block[:, :2]).T)
            reward = 100 * np.maximum(0, gain) - np.linalg.norm(block - tips, axis=-1)
        total += (k < span) * 0.25 * 0.9 ** k * reward
    assert np.abs(batch["reward"] - total).max() < 1e-3
    assert np.abs(batch["discount"] - 0.9 ** span).max() < 1e-6
    for name, step in (("observation", t), ("next_observation", t + span)):
        seen = batch[name][:, :6] * 0.1 + CENTRE
        assert np.abs(seen - episodes["observations"][e, step]).max() < 1e-6
    ended = episodes["terminated"][e] & (t + span == lengths[e])
    assert np.array_equal(batch["terminated"], ended)
    assert set(zip(span, ended)) == {(k, end) for k in (1, 2, 3, 4, 5) for end in (False, True)}


def test_replay_by_hand():
    """Episodes of 3, 1, 4 and 2 steps, added in turn to streams 2, 0, 2 and 0: every array.

    Stream 1 stays empty, and no sample is of it. Numbers name episode and step.
    """
    lengths, tasks = np.array([3, 1, 4, 2]), task_set(PUSH, "train", 3)
    names = 10.0 * np.arange(1, 5)[:, None] + np.arange(5)  # (episode, step), of observations
    after = np.where(np.arange(1, 5) <= lengths[:, None], names[:, :4], -1.0)
    episodes = {"observations": np.repeat(names[..., None], 6, -1),
                "actions": np.repeat(after[..., None], 3, -1),
                "outcomes": np.repeat(after[..., None], 6, -1), "rewards": after,
                "mask": (after > 0).astype(float), "terminated": np.array([1, 1, 0, 1], bool)}
    replay = Replay(PUSH, tasks, 7)
    for part in (slice(3), slice(3, 4)):
        replay.add({name: value[part] for name, value in episodes.items()},
                   np.array([2, 0, 2, 0])[part])
    assert replay.sizes.tolist() == [3, 0, 7]
    for stream, now, end, terminated in (
            (0, [20, 40, 41], [1, 3, 3], [1, 0, 1]),
            (2, [10, 11, 12, 30, 31, 32, 33], [3, 3, 3, 7, 7, 7, 7], [0, 0, 1, 0, 0, 0, 0])):
        stored = {name: values[stream, :len(now)] for name, values in replay.data.items()}
        for name in ("observation", "action", "outcome", "reward"):
            assert (stored[name] == np.array(now)[:, None]).all(), name
        assert (stored["next_observation"] == 1.0 + np.array(now)[:, None]).all()
        assert stored["end"][:, 0].tolist() == end
        assert stored["terminated"][:, 0].tolist() == terminated
    for share, told in ((0.0, {0, 2}), (1.0, {0, 1, 2})):
        batch = replay.sample(np.random.default_rng(0), 1,
                              Settings(expert_batch=500, expert_relabelled=share))
        first, context = batch["action"][0, :, 0], batch["observation"][0, :, 6:].numpy()
        assert set(first.tolist()) == {20, 40, 41, 10, 11, 12, 30, 31, 32, 33}
        assert abs((first == 20).float().mean() - 1 / 6) < 5 * math.sqrt(5 / 36 / 500)
        goals = context * [0.1, 0.05] + [0.0, 0.75]
        assert set(np.linalg.norm(goals[:, None] - tasks, axis=-1).argmin(1)) == told


# ---------------------------------------------------------------- step 1: experts
def test_tasks_take_turns_and_each_stream_holds_its_own(recorded):
    """Five tasks, three environments, four iterations: at any time as many episodes, give or take
    one. A resumed run takes the same turns; another seed takes others.
    """
    tasks, env, orders = task_set(PUSH, "train", 5), BatchEnv(3), []
    for seed in (0, 1):
        settings = Settings(expert_iterations=4, expert_episodes=3, expert_updates=1, seed=seed,
                            expert_width=8, expert_batch=16)
        recorded.clear()
        states = [snapshot() for _, snapshot, _ in
                  local_policies.train_experts(env, tasks, settings)]
        distance = np.linalg.norm([part["tasks"][:, None] - tasks for part in recorded], axis=-1)
        assert (distance.min(-1) == 0).all(), "training tasks"
        orders.append(turns := distance.argmin(-1))  # (iteration, environment)
        for k, state in enumerate(states):
            counts = np.bincount(turns[:k + 1].ravel(), minlength=5)
            assert np.ptp(counts) <= 1 and counts.sum() == 3 * (k + 1)
            assert state["replay"]["sizes"].tolist() == (50 * counts).tolist()
        for task in range(5):
            own = [part["observations"][e, :-1] for part, streams in zip(recorded, turns)
                   for e in np.flatnonzero(streams == task)]
            stored = states[-1]["replay"]["observation"][task, :50 * len(own)]
            assert np.array_equal(stored, np.float32(np.concatenate(own)))
        list(local_policies.train_experts(env, tasks, settings, states[1]))
        assert [part["tasks"].tolist() for part in recorded[4:]] == [
            part["tasks"].tolist() for part in recorded[2:4]]
    assert not np.array_equal(*orders)


@pytest.mark.parametrize("kind", ["contextual", "local"])
def test_experts_explore_learn_and_go_on_from_a_snapshot_with_the_same_bits(kind, recorded):
    """First at random, then by the policy of the iteration before, with noise that lasts.

    Episodes end early, so streams differ in length. What follows changes neither a snapshot nor
    the experts of its moment, and a run that goes on from it may do so again.
    """
    tasks, learners = task_set(PUSH, "train", 2), 1 if kind == "contextual" else 2
    settings = Settings(training_tasks=2, expert_iterations=4, expert_episodes=3, expert_updates=3,
                        expert_width=8, expert_batch=16, expert_noise_correlation=0.6, seed=5,
                        experts=kind, expert_learning_rate=3e-3)

    def network_input(observations):
        """Of observations (2, B, 6), scaled by hand; the contextual expert also sees the task."""
        x = (observations - CENTRE) / 0.1
        if kind == "contextual":
            told = np.broadcast_to(((tasks - [0, 0.75]) / [0.1, 0.05])[:, None], (*x.shape[:2], 2))
            x = np.concatenate([x, told], axis=-1).reshape(1, -1, 8)
        return torch.as_tensor(x, dtype=torch.float32)

    env, seen, total, ended = BatchEnv(6, FRAGILE), [], 0, 0
    for experts, snapshot, metrics in local_policies.train_experts(env, tasks, settings):
        seen.append((experts, snapshot(), metrics))
    first = recorded[0]["actions"]  # uniform in [-1, 1]
    assert 0.99 < np.abs(first).max() <= 1 and abs((first ** 2).mean() * 3 - 1) < 0.15
    assert abs(first.mean()) < 0.1
    for k, ((_, saved, metrics), episodes) in enumerate(zip(seen, recorded, strict=True)):
        total, ended = total + episodes["mask"].sum(), ended + episodes["terminated"].sum()
        assert metrics["iteration"] == k + 1 and metrics["env_steps"] == total < (k + 1) * 300
        assert metrics["return"] == pytest.approx(episodes["rewards"].sum() / 6)
        assert metrics["distance"] == pytest.approx(episodes["distances"][:, -1].mean())
        assert metrics["divergences"] == 1
        sizes, adam = saved["replay"]["sizes"], saved["learner"]["optimiser"]
        assert sizes.sum() == total and sizes[0] != sizes[1]
        assert saved["replay"]["terminated"].sum() == ended
        assert adam["param_groups"][0]["lr"] == pytest.approx(3e-3 * (1 - 0.9 * k / 4))
        assert adam["state"][0]["step"] == 3 * (k + 1)
        noise = CorrelatedNoise((learners, 6 // learners, 3), 0.6,
                                 random_streams(5, "experts", k)[1])
        for t in range(50 * (k > 0)):
            x = network_input(episodes["observations"][:, t].reshape(2, 3, 6))
            action = squashed_sample(seen[k - 1][0].policy, x, next(noise))[0].reshape(6, 3)
            assert np.allclose(episodes["actions"][:, t], action, atol=1e-5)

    experts, observations = seen[-1][0], recorded[0]["observations"][:2]
    mean = squashed_mean(experts.policy, network_input(observations)).reshape(2, 51, 3)
    assert np.allclose(experts(observations, tasks), mean, atol=1e-5)
    if kind == "local":
        with pytest.raises(ValueError, match="own training tasks"):
            experts(observations, tasks[::-1])
    else:
        swapped = experts(observations[::-1], tasks[::-1])[::-1]
        assert np.allclose(experts(observations, tasks), swapped, atol=1e-6)
    for load in (dict, through_bytes):  # that of memory first, that of a file after its use
        resumed = list(local_policies.train_experts(env, tasks, settings, load(seen[1][1])))
        for (again, _, metrics), (unbroken, _, expected) in zip(resumed, seen[2:], strict=True):
            assert all(map(torch.equal, again.policy, unbroken.policy)) and metrics == expected


def test_losses_that_are_not_finite_end_the_training(monkeypatch):
    losses = {"critic_loss": 1.0, "policy_loss": math.nan}
    monkeypatch.setattr(local_policies.SoftActorCritic, "update", lambda *_: losses)
    with pytest.raises(FloatingPointError, match="iteration 1"):
        next(local_policies.train_experts(BatchEnv(4), task_set(PUSH, "train", 2), Settings()))


# ---------------------------------------------------------------- step 2: demonstrations
@pytest.mark.parametrize("sent", [False, True])
def test_every_environment_gets_its_own_experts_action(sent):
    """An expert that differs wildly from state to state and from aim to aim; its own noise."""
    def expert(observations, tasks):
        return 0.5 * np.sin(1e3 * observations[..., :3] + 1e2 * tasks[:, None, [0, 1, 0]])

    tasks = np.repeat(task_set(PUSH, "train", 2), 3, axis=0)
    aims = PUSH.sample_tasks(np.random.default_rng(3), 6) if sent else tasks
    episodes = local_policies.run_experts(BatchEnv(6), expert, tasks[::3], np.random.default_rng(0),
                                          0.1, aims if sent else None)
    noise = episodes["actions"] - expert(episodes["observations"][:, :-1], aims)
    assert not noise[[0, 3]].any(), "the first episode of each task"
    rest = noise[[1, 2, 4, 5]].transpose(0, 2, 1).reshape(12, 50)
    assert rest.std() == pytest.approx(0.1, rel=0.1) and abs(rest.mean()) < 0.02
    assert np.abs(np.corrcoef(rest) - np.eye(12)).max() < 0.6
    to_goal = episodes["outcomes"][..., :2] - tasks[:, None]
    assert np.allclose(episodes["distances"], np.linalg.norm(to_goal, axis=-1)), "the task's own"


def test_demonstrations_are_visited_states_with_clean_labels():
    """Per task: the expert's own path, one off it by noise, one sent to another task.

    All are labelled for the task itself. There are never more detours than later episodes.
    """
    tasks = np.array([[-0.1, 0.7], [0.1, 0.8], [0.0, 0.75]])
    clean = rollout(BatchEnv(3), lambda o, _: scripted_expert(o[:, None], tasks)[:, 0], tasks)
    own = clean["observations"][:, :-1]
    for noise, detours in ((0.5, 1), (0.0, 1), (0.0, 9)):
        settings = Settings(demonstration_episodes=3, demonstration_noise=noise,
                            demonstration_detours=detours)
        found, episodes = local_policies.make_demonstrations(
            BatchEnv(9), scripted_expert, tasks, settings)
        assert found.observations.shape == (3, 150, 6) and found.mask.all()
        assert np.array_equal(found.observations.reshape(9, 50, 6),
                              episodes["observations"][:, :-1])
        assert np.array_equal(found.actions, scripted_expert(found.observations, tasks))
        paths = found.observations.reshape(3, 3, 1, 50, 6)
        goes = (paths == own).all((-1, -2))  # (task, episode, whose path)
        assert np.array_equal(goes[:, 0], np.eye(3))
        if noise:
            assert np.abs(paths[:, 1, 0, :, :3] - own[..., :3]).max() > 0.01
        else:
            assert (goes.sum(-1) == 1).all() and not np.array_equal(goes[:, 2], np.eye(3))
            assert np.array_equal(goes[:, 1], np.eye(3)) == (detours == 1)


def test_only_visited_states_are_sampled_and_all_of_them(recorded, tmp_path):
    """Of demonstrations with early ends, of their file, and of what step 3c adds to them."""
    tasks, env = task_set(PUSH, "train", 3), BatchEnv(9, FRAGILE)
    demonstrations, episodes = local_policies.make_demonstrations(
        env, scripted_expert, tasks, Settings(demonstration_episodes=3))
    assert episodes is recorded[0] and demonstrations.mask.sum() == episodes["mask"].sum() < 450
    actions, visited = iter(random_actions(9)), [{}, {}, {}]
    recorded.append(rollout(env, lambda *_: next(actions), np.repeat(tasks, 3, axis=0)))

    def check(labelled, episodes=None):
        """Samples are the visited states and the expert's actions, as bits."""
        for e in range(9 * (episodes is not None)):
            seen = episodes["observations"][e, :int(episodes["mask"][e].sum())]
            x = np.float32((seen - PUSH.observation_centre) / 0.1)
            label = scripted_expert(seen[None], tasks[None, e // 3])[0]
            visited[e // 3] |= {a.tobytes(): b.tobytes() for a, b in zip(x, label)}
        x, label = labelled.sample(PUSH, np.random.default_rng(0), np.array([2, 0]), 6000)
        for task, *drawn in zip((2, 0), x.numpy(), label.numpy(), strict=True):
            pairs = {(a.tobytes(), b.tobytes()) for a, b in zip(*drawn)}
            assert pairs == set(visited[task].items())

    check(demonstrations, recorded[0])
    local_policies.save_demonstrations(tmp_path / "d.npz", tasks, demonstrations, 123)
    read, loaded, env_steps = local_policies.load_demonstrations(tmp_path / "d.npz", PUSH)
    assert np.array_equal(read, tasks) and env_steps == 123
    check(loaded)
    loaded.freeze(PUSH, {"z": torch.zeros(1, 2)})
    check(loaded)
    inputs = normalised(PUSH, recorded[1]["observations"][:, :-1]).unflatten(0, (3, 3))
    loaded.add_visited(inputs, recorded[1], scripted_expert, tasks)
    check(loaded, recorded[1])


FILE = {"tasks": np.zeros((2, 2)), "observations": np.zeros((2, 7, 6)),
        "actions": np.zeros((2, 7, 3)), "mask": np.ones((2, 7), bool)}


@pytest.mark.parametrize("change", [
    {"tasks": np.zeros((2, 3))}, {"tasks": np.zeros((3, 2))}, {"tasks": np.zeros(2)},
    {"tasks": None}, {"actions": np.zeros((2, 7, 2))}, {"actions": np.zeros((2, 6, 3))},
    {"actions": np.r_[-1.01, np.zeros(41)].reshape(2, 7, 3)},
    {"actions": np.zeros((2, 7, 3), complex)}, {"observations": np.zeros((2, 7, 5))},
    {"observations": np.zeros((2, 6))}, {"observations": None},
    {"observations": np.r_[np.nan, np.zeros(83)].reshape(2, 7, 6)},
    {"mask": np.ones((2, 6), bool)}, {"mask": np.ones((2, 7))},
    {"mask": np.ones((2, 7, 1), bool)}, {"mask": np.arange(14).reshape(2, 7) < 7},
    {"observations": np.zeros((2, 0, 6)), "actions": np.zeros((2, 0, 3)), "mask": None}])
def test_demonstrations_that_do_not_fit_are_refused(tmp_path, change):
    def write(arrays):
        np.savez(tmp_path / "d.npz", **{k: v for k, v in arrays.items() if v is not None})
        return local_policies.load_demonstrations(tmp_path / "d.npz", PUSH)
    _, demonstrations, env_steps = write(FILE | {"mask": None})
    assert demonstrations.mask.all() and demonstrations.mask.shape == (2, 7) and env_steps == 0
    with pytest.raises(ValueError, match="demonstrations"):
        write(FILE | change)


def test_reward_terms_of_a_wrong_shape_are_refused(monkeypatch):
    """(..., 1) instead of (...) would broadcast into nonsense."""
    tasks, replay = task_set(PUSH, "train", 2), Replay(PUSH, task_set(PUSH, "train", 2), 50)
    replay.add(rollout(BatchEnv(2), lambda *_: np.zeros((2, 3)), tasks), np.arange(2))
    monkeypatch.setattr(type(PUSH), "reward_terms", lambda self, outcome, action, task: {
        "near": -np.linalg.norm(outcome[..., :2] - task, axis=-1, keepdims=True)})
    with pytest.raises(ValueError, match=r"reward_terms\(\)\['near'\] has shape"):
        replay.sample(np.random.default_rng(0), 1, Settings())
