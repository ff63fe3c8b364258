"""The learning rate as a function of the step, so that nothing about it needs to be kept."""

from __future__ import annotations

import math

from training.spec.trainers import Gradient


def share(spec: Gradient, step: int, steps: int) -> float:
    """Which share of the highest rate holds at `step`, 0 ≤ step < steps."""
    if spec.schedule == "onecycle":
        # Half a cosine up from 1/25 during the first 30 %, another one down to next to nothing.
        peak = 0.3 * steps
        if step < peak:
            return 0.04 + 0.96 * _rise(step / peak)
        return 1 - _rise((step - peak) / max(1.0, steps - 1 - peak)) * (1 - 4e-7)
    warm = spec.warmup * steps
    if step < warm:
        return (step + 1) / (warm + 1)
    left = (steps - step) / max(1.0, steps - warm)
    match spec.schedule:
        case "linear":
            return left
        case "cosine":
            return 1 - _rise(1 - left)
        case "constant":
            return 1.0


def _rise(at: float) -> float:
    """From 0 to 1 along half a cosine."""
    return (1 - math.cos(math.pi * min(1.0, at))) / 2
