"""Images moved about, so that a model learns what a movement leaves as it is."""

from __future__ import annotations

import numpy as np
import torch

from training.contract import Array
from training.spec.models import Warp


def warped(spec: Warp, images: Array, chance: np.random.Generator) -> Array:
    """Each shifted, turned, scaled and sheared by its own chance; float32 of the same shape and range. What comes in
    from beyond the edge is as the edge is."""
    planes = torch.from_numpy(images).to(torch.float32)
    planes = planes.unsqueeze(1) if planes.ndim == 3 else planes.permute(0, 3, 1, 2)
    matrices = torch.from_numpy(_matrices(spec, len(images), planes.shape[3], planes.shape[2], chance))
    grid = torch.nn.functional.affine_grid(matrices, list(planes.shape), align_corners=False)
    moved = torch.nn.functional.grid_sample(planes, grid, padding_mode="border", align_corners=False)
    found: Array = (moved.squeeze(1) if images.ndim == 3 else moved.permute(0, 2, 3, 1)).numpy()
    return found


def _matrices(spec: Warp, rows: int, width: int, height: int, chance: np.random.Generator) -> Array:
    """From where in the image, whose sides go from -1 to 1, each place is taken; float32 [rows, 2, 3]."""

    def drawn(most: float) -> Array:
        return chance.uniform(-most, most, rows)

    angle, shear, size = np.deg2rad(drawn(spec.rotate_degrees)), drawn(spec.shear), 1 / (1 + drawn(spec.scale))
    cos, sin = np.cos(angle) * size, np.sin(angle) * size
    across, down = drawn(spec.shift_px) * 2 / width, drawn(spec.shift_px) * 2 / height
    lines = [[cos, cos * shear - sin, across], [sin, sin * shear + cos, down]]
    return np.moveaxis(np.array(lines, np.float32), -1, 0)
