"""Push from images: Sawyer push, seen through a camera.

Source: the paper's vision task with the camera of the authors' release.
"""
import math

import numpy as np

from tasks.sawyer_push import SawyerPush

CAMERA_POSE = 'pos="0 1.3 0.5" euler="-0.78 0 3.14159"'  # in front of the robot, looking back
PICTURE = 84                # pixels a side of the release's picture
FIELD_OF_VIEW = math.radians(45)
# Kept: rows 0 to 47, columns 10 to 73. They show the table up to y = 0.86 m.
CROP_TOP, CROP_LEFT = 0, 10


class SawyerPushVision(SawyerPush):
    """Push a block to a hidden goal; the block's position is not observed either.

    Observation: image (48, 64, 3) uint8, and hand (3,): hand x, y, z in metres. The goal leaves no
    mark in the image. Action, task, reward and episode are those of `SawyerPush`. Experts, known at
    meta-training only, see its state.
    """
    name = "push-vision"
    observation_size, image_shape = 3, (48, 64, 3)  # numbers beside the image; the image
    observation_centre, observation_scale = np.array([0.0, 0.6, 0.1]), np.full(3, 0.1)
    settings = SawyerPush.settings | dict(
        demonstration_episodes=5, imitation_steps=1500, imitation_batch=30, noise_hold=1)
    published = {}

    @property
    def expert_family(self):
        """Push with the block's position."""
        return SawyerPush(self.reward)

    def xml(self):
        """Push's model and the camera: a shifted centre makes the crop a whole picture."""
        height, width, _ = self.image_shape
        focal = 0.5 * PICTURE / math.tan(0.5 * FIELD_OF_VIEW)  # in pixels
        right = CROP_LEFT + 0.5 * (width - PICTURE)
        down = CROP_TOP + 0.5 * (height - PICTURE)
        camera = (f'<camera name="policy" {CAMERA_POSE} resolution="{width} {height}" '
                  f'sensorsize="{width} {height}" focalpixel="{focal} {focal}" '
                  f'principalpixel="{right} {down}"/>')
        return super().xml().replace("<worldbody>", "<worldbody>" + camera)

    def observe(self, state, sensors):
        """The hand's position (B, 3)."""
        return sensors[:, :3].copy()
