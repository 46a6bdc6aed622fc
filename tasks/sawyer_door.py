"""Sawyer door: open a door by its handle to a hidden angle; and a scripted expert for it.

Source: the paper's door task with the constants of the authors' release, see tasks/sawyer.py. The
scripted expert and the hardness of the door's contacts are [ours].
"""
import numpy as np

from tasks.sawyer import SawyerFamily, numbers, sawyer_xml, sensed_positions, settled_arm

# ---------------------------------------------------------------- geometry
# The closed door's frame, turned about z [release]. Hinge and handle are given in that frame.
DOOR_CENTRE, DOOR_TURN = np.array([0.0, 1.0, 0.3]), -1.57
HINGE = np.array([0.0, 0.2, 0.0])     # the vertical edge far from the handle
BAR = np.array([0.01, 0.1, 0.01])     # half sizes of the handle's bar, along the panel [release]
GRASP = np.array([0.1, -0.1, 0.0])    # the middle of that bar [release]
# From the hand's centre to a claw's inner face along y; half a claw's width along x.
CLAW_GAP, CLAW_WIDTH = 0.045, 0.015


def _turned(vector, angle):
    """x, y (..., 2) of vectors (..., 2 or 3) turned about z by `angle` (...)."""
    x, y, c, s = vector[..., 0], vector[..., 1], np.cos(angle), np.sin(angle)
    return np.stack([c * x - s * y, s * x + c * y], axis=-1)


HINGE_XY = DOOR_CENTRE[:2] + _turned(HINGE, DOOR_TURN)
CLOSED_ARM = _turned(GRASP - HINGE, DOOR_TURN)  # from hinge to grasp point, door closed
RADIUS = np.hypot(*CLOSED_ARM)                  # of the arc on which the grasp point moves


def grasp_point(angle: np.ndarray) -> np.ndarray:
    """World position (..., 3) of the grasp point at door angles (...)."""
    xy = HINGE_XY + _turned(CLOSED_ARM, angle)
    height = np.full(xy.shape[:-1] + (1,), DOOR_CENTRE[2] + GRASP[2])
    return np.concatenate([xy, height], axis=-1)


def door_angle(grasp: np.ndarray) -> np.ndarray:
    """Door angle (...) from the grasp point's world position (..., 3)."""
    x, y = grasp[..., 0] - HINGE_XY[0], grasp[..., 1] - HINGE_XY[1]
    return np.arctan2(CLOSED_ARM[0] * y - CLOSED_ARM[1] * x,
                      CLOSED_ARM[0] * x + CLOSED_ARM[1] * y)


# ---------------------------------------------------------------- task family
class SawyerDoor(SawyerFamily):
    """Open a door to a hidden angle and hold it there.

    Observation (6,): hand x, y, z, grasp point x, y, z.
    Action (3,) in [-1, 1]: motion of the hand's mocap target, 1 cm per unit and step.
    Task (1,): target angle in radians; training distribution uniform in [0, pi/3].
    Reward: 10 angle up to the target, then falling as fast past it, never below 0; and 0 unless the
    fingertip midpoint is within 10 cm of the grasp point.
    Episode: 100 steps, never ends early.
    """
    # ---- constants
    name = "door"
    observation_size, task_size, outcome_size = 6, 1, 2
    horizon = 100
    task_low, task_high = np.array([0.0]), np.array([np.pi / 3])
    task_unit = "rad"
    success_distance = np.deg2rad(5.0)
    rewards = ("sparse",)
    hand_start = np.array([0.0, 0.4, 0.1])
    hinge_damping = 100.0  # N m s/rad [release]: the door stops where it is let go
    reach = 0.1            # metres: closer fingertips count as at the handle
    observation_centre = np.array([0.0, 0.7, 0.3, 0.02, 0.82, 0.3])
    observation_scale = np.repeat([0.1, 0.05], 3)  # the grasp point moves less than the hand

    # ---- settings, tables, films
    # The pre-update policy imitates wide angles, so that its episodes pass most others. Rewards
    # grow with the target angle, hence each task's own advantage scale. Labels come from the
    # demonstrations alone, half of which head for another angle, with as much noise as exploration:
    # with less, some seeds never learn to hold on to the handle.
    settings = dict(
        experts="scripted", training_tasks=20, demonstration_episodes=12, demonstration_detours=6,
        demonstration_noise=0.5, pre_update_tasks=12, pre_update_imitation=1.0,
        advantage_scale="per task", aggregation_episodes=0, meta_steps=160, meta_batch=20,
        later_steps=0.05)
    table = ("angle error (degrees)", np.degrees(1.0), 1)
    goal_size = (0.012, 0.012, 0.012)

    # ---- model
    def xml(self):
        # Hard contacts [ours]: the hand's target may run far ahead of the hand, and no claw may
        # slip through a bar.
        hard = 'priority="1" condim="4" solimp="0.99 0.999 0.001"'
        steel = f'{hard} rgba="0.55 0.57 0.6 1"'
        door = f"""<body name="door" pos="{numbers(DOOR_CENTRE)}" euler="0 0 {DOOR_TURN}">
          <joint name="hinge" axis="0 0 1" pos="{numbers(HINGE)}" range="-3 3"
            damping="{self.hinge_damping}"/>
          <geom type="box" size="0.01 0.2 0.2" {hard} rgba="0.45 0.60 0.70 1"/>
          <geom type="box" size="0.06 0.01 0.01" pos="0.05 -0.2 0" {steel}/>
          <geom type="box" size="{numbers(BAR)}" pos="{numbers(GRASP)}" {steel}/>
          <site name="grasp" pos="{numbers(GRASP)}" size="0.005" rgba="0 0 0 0"/></body>
          <geom class="link" type="cylinder" size="0.012"
            fromto="{numbers(HINGE_XY)} 0 {numbers(HINGE_XY)} 0.5" rgba="0.3 0.3 0.33 1"/>"""
        sensors = sensed_positions(("xbody", "hand"), ("site", "grasp"),
                                   ("site", "right_tip"), ("site", "left_tip"))
        sensors += '<jointpos joint="hinge"/>'
        return sawyer_xml(door, numbers(self.hand_start), sensors, claw_gain=100)

    def start(self, model):
        """The arm settled on its mocap target for ten steps, as in the release; the door closed."""
        data = settled_arm(model, 10 * self.frame_skip)
        data.qpos[model.joint("hinge").qposadr[0]] = 0
        data.qvel[:] = 0
        return data

    # ---- reward
    def outcome(self, state, sensors):
        """-> (B, 2): door angle, distance of the fingertip midpoint to the grasp point."""
        away = 0.5 * (sensors[:, 6:9] + sensors[:, 9:12]) - sensors[:, 3:6]
        return np.stack([sensors[:, 12], np.sqrt(np.einsum("bi,bi->b", away, away))], axis=1)

    def distance(self, outcome, task):
        """Door angle to target, radians."""
        return np.abs(outcome[..., 0] - task[..., 0])

    def reward_terms(self, outcome, action, task):
        opened = np.maximum(0.0, task[..., 0] - self.distance(outcome, task))
        return {"open": 10.0 * np.where(outcome[..., 1] <= self.reach, opened, 0.0)}

    # ---- tasks
    def training_tasks(self, count):
        """(count, 1) angles over the whole range, denser at small ones.

        Small angles give little reward. Evenly spread, they were the hardest to learn.
        """
        share = np.linspace(0.0, 1.0, count)[:, None] ** 1.5
        return self.task_low + (self.task_high - self.task_low) * share

    def goal_position(self, task):
        """The grasp point at the target angle."""
        return grasp_point(np.asarray(task)[0])

    def expert(self, observations, tasks):
        return door_expert(observations, tasks)


# ---------------------------------------------------------------- scripted expert
GAIN = 50.0              # units of action per metre to where the hand should be
PULL = 1.5               # the hand aims this many times as far as the door has to go
OVER, DOWN = 0.07, 0.01  # height of the hand over the bar: claws clear of it, claws around it


def _ramp(x, low, high):
    """From 0 at `low` to 1 at `high`."""
    return np.clip((x - low) / (high - low), 0.0, 1.0)


def door_expert(observations: np.ndarray, tasks: np.ndarray) -> np.ndarray:
    """Over the bar, down until a claw is on either side of it, then pull along the arc.

    observations (n, B, 6), tasks (n, 1) -> actions (n, B, 3), float32 in [-1, 1]. The script has no
    memory: the position of the hand relative to the bar blends the phases. The pull is proportional
    to the remaining angle. So actions are continuous in the state, and any state can be labelled.
    """
    hand, grasp = observations[..., :3], observations[..., 3:]
    angle = door_angle(grasp)
    dx, dy, dz = np.moveaxis(hand - grasp, -1, 0)
    # The bar lies at `angle` across the slot between the claws. This much play along y is left.
    slope = np.tan(np.clip(angle, 0.0, 1.1))
    play = np.maximum(CLAW_GAP - CLAW_WIDTH * slope - BAR[0] * np.sqrt(1 + slope ** 2), 0.003)
    along_y = dy - dx * slope             # of the hand from the bar's line; contact at -play
    down = _ramp(dz, 0.05, 0.038)         # 1: the claws reach below the bar's top
    cleared = _ramp(dz, 0.05, 0.065)      # 1: the claws pass over the bar
    # 1: the bar is between the claws, seen from above. Once the claws are down it stays 1 where a
    # claw touches the bar and gives a little.
    around = (_ramp(play - 0.002 + 0.012 * down - np.abs(along_y), 0.0, 0.006)
              * _ramp(0.06 - np.abs(dx), 0.0, 0.02))

    # Not around the bar: come over it, 5 cm before it until cleared. Around it: come down.
    along_approach = -play + 0.02 - 0.05 * (1 - around) * (1 - cleared)
    approach = np.stack([np.zeros_like(dx), along_approach], axis=-1)
    height = DOWN + (OVER - DOWN) * (1 - around)
    # Around and down: along the arc, from where the far claw touches the bar. It stays 3 mm short
    # of the bar, since noise must not pull.
    arm = grasp[..., :2] - HINGE_XY
    tangent = np.stack([-arm[..., 1], arm[..., 0]], axis=-1) / RADIUS
    ahead = np.clip(PULL * RADIUS * (tasks[:, None, 0] - angle), -0.04, 0.04)
    pull = np.stack([np.zeros_like(dx), 0.003 - play], axis=-1) + ahead[..., None] * tangent

    holding = (around * down)[..., None]
    target = np.concatenate([approach + holding * (pull - approach), height[..., None]], axis=-1)
    action = GAIN * (target - (hand - grasp))
    # In the plane both components shrink alike, so the hand keeps its direction at full speed.
    fastest = np.maximum(np.abs(action[..., :2]).max(-1, keepdims=True), 1.0)
    action[..., :2] /= fastest
    return np.clip(action, -1.0, 1.0).astype(np.float32)
