"""The three-dimensional part of the live page (tools/view.py): robot, ghost and goal."""
import numpy as np
import viser
from mjviser import ViserMujocoScene
from mjviser.conversions import is_fixed_body, merge_geoms

from envs import FULL
from tasks import task_set
from tasks.rendering import mujoco

INSIDE, OUTSIDE = (25, 160, 70), (240, 120, 0)  # colours of goals, in and out of the training range
GHOST = (70, 110, 200)
TRAINING_GOALS = 20  # dots that show where training took place


# ---------------------------------------------------------------- the robot
class Robot:
    """The robot in the page's scene, and its ghost: transparent, of an earlier step."""

    def __init__(self, server: viser.ViserServer, family):
        self.server = server
        # A model of its own, since mjviser changes its visual settings.
        self.model = model = mujoco.MjModel.from_xml_string(family.xml())
        self.scene = ViserMujocoScene(server, model, num_envs=1)
        self.scene.camera_tracking_enabled = False  # it would shift the world, goal and all
        self.data, self.ghost_data = mujoco.MjData(model), mujoco.MjData(model)
        self.frame = server.scene.add_frame("/ghost", show_axes=False, visible=False)
        self.ghost = {}
        for body in range(model.nbody):
            geoms = [g for g in range(model.ngeom) if model.geom_bodyid[g] == body]
            if geoms and not is_fixed_body(model, body):
                mesh = merge_geoms(model, geoms)
                # A little smaller than the robot: where both are, the robot alone shows. Batches
                # of one, as the robot's own: a slow browser moves other meshes ahead of batches.
                centre = mesh.vertices.mean(0)
                self.ghost[body] = server.scene.add_batched_meshes_simple(
                    f"/ghost/{body}", centre + 0.97 * (mesh.vertices - centre), mesh.faces,
                    np.array([[1.0, 0, 0, 0]]), np.zeros((1, 3)), batched_colors=GHOST,
                    opacity=0.35, lod="off", cast_shadow=False, receive_shadow=False)
        self._place_camera(server, family)

    def _place_camera(self, server, family) -> None:
        """As the film's camera, but further off and towards the training goals."""
        mujoco.mj_forward(self.model, self.data)
        camera = self.model.camera("video").id
        tasks = family.training_tasks(TRAINING_GOALS)
        goals = np.mean([family.goal_position(task) for task in tasks], axis=0)
        server.initial_camera.position = tuple(
            goals + 1.3 * (self.data.cam_xpos[camera] - goals))
        server.initial_camera.look_at = tuple(goals)
        server.initial_camera.fov = float(np.radians(self.model.cam_fovy[camera]))

    def show(self, state: np.ndarray, ghost: np.ndarray | None) -> None:
        """Place both in full physics states (state,)."""
        with self.server.atomic():  # else a browser may draw the ghost of another moment
            self.frame.visible = ghost is not None
            if ghost is not None:
                self._place(self.ghost_data, ghost)
                for body, handle in self.ghost.items():
                    handle.batched_positions = self.ghost_data.xpos[body][None]
                    handle.batched_wxyzs = self.ghost_data.xquat[body][None]
            self._place(self.data, state)
            self.scene.update_from_mjdata(self.data)

    def _place(self, data: mujoco.MjData, state: np.ndarray) -> None:
        mujoco.mj_setState(self.model, data, state, FULL)
        mujoco.mj_kinematics(self.model, data)


# ---------------------------------------------------------------- the goal
class Goal:
    """The goal: its mark and sliders, and a handle to drag it if it is a place on the ground.

    `moved()` is called when a user has moved it; `task` is then the new goal.
    """

    def __init__(self, server: viser.ViserServer, family, moved):
        self.family, self.moved = family, moved
        low, high = map(np.asarray, family.task_limits or (family.task_low, family.task_high))
        self.low, self.high = low, high
        self.factor = np.degrees(1.0) if family.task_unit == "rad" else 1.0
        self.task = task_set(family, "held_out", 1)[0]
        for number, task in enumerate(family.training_tasks(TRAINING_GOALS)):
            server.scene.add_icosphere(f"/training/{number}", 0.2 * family.goal_size[0],
                                       color=INSIDE, position=family.goal_position(task),
                                       cast_shadow=False)
        place = family.goal_position(self.task)
        self.handle = None
        if family.task_size == 2 and np.allclose(place[:2], self.task):
            self.handle = server.scene.add_transform_controls(
                "/goal", scale=6 * family.goal_size[0], line_width=4, depth_test=False,
                active_axes=(True, True, False), disable_rotations=True,
                translation_limits=((low[0], high[0]), (low[1], high[1]), (place[2], place[2])))
            self.handle.on_update(self._dragged)
        else:
            self.frame = server.scene.add_frame("/goal", show_axes=False)
        radius, _, half_height = family.goal_size
        # A disc, and a pole that stays in sight when something stands on the goal.
        self.marks = [server.scene.add_cylinder(f"/goal/{name}", size, height, position=(0, 0, z),
                                                cast_shadow=False)
                      for name, size, height, z in (
                          ("disc", radius, 2 * half_height, 0.0),
                          ("pole", 0.1 * radius, 6 * radius, 3 * radius))]
        names = {1: ("angle",), 2: ("x", "y")}.get(
            family.task_size, tuple(map(str, range(family.task_size))))
        unit = "degrees" if family.task_unit == "rad" else family.task_unit
        step = 0.5 if unit == "degrees" else 0.005
        self.sliders = [server.gui.add_slider(f"Goal {name} ({unit})", float(a), float(b), step,
                                              float(value))
                        for name, a, b, value in zip(names, self.factor * low, self.factor * high,
                                                     self.factor * self.task)]
        for slider in self.sliders:
            slider.on_update(self._slid)
        how = "Drag the arrows at the goal, or move the sliders" if self.handle else (
            "Move the slider")
        server.gui.add_markdown(f"{how}: the policy then starts again.")
        self.text = server.gui.add_markdown("")
        self.put(self.task)

    def put(self, task: np.ndarray) -> None:
        """Show the goal there, and whether training covered it."""
        self.task = np.clip(task, self.low, self.high)
        for slider, value in zip(self.sliders, self.factor * self.task):
            slider.value = float(np.clip(value, slider.min, slider.max).round(3))
        (self.handle or self.frame).position = self.family.goal_position(self.task)
        inside = bool(self.family.in_training_range(self.task))
        for mark in self.marks:
            mark.color = INSIDE if inside else OUTSIDE
        self.text.content = ("The goal is inside the training range (green dots)." if inside else
                             "**The goal is outside the training range.** Training never saw a "
                             "goal like this one.")

    # Callbacks are async: viser then runs them in order, on its own thread.
    async def _slid(self, event) -> None:
        if event.client is not None:  # else `put` has moved the slider
            self.put(np.array([slider.value for slider in self.sliders]) / self.factor)
            self.moved()

    async def _dragged(self, event) -> None:
        self.put(np.asarray(self.handle.position[:2], float))
        if event.phase == "end":
            self.moved()
