"""Push from images: the task family, the camera that takes pictures of a whole batch, and what a policy sees in them.

Sources: the vision task of "Guided Meta-Policy Search" (Mendonca et al., NeurIPS 2019, arXiv 1904.00956v2): camera pose,
picture sizes and convolutions of the authors' release; which 48 x 64 pixels of the 84 x 84 are kept is [ours].
"""
import contextlib
import math
import warnings

import mujoco
import numpy as np
import torch

from sawyer import SawyerPush

CAMERA_POSE = 'pos="0 1.3 0.5" euler="-0.78 0 3.14159"'  # in front of the robot, looking back and down [release]
PICTURE = 84              # pixels a side of the release's picture, with MuJoCo's default field of view
FIELD_OF_VIEW = math.radians(45)
CROP_TOP, CROP_LEFT = 10, 10  # kept: the table from y = 0.35 to 0.95 m, x within 0.28 m at the start and 0.2 m at the end


class SawyerPushVision(SawyerPush):
    """Push a block to a hidden goal, seen through a camera: neither the block's position nor the goal is observed.

    Observation: image (48, 64, 3) uint8, and hand (3,): hand x, y, z in metres. The goal leaves no mark in the image.
    Action, task, reward and episode are those of `SawyerPush`; experts, known at meta-training only, see its state.
    """
    name, env_id = "push-vision", "gmps/SawyerPushVision-v0"
    observation_size, image_shape = 3, (48, 64, 3)  # numbers beside the image; rows, columns, RGB
    observation_centre, observation_scale = np.array([0.0, 0.6, 0.1]), np.full(3, 0.1)
    baseline_products = [0, 1, 2]

    @property
    def expert_family(self):
        """The family whose observation experts see: push with the block's position."""
        return SawyerPush(self.reward)

    def xml(self):
        """Push's model with the camera in it. A shifted centre and the same focal length make the crop a whole picture."""
        height, width, _ = self.image_shape
        focal = 0.5 * PICTURE / math.tan(0.5 * FIELD_OF_VIEW)  # in pixels
        right, down = CROP_LEFT + 0.5 * (width - PICTURE), CROP_TOP + 0.5 * (height - PICTURE)
        camera = (f'<camera name="policy" {CAMERA_POSE} resolution="{width} {height}" sensorsize="{width} {height}" '
                  f'focalpixel="{focal} {focal}" principalpixel="{right} {down}"/>')
        return super().xml().replace("<worldbody>", "<worldbody>" + camera)

    def observe(self, state, sensors):
        """Sensor readings (B, 12) -> hand (B, 3)."""
        return sensors[:, :3].copy()


class NoOpenGL(RuntimeError):
    """No library to render with; the message is one line that says what to install."""


@contextlib.contextmanager
def opengl():
    """Whatever goes wrong inside for want of a GL library becomes NoOpenGL."""
    try:
        with warnings.catch_warnings(action="ignore"):  # GLFW, MuJoCo's last resort, warns before it fails
            yield
    except Exception as error:  # each GL binding fails with an exception type of its own
        raise NoOpenGL("no OpenGL for offscreen rendering: install EGL (libegl1) or OSMesa (libosmesa6) and set "
                       "MUJOCO_GL=egl or MUJOCO_GL=osmesa, whichever is there") from error


class Camera:
    """Offscreen pictures of many states, thousands a second in software: no shadows, few facets, geometry only.

    The loop over states calls MuJoCo's C functions directly; kinematics alone puts the bodies in their places, and
    mujoco.Renderer with its full settings would take a hundred times as long. RuntimeError where there is no GL.
    """

    def __init__(self, family, name="policy"):
        self.height, self.width, _ = family.image_shape
        self.model = mujoco.MjModel.from_xml_string(family.xml())  # of its own: pictures for people stay fine
        quality = self.model.vis.quality
        quality.shadowsize, quality.offsamples = 0, 0
        quality.numslices, quality.numstacks, quality.numquads = 6, 4, 1
        self.data = mujoco.MjData(self.model)
        self.options, self.perturbation = mujoco.MjvOption(), mujoco.MjvPerturb()
        self.scene = mujoco.MjvScene(self.model, maxgeom=self.model.ngeom + 20)
        self.scene.flags[:] = 0  # no shadows, no reflections, no sky
        self.view = mujoco.MjvCamera()
        self.view.type, self.view.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, self.model.camera(name).id
        self.rectangle = mujoco.MjrRect(0, 0, self.width, self.height)
        with opengl():
            self.gl = mujoco.GLContext(self.width, self.height)
            self.gl.make_current()
            self.context = mujoco.MjrContext(self.model, mujoco.mjtFontScale.mjFONTSCALE_100)

    def images(self, states):
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
            mujoco.mjv_updateScene(model, data, self.options, self.perturbation, self.view, everything, scene)
            mujoco.mjr_render(rectangle, scene, self.context)
            mujoco.mjr_readPixels(image, None, rectangle, self.context)
        return out[:, ::-1].copy()  # GL counts rows from below

    def close(self):
        self.gl.make_current()
        self.context.free()
        self.gl.free()


# ---------------------------------------------------------------- convolutions: from an image to 16 points in it
FILTERS, KEYPOINTS = 16, 32
CONVOLUTIONS = ((3, 5, 3), (FILTERS, 3, 3), (FILTERS, 3, 1))  # input channels, kernel, stride [release]
SHARPNESS = 10.0  # of the soft-argmax [ours]: points spread over the image from the start
CHUNK = 500       # images at a time: intermediate results that stay in a processor's cache


def init_convolutions(generator, dtype=torch.float32):
    """conv1_w, conv1_b .. conv3_w, as torch.nn.Conv2d's. The last has no bias: it would move no point."""
    theta = {}
    for layer, (channels, kernel, _) in enumerate(CONVOLUTIONS, start=1):
        bound = 1.0 / math.sqrt(channels * kernel * kernel)
        for name, shape in (("w", (FILTERS, channels, kernel, kernel)), ("b", (FILTERS,))):
            theta[f"conv{layer}_{name}"] = (torch.rand(shape, generator=generator, dtype=dtype) * 2 - 1) * bound
    del theta[f"conv{layer}_b"]
    return theta


def soft_argmax(maps):
    """Feature maps (B, C, rows, columns) -> (B, 2C): x of every map's point, then y, in [-1, 1] from edge to edge.

    A point is the mean position under the softmax over the map (Levine et al. 2016, section 5.1).
    """
    batch, channels, rows, columns = maps.shape
    share = maps.flatten(2).softmax(-1).view(batch, channels, rows, columns)
    x = share.sum(2) @ torch.linspace(-1, 1, columns, dtype=maps.dtype, device=maps.device)
    y = share.sum(3) @ torch.linspace(-1, 1, rows, dtype=maps.dtype, device=maps.device)
    return torch.cat([x, y], dim=1)


def keypoints(theta, image):
    """Images (..., rows, columns, 3) uint8 -> (..., 32), through the convolutions of `theta`; differentiable in them."""
    def chunk(images):
        x = images.permute(0, 3, 1, 2).to(theta["conv1_w"].dtype) * (2 / 255) - 1
        for layer, (_, kernel, stride) in enumerate(CONVOLUTIONS, start=1):
            x = torch.nn.functional.conv2d(x.relu() if layer > 1 else x, theta[f"conv{layer}_w"],
                                           theta.get(f"conv{layer}_b"), stride, padding=kernel // 2)
        return soft_argmax(SHARPNESS * x)

    flat = image.reshape(-1, *image.shape[-3:])
    return torch.cat([chunk(images) for images in flat.split(CHUNK)]).view(*image.shape[:-3], KEYPOINTS)
