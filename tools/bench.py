"""Speed, as ratios measured in one run.

    python tools/bench.py [env] [learner] [meta]    # default: all three
    python tools/bench.py device                    # GPU against CPU, on two threads

Every figure is the median of several passes. What is compared takes turns, so that a machine whose
speed drifts does not favour either side.
"""
import argparse
import os
import sys
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as in run.py
import gymnasium
import numpy as np
import torch
from loky import cpu_count

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gmps
import policy
from envs import BatchEnv, Rollout, rollout
from local_policies import Replay
from sac import SoftActorCritic
from settings import Settings
from tasks import make_family, task_set


def seconds(*functions, passes: int = 5) -> list[float]:
    """Median seconds of each function, called in turn; a first, uncounted round warms up."""
    times = [[] for _ in functions]
    for number in range(passes + 1):
        for function, record in zip(functions, times):
            start = time.perf_counter()
            function()
            if number:
                record.append(time.perf_counter() - start)
    return [median(record) for record in times]


# ---------------------------------------------------------------- environments
def bench_env(num_envs: int = 400, steps: int = 50) -> None:
    """Batches against bare mujoco.rollout on the same model, controls and threads; gymnasium's."""
    for task in ("push", "ant", "door"):
        env = gymnasium.make_vec(f"gmps/{type(make_family(task)).__name__}-v0",
                                 num_envs=num_envs).unwrapped
        bench_family(env, steps)
        env.close()


def bench_family(env: BatchEnv, steps: int) -> None:
    family, num_envs = env.family, env.num_envs
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (steps, num_envs, family.action_size))
    env.reset(seed=0)
    controls, control = [], env.control
    for action in actions:
        control = family.next_control(control, action)
        controls.append(np.repeat(control[:, None], family.frame_skip, axis=1))
    start = env.state.copy()
    data = [env._workers[0].__copy__() for _ in range(cpu_count())]

    def ours():
        env.reset(seed=0)
        for action in actions:
            env.step(action)

    def bare():
        state = start
        for control in controls:
            state = pool.rollout(env.model, data, state, control,
                                 control_spec=family.control_spec)[0][:, -1]

    with Rollout(nthread=len(data)) as pool:
        mine, raw = seconds(ours, bare, passes=9)
    count = num_envs * steps
    print(f"{family.name}, B = {num_envs}: {count / mine:,.0f} steps/s; bare mujoco.rollout "
          f"{count / raw:,.0f} steps/s; ratio {raw / mine:.2f}")

    small = 8
    for mode in ("sync", "async"):
        other = gymnasium.make_vec(f"gmps/{type(family).__name__}-v0", num_envs=small,
                                   vectorization_mode=mode)

        def theirs(other=other):
            other.reset(seed=0)
            for action in actions:
                other.step(action[:small].astype(np.float32))
        speed = small * steps / seconds(theirs, passes=3)[0]
        other.close()
        print(f"  gymnasium's {mode} vector env of {small} single environments: {speed:,.0f} "
              f"steps/s; batched is {count / mine / speed:.1f} times as fast")


# ---------------------------------------------------------------- soft actor-critic
def updater(learners: int, updates: int, device="cpu"):
    """A function that takes so many updates of learners on push, sampling included."""
    settings = Settings(experts="local" if learners > 1 else "contextual", expert_updates=updates)
    family = make_family("push")
    tasks = task_set(family, "train", max(learners, 2))
    env, rng = BatchEnv(len(tasks), family), np.random.default_rng(0)
    replay = Replay(family, tasks, 50)
    replay.add(rollout(env, lambda *_: rng.uniform(-1, 1, (len(tasks), 3)), tasks),
               np.arange(len(tasks)))
    env.close()
    learner = SoftActorCritic(learners, 6 + 2 * (learners == 1), 3, settings, device)
    generator = torch.Generator()
    return lambda: learner.learn(replay, rng, generator)


def bench_learner(updates: int = 40) -> None:
    """One update of 20 learners against one of one, sampling included; stable-baselines3's SAC."""
    width, batch_size = Settings().expert_width, Settings().expert_batch
    one, twenty = seconds(updater(1, updates), updater(20, updates // 4))
    one, twenty = one / updates, twenty / (updates // 4)
    print(f"soft actor-critic, width {width}, batch {batch_size}: 1 learner {1e3 * one:.1f} ms per "
          f"update, 20 learners {1e3 * twenty:.1f} ms ({1e3 * twenty / 20:.2f} ms each); ratio "
          f"{twenty / one:.1f}")
    try:
        from stable_baselines3 import SAC
    except ImportError:
        print("  stable-baselines3 is not installed: no comparison with its SAC")
        return
    model = SAC("MlpPolicy", gymnasium.make("gmps/SawyerPush-v0"), seed=0, device="cpu",
                policy_kwargs={"net_arch": [width, width]}, batch_size=batch_size,
                learning_starts=10_000)
    model.learn(300)
    theirs, = seconds(lambda: model.train(gradient_steps=updates, batch_size=batch_size))
    print(f"  stable-baselines3's SAC: {1e3 * theirs / updates:.1f} ms per update; one learner "
          f"here is {theirs / updates / one:.1f} times as fast")


# ---------------------------------------------------------------- the meta-step
def meta_stepper(settings: Settings, device="cpu"):
    """A function that takes a meta-step of push on some rows of a batch of random numbers."""
    family = make_family("push")
    n, B = settings.meta_batch, settings.episodes * -(-family.horizon // settings.noise_hold)
    generator = torch.Generator().manual_seed(0)
    theta = {name: value.to(device)
             for name, value in policy.init_policy(family, settings, generator).items()}
    alpha = gmps.init_step_sizes(theta, settings)
    for params in (theta, alpha):
        for value in params.values():
            value.requires_grad_()

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device)
    batch = {"features": normal(n, B, 6), "action": normal(n, B, 3), "advantage": normal(n, B),
             "mask": torch.ones(n, B, device=device), "behaviour_log_prob": -3 + 0.1 * normal(n, B)}
    labels = normal(n, settings.imitation_batch, 6), normal(n, settings.imitation_batch, 3)

    def meta_step(rows=slice(None)):
        phi = gmps.adapt(theta, alpha, {name: value[rows] for name, value in batch.items()},
                         settings)
        adapted = tuple(value[rows] for value in labels)
        gmps.outer_loss(theta, phi, {"adapted": adapted}, settings)[0].backward()
    return meta_step


def bench_meta() -> None:
    """One meta-step: all tasks as one batched product, against a loop over the tasks."""
    settings = Settings()
    meta_step, n = meta_stepper(settings), settings.meta_batch
    batched, loop = seconds(meta_step, lambda: [meta_step(slice(i, i + 1)) for i in range(n)])
    print(f"meta-step, {n} tasks, {settings.episodes} episodes each: batched "
          f"{1e3 * batched:.0f} ms, loop over tasks {1e3 * loop:.0f} ms; "
          f"ratio {loop / batched:.2f}")


# ---------------------------------------------------------------- a GPU
def bench_device(updates: int = 20) -> None:
    """A meta-step and an update of the experts on the GPU, against two threads of the CPU."""
    torch.set_num_threads(2)

    def meta_steps(device):
        meta_step = meta_stepper(Settings(), device)
        return lambda: [meta_step() for _ in range(updates)]

    def finished(function):
        def run():
            function()
            torch.cuda.synchronize()  # a GPU works on while Python goes on
        return run
    for name, make in (("meta-step", meta_steps),
                       ("update of the experts", lambda device: updater(1, updates, device))):
        cpu, gpu = seconds(make("cpu"), finished(make("cuda")))
        print(f"{name}: CPU {1e3 * cpu / updates:.1f} ms, {torch.cuda.get_device_name()} "
              f"{1e3 * gpu / updates:.1f} ms; ratio {cpu / gpu:.2f}")


if __name__ == "__main__":
    benches = {"env": bench_env, "learner": bench_learner, "meta": bench_meta,
               "device": bench_device}
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", help=f"of {', '.join(benches)}; default: all but the "
                        "last")
    chosen = parser.parse_args().which or [name for name in benches if name != "device"]
    if not set(chosen) <= set(benches):
        parser.error(f"choose of {', '.join(benches)}")
    for name in chosen:
        benches[name]()
