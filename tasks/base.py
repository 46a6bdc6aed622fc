"""The contract of a task family: everything that the rest of the code asks of one.

A *task family* (push, ant, ...) is a robot, an observation, and a reward that depends on a task. A
*task* is a vector: two numbers for a goal on the table, one for an angle. The policy never sees it.

Write a subclass of `MujocoFamily` (a MuJoCo model, stepped in batches) or of `GymnasiumFamily` (any
`gymnasium.Env`, slower), and add its line to `TASKS` in tasks/__init__.py. docs/fork.md has a
complete example. "..." in a shape stands for any leading axes, also none.
"""
import abc

import gymnasium
import numpy as np


class TaskFamily:
    """What learning, tables and films ask of every family. Subclass one of the two below."""

    # ---- Required
    name: str                   # what --task takes; the key in tasks.TASKS
    observation_size: int       # numbers that the policy sees; the task is not among them
    action_size: int            # numbers of an action, each in [-1, 1]
    task_size: int              # numbers that make a task
    horizon: int                # steps of an episode
    task_low: np.ndarray        # (task_size,) range of the training distribution:
    task_high: np.ndarray       # (task_size,) experts see the task scaled by it
    success_distance: float     # a final distance of at most this is a success, in `task_unit`

    # ---- Optional: tasks and rewards
    task_unit = "m"             # of tasks and of `distance`; "rad" shows as degrees in tables
    task_limits = None          # (low, high): tasks outside are refused. None: the range above
    rewards = ("dense",)        # what --reward offers; the usual one first
    outcome_size = 0            # numbers of an outcome: what the reward of any task needs of a
                                # state. Experts use it to relabel tasks. 0, for a GymnasiumFamily
                                # only: no relabelling. 0 if an episode's end depends on the task
    # ---- Optional: learning
    observation_centre = 0.0    # networks see (observation - centre) / scale,
    observation_scale = 1.0     # numbers or arrays (observation_size,)
    image_shape = None          # (rows, columns, 3) of the image from the MuJoCo camera "policy";
                                # `observe` then gives the numbers beside it. None: no image
    expert = None               # scripted: (n, B, obs), (n, task) -> (n, B, act). None: learn one
    settings = {}               # settings of this family that differ from settings.py
    local_settings = {}         # further ones with --experts local
    paper_settings = {}         # further ones with --preset paper

    # ---- Optional: what people see
    table = ("final distance (m)", 1.0, 4)  # title with a unit in (), factor to that unit, digits
    published = {}              # {list or phase of result.json: text of the column "published"}
    frames_every = 1            # steps per frame of the film, which plays 20 frames a second

    def __init__(self, reward: str | None = None):
        self.reward = reward or self.rewards[0]
        self.task_low, self.task_high = np.asarray(self.task_low), np.asarray(self.task_high)

    @property
    def expert_family(self) -> "TaskFamily":
        """The family whose observation experts see: this one, unless the policy sees pictures."""
        return self

    def sample_tasks(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """(count, task_size) random tasks of the training distribution: uniform in its range."""
        return generator.uniform(self.task_low, self.task_high, (count, self.task_size))

    def training_tasks(self, count: int) -> np.ndarray:
        """(count, task_size) tasks to train on, the same at every call: here a fixed draw."""
        return self.sample_tasks(np.random.default_rng(101), count)

    def in_training_range(self, task: np.ndarray) -> np.ndarray:
        """(...,) bool: which tasks (..., task_size) training covers. The live page marks others."""
        return ((task >= self.task_low) & (task <= self.task_high)).all(-1)

    def reward_terms(self, outcome: np.ndarray, action: np.ndarray,
                     task: np.ndarray) -> dict[str, np.ndarray]:
        """Weighted terms (...,) whose sum is the reward of a step, for any task.

        `outcome` (..., outcome_size) is that after the step, `action` (..., action_size) is
        clipped, `task` (..., task_size). Needed where outcome_size is not 0.
        """

    def rewards_of(self, outcome: np.ndarray, action: np.ndarray, task: np.ndarray) -> np.ndarray:
        """Rewards (...,) by `reward_terms`, for actions of any size."""
        terms = self.reward_terms(outcome, np.clip(action, -1.0, 1.0), task)
        for name, term in terms.items():  # another shape may broadcast into nonsense, silently
            if term.shape != outcome.shape[:-1]:
                raise ValueError(f"{self.name}: reward_terms()[{name!r}] has shape {term.shape}, "
                                 f"not {outcome.shape[:-1]}")
        return sum(terms.values())

    def bands(self) -> list[tuple[str, np.ndarray]]:
        """[(label, tasks)] inside and outside the training range for --extrapolate; none here."""
        return []


class MujocoFamily(TaskFamily, abc.ABC):
    """A MuJoCo model whose environments `envs.BatchEnv` steps together.

    B environments. A state is (1 + nq + nv + na,): time, positions, velocities, activations. Sensor
    readings belong to that state, in the order of <sensor>. The model needs a camera "video" for
    the film. outcome_size and reward_terms are required here.
    """
    frame_skip: int             # physics steps per environment step
    control_spec: int           # what an action sets: int(mujoco.mjtState.mjSTATE_CTRL) for motors,
                                # mjSTATE_MOCAP_POS for a mocap body
    start_noise = None          # std of noise on the start's (positions, velocities), on request
    observation_limit = np.inf  # bound of gymnasium's observation space
    goal_size = (0.02, 0.02, 0.002)  # of the mark that a film shows: radius, radius, half height

    @abc.abstractmethod
    def xml(self) -> str:
        """The model as MJCF text."""

    @abc.abstractmethod
    def start(self, model):
        """The one start state of all episodes, as MjData."""

    @abc.abstractmethod
    def observe(self, state: np.ndarray, sensors: np.ndarray) -> np.ndarray:
        """Full physics states (B, state) and sensor readings (B, sensors) -> (B, observation)."""

    @abc.abstractmethod
    def outcome(self, state: np.ndarray, sensors: np.ndarray) -> np.ndarray:
        """-> (B, outcome_size): all that the reward of any task needs of a state."""

    @abc.abstractmethod
    def distance(self, outcome: np.ndarray, task: np.ndarray) -> np.ndarray:
        """Distance from the goal (...,) in `task_unit`, of outcomes (..., outcome_size)."""

    @abc.abstractmethod
    def next_control(self, control: np.ndarray, action: np.ndarray) -> np.ndarray:
        """New control (B, control) from the one before and actions (B, act) clipped to [-1, 1].

        The size of a control follows from `control_spec`: motor signals (nu), mocap position (3).
        """

    def ended(self, state: np.ndarray) -> np.ndarray:
        """(B,) bool: which episodes terminate in this state. Here none does before the horizon."""
        return np.zeros(len(state), bool)

    @abc.abstractmethod
    def goal_position(self, task: np.ndarray) -> np.ndarray:
        """(3,): where a film marks the goal of one task (task_size,), in world coordinates."""


class GymnasiumFamily(TaskFamily, abc.ABC):
    """Any `gymnasium.Env`, stepped by gymnasium's own vector environment.

    The environment must take `reset(options={"task": task})`, task (task_size,). Observations are
    (observation_size,). Every step's info must hold "goal_distance": a number in `task_unit`. With
    an outcome_size it must also hold "outcome" (outcome_size,). Episodes end at `horizon`.
    Other bounds of actions are scaled to [-1, 1]. A film needs render_mode "rgb_array".
    """

    @abc.abstractmethod
    def make_env(self, render_mode: str | None = None) -> gymnasium.Env:
        """One environment with this family's reward, `self.reward`."""


# ---------------------------------------------------------------- tasks that a user gives
def check_tasks(family: TaskFamily, tasks) -> np.ndarray:
    """`tasks` as a float array (n, task_size); ValueError, in one line, where it is not one."""
    size = family.task_size
    try:
        if np.iscomplexobj(tasks):
            raise ValueError
        tasks = np.asarray(tasks, dtype=float)
    except (TypeError, ValueError):
        raise ValueError(f"goals must be numbers of shape (n, {size})") from None
    if tasks.ndim != 2 or tasks.shape[1] != size or not len(tasks):
        raise ValueError(f"goals must have shape (n, {size}) with n >= 1, not {tasks.shape}")
    finite = np.isfinite(tasks).all(1)
    if not finite.all():
        raise ValueError(f"goals must be finite; row {int(np.argmin(finite))} is not")
    low, high = map(np.asarray, family.task_limits or (family.task_low, family.task_high))
    outside = ((tasks < low) | (tasks > high)).any(1)
    if outside.any():
        row = int(np.argmax(outside))
        raise ValueError(f"goal {tasks[row].tolist()} in row {row} is out of range: give "
                         f"{family.task_unit} between {low.tolist()} and {high.tolist()}")
    return tasks


def task_of_each(family: TaskFamily, task, num_envs: int) -> np.ndarray:
    """One task (task_size,) for all, or one each: (num_envs, task_size)."""
    rows = check_tasks(family, np.atleast_2d(task))
    if len(rows) not in (1, num_envs):
        raise ValueError(f"options['task'] has {len(rows)} rows for {num_envs} environments")
    return np.broadcast_to(rows, (num_envs, family.task_size)).copy()
