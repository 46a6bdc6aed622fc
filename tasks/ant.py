"""The low-gear ant: run to a hidden goal on a quarter circle, and stop there.

Source: the ant task of "Guided Meta-Policy Search" (Mendonca et al., NeurIPS 2019, arXiv
1904.00956v2) with the constants of the authors' release: gym's ant with weaker motors. Lengths are
in metres, angles in radians.
"""
import mujoco
import numpy as np

from tasks.base import MujocoFamily

GEAR = 30         # torque per unit of action; gym's ant has 150
STANDING_HEIGHT, STANDING_ANKLES = 0.55, (1, -1, -1, 1)  # metres, radians
# Leg directions in the torso's plane, and the signs of each ankle's axis and range (gym's ant.xml).
LEGS = (("1", (1, 1), (-1, 1), (30, 70)), ("2", (-1, 1), (1, 1), (-70, -30)),
        ("3", (-1, -1), (-1, 1), (-70, -30)), ("4", (1, -1), (1, 1), (30, 70)))


def ant_xml() -> str:
    """MJCF text of gym's ant with gear 30, and sensors for every body's contact force."""
    legs, bodies = "", ["torso"]
    for name, (x, y), (ax, ay), (low, high) in LEGS:
        bodies += [f"aux_{name}", f"leg_{name}", f"foot_{name}"]
        inner, outer = f"{0.2 * x} {0.2 * y} 0", f"{0.4 * x} {0.4 * y} 0"
        legs += f"""
<body name="aux_{name}">
  <geom type="capsule" fromto="0 0 0 {inner}" size="0.08"/>
  <body name="leg_{name}" pos="{inner}">
    <joint name="hip_{name}" axis="0 0 1" range="-30 30"/>
    <geom type="capsule" fromto="0 0 0 {inner}" size="0.08"/>
    <body name="foot_{name}" pos="{inner}">
      <joint name="ankle_{name}" axis="{ax} {ay} 0" range="{low} {high}"/>
      <geom type="capsule" fromto="0 0 0 {outer}" size="0.08" rgba="0.55 0.30 0.14 1"/>
    </body>
  </body>
</body>"""
    motors = "".join(f'<motor joint="{joint}_{name}"/>'
                     for name, *_ in LEGS for joint in ("hip", "ankle"))
    contacts = "".join(
        f'<contact body1="{body}" reduce="netforce" num="1" data="force torque pos"/>'
        for body in bodies)
    return f"""
<mujoco model="ant">
<compiler angle="degree" autolimits="true" inertiafromgeom="true"/>
<option timestep="0.01" integrator="RK4"/>
<visual>
  <global offwidth="640" offheight="480"/><quality shadowsize="1024"/><map shadowclip="3"/>
</visual>
<asset>
  <texture name="tiles" type="2d" builtin="checker" rgb1="0.86 0.87 0.88" rgb2="0.78 0.80 0.82"
    width="64" height="64"/>
  <material name="tiles" texture="tiles" texrepeat="40 40"/>
</asset>
<default>
  <joint armature="1" damping="1"/>
  <geom conaffinity="0" condim="3" density="5" friction="1 0.5 0.5" margin="0.01"
    rgba="0.80 0.55 0.30 1"/>
  <motor gear="{GEAR}" ctrlrange="-1 1" ctrllimited="true"/>
</default>
<worldbody>
  <light directional="true" pos="0 0 4" dir="-0.2 -0.2 -1" diffuse="0.8 0.8 0.8"/>
  <camera name="video" pos="2.6 -2.4 3.4" mode="targetbody" target="look_at" fovy="45"/>
  <body name="look_at" pos="0.7 0.7 0.2"/>
  <geom name="floor" type="plane" size="40 40 40" conaffinity="1" margin="0" material="tiles"
    rgba="1 1 1 1"/>
  <body name="torso" pos="0 0 {STANDING_HEIGHT}">
    <freejoint/><geom type="sphere" size="0.25"/>{legs}
  </body>
</worldbody>
<actuator>{motors}</actuator>
<sensor><subtreecom body="torso"/>{contacts}</sensor>
</mujoco>"""


class AntGoal(MujocoFamily):
    """Run to a hidden goal 2 m away and stay there.

    Observation (38,): torso x, y, z, its quaternion, hip and ankle angles of legs 1 to 4 (8), their
    velocities in the same order (torso linear 3, angular 3, joints 8), the torso's rotation matrix
    by rows (9). The release adds contact forces.
    Action (8,) in [-1, 1]: motor torques of hip and ankle of legs 1 to 4, 30 N m per unit.
    Task (2,): goal x, y; training distribution: angle uniform in [0, 90] degrees on the circle of
    radius 2 m.
    Reward: 4 - |dx| - |dy| from the centre of mass to the goal - 0.005 |a|^2
    - 0.0005 |clipped contact forces|^2 + 0.05.
    Reward "sparse": |dx| + |dy| counts as 0.8 m wherever it is more.
    Episode: 200 steps of 0.01 s, one physics step each; ends early when the torso's z leaves
    [0.2, 1]. Every episode starts in the same state. With `start_noise` (an argument of the
    environment) normal noise is added, as in the recordings of the release's experts.
    """
    # ---- constants
    name = "ant"
    observation_size, action_size, task_size, outcome_size = 38, 8, 2, 3
    horizon, frame_skip = 200, 1
    control_spec = int(mujoco.mjtState.mjSTATE_CTRL)
    radius, arc = 2.0, (0.0, 0.5 * np.pi)
    task_low, task_high = np.array([0.0, 0.0]), np.array([2.0, 2.0])
    task_limits = np.array([-4.0, -4.0]), np.array([4.0, 4.0])
    success_distance = 0.5
    rewards = ("dense", "sparse")
    healthy_z = (0.2, 1.0)
    control_cost, contact_cost, survival = 0.005, 0.0005, 0.05
    sparse_distance = 0.8
    start_noise = (0.01, 0.1)
    observation_centre = np.array([0.7, 0.7, 0.55, 1, 0, 0, 0] + [0, 0.9, 0, -0.9, 0, -0.9, 0, 0.9]
                                  + [0] * 14 + [1, 0, 0, 0, 1, 0, 0, 0, 1.0])
    observation_scale = np.array([0.7, 0.7, 0.15] + [0.3] * 4 + [0.5, 0.4] * 4 + [1.0] * 2 + [1.0]
                                 + [2.0] * 3 + [4.0] * 8 + [0.5] * 9)

    # ---- settings, tables, films
    settings = dict(
        expert_return_steps=10, expert_noise_correlation=0.9, noise_hold=8, discount=0.99,
        gae_lambda=0.95, episodes=50, shared_episodes=75, imitation_steps=600, meta_steps=240,
        imitation_batch=800, test_episodes=50)
    local_settings = dict(training_tasks=20, expert_iterations=100, expert_episodes=20,
                          expert_updates=400)
    paper_settings = dict(training_tasks=40, episodes=50, test_episodes=50)
    table = ("final distance (m)", 1.0, 3)
    published = {"experts_training": "539, 0.31 m (10 goals, authors' simulator)",
                 "meta_training": "about 2,000,000 in the released settings"}
    goal_size, frames_every = (0.12, 0.12, 0.01), 4

    # ---- model and observation
    def xml(self):
        return ant_xml()

    def start(self, model):
        """The one start state: standing, ankles bent."""
        data = mujoco.MjData(model)
        for leg, angle in zip("1234", STANDING_ANKLES):
            data.qpos[model.joint(f"ankle_{leg}").qposadr[0]] = angle
        return data

    def observe(self, state, sensors):
        """Full states (B, 30) [time, positions 15, velocities 14] -> observation (B, 38)."""
        w, x, y, z = state[:, 4:8].T
        rotation = np.stack([
            1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
            2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
            2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], axis=1)
        return np.concatenate([state[:, 1:], rotation], axis=1)

    def ended(self, state):
        """(B,) bool: whose torso is too low or too high."""
        return (state[:, 3] < self.healthy_z[0]) | (state[:, 3] > self.healthy_z[1])

    def next_control(self, control, action):
        """Motor signals (B, 8): the action itself."""
        return action

    # ---- reward
    def outcome(self, state, sensors):
        """-> (B, 3): x, y of the ant's centre of mass, and |clipped contact forces|^2.

        The forces are, as in gym, every body's contact force and torque about the centre of mass
        (MuJoCo's cfrc_ext), clipped to [-1, 1]. Contact sensors give them.
        """
        contact = sensors[:, 3:].reshape(len(sensors), -1, 9)
        # Few bodies touch the ground at a time, and it pushes them upwards.
        which, body = np.nonzero(contact[..., 2])
        touching = contact[which, body]
        force, torque, position = touching[:, :3], touching[:, 3:6], touching[:, 6:]
        torque = torque + np.cross(position - sensors[which, :3], force)
        squares = np.square(np.clip(np.concatenate([force, torque], axis=1), -1, 1)).sum(1)
        contact_squares = np.bincount(which, squares, len(state))[:, None]
        return np.concatenate([sensors[:, :2], contact_squares], axis=1)

    def distance(self, outcome, task):
        """Centre of mass to goal in the plane, metres."""
        return np.hypot(outcome[..., 0] - task[..., 0], outcome[..., 1] - task[..., 1])

    def reward_terms(self, outcome, action, task):
        away = (np.abs(outcome[..., 0] - task[..., 0]) + np.abs(outcome[..., 1] - task[..., 1]))
        if self.reward == "sparse":
            away = np.minimum(away, self.sparse_distance)
        return {"goal": 4.0 - away,
                "control": -self.control_cost * np.einsum("...i,...i->...", action, action),
                "contact": -self.contact_cost * outcome[..., 2],
                "survive": np.full(away.shape, self.survival)}

    # ---- tasks
    def goals_at(self, angles):
        """Goals (n, 2) at angles (n,) from the x axis."""
        return self.radius * np.stack([np.cos(angles), np.sin(angles)], axis=-1)

    def sample_tasks(self, generator, count):
        """(count, 2) goals from the training distribution."""
        return self.goals_at(generator.uniform(*self.arc, count))

    def in_training_range(self, task):
        """Near the quarter circle: to a quarter of a metre along the radius."""
        away = np.abs(np.hypot(task[..., 0], task[..., 1]) - self.radius)
        return (away <= 0.25) & (task >= 0).all(-1)

    def training_tasks(self, count):
        """(count, 2) goals spread evenly over the quarter circle, both ends included."""
        return self.goals_at(np.linspace(*self.arc, count))

    def bands(self):
        """Six goals on the arc. Outside it: 15, 30 and 45 degrees beyond both ends, thrice each."""
        on_the_arc = self.goals_at(np.radians([7.5, 22.5, 37.5, 52.5, 67.5, 82.5]))
        outside = [(f"{beyond} degrees outside",
                    np.tile(self.goals_at(np.radians([-beyond, 90 + beyond])), (3, 1)))
                   for beyond in (15, 30, 45)]
        return [("on the arc", on_the_arc), *outside]

    def goal_position(self, task):
        return np.array([task[0], task[1], 0.01])
