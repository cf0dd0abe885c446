"""The picture of five landmarks that checkpoints with `is_kps` take as their second image."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from consisid_xdit.face_detect import Floats, Picture, require

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))
NOSE = 2


def draw_keypoints(landmarks: Floats, height: int, width: int) -> Picture:
    """Landmarks (5, 2) in pixels, drawn on black (height, width, 3): dimmed limbs to the nose, then bright dots.

    The reference draws them on the size of the aligned crop although they are pixels of the photograph, so they may
    lie outside; kept, as the checkpoint was trained with it. Needs OpenCV (extra `face`).
    """
    cv2 = require("cv2")
    canvas: Any = np.zeros((height, width, 3))
    nose = landmarks[NOSE]
    for i in (0, 1, 3, 4):
        x, y = np.stack([landmarks[i], nose]).T
        length = math.hypot(x[0] - x[1], y[0] - y[1])
        angle = math.degrees(math.atan2(y[0] - y[1], x[0] - x[1]))
        middle = (int(x.mean()), int(y.mean()))
        limb = cv2.ellipse2Poly(middle, (int(length / 2), 4), int(angle), 0, 360, 1)
        canvas = cv2.fillConvexPoly(canvas, limb, COLOURS[i])
    canvas = (canvas * 0.6).astype(np.uint8)
    for colour, (x, y) in zip(COLOURS, landmarks, strict=True):
        canvas = cv2.circle(canvas, (int(x), int(y)), 10, colour, -1)
    return canvas
