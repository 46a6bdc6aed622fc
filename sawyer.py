"""Task families of the Sawyer arm: the model of the arm, and what each of its tasks adds to it.

A family says what `envs.BatchEnv` cannot know: model text, observation, reward terms, start state, task distribution.

Sources: the tasks of "Guided Meta-Policy Search" (Mendonca et al., NeurIPS 2019, arXiv 1904.00956v2) with the
constants of the authors' release; lengths in metres, angles in radians, time in seconds throughout.
"""
import mujoco
import numpy as np


def _text(numbers):
    return " ".join(f"{number:g}" for number in numbers)


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


def settled_arm(model):
    """The state in which the arm hangs still on its mocap target."""
    data = mujoco.MjData(model)
    data.qpos[:len(ARM_START)] = ARM_START
    mujoco.mj_step(model, data, 1000)
    return data


class SawyerTask:
    """What the arm's tasks share: the hand's control, and six observed numbers that are their first sensor readings."""
    image_shape = None  # (rows, columns, 3) where the policy also sees a picture
    control_spec = int(mujoco.mjtState.mjSTATE_MOCAP_POS)
    observation_limit = 2.0  # metres: of gymnasium's observation space
    baseline_products = [0, 1, 2, 3, 4, 5]  # observations whose products the baseline of the advantages sees

    @property
    def expert_family(self):
        """The family whose observation experts see: this one."""
        return self

    def observe(self, state, sensors):
        """Full states (not needed here) and sensor readings (B, 12 or more) -> observation (B, 6)."""
        return sensors[:, :6].copy()

    def ended(self, state):
        """(B,) bool: who ends before the horizon. Nobody does."""
        return np.zeros(len(state), bool)

    def next_control(self, control, action):
        """Mocap position (B, 3) after an action (B, 3) already clipped to [-1, 1]."""
        return np.clip(control + ACTION_SCALE * action, MOCAP_LOW, MOCAP_HIGH)


# ---------------------------------------------------------------- Sawyer push
class SawyerPush(SawyerTask):
    """Push a block to a hidden goal on the table (the paper's push task, constants of the release).

    Observation (6,): hand x, y, z, block x, y, z. The goal is never in it.
    Action (3,) in [-1, 1]: motion of the hand's mocap target, 1 cm per unit and step.
    Task (2,): goal x, y; training distribution uniform in [-0.1, 0.1] x [0.7, 0.8].
    Reward: -|block - fingertip midpoint| + 100 max(0, d0 - d), d = |block xy - goal|, d0 its start value; "sparse": -d
    within 5 cm of the goal and -d0 elsewhere.
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
    hand_start, block_start = np.array([0.0, 0.4, 0.05]), np.array([0.0, 0.52, 0.02])
    # The release gives the block 0.01 kg and a huge inertia. In the authors' recorded episodes, though, the block
    # pushes the front claw 3 cm back against its 1000 N s/m damper, which takes far more than the 0.1 N of friction
    # that 0.01 kg has: replayed with it, the block runs 2.5 cm ahead and returns are 7% too high. 1 kg is the lightest
    # block that stays well within the recordings' tolerance (README, "The simulator").
    block_mass = 1.0

    goal_size = (0.02, 0.02, 0.002)  # of the mark that a picture shows: radius, radius, half height
    frames_every = 1  # steps per frame of a film
    rewards = ("dense", "sparse")

    def __init__(self, reward="dense"):
        self.reward = reward
        self.reward_weights = {"near": 1.0} if reward == "sparse" else {"reach": 1.0, "place": 100.0}

    def xml(self):
        block = f"""<body name="block" pos="{_text(self.block_start)}"><freejoint/>
          <inertial pos="0 0 0" mass="{self.block_mass}" diaginertia="1e5 1e5 1e5"/>
          <geom type="box" size="0.02 0.02 0.02" condim="4" friction="1 0.005 0.0001" rgba="0.15 0.35 0.75 1"/></body>"""
        frames = (("xbody", "hand"), ("xbody", "block"), ("site", "right_tip"), ("site", "left_tip"))
        sensors = "".join(f'<framepos objtype="{kind}" objname="{name}"/>' for kind, name in frames)
        return sawyer_xml(block, _text(self.hand_start), sensors)

    def start(self, model):
        """The one start state: the arm settled under gravity on its mocap target, the block put in its place."""
        data = settled_arm(model)
        block = model.jnt_qposadr[model.body("block").jntadr[0]]
        data.qpos[block:block + 7] = *self.block_start, 1, 0, 0, 0
        data.qvel[:] = 0
        return data

    def outcome(self, state, sensors):
        """Sensor readings (B, 12) -> (B, 6), all that a reward for any goal needs: block, midpoint of both fingertips."""
        return np.concatenate([sensors[:, 3:6], 0.5 * (sensors[:, 6:9] + sensors[:, 9:12])], axis=1)

    def distance(self, outcome, task):
        """Block to goal in the plane, metres. `outcome` (..., 6), `task` (..., 2) -> (...)."""
        return np.hypot(outcome[..., 0] - task[..., 0], outcome[..., 1] - task[..., 1])

    def reward_terms(self, outcome, action, task):
        """Weighted terms whose sum is the reward; `outcome` is that after the step, as sensors give it: one physics step,
        10 ms, old. Shapes as in `distance`."""
        start_distance = np.hypot(self.block_start[0] - task[..., 0], self.block_start[1] - task[..., 1])
        distance, weights = self.distance(outcome, task), self.reward_weights
        if self.reward == "sparse":
            return {"near": -weights["near"] * np.where(distance < self.success_distance, distance, start_distance)}
        reach = outcome[..., :3] - outcome[..., 3:]
        return {"reach": -weights["reach"] * np.sqrt(np.einsum("...i,...i->...", reach, reach)),
                "place": weights["place"] * np.maximum(0.0, start_distance - distance)}

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
