"""Speed, as ratios measured in one run: `python bench.py [env] [learner] [meta]` (default: all three).

Every figure is the median of several passes, and what is compared takes turns, so that a machine whose speed drifts
does not favour either side.
"""
import argparse
import os
import time
from statistics import median

import gymnasium
import numpy as np
import torch

import gmps
import policy
from envs import AntGoal, BatchEnv, SawyerDoor, SawyerPush, rollout, task_set
from local_policies import Replay
from sac import SoftActorCritic
from settings import Settings


def seconds(*functions, passes=5):
    """Median seconds of each function, called in turn; a first, uncounted round warms up."""
    times = [[] for _ in functions]
    for round_number in range(passes + 1):
        for function, record in zip(functions, times):
            start = time.perf_counter()
            function()
            if round_number:
                record.append(time.perf_counter() - start)
    return [median(record) for record in times]


def bench_env(num_envs=400, steps=50):
    """Batched environments against bare mujoco.rollout on the same model, controls and threads, and gymnasium's own."""
    for family in (SawyerPush, AntGoal, SawyerDoor):
        bench_family(family, num_envs, steps)


def bench_family(family, num_envs, steps):
    env = gymnasium.make_vec(family.env_id, num_envs=num_envs).unwrapped
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, num_envs, family.action_size))
    env.reset(seed=0)
    controls, control = [], env.control
    for action in actions:
        control = env.family.next_control(control, action)
        controls.append(np.repeat(control[:, None], env.family.frame_skip, axis=1))
    start, data = env.state.copy(), [env._workers[0].__copy__() for _ in range(os.cpu_count())]

    def ours():
        env.reset(seed=0)
        for action in actions:
            env.step(action)

    def bare():
        state = start
        for control in controls:
            state = pool.rollout(env.model, data, state, control, control_spec=env.family.control_spec)[0][:, -1]

    from mujoco.rollout import Rollout
    with Rollout(nthread=len(data)) as pool:
        mine, raw = seconds(ours, bare, passes=9)
    count = num_envs * steps
    print(f"{family.name}, B = {num_envs}: {count / mine:,.0f} steps/s; bare mujoco.rollout {count / raw:,.0f} steps/s; "
          f"ratio {raw / mine:.2f}")

    for mode, small in (("sync", 8), ("async", 8)):
        other = gymnasium.make_vec(family.env_id, num_envs=small, vectorization_mode=mode)

        def theirs(other=other, small=small):
            other.reset(seed=0)
            for action in actions:
                other.step(action[:small].astype(np.float32))
        speed = small * steps / seconds(theirs, passes=3)[0]
        other.close()
        print(f"  gymnasium's {mode} vector env of {small} single environments: {speed:,.0f} steps/s; "
              f"batched is {count / mine / speed:.1f} times as fast")
    env.close()


def learner_and_batch(learners, width, batch_size):
    settings = Settings(experts="local" if learners > 1 else "contextual", expert_width=width, expert_batch=batch_size)
    family = SawyerPush()
    tasks = task_set(family, "train", max(learners, 2))
    env = BatchEnv(len(tasks), family)
    replay = Replay(family, tasks, 50)
    rng = np.random.default_rng(0)
    replay.add(rollout(env, lambda observation: rng.uniform(-1, 1, (len(tasks), 3)), tasks))
    env.close()
    learner = SoftActorCritic(learners, 6 + 2 * (learners == 1), 3, settings)
    return learner, lambda: replay.sample(rng, learners, settings), settings


def bench_learner(width=128, batch_size=128, updates=40):
    """One update of 20 learners against one update of one, sampling included; and stable-baselines3's SAC."""
    def updater(learners, updates):
        learner, sample, _ = learner_and_batch(learners, width, batch_size)
        generator = torch.Generator()
        return lambda: [learner.update(sample(), generator) for _ in range(updates)]

    one, twenty = seconds(updater(1, updates), updater(20, updates // 4))
    one, twenty = one / updates, twenty / (updates // 4)
    print(f"soft actor-critic, width {width}, batch {batch_size}: 1 learner {1e3 * one:.1f} ms per update, "
          f"20 learners {1e3 * twenty:.1f} ms ({1e3 * twenty / 20:.2f} ms each); ratio {twenty / one:.1f}")
    try:
        from stable_baselines3 import SAC
    except ImportError:
        print("  stable-baselines3 is not installed: no comparison with its SAC")
        return
    model = SAC("MlpPolicy", gymnasium.make(SawyerPush.env_id), policy_kwargs={"net_arch": [width, width]},
                batch_size=batch_size, learning_starts=10_000, device="cpu", seed=0)
    model.learn(300)
    theirs, = seconds(lambda: model.train(gradient_steps=updates, batch_size=batch_size))
    print(f"  stable-baselines3's SAC: {1e3 * theirs / updates:.1f} ms per update; one learner here is "
          f"{theirs / updates / one:.1f} times as fast")


def bench_meta():
    """One meta-step: all tasks of a meta-batch as one batched product, against a loop over the tasks."""
    settings, family = Settings(), SawyerPush()
    n, B = settings.meta_batch, settings.episodes * family.horizon
    generator = torch.Generator().manual_seed(0)
    theta = {name: value.requires_grad_() for name, value in policy.init_policy(family, settings, generator).items()}
    alpha = {name: value.requires_grad_() for name, value in gmps.init_step_sizes(theta, settings).items()}

    def normal(*shape):
        return torch.randn(*shape, generator=generator)
    batch = {"observation": normal(n, B, 6), "action": normal(n, B, 3), "advantage": normal(n, B),
             "mask": torch.ones(n, B), "log_prob": -3 + 0.1 * normal(n, B)}
    demonstration = normal(n, settings.imitation_batch, 6), normal(n, settings.imitation_batch, 3)

    def together():
        gmps.meta_loss(theta, alpha, [batch] * settings.inner_steps, demonstration, settings)[0].backward()

    def looped():
        for i in range(n):
            one = gmps.of_tasks(batch, slice(i, i + 1))
            pair = tuple(value[i:i + 1] for value in demonstration)
            gmps.meta_loss(theta, alpha, [one] * settings.inner_steps, pair, settings)[0].backward()
    batched, loop = seconds(together, looped)
    print(f"meta-step, {n} tasks, {B} samples, {settings.inner_steps} inner steps: batched {1e3 * batched:.0f} ms, "
          f"loop over tasks {1e3 * loop:.0f} ms; ratio {loop / batched:.2f}")


if __name__ == "__main__":
    benches = {"env": bench_env, "learner": bench_learner, "meta": bench_meta}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", help=f"of {', '.join(benches)}; default: all")
    chosen = parser.parse_args().which or list(benches)
    if not set(chosen) <= set(benches):
        parser.error(f"choose of {', '.join(benches)}")
    for name in chosen:
        benches[name]()
