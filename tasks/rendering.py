"""OpenGL: which library MuJoCo takes, and the pictures of a whole batch.

Import MuJoCo from here, or import `tasks` before it: MuJoCo picks its OpenGL library when it is
imported, and a library that is named but absent breaks that import.
"""
import contextlib
import ctypes.util
import os
import sys
import warnings

if sys.platform == "linux" and "MUJOCO_GL" not in os.environ and "DISPLAY" not in os.environ:
    for _name, _library in (("egl", "EGL"), ("osmesa", "OSMesa")):
        if ctypes.util.find_library(_library):
            os.environ["MUJOCO_GL"] = _name
            break
try:
    import mujoco
except (AttributeError, ImportError, OSError, RuntimeError):  # each GL binding fails its own way
    if os.environ.get("MUJOCO_GL", "disabled") == "disabled":
        raise
    # The user named a library that is absent. Only pictures need one, and they will say so.
    os.environ["MUJOCO_GL"] = "disabled"
    import mujoco
import numpy as np
from mujoco.rollout import Rollout  # noqa: F401  for envs.py


class NoOpenGL(RuntimeError):
    """No library to render with; the message is one line that says what to install."""


@contextlib.contextmanager
def opengl():
    """Turn every error inside, which here means no OpenGL library, into NoOpenGL."""
    try:
        with warnings.catch_warnings(action="ignore"):  # GLFW, the last resort, warns, then fails
            yield
    except Exception as error:  # each GL binding fails with an exception type of its own
        raise NoOpenGL("no OpenGL for offscreen rendering: install EGL (libegl1) or OSMesa "
                       "(libosmesa6) and set MUJOCO_GL=egl or MUJOCO_GL=osmesa, whichever is "
                       "there") from error


def open_renderer(model: mujoco.MjModel, height: int, width: int) -> mujoco.Renderer:
    """An offscreen renderer of full quality, for films. NoOpenGL where there is no library."""
    with opengl():
        return mujoco.Renderer(model, height, width)


class Camera:
    """Small offscreen pictures of many states: thousands a second, in software.

    No shadows, few facets, geometry only. The loop over states calls MuJoCo's C functions
    directly, and kinematics alone puts the bodies in their places: mujoco.Renderer with its full
    settings would take a hundred times as long. NoOpenGL where there is no library, ValueError
    where the model has no camera of that name.
    """

    def __init__(self, family, name: str = "policy"):
        self.height, self.width, _ = family.image_shape
        # A model of its own: pictures for people keep their quality.
        self.model = mujoco.MjModel.from_xml_string(family.xml())
        quality = self.model.vis.quality
        quality.shadowsize, quality.offsamples = 0, 0
        quality.numslices, quality.numstacks, quality.numquads = 6, 4, 1
        self.data = mujoco.MjData(self.model)
        self.options, self.perturbation = mujoco.MjvOption(), mujoco.MjvPerturb()
        self.scene = mujoco.MjvScene(self.model, maxgeom=self.model.ngeom + 20)
        self.scene.flags[:] = 0  # no shadows, no reflections, no sky
        self.view = mujoco.MjvCamera()
        self.view.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self.view.fixedcamid = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_CAMERA, name)
        if self.view.fixedcamid < 0:
            raise ValueError(f"{family.name} has pictures: give its model a camera named {name!r}")
        self.rectangle = mujoco.MjrRect(0, 0, self.width, self.height)
        with opengl():
            self.gl = mujoco.GLContext(self.width, self.height)
            self.gl.make_current()
            self.context = mujoco.MjrContext(self.model, mujoco.mjtFontScale.mjFONTSCALE_100)

    def images(self, states: np.ndarray) -> np.ndarray:
        """Full physics states (B, state) -> (B, height, width, 3) uint8, top row first."""
        model, data, scene, rectangle = self.model, self.data, self.scene, self.rectangle
        everything = int(mujoco.mjtCatBit.mjCAT_ALL)
        out = np.empty((len(states), self.height, self.width, 3), np.uint8)
        self.gl.make_current()  # other environments have contexts of their own
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)
        for state, image in zip(states, out):
            mujoco.mj_setState(model, data, state, mujoco.mjtState.mjSTATE_FULLPHYSICS)
            mujoco.mj_kinematics(model, data)
            mujoco.mj_camlight(model, data)
            mujoco.mjv_updateScene(model, data, self.options, self.perturbation, self.view,
                                   everything, scene)
            mujoco.mjr_render(rectangle, scene, self.context)
            mujoco.mjr_readPixels(image, None, rectangle, self.context)
        return out[:, ::-1].copy()  # OpenGL counts rows from below

    def close(self):
        self.gl.make_current()
        self.context.free()
        self.gl.free()
