"""The keypoint image that conditions identity networks on the pose of the face."""

from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import FaceFeatures, Image


def pose_image(face: FaceFeatures, shot: Shot) -> Image:
    """Draw the keypoints, RGB at the size of the shot, at their position in the centred photo. Black if `shot.pose` is none.

    Line widths scale with the size of the image. The networks were trained on images of about a megapixel.
    """
    import numpy as np

    from vidgen_ray.nets.keypoints import TRAINING_AREA_PX, draw_keypoints, map_to_canvas

    width, height = shot.width, shot.height
    if shot.pose == "none":
        return np.zeros((height, width, 3), np.uint8)
    points = map_to_canvas(face.keypoints, face.photo_size, (width, height))
    return draw_keypoints(points, width, height, (width * height / TRAINING_AREA_PX) ** 0.5)
