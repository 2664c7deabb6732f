"""How a person's face is to stand in a picture: the keypoint picture that identity networks are shown."""

from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import FaceFeatures, Image


def pose_image(face: FaceFeatures, shot: Shot) -> Image:
    """RGB at the size of the shot: the keypoints where the centred photo has them, or black where the prompt shall decide.

    What the networks were trained with at about a megapixel is drawn smaller on a smaller picture.
    """
    import numpy as np

    from vidgen_ray.nets.keypoints import TRAINING_AREA_PX, draw_keypoints, map_to_canvas

    width, height = shot.width, shot.height
    if shot.pose == "none":
        return np.zeros((height, width, 3), np.uint8)
    points = map_to_canvas(face.keypoints, face.photo_size, (width, height))
    return draw_keypoints(points, width, height, (width * height / TRAINING_AREA_PX) ** 0.5)
