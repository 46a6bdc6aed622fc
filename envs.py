"""Task families in MuJoCo, stepped as one batch.

A *family* (`SawyerPush`) says what differs between tasks and between robots: model text, observation,
reward terms, start state, task distribution. `BatchEnv` is the physics and the gymnasium vector API, written
once for B environments: one call to `mujoco.rollout` steps them all on C++ threads, with no Python loop over
environments. `SingleEnv` is the batch of one behind the plain gymnasium API.

    env = gymnasium.make("gmps/SawyerPush-v0")                       # one environment
    env = gymnasium.make_vec("gmps/SawyerPush-v0", num_envs=400)     # a batch

A new family is one class with the attributes and methods of `SawyerPush`, and its entry in `FAMILIES` (and its name
among the choices of settings.py).

Sources: the tasks of "Guided Meta-Policy Search" (Mendonca et al., NeurIPS 2019, arXiv 1904.00956v2) with the
constants of the authors' release; lengths in metres, angles in radians, time in seconds throughout.
"""
import ctypes.util
import os
import sys
import warnings

if sys.platform == "linux" and "MUJOCO_GL" not in os.environ and "DISPLAY" not in os.environ:
    # MuJoCo picks its GL library at import, and a named library that is absent breaks that import.
    for _name, _library in (("egl", "EGL"), ("osmesa", "OSMesa")):
        if ctypes.util.find_library(_library):
            os.environ["MUJOCO_GL"] = _name
            break

import gymnasium
import mujoco
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from mujoco.rollout import Rollout

FULL = int(mujoco.mjtState.mjSTATE_FULLPHYSICS)  # time, positions, velocities, activations
START_TIME = 1.0  # every episode's clock starts here: a simulator that resets itself falls back to 0 and is seen


# ---------------------------------------------------------------- Sawyer: constants, model, control
# Kinematic chain of the arm, base outward: name, position and quaternion in the parent frame, joint range, mass
# in kg (release's model). Every joint turns about its z axis.
ARM = (("l0", "0 0 0.08", "1 0 0 0", "-3.05 3.05", 5.32),
       ("l1", "0.081 0.05 0.237", "0.5 -0.5 0.5 0.5", "-3.8 -0.5", 4.505),
       ("l2", "0 -0.14 0.1425", "0.7071 0.7071 0 0", "-3.04 3.04", 1.745),
       ("l3", "0 -0.042 0.26", "0.7071 -0.7071 0 0", "-3.04 3.04", 2.51),
       ("l4", "0 -0.125 -0.1265", "0.7071 0.7071 0 0", "-2.976 2.976", 1.11),
       ("l5", "0 0.031 0.275", "0.7071 -0.7071 0 0", "-2.976 2.976", 1.56),
       ("l6", "0 -0.11 0.1053", "0.06162 0.06163 -0.70442 0.70442", "-4.71 4.71", 0.33))
ARM_START = (2.127, -0.5, -0.793, 2.336, 1.704, 0.683, 1.679)  # where the arm hangs with its hand at the start
MOCAP_LOW, MOCAP_HIGH = np.array([-0.5, 0.4, 0.05]), np.array([0.5, 1.0, 0.5])
ACTION_SCALE = 0.01  # metres of mocap motion per unit of action and env step

# The claws are 0.1 m apart along y, so a hand that moves in +y pushes with the outer face of its front claw.
GRIPPER = """
<body name="flange" pos="0 0 0.0245" quat="0.7071 0 0 0.7071">
  <geom class="link" type="cylinder" size="0.035" fromto="0 0 0 0 0 0.09" mass="0.01"/>
  <body name="hand" pos="0 0 0.12" quat="-1 0 1 0">
    <geom class="link" type="box" size="0.02 0.055 0.02" pos="-0.05 0 0" rgba="0.25 0.25 0.28 1" mass="0.01"/>
    <body name="right_claw" pos="0 -0.05 0">
      <joint name="right_claw" class="claw" axis="0 1 0"/><geom class="claw"/><site name="right_tip" pos="0.03 0.005 0"/>
    </body>
    <body name="left_claw" pos="0 0.05 0">
      <joint name="left_claw" class="claw" axis="0 -1 0"/><geom class="claw"/><site name="left_tip" pos="0.03 -0.005 0"/>
    </body>
  </body>
</body>"""


def sawyer_xml(objects, hand_start, sensors):
    """MJCF text of arm, table and mocap weld, with the family's own `objects` and `sensors` put in."""
    body = GRIPPER
    link_ends = [position for _, position, *_ in ARM[1:]] + ["0 0 0.0245"]
    for (name, position, quaternion, joint_range, mass), end in zip(reversed(ARM), reversed(link_ends)):
        # Links are drawn as capsules from joint to joint; they carry their mass and touch nothing.
        body = f"""
<body name="{name}" pos="{position}" quat="{quaternion}">
  <joint name="{name}" range="{joint_range}" damping="10" armature="0.1"/>
  <geom class="link" type="capsule" size="0.05" fromto="0 0 0 {end}" mass="{0.7 * mass}"/>
  <geom class="link" type="cylinder" size="0.06 0.07" mass="{0.3 * mass}" rgba="0.25 0.25 0.28 1"/>{body}
</body>"""
    return f"""
<mujoco model="sawyer">
<compiler angle="radian" autolimits="true"/>
<option timestep="0.01" cone="elliptic" impratio="3" iterations="50"/>
<visual><global offwidth="640" offheight="480"/><headlight ambient="0.45 0.45 0.45"/></visual>
<default>
  <default class="link"><geom contype="0" conaffinity="0" rgba="0.72 0.12 0.13 1"/></default>
  <default class="claw">
    <joint type="slide" range="0 0.03" armature="100" damping="1000"/>
    <geom type="box" size="0.045 0.005 0.015" condim="4" friction="1 0.005 0.0001" rgba="0.1 0.1 0.1 1"/>
  </default>
</default>
<worldbody>
  <light pos="0.6 0.2 2" dir="-0.3 0.2 -1" diffuse="0.5 0.5 0.5"/>
  <camera name="video" pos="1.15 0.05 0.75" mode="targetbody" target="look_at" fovy="36"/>
  <body name="look_at" pos="0 0.55 0.15"/>
  <geom name="floor" type="plane" size="3 3 0.1" pos="0 0 -0.9" rgba="0.86 0.87 0.88 1"/>
  <geom name="table" type="box" size="0.4 0.4 0.03" pos="0 0.8 -0.03" rgba="0.80 0.70 0.55 1"/>
  <geom class="link" type="cylinder" size="0.12" fromto="0 0 -0.9 0 0 0.08" rgba="0.3 0.3 0.33 1"/>{body}
  <body name="mocap" mocap="true" pos="{hand_start}" quat="1 0 1 0"/>
  {objects}
</worldbody>
<equality><weld body1="mocap" body2="hand" relpose="0 0 0 1 0 0 0" solref="0.02 1"/></equality>
<actuator><position joint="right_claw" kp="400"/><position joint="left_claw" kp="400"/></actuator>
<sensor>{sensors}</sensor>
</mujoco>"""


# ---------------------------------------------------------------- Sawyer push
class SawyerPush:
    """Push a block to a hidden goal on the table (the paper's push task, constants of the release).

    Observation (6,): hand x, y, z, block x, y, z. The goal is never in it.
    Action (3,) in [-1, 1]: motion of the hand's mocap target, 1 cm per unit and step.
    Task (2,): goal x, y; training distribution uniform in [-0.1, 0.1] x [0.7, 0.8].
    Reward: -|block - fingertip midpoint| + 100 max(0, d0 - d), d = |block xy - goal|, d0 its start value.
    Episode: 50 steps, never ends early.
    """
    name, env_id = "push", "gmps/SawyerPush-v0"
    # Networks see (observation - centre) / scale: a decimetre is about the range in which positions vary.
    observation_centre, observation_scale = np.array([0.0, 0.6, 0.1, 0.0, 0.65, 0.02]), np.full(6, 0.1)
    observation_size, action_size, task_size, outcome_size = 6, 3, 2, 6
    horizon, frame_skip = 50, 5
    task_low, task_high = np.array([-0.1, 0.7]), np.array([0.1, 0.8])
    task_limits = np.array([-0.4, 0.4]), np.array([0.4, 1.2])  # the table: goals off it are refused
    task_unit = "m"
    success_distance = 0.05
    control_spec = int(mujoco.mjtState.mjSTATE_MOCAP_POS)
    hand_start, block_start = np.array([0.0, 0.4, 0.05]), np.array([0.0, 0.52, 0.02])
    # The release gives the block 0.01 kg and a huge inertia. In the authors' recorded episodes, though, the block
    # pushes the front claw 3 cm back against its 1000 N s/m damper, which takes far more than the 0.1 N of friction
    # that 0.01 kg has: replayed with it, the block runs 2.5 cm ahead and returns are 7% too high. 1 kg is the lightest
    # block that stays well within the recordings' tolerance (README, "The simulator").
    block_mass = 1.0
    reward_weights = {"reach": 1.0, "place": 100.0}

    def xml(self):
        block = f"""<body name="block" pos="{_text(self.block_start)}"><freejoint/>
          <inertial pos="0 0 0" mass="{self.block_mass}" diaginertia="1e5 1e5 1e5"/>
          <geom type="box" size="0.02 0.02 0.02" condim="4" friction="1 0.005 0.0001" rgba="0.15 0.35 0.75 1"/></body>"""
        frames = (("xbody", "hand"), ("xbody", "block"), ("site", "right_tip"), ("site", "left_tip"))
        sensors = "".join(f'<framepos objtype="{kind}" objname="{name}"/>' for kind, name in frames)
        return sawyer_xml(block, _text(self.hand_start), sensors)

    def start(self, model):
        """The one start state: the arm settled under gravity on its mocap target, the block put in its place."""
        data = mujoco.MjData(model)
        data.qpos[:len(ARM_START)] = ARM_START
        mujoco.mj_step(model, data, 1000)
        block = model.jnt_qposadr[model.body("block").jntadr[0]]
        data.qpos[block:block + 7] = *self.block_start, 1, 0, 0, 0
        data.qvel[:] = 0
        return data

    def observe(self, sensors):
        """(B, 12) sensor readings -> observation (B, 6)."""
        return sensors[:, :6]

    def outcome(self, sensors):
        """(B, 12) -> (B, 6), all that a reward for any goal needs: block xyz, midpoint of the two fingertips xyz."""
        return np.concatenate([sensors[:, 3:6], 0.5 * (sensors[:, 6:9] + sensors[:, 9:12])], axis=1)

    def next_control(self, control, action):
        """Mocap position (B, 3) after an action (B, 3) already clipped to [-1, 1]."""
        return np.clip(control + ACTION_SCALE * action, MOCAP_LOW, MOCAP_HIGH)

    def distance(self, outcome, task):
        """Block to goal in the plane, metres. `outcome` (..., 6), `task` (..., 2) -> (...)."""
        return np.hypot(outcome[..., 0] - task[..., 0], outcome[..., 1] - task[..., 1])

    def reward_terms(self, outcome, action, task):
        """Weighted terms whose sum is the reward; `outcome` is that after the step. Shapes as in `distance`."""
        start_distance = np.hypot(self.block_start[0] - task[..., 0], self.block_start[1] - task[..., 1])
        reach = outcome[..., :3] - outcome[..., 3:]
        return {"reach": -self.reward_weights["reach"] * np.sqrt(np.einsum("...i,...i->...", reach, reach)),
                "place": self.reward_weights["place"] * np.maximum(0.0, start_distance - self.distance(outcome, task))}

    def sample_tasks(self, generator, count):
        """(count, 2) goals from the training distribution."""
        return generator.uniform(self.task_low, self.task_high, (count, self.task_size))

    def training_tasks(self, count):
        """(count, 2) goals spread evenly over the distribution's range: the R2 low-discrepancy sequence."""
        golden = 1.324717957244746  # the real root of x^3 = x + 1
        offset = np.array([0.1, 0.85])  # of a few tried, it leaves the smallest hole between 20 goals, 3.2 cm
        unit = (offset + np.arange(count)[:, None] / golden ** np.array([1, 2])) % 1.0
        return self.task_low + unit * (self.task_high - self.task_low)

    def goal_position(self, task):
        """Where a picture shows the goal."""
        return np.array([task[0], task[1], 0.002])


FAMILIES = {family.name: family for family in (SawyerPush,)}
TASK_STREAMS = {"validation": 202, "held_out": 303}


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


def _text(numbers):
    return " ".join(f"{number:g}" for number in numbers)


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

    def __init__(self, num_envs=1, family="push", threads=None, render_mode=None):
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, not {num_envs}")
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f'render_mode must be None or "rgb_array", not {render_mode!r}')
        self.family = FAMILIES[family]() if isinstance(family, str) else family
        self.num_envs, self.render_mode = num_envs, render_mode
        self.single_observation_space = gymnasium.spaces.Box(-2.0, 2.0, (self.family.observation_size,), np.float64)
        self.single_action_space = gymnasium.spaces.Box(-1.0, 1.0, (self.family.action_size,), np.float32)
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, num_envs)
        self.model = mujoco.MjModel.from_xml_string(self.family.xml())
        self.divergences = 0
        self._renderer = None

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
        self._outcome = self.family.outcome(self.sensors)
        return self.family.observe(self.sensors).copy(), self._info(np.zeros((self.num_envs, self.family.action_size)))

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
        self._outcome = self.family.outcome(self.sensors)
        info = self._info(np.where(diverged[:, None], 0.0, actions))
        reward = np.where(resetting, 0.0, sum(info[name] for name in self.family.reward_weights))
        truncated = (self.steps >= self.family.horizon) & ~diverged
        self._finished = truncated | diverged
        if diverged.any():
            self.divergences += int(diverged.sum())
            info["diverged"], info["_diverged"] = diverged, diverged
            warnings.warn(f"simulation diverged in environments {np.flatnonzero(diverged).tolist()[:8]}; "
                          f"{self.divergences} so far: their episodes end here", stacklevel=2)
        return self.family.observe(self.sensors).copy(), reward, diverged, truncated, info

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
        info = {"goal_distance": self.family.distance(self._outcome, self.tasks)}
        info |= self.family.reward_terms(self._outcome, actions, self.tasks)
        return info | {f"_{name}": self._all for name in info}

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
        mujoco.mjv_initGeom(scene.geoms[scene.ngeom], mujoco.mjtGeom.mjGEOM_CYLINDER, np.array([0.02, 0.02, 0.002]),
                            self.family.goal_position(self.tasks[0]), np.eye(3).ravel(),
                            np.array([0.1, 0.75, 0.2, 1.0], np.float32))
        scene.ngeom += 1
        return self._renderer.render().copy()

    def close_extras(self, **kwargs):
        self._rollout.close()
        if self._renderer is not None:
            self._renderer.close()


def open_renderer(model, height=480, width=640):
    """An offscreen renderer, or RuntimeError with one line that says what to install."""
    try:
        return mujoco.Renderer(model, height, width)
    except Exception as error:  # each GL binding fails with an exception type of its own
        raise RuntimeError("no OpenGL for offscreen rendering: install EGL (libegl1) or OSMesa (libosmesa6) "
                           "and set MUJOCO_GL=egl or MUJOCO_GL=osmesa") from error


class SingleEnv(gymnasium.Env):
    """One environment: the batch of one, with gymnasium's plain API. `task` options have shape (task_size,)."""
    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, family="push", render_mode=None):
        self.batch = BatchEnv(1, family, threads=1, render_mode=render_mode)
        self.render_mode = render_mode
        self.observation_space, self.action_space = self.batch.single_observation_space, self.batch.single_action_space

    @property
    def model(self):
        return self.batch.model

    @staticmethod
    def _first(info):
        return {name: value[0].item() for name, value in info.items() if not name.startswith("_")}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.batch._np_random = self.np_random  # goals come from the generator that gymnasium seeds
        observation, info = self.batch.reset(options=options)
        return observation[0], self._first(info)

    def step(self, action):
        self.batch._finished[:] = False  # the caller resets; there is no autoreset behind one environment
        observation, reward, terminated, truncated, info = self.batch.step(np.asarray(action)[None])
        return observation[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), self._first(info)

    def render(self):
        return self.batch.render()

    def close(self):
        self.batch.close()


def rollout(env, policy, tasks):
    """Whole episodes of every environment. `policy` maps observations (B, obs) to actions (B, act).

    Returns a dict of arrays, B environments by T steps: observations (B, T+1, obs), actions (B, T, act),
    rewards (B, T), distances (B, T), outcomes (B, T, outcome), mask (B, T): 1 until the episode ended, and
    terminated (B,). After an early end rewards and mask are 0, and distances and outcomes stay at their last value.
    """
    observation, _ = env.reset(options={"task": tasks})
    keys = ("observations", "actions", "rewards", "distances", "outcomes", "mask")
    steps = {key: [] for key in keys}
    steps["observations"].append(observation)
    alive, ended = np.ones(env.num_envs, bool), np.zeros(env.num_envs, bool)
    for _ in range(env.family.horizon):
        action = policy(observation)
        next_observation, reward, terminated, _, info = env.step(action)
        distance, outcome = info["goal_distance"], env.outcomes
        if not alive.all():  # autoreset has begun another episode there: keep the finished one's last values
            next_observation = np.where(alive[:, None], next_observation, observation)
            distance = np.where(alive, distance, steps["distances"][-1])
            outcome = np.where(alive[:, None], outcome, steps["outcomes"][-1])
        for key, value in zip(keys, (next_observation, action, reward * alive, distance, outcome, alive.astype(float))):
            steps[key].append(value)
        ended |= terminated & alive
        alive &= ~terminated
        observation = next_observation
    return {key: np.stack(value, axis=1) for key, value in steps.items()} | {"terminated": ended}


STREAMS = ("experts", "demonstrations", "imitation", "meta-training", "evaluation")  # add at the end only


def random_streams(seed, purpose, iteration):
    """(numpy, torch) generators of one iteration of one phase: going on with a run needs no stored random state."""
    generator = np.random.default_rng([seed, STREAMS.index(purpose), iteration])
    return generator, torch.Generator().manual_seed(int(generator.integers(2 ** 62)))


for _family in FAMILIES.values():
    gymnasium.register(id=_family.env_id, entry_point="envs:SingleEnv", vector_entry_point="envs:BatchEnv",
                       kwargs={"family": _family.name})
