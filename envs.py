"""Environments stepped as a batch, and rollouts.

A task family (tasks/) says what differs between robots and between tasks. `BatchEnv` is the physics
and gymnasium's vector API, written once for B MuJoCo environments: one call to `mujoco.rollout`
steps them all on C++ threads, with no Python loop over environments. `GymnasiumBatch` does the same
for families that bring a plain `gymnasium.Env`, at gymnasium's own speed.

    env = gymnasium.make("gmps/SawyerPush-v0")                       # one environment
    env = gymnasium.make_vec("gmps/SawyerPush-v0", num_envs=400)     # a batch

Lengths are in metres, angles in radians, times in seconds throughout.
"""
import copy
import warnings

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from loky import cpu_count

from tasks import TASKS, make_family
from tasks.base import GymnasiumFamily, MujocoFamily, TaskFamily, task_of_each
from tasks.gymnasium_batch import GymnasiumBatch
from tasks.rendering import Camera, Rollout, mujoco, open_renderer

FULL = int(mujoco.mjtState.mjSTATE_FULLPHYSICS)  # time, positions, velocities, activations
# Episodes start at this time, since MuJoCo resets a diverged state to time 0: `_simulate` sees it.
START_TIME = 1.0


# ---------------------------------------------------------------- physics for a batch
class BatchEnv(gymnasium.vector.VectorEnv):
    """B MuJoCo environments of one family, behind gymnasium's vector API (next-step autoreset).

    `reset(options={"task": array})` takes one task (task_size,) for all or one each (B, task_size),
    for the episodes that it starts. An autoreset gets no options (gymnasium's rule), so it draws a
    random task. Results depend neither on `threads` nor on B: every environment is integrated from
    its own full state, without warm start of the solver. An environment whose simulator diverges
    keeps its last good state, ends with a finite reward and `terminated` true, and is counted in
    `divergences`. The others go on. `start_noise`: add the family's noise to start states.
    """
    metadata = {"render_modes": ["rgb_array"], "render_fps": 20,
                "autoreset_mode": AutoresetMode.NEXT_STEP}
    picture_size = 480, 640  # rows and columns of `render`; change it before the first picture

    def __init__(self, num_envs: int = 1, family: str | MujocoFamily = "push",
                 threads: int | None = None, render_mode: str | None = None,
                 reward: str | None = None, start_noise: bool = False):
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, not {num_envs}")
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f'render_mode must be None or "rgb_array", not {render_mode!r}')
        self.family = make_family(family, reward) if isinstance(family, str) else family
        if not isinstance(self.family, MujocoFamily):
            raise ValueError(f"{self.family.name} is no MuJoCo family: use its make_env()")
        if start_noise and self.family.start_noise is None:
            raise ValueError(f"{self.family.name} has no start_noise: leave it out")
        self._noise = self.family.start_noise if start_noise else None
        # What gymnasium asks of a vector environment
        self.num_envs, self.render_mode = num_envs, render_mode
        batch_space = gymnasium.vector.utils.batch_space
        self.single_observation_space = observation_space(self.family)
        self.single_action_space = gymnasium.spaces.Box(
            -1.0, 1.0, (self.family.action_size,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        # Model, cameras, and the one start state
        self.model = mujoco.MjModel.from_xml_string(self.family.xml())
        self._sensing = copy.copy(self.model)  # with options of its own, see `_sense`
        self._sensing.opt.integrator = mujoco.mjtIntegrator.mjINT_EULER
        self._renderer = None
        self._camera = Camera(self.family) if self.family.image_shape else None
        start = self.family.start(self.model)
        start.time = START_TIME
        mujoco.mj_forward(self.model, start)
        self._start_state = self._get(start, FULL)
        self._start_control = self._get(start, self.family.control_spec)
        self._start_sensors = start.sensordata.copy()
        # Threads, and the arrays that mujoco.rollout fills
        threads = min(threads or cpu_count(), num_envs)
        self._rollout = Rollout(nthread=threads if threads > 1 else 0)
        self._workers = [mujoco.MjData(self.model) for _ in range(threads)]
        shape = (num_envs, self.family.frame_skip)
        self._trace = np.empty((*shape, self._start_state.size))
        self._sensor_trace = np.empty((num_envs, 1, self._start_sensors.size))
        self._control_trace = np.empty((*shape, self._start_control.size))
        # The state of every environment
        self.state = np.tile(self._start_state, (num_envs, 1))
        self.control = np.tile(self._start_control, (num_envs, 1))
        self.sensors = np.tile(self._start_sensors, (num_envs, 1))
        self.steps = np.zeros(num_envs, int)
        self.divergences, self.tasks = 0, None
        self._finished, self._all = np.zeros(num_envs, bool), np.ones(num_envs, bool)

    def _get(self, data, spec):
        vector = np.empty(mujoco.mj_stateSize(self.model, spec))
        mujoco.mj_getState(self.model, data, vector, spec)
        return vector

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Start all episodes: (observations (B, obs), infos). ValueError for a wrong task."""
        if seed is not None:
            self._np_random, self._np_random_seed = gymnasium.utils.seeding.np_random(seed)
        task = (options or {}).get("task")
        if task is None:
            self.tasks = self.family.sample_tasks(self.np_random, self.num_envs)
        else:
            self.tasks = task_of_each(self.family, task, self.num_envs)
        self._restart(self._all)
        self._outcome = self.family.outcome(self.state, self.sensors)
        return self._observe(), self._info(np.zeros((self.num_envs, self.family.action_size)))

    def _observe(self):
        vector = self.family.observe(self.state, self.sensors)
        if self._camera is None:
            return vector
        return {"image": self._camera.images(self.state), "hand": vector}

    def _restart(self, which):
        self.state[which], self.control[which] = self._start_state, self._start_control
        self.sensors[which] = self._start_sensors
        self.steps[which], self._finished[which] = 0, False
        if self._noise is not None:
            sizes = np.repeat([0.0, *self._noise, 0.0], [1, self.model.nq, self.model.nv,
                                                         self.model.na])
            states = self._start_state + sizes * self.np_random.standard_normal(self.state.shape)
            for state in states:
                mujoco.mj_normalizeQuat(self.model, state[1:1 + self.model.nq])
            self.state[which] = states[which]
            self.sensors[which] = self._sense(self.state, self.control)[which]

    def step(self, actions: np.ndarray):
        """One step of every environment: actions (B, act), clipped to [-1, 1]."""
        if self.tasks is None:
            raise gymnasium.error.ResetNeeded("call reset() before step()")
        actions = np.asarray(actions, dtype=float)
        shape = (self.num_envs, self.family.action_size)
        if actions.shape != shape:
            raise ValueError(f"actions must have shape {shape}, not {actions.shape}")
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
        reward = np.where(resetting, 0.0, sum(info[name] for name in self._terms))
        terminated = diverged | (self.family.ended(self.state) & ~resetting)
        truncated = (self.steps >= self.family.horizon) & ~terminated
        self._finished = truncated | terminated
        if diverged.any():
            self.divergences += int(diverged.sum())
            info["diverged"], info["_diverged"] = diverged, diverged
            warnings.warn(
                f"simulation diverged in environments {np.flatnonzero(diverged).tolist()[:8]}; "
                f"{self.divergences} so far: their episodes end here", stacklevel=2)
        return self._observe(), reward, terminated, truncated, info

    def _simulate(self, actions, skip):
        """Advance by `frame_skip` physics steps; returns whose simulator diverged, (B,) bool."""
        if skip:
            return np.zeros(self.num_envs, bool)
        control = self.family.next_control(self.control, actions)
        self._control_trace[:] = control[:, None]
        self._advance(self.model, self.state, self._control_trace, state=self._trace)
        state = self._trace[:, -1].copy()
        sensors = self._sense(state, control)
        # On a warning such as BADQACC, MuJoCo resets the state, time included, and stops.
        timestep = self.model.opt.timestep
        expected_time = self.state[:, 0] + self.family.frame_skip * timestep
        good = np.isfinite(state).all(1) & np.isfinite(sensors).all(1)
        good &= np.abs(state[:, 0] - expected_time) < 0.5 * timestep
        which = slice(None) if good.all() else good  # a slice copies faster
        self.state[which], self.sensors[which] = state[which], sensors[which]
        self.control[which] = control[which]
        return ~good

    def _sense(self, state, control):
        """Sensor readings (B, sensors) in states (B, state).

        `mujoco.rollout` reads sensors at the start of its last step. So we take one step more and
        keep its readings alone. One of Euler is enough: it costs a quarter of one of RK4.
        """
        self._advance(self._sensing, state, control[:, None], sensordata=self._sensor_trace)
        return self._sensor_trace[:, 0]

    def _advance(self, model, start, controls, **outputs):
        self._rollout.rollout([model] * self.num_envs, self._workers, start, controls,
                              control_spec=self.family.control_spec, skip_checks=True,
                              nstep=controls.shape[1], **outputs)

    def _info(self, actions):
        distance = self.family.distance(self._outcome, self.tasks)
        info = {"goal_distance": distance}
        if self.family.task_unit == "rad":
            info["angle_error"] = distance
        terms = self.family.reward_terms(self._outcome, actions, self.tasks)
        self._terms = list(terms)
        info |= terms
        return info | {f"_{name}": self._all for name in info}

    @property
    def expert_observation(self) -> np.ndarray:
        """The state behind images, (B, obs of `family.expert_family`): what their experts see."""
        return self.family.expert_family.observe(self.state, self.sensors)

    @property
    def outcomes(self) -> np.ndarray:
        """(B, outcome): what the last rewards came from. It lets a learner relabel tasks."""
        return self._outcome

    def render(self) -> np.ndarray:
        """Picture (rows, columns, 3) of the first environment and its goal. Errors: NoOpenGL."""
        if self._renderer is None:
            self._renderer = open_renderer(self.model, *self.picture_size)
        data = self._workers[0]
        mujoco.mj_setState(self.model, data, self.state[0], FULL)
        mujoco.mj_setState(self.model, data, self.control[0], self.family.control_spec)
        mujoco.mj_forward(self.model, data)
        self._renderer.update_scene(data, camera="video")
        scene = self._renderer.scene
        mujoco.mjv_initGeom(
            scene.geoms[scene.ngeom], mujoco.mjtGeom.mjGEOM_CYLINDER,
            np.array(self.family.goal_size), self.family.goal_position(self.tasks[0]),
            np.eye(3).ravel(), np.array([0.1, 0.75, 0.2, 1.0], np.float32))
        scene.ngeom += 1
        return self._renderer.render().copy()

    def close_extras(self, **kwargs):
        self._rollout.close()
        if self._camera is not None:
            self._camera.close()
        if self._renderer is not None:
            self._renderer.close()


def observation_space(family: MujocoFamily) -> gymnasium.Space:
    """Gymnasium's space of one observation: a box of numbers, or a dict of image and numbers."""
    limit = family.observation_limit
    box = gymnasium.spaces.Box(-limit, limit, (family.observation_size,), np.float64)
    if not family.image_shape:
        return box
    image = gymnasium.spaces.Box(0, 255, family.image_shape, np.uint8)
    return gymnasium.spaces.Dict({"image": image, "hand": box})


class SingleEnv(gymnasium.Env):
    """One environment: the batch of one, with gymnasium's plain API.

    `reset(options={"task": task})` takes a task of shape (task_size,). Every info holds the
    episode's own as "task", so that a recording says what its episodes were for.
    """
    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, family: str | MujocoFamily = "push", render_mode: str | None = None,
                 reward: str | None = None, start_noise: bool = False):
        self.batch = BatchEnv(1, family, 1, render_mode, reward, start_noise)
        self.render_mode, self.model = render_mode, self.batch.model
        self.observation_space = self.batch.single_observation_space
        self.action_space = self.batch.single_action_space

    @staticmethod
    def _own(observation):
        if isinstance(observation, dict):
            return {name: value[0] for name, value in observation.items()}
        return observation[0]

    def _first(self, info):
        numbers = {name: value[0].item() for name, value in info.items()
                   if not name.startswith("_")}
        return numbers | {"task": self.batch.tasks[0].copy()}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.batch._np_random = self.np_random  # goals come from gymnasium's own generator
        observation, info = self.batch.reset(options=options)
        return self._own(observation), self._first(info)

    def step(self, action):
        self.batch._finished[:] = False  # the caller resets: one environment has no autoreset
        observation, reward, terminated, truncated, info = self.batch.step(
            np.asarray(action)[None])
        return (self._own(observation), float(reward[0]), bool(terminated[0]), bool(truncated[0]),
                self._first(info))

    def render(self):
        return self.batch.render()

    def close(self):
        self.batch.close()


# ---------------------------------------------------------------- rollouts
class Environments:
    """The batches of one family: one for each number of environments, made when first needed."""

    def __init__(self, family: TaskFamily, threads: int | None = None):
        self.family, self.threads, self.batches = family, threads, {}

    def __call__(self, num_envs: int):
        if num_envs not in self.batches:
            self.batches[num_envs] = make_batch(self.family, num_envs, self.threads)
        return self.batches[num_envs]

    def rollout(self, policy, tasks: np.ndarray, episodes: int = 1) -> dict:
        """`rollout` of `episodes` on each task (n, task); environments are ordered by task."""
        env = self(len(tasks) * episodes)
        return rollout(env, policy, np.repeat(tasks, episodes, axis=0))

    def close(self) -> None:
        for batch in self.batches.values():
            batch.close()
        self.batches.clear()


def make_batch(family: TaskFamily, num_envs: int, threads: int | None = None,
               render_mode: str | None = None):
    """The batch of environments that fits a family."""
    if isinstance(family, GymnasiumFamily):
        return GymnasiumBatch(num_envs, family, render_mode)
    return BatchEnv(num_envs, family, threads, render_mode)


def seen_parts(env, observation) -> dict:
    """The parts of an observation, named as in the result of `rollout`."""
    if not env.family.image_shape:
        return {"observations": observation}
    return {"observations": observation["hand"], "images": observation["image"],
            "states": env.expert_observation}


def rollout(env, policy, tasks: np.ndarray, keep_images: bool = False) -> dict:
    """Whole episodes of all B environments, on `tasks` (B, task).

    `policy(observation, last)` maps what the environment returned to actions (B, act). `last` is
    None at the first step. Then it is {"reward": (B,), "alive": (B,)}: the reward of the step
    before, and which episodes still go on.

    Returns arrays: observations (B, T+1, obs); actions (B, T, act) as the policy gave them, before
    the environment clips; rewards, distances (B, T); outcomes (B, T, outcome); mask (B, T), 1 until
    the episode ended; terminated, diverged (B,). After an early end rewards and mask are 0, actions
    have no effect, and the rest keeps its last value. A family with images adds states (B, T+1,
    obs of its experts) and, with `keep_images`, images (B, T+1, rows, columns, 3) uint8.
    """
    observation, _ = env.reset(options={"task": tasks})
    seen = seen_parts(env, observation)
    kept = [name for name in seen if name != "images" or keep_images]
    steps = {name: [seen[name]] for name in kept}
    keys = ("actions", "rewards", "distances", "outcomes", "mask")
    steps |= {key: [] for key in keys}
    alive, last = np.ones(env.num_envs, bool), None
    terminated, diverged = np.zeros(env.num_envs, bool), np.zeros(env.num_envs, bool)
    for _ in range(env.family.horizon):
        action = policy(observation, last)
        observation, reward, ended, truncated, info = env.step(action)
        now, distance, outcome = seen_parts(env, observation), info["goal_distance"], env.outcomes
        if not alive.all():  # autoreset began another episode: keep the end of this one
            now = {name: np.where(alive.reshape(-1, *[1] * (value.ndim - 1)), value, seen[name])
                   for name, value in now.items()}
            distance = np.where(alive, distance, steps["distances"][-1])
            outcome = np.where(alive[:, None], outcome, steps["outcomes"][-1])
            observation = now["observations"] if not env.family.image_shape else {
                "image": now["images"], "hand": now["observations"]}
        seen = now
        values = (action, reward * alive, distance, outcome, alive.astype(float))
        for name, value in (*((name, seen[name]) for name in kept), *zip(keys, values)):
            steps[name].append(value)
        terminated |= ended & alive
        diverged |= np.asarray(info.get("diverged", False), bool) & alive
        alive = alive & ~(ended | truncated)
        last = {"reward": reward * steps["mask"][-1], "alive": alive}
    return {key: np.stack(value, axis=1) for key, value in steps.items()} | {
        "terminated": terminated, "diverged": diverged}


for _name, _entry in TASKS.items():
    gymnasium.register(id=f"gmps/{_entry.partition(':')[2]}-v0", entry_point="envs:SingleEnv",
                       vector_entry_point="envs:BatchEnv", kwargs={"family": _name})
