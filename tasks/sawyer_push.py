"""Sawyer push: push a block to a hidden goal on the table.

Source: the paper's push task with the constants of the authors' release, see tasks/sawyer.py.
"""
import numpy as np

from tasks.sawyer import SawyerFamily, numbers, sawyer_xml, sensed_positions, settled_arm


class SawyerPush(SawyerFamily):
    """Push a block to a goal that the observation does not hold.

    Observation (6,): hand x, y, z, block x, y, z.
    Action (3,) in [-1, 1]: motion of the hand's mocap target, 1 cm per unit and step.
    Task (2,): goal x, y; training distribution uniform in [-0.1, 0.1] x [0.7, 0.8].
    Reward: -|block - fingertip midpoint| + 100 max(0, d0 - d), where d = |block xy - goal| and d0
    is its start value. Reward "sparse": -d within 5 cm of the goal and -d0 elsewhere.
    Episode: 50 steps, never ends early.
    """
    # ---- constants
    name = "push"
    observation_size, task_size, outcome_size = 6, 2, 6
    horizon = 50
    task_low, task_high = np.array([-0.1, 0.7]), np.array([0.1, 0.8])
    task_limits = np.array([-0.4, 0.4]), np.array([0.4, 1.2])  # the table
    success_distance = 0.05
    rewards = ("dense", "sparse")
    hand_start, block_start = np.array([0.0, 0.4, 0.05]), np.array([0.0, 0.52, 0.02])
    # Released: 0.01 kg, which a converged contact solver pushes ahead of the claw. 1 kg is the
    # lightest block that stays within the authors' recordings (docs/simulator.md).
    block_mass = 1.0
    # Positions vary by decimetres.
    observation_centre = np.array([0.0, 0.6, 0.1, 0.0, 0.65, 0.02])
    observation_scale = np.full(6, 0.1)

    # ---- settings and published levels
    # Episodes have only 50 steps. So experts need fewer iterations and a smaller discount.
    settings = dict(expert_iterations=75, expert_updates=200, expert_discount=0.95,
                    shared_episodes=20)
    local_settings = dict(training_tasks=20, expert_episodes=80, expert_width=64,
                          expert_updates=300)
    published = {"experts_training": "670, 0.031 m (10 goals, authors' simulator)",
                 "meta_training": "about 120,000 in the released settings"}

    # ---- model
    def xml(self):
        block = f"""<body name="block" pos="{numbers(self.block_start)}"><freejoint/>
          <inertial pos="0 0 0" mass="{self.block_mass}" diaginertia="1e5 1e5 1e5"/>
          <geom type="box" size="0.02 0.02 0.02" friction="1 0.1 0.002"
            rgba="0.15 0.35 0.75 1"/></body>"""
        sensors = sensed_positions(("xbody", "hand"), ("xbody", "block"),
                                   ("site", "right_tip"), ("site", "left_tip"))
        return sawyer_xml(block, numbers(self.hand_start), sensors)

    def start(self, model):
        """The arm settled under gravity on its mocap target, the block put in its place."""
        data = settled_arm(model)
        block = model.jnt_qposadr[model.body("block").jntadr[0]]
        data.qpos[block:block + 7] = *self.block_start, 1, 0, 0, 0
        data.qvel[:] = 0
        return data

    # ---- reward
    def outcome(self, state, sensors):
        """-> (B, 6): block x, y, z and the midpoint of both fingertips."""
        tips = 0.5 * (sensors[:, 6:9] + sensors[:, 9:12])
        return np.concatenate([sensors[:, 3:6], tips], axis=1)

    def distance(self, outcome, task):
        """Block to goal in the plane, metres."""
        return np.hypot(outcome[..., 0] - task[..., 0], outcome[..., 1] - task[..., 1])

    def reward_terms(self, outcome, action, task):
        start_distance = np.hypot(self.block_start[0] - task[..., 0],
                                  self.block_start[1] - task[..., 1])
        distance = self.distance(outcome, task)
        if self.reward == "sparse":
            near = distance < self.success_distance
            return {"near": -np.where(near, distance, start_distance)}
        reach = outcome[..., :3] - outcome[..., 3:]
        return {"reach": -np.sqrt(np.einsum("...i,...i->...", reach, reach)),
                "place": 100.0 * np.maximum(0.0, start_distance - distance)}

    # ---- tasks
    def training_tasks(self, count):
        """(count, 2) goals spread evenly: the R2 low-discrepancy sequence."""
        golden = 1.324717957244746  # the real root of x^3 = x + 1
        # Of a few offsets tried, this leaves the smallest hole between 20 goals: 3.3 cm.
        offset = np.array([0.1, 0.85])
        unit = (offset + np.arange(count)[:, None] / golden ** np.array([1, 2])) % 1.0
        return self.task_low + unit * (self.task_high - self.task_low)

    def goal_position(self, task):
        return np.array([task[0], task[1], 0.002])
