"""The Sawyer arm: its model, and what its tasks (sawyer_push.py, sawyer_door.py) share.

Source: the authors' release of "Guided Meta-Policy Search" (Mendonca et al., NeurIPS 2019, arXiv
1904.00956v2). Lengths are in metres, angles in radians, times in seconds, masses in kilograms.
"""
import mujoco
import numpy as np

from tasks.base import MujocoFamily


def numbers(values) -> str:
    """Numbers as MJCF text."""
    return " ".join(f"{value:g}" for value in values)


# ---------------------------------------------------------------- constants
# Kinematic chain, base outward: name, position and quaternion in the parent's frame, joint range,
# mass. Every joint turns about its z axis.
ARM = (("l0", "0 0 0.08", "1 0 0 0", "-3.05 3.05", 5.32),
       ("l1", "0.081 0.05 0.237", "0.5 -0.5 0.5 0.5", "-3.8 -0.5", 4.505),
       ("l2", "0 -0.14 0.1425", "0.7071 0.7071 0 0", "-3.04 3.04", 1.745),
       ("l3", "0 -0.042 0.26", "0.7071 -0.7071 0 0", "-3.04 3.04", 2.51),
       ("l4", "0 -0.125 -0.1265", "0.7071 0.7071 0 0", "-2.976 2.976", 1.11),
       ("l5", "0 0.031 0.275", "0.7071 -0.7071 0 0", "-2.976 2.976", 1.56),
       ("l6", "0 -0.11 0.1053", "0.06162 0.06163 -0.70442 0.70442", "-4.71 4.71", 0.33))
ARM_START = (2.127, -0.5, -0.793, 2.336, 1.704, 0.683, 1.679)  # near where the arm then settles
MOCAP_LOW, MOCAP_HIGH = np.array([-0.5, 0.4, 0.05]), np.array([0.5, 1.0, 0.5])
ACTION_SCALE = 0.01  # metres that the hand's target moves per unit of action and step

# The claws are 0.1 m apart along y. A hand that moves in +y pushes with its front claw.
GRIPPER = """
<body name="flange" pos="0 0 0.0245" quat="0.7071 0 0 0.7071">
  <geom class="link" type="cylinder" size="0.035" fromto="0 0 0 0 0 0.09" mass="0.01"/>
  <body name="hand" pos="0 0 0.12" quat="-1 0 1 0">
    <geom class="link" type="box" size="0.02 0.055 0.02" pos="-0.05 0 0" rgba="0.25 0.25 0.28 1"
      mass="0.01"/>
    <geom name="rail" type="box" size="0.005 0.055 0.005" pos="-0.05 0 0" density="7850"
      rgba="0.25 0.25 0.28 1"/>
    <body name="right_claw" pos="0 -0.05 0">
      <joint name="right_claw" class="claw" axis="0 1 0"/><geom class="claw"/>
      <site name="right_tip" pos="0.03 0.005 0"/>
    </body>
    <body name="left_claw" pos="0 0.05 0">
      <joint name="left_claw" class="claw" axis="0 -1 0"/><geom class="claw"/>
      <site name="left_tip" pos="0.03 -0.005 0"/>
    </body>
  </body>
</body>"""


# ---------------------------------------------------------------- model
def sawyer_xml(objects: str, hand_start: str, sensors: str, claw_gain: int = 400) -> str:
    """MJCF text of arm, table and mocap weld, with a family's own `objects` and `sensors`.

    `claw_gain` (N/m): of the actuators that hold the claws at their ends.
    """
    body = GRIPPER
    link_ends = [position for _, position, *_ in ARM[1:]] + ["0 0 0.0245"]
    for link, end in zip(reversed(ARM), reversed(link_ends)):
        # Links are capsules from joint to joint. They carry their mass and touch nothing.
        name, position, quaternion, joint_range, mass = link
        body = f"""
<body name="{name}" pos="{position}" quat="{quaternion}">
  <joint name="{name}" range="{joint_range}" damping="10" armature="0.1"/>
  <geom class="link" type="capsule" size="0.05" fromto="0 0 0 {end}" mass="{0.7 * mass}"/>
  <geom class="link" type="cylinder" size="0.06 0.07" mass="{0.3 * mass}"
    rgba="0.25 0.25 0.28 1"/>{body}
</body>"""
    return f"""
<mujoco model="sawyer">
<compiler angle="radian" autolimits="true"/>
<option timestep="0.01" cone="elliptic" impratio="3" iterations="50"/>
<visual>
  <global offwidth="640" offheight="480"/><quality shadowsize="1024"/>
  <headlight ambient="0.45 0.45 0.45"/>
</visual>
<default>
  <default class="link"><geom contype="0" conaffinity="0" rgba="0.72 0.12 0.13 1"/></default>
  <default class="claw">
    <joint type="slide" range="0 0.03" armature="100" damping="1000"/>
    <geom type="box" size="0.045 0.005 0.015" condim="4" margin="0.001" rgba="0.1 0.1 0.1 1"/>
  </default>
</default>
<worldbody>
  <light pos="0.6 0.2 2" dir="-0.3 0.2 -1" diffuse="0.5 0.5 0.5"/>
  <camera name="video" pos="1.15 0.05 0.75" mode="targetbody" target="look_at" fovy="36"/>
  <body name="look_at" pos="0 0.55 0.15"/>
  <geom name="floor" type="plane" size="3 3 0.1" pos="0 0 -0.9" rgba="0.86 0.87 0.88 1"/>
  <geom name="table" type="box" size="0.4 0.4 0.03" pos="0 0.8 -0.03" friction="10 0.1 0.002"
    rgba="0.80 0.70 0.55 1"/>
  <geom class="link" type="cylinder" size="0.12" fromto="0 0 -0.9 0 0 0.08"
    rgba="0.3 0.3 0.33 1"/>{body}
  <body name="mocap" mocap="true" pos="{hand_start}" quat="1 0 1 0"/>
  {objects}
</worldbody>
<equality>
  <weld body1="mocap" body2="hand" relpose="0 0 0 1 0 0 0" solref="0.02 1"/>
</equality>
<actuator>
  <position joint="right_claw" kp="{claw_gain}"/><position joint="left_claw" kp="{claw_gain}"/>
</actuator>
<sensor>{sensors}</sensor>
</mujoco>"""


def sensed_positions(*frames: tuple[str, str]) -> str:
    """MJCF sensors for the positions of frames (kind, name), three readings each, in order."""
    return "".join(f'<framepos objtype="{kind}" objname="{name}"/>' for kind, name in frames)


def settled_arm(model: mujoco.MjModel, steps: int = 1000) -> mujoco.MjData:
    """The state of the arm after `steps` physics steps with its hand on the start target."""
    data = mujoco.MjData(model)
    data.qpos[:len(ARM_START)] = ARM_START
    mujoco.mj_step(model, data, steps)
    return data


class SawyerFamily(MujocoFamily):
    """What the arm's families share: control of the hand, and six observed positions.

    Action (3,) in [-1, 1]: motion of the hand's mocap target, 1 cm per unit and step.
    """
    action_size = 3
    frame_skip = 5              # of 0.01 s
    control_spec = int(mujoco.mjtState.mjSTATE_MOCAP_POS)
    observation_limit = 2.0     # metres
    frames_every = 2

    def observe(self, state, sensors):
        """The first six sensor readings (B, 6)."""
        return sensors[:, :6].copy()

    def next_control(self, control, action):
        """Mocap position (B, 3) after an action (B, 3)."""
        return np.clip(control + ACTION_SCALE * action, MOCAP_LOW, MOCAP_HIGH)
