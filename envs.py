"""Task families in MuJoCo, stepped as one batch.

A *family* (`SawyerPush` in sawyer.py, `SawyerDoor` in door.py, `AntGoal` in ant.py) says what differs between tasks
and between robots: model text, observation, reward terms, start state, task distribution. `BatchEnv` is the physics and
the gymnasium vector API, written once for B environments: one call to `mujoco.rollout` steps them all on C++ threads,
with no Python loop over environments. `SingleEnv` is the batch of one behind the plain gymnasium API.

    env = gymnasium.make("gmps/SawyerPush-v0")                       # one environment
    env = gymnasium.make_vec("gmps/SawyerPush-v0", num_envs=400)     # a batch

A new family is one class with the attributes and methods of `SawyerPush`, and its entry in `FAMILIES` (and its name
among the choices of settings.py). Import families from here: this file picks the GL library before MuJoCo is loaded.

Sources: the tasks of "Guided Meta-Policy Search" (Mendonca et al., NeurIPS 2019, arXiv 1904.00956v2) with the
constants of the authors' release; lengths in metres, angles in radians, time in seconds throughout.
"""
import ctypes.util
import math
import os
import sys
import warnings

if sys.platform == "linux" and "MUJOCO_GL" not in os.environ and "DISPLAY" not in os.environ:
    # MuJoCo picks its GL library at import, and a named library that is absent breaks that import (see below).
    for _name, _library in (("egl", "EGL"), ("osmesa", "OSMesa")):
        if ctypes.util.find_library(_library):
            os.environ["MUJOCO_GL"] = _name
            break

import gymnasium

try:
    import mujoco
except (AttributeError, ImportError, OSError, RuntimeError):  # every GL binding fails with an exception of its own
    if os.environ.get("MUJOCO_GL", "disabled") == "disabled":
        raise
    os.environ["MUJOCO_GL"] = "disabled"  # the user named one that is absent: only pictures need it, and say so
    import mujoco
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from mujoco.rollout import Rollout

from ant import AntGoal
from door import SawyerDoor
from sawyer import SawyerPush
from vision import Camera, SawyerPushVision, opengl

FULL = int(mujoco.mjtState.mjSTATE_FULLPHYSICS)  # time, positions, velocities, activations
START_TIME = 1.0  # every episode's clock starts here: a simulator that resets itself falls back to 0 and is seen


# ---------------------------------------------------------------- families and their tasks
FAMILIES = {family.name: family for family in (SawyerPush, AntGoal, SawyerDoor, SawyerPushVision)}
TASK_STREAMS = {"validation": 202, "held_out": 303}


def make_family(name, reward=None):
    """The family of that name, with that reward or its usual one; ValueError where it has no such reward."""
    family = FAMILIES[name]
    reward = reward or family.rewards[0]
    if reward not in family.rewards:
        raise ValueError(f"{name} has no {reward} reward: choose {' or '.join(family.rewards)}")
    return family(reward)


def task_set(family, split, count):
    """Fixed, disjoint task sets: (count, task_size) tasks of `split` "train", "validation" or "held_out".

    They are the same for every run's seed. Validation and held-out tasks are random draws from streams of their own;
    tuning looks at validation tasks only.
    """
    if split == "train":
        return family.training_tasks(count)
    return family.sample_tasks(np.random.default_rng(TASK_STREAMS[split]), count)


def check_tasks(family, tasks):
    """`tasks` as a float (n, task_size) array; ValueError, in one line, where it is not one."""
    try:
        if np.iscomplexobj(tasks):
            raise ValueError
        tasks = np.asarray(tasks, dtype=float)
    except (TypeError, ValueError):
        raise ValueError(f"goals must be numbers of shape (n, {family.task_size})") from None
    if tasks.ndim != 2 or tasks.shape[1] != family.task_size or not len(tasks):
        raise ValueError(f"goals must have shape (n, {family.task_size}) with n >= 1, not {tasks.shape}")
    if not np.isfinite(tasks).all():
        raise ValueError(f"goals must be finite; row {int(np.argmin(np.isfinite(tasks).all(1)))} is not")
    low, high = family.task_limits
    outside = ((tasks < low) | (tasks > high)).any(1)
    if outside.any():
        row = int(np.argmax(outside))
        raise ValueError(f"goal {tasks[row].tolist()} in row {row} is out of range: "
                         f"give {family.task_unit} between {low.tolist()} and {high.tolist()}")
    return tasks


# ---------------------------------------------------------------- physics for a batch
class BatchEnv(gymnasium.vector.VectorEnv):
    """B environments of one family behind gymnasium's vector API (next-step autoreset).

    `reset(options={"task": array})` takes one task (task_size,) for all or one each (B, task_size), for the episodes
    that it starts; as gymnasium has it, an autoreset knows no options and draws a task anew. Results depend
    neither on `threads` nor on B: every environment is integrated from its own full state with a cold-started solver.
    An environment whose simulator diverges keeps its last good state, ends with a finite reward, `terminated`
    true, and is counted in `divergences`; the others go on.
    """
    metadata = {"render_modes": ["rgb_array"], "render_fps": 20, "autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(self, num_envs=1, family="push", threads=None, render_mode=None, reward=None):
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, not {num_envs}")
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f'render_mode must be None or "rgb_array", not {render_mode!r}')
        self.family = make_family(family, reward) if isinstance(family, str) else family
        self.num_envs, self.render_mode = num_envs, render_mode
        self.single_observation_space = observation_space(self.family)
        self.single_action_space = gymnasium.spaces.Box(-1.0, 1.0, (self.family.action_size,), np.float32)
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, num_envs)
        self.model = mujoco.MjModel.from_xml_string(self.family.xml())
        self.divergences = 0
        self._renderer = None
        self._camera = Camera(self.family) if self.family.image_shape else None

        start = self.family.start(self.model)
        start.time = START_TIME
        mujoco.mj_forward(self.model, start)
        self._start_state, self._start_control = self._get(start, FULL), self._get(start, self.family.control_spec)
        self._start_sensors = start.sensordata.copy()

        self.threads = threads
        threads = min(threads or os.cpu_count(), num_envs)
        self._rollout = Rollout(nthread=threads if threads > 1 else 0)
        self._workers = [mujoco.MjData(self.model) for _ in range(threads)]
        self._models = [self.model] * num_envs
        steps = self.family.frame_skip
        self._trace = np.empty((num_envs, steps, self._start_state.size))
        self._sensor_trace = np.empty((num_envs, steps, self._start_sensors.size))
        self._control_trace = np.empty((num_envs, steps, self._start_control.size))
        self._all = np.ones(num_envs, bool)
        self.state = np.tile(self._start_state, (num_envs, 1))
        self.control = np.tile(self._start_control, (num_envs, 1))
        self.sensors = np.tile(self._start_sensors, (num_envs, 1))
        self.steps = np.zeros(num_envs, int)
        self._finished = np.zeros(num_envs, bool)
        self.tasks = None

    def resized(self, num_envs):
        """Another batch of the same family and threads."""
        return BatchEnv(num_envs, self.family, self.threads)

    def _get(self, data, spec):
        vector = np.empty(mujoco.mj_stateSize(self.model, spec))
        mujoco.mj_getState(self.model, data, vector, spec)
        return vector

    def reset(self, *, seed=None, options=None):
        """Start all episodes. Returns observations (B, obs) and infos. ValueError for a task of a wrong shape."""
        if seed is not None:
            self._np_random, self._np_random_seed = gymnasium.utils.seeding.np_random(seed)
        task = (options or {}).get("task")
        if task is None:
            self.tasks = self.family.sample_tasks(self.np_random, self.num_envs)
        else:
            rows = check_tasks(self.family, np.atleast_2d(task))
            if len(rows) not in (1, self.num_envs):
                raise ValueError(f"options['task'] has {len(rows)} rows for {self.num_envs} environments")
            self.tasks = np.broadcast_to(rows, (self.num_envs, self.family.task_size)).copy()
        self._restart(self._all)
        self._outcome = self.family.outcome(self.state, self.sensors)
        return self._observe(), self._info(np.zeros((self.num_envs, self.family.action_size)))

    def _observe(self):
        vector = self.family.observe(self.state, self.sensors)
        return {"image": self._camera.images(self.state), "hand": vector} if self._camera else vector

    def _restart(self, which):
        self.state[which], self.control[which] = self._start_state, self._start_control
        self.sensors[which], self.steps[which], self._finished[which] = self._start_sensors, 0, False

    def step(self, actions):
        """One step of every environment: actions (B, act), clipped to [-1, 1]."""
        if self.tasks is None:
            raise gymnasium.error.ResetNeeded("call reset() before step()")
        actions = np.asarray(actions, dtype=float)
        if actions.shape != (self.num_envs, self.family.action_size):
            raise ValueError(f"actions must have shape {(self.num_envs, self.family.action_size)}, not {actions.shape}")
        actions = np.clip(actions, -1.0, 1.0)
        resetting = self._finished.copy()
        diverged = self._simulate(actions, skip=resetting.all())
        self.steps += 1
        if resetting.any():  # gymnasium's next-step autoreset: this step's action is not used
            diverged &= ~resetting
            self.tasks[resetting] = self.family.sample_tasks(self.np_random, int(resetting.sum()))
            self._restart(resetting)
        self._outcome = self.family.outcome(self.state, self.sensors)
        info = self._info(np.where(diverged[:, None], 0.0, actions))
        reward = np.where(resetting, 0.0, sum(info[name] for name in self.family.reward_weights))
        terminated = diverged | (self.family.ended(self.state) & ~resetting)
        truncated = (self.steps >= self.family.horizon) & ~terminated
        self._finished = truncated | terminated
        if diverged.any():
            self.divergences += int(diverged.sum())
            info["diverged"], info["_diverged"] = diverged, diverged
            warnings.warn(f"simulation diverged in environments {np.flatnonzero(diverged).tolist()[:8]}; "
                          f"{self.divergences} so far: their episodes end here", stacklevel=2)
        return self._observe(), reward, terminated, truncated, info

    def _simulate(self, actions, skip):
        """Advance state, control and sensors by `frame_skip` physics steps; returns who diverged, (B,) bool."""
        if skip:
            return np.zeros(self.num_envs, bool)
        control = self.family.next_control(self.control, actions)
        self._control_trace[:] = control[:, None]
        self._rollout.rollout(self._models, self._workers, self.state, self._control_trace,
                              control_spec=self.family.control_spec, skip_checks=True, nstep=self.family.frame_skip,
                              state=self._trace, sensordata=self._sensor_trace)
        state, sensors = self._trace[:, -1], self._sensor_trace[:, -1]
        # After a BADQACC and its like MuJoCo resets the state, clock included, and stops stepping it.
        expected_time = self.state[:, 0] + self.family.frame_skip * self.model.opt.timestep
        good = np.isfinite(state).all(1) & np.isfinite(sensors).all(1)
        good &= np.abs(state[:, 0] - expected_time) < 0.5 * self.model.opt.timestep
        if good.all():
            self.state[:], self.control, self.sensors[:] = state, control, sensors
        else:
            self.state[good], self.control[good], self.sensors[good] = state[good], control[good], sensors[good]
        return ~good

    def _info(self, actions):
        distance = self.family.distance(self._outcome, self.tasks)
        info = {"goal_distance": distance} | ({"angle_error": distance} if self.family.task_unit == "rad" else {})
        info |= self.family.reward_terms(self._outcome, actions, self.tasks)
        return info | {f"_{name}": self._all for name in info}

    @property
    def expert_observation(self):
        """The state behind images, (B, obs of `family.expert_family`): what their experts see."""
        return self.family.expert_family.observe(self.state, self.sensors)

    @property
    def outcomes(self):
        """What the rewards of the last step were computed from, (B, outcome): lets a learner relabel tasks."""
        return self._outcome

    def render(self):
        """Picture (480, 640, 3) of the first environment, its goal drawn. RuntimeError where there is no GL."""
        if self._renderer is None:
            self._renderer = open_renderer(self.model)
        data = self._workers[0]
        mujoco.mj_setState(self.model, data, self.state[0], FULL)
        mujoco.mj_setState(self.model, data, self.control[0], self.family.control_spec)
        mujoco.mj_forward(self.model, data)
        self._renderer.update_scene(data, camera="video")
        scene = self._renderer.scene
        mujoco.mjv_initGeom(scene.geoms[scene.ngeom], mujoco.mjtGeom.mjGEOM_CYLINDER, np.array(self.family.goal_size),
                            self.family.goal_position(self.tasks[0]), np.eye(3).ravel(),
                            np.array([0.1, 0.75, 0.2, 1.0], np.float32))
        scene.ngeom += 1
        return self._renderer.render().copy()

    def close_extras(self, **kwargs):
        self._rollout.close()
        if self._camera is not None:
            self._camera.close()
        if self._renderer is not None:
            self._renderer.close()


def open_renderer(model, height=480, width=640):
    """An offscreen renderer, or RuntimeError with one line that says what to install."""
    with opengl():
        return mujoco.Renderer(model, height, width)


def observation_space(family):
    """Gymnasium's space of one observation: a box of numbers, or a dict of image and numbers."""
    box = gymnasium.spaces.Box(-family.observation_limit, family.observation_limit, (family.observation_size,), np.float64)
    if not family.image_shape:
        return box
    return gymnasium.spaces.Dict({"image": gymnasium.spaces.Box(0, 255, family.image_shape, np.uint8), "hand": box})


class SingleEnv(gymnasium.Env):
    """One environment: the batch of one, with gymnasium's plain API. `task` options have shape (task_size,)."""
    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, family="push", render_mode=None, reward=None):
        self.batch = BatchEnv(1, family, threads=1, render_mode=render_mode, reward=reward)
        self.render_mode = render_mode
        self.observation_space, self.action_space = self.batch.single_observation_space, self.batch.single_action_space

    @property
    def model(self):
        return self.batch.model

    @staticmethod
    def _own(observation):
        return {name: value[0] for name, value in observation.items()} if isinstance(observation, dict) else observation[0]

    @staticmethod
    def _first(info):
        return {name: value[0].item() for name, value in info.items() if not name.startswith("_")}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.batch._np_random = self.np_random  # goals come from the generator that gymnasium seeds
        observation, info = self.batch.reset(options=options)
        return self._own(observation), self._first(info)

    def step(self, action):
        self.batch._finished[:] = False  # the caller resets; there is no autoreset behind one environment
        observation, reward, terminated, truncated, info = self.batch.step(np.asarray(action)[None])
        return self._own(observation), float(reward[0]), bool(terminated[0]), bool(truncated[0]), self._first(info)

    def render(self):
        return self.batch.render()

    def close(self):
        self.batch.close()


def rollout(env, policy, tasks):
    """Whole episodes of every environment. `policy` maps what the environment returns, (B, obs), to actions (B, act).

    Returns a dict of arrays, B environments by T steps: observations (B, T+1, obs), actions (B, T, act) as the policy gave
    them, before the environment clips, rewards (B, T), distances (B, T), outcomes (B, T, outcome), mask (B, T): 1 until the
    episode ended, and terminated (B,). After an early end rewards and mask are 0, and distances and outcomes stay at their
    last value. A family with images adds images (B, T+1, ...) uint8 and states (B, T+1, obs of its experts).
    """
    observation, _ = env.reset(options={"task": tasks})
    seen = seen_parts(env, observation)
    steps = {key: [value] for key, value in seen.items()}
    keys = ("actions", "rewards", "distances", "outcomes", "mask")
    steps |= {key: [] for key in keys}
    alive, ended = np.ones(env.num_envs, bool), np.zeros(env.num_envs, bool)
    for _ in range(env.family.horizon):
        action = policy(observation)
        observation, reward, terminated, _, info = env.step(action)
        next_seen, distance, outcome = seen_parts(env, observation), info["goal_distance"], env.outcomes
        if not alive.all():  # autoreset has begun another episode there: keep the finished one's last values
            next_seen = {key: np.where(alive.reshape(-1, *[1] * (value.ndim - 1)), value, seen[key])
                         for key, value in next_seen.items()}
            distance = np.where(alive, distance, steps["distances"][-1])
            outcome = np.where(alive[:, None], outcome, steps["outcomes"][-1])
            observation = next_seen["observations"] if not env.family.image_shape else {
                "image": next_seen["images"], "hand": next_seen["observations"]}
        seen = next_seen
        values = (action, reward * alive, distance, outcome, alive.astype(float))
        for key, value in (*seen.items(), *zip(keys, values)):
            steps[key].append(value)
        ended |= terminated & alive
        alive &= ~terminated
    return {key: np.stack(value, axis=1) for key, value in steps.items()} | {"terminated": ended}


def correlated_noise(shape, correlation, generator):
    """Endless standard normal noise of that shape, each correlated with the one before [ours].

    An ant that is controlled at 100 Hz moves its legs only by noise that lasts. Each step's noise is still standard normal,
    but not given the state, which earlier noise has shaped: the densities of single steps that the inner loss takes are
    then an approximation.
    """
    noise = torch.randn(shape, generator=generator)
    while True:
        yield noise
        noise = correlation * noise + math.sqrt(1 - correlation ** 2) * torch.randn(shape, generator=generator)


def seen_parts(env, observation):
    """The parts of an observation under the names that `rollout` keeps them by."""
    if not env.family.image_shape:
        return {"observations": observation}
    return {"observations": observation["hand"], "images": observation["image"], "states": env.expert_observation}


STREAMS = ("experts", "demonstrations", "imitation", "meta-training", "evaluation")  # add at the end only


def random_streams(seed, purpose, iteration):
    """(numpy, torch) generators of one iteration of one phase: going on with a run needs no stored random state."""
    generator = np.random.default_rng([seed, STREAMS.index(purpose), iteration])
    return generator, torch.Generator().manual_seed(int(generator.integers(2 ** 62)))


for _family in FAMILIES.values():
    gymnasium.register(id=_family.env_id, entry_point="envs:SingleEnv", vector_entry_point="envs:BatchEnv",
                       kwargs={"family": _family.name})
