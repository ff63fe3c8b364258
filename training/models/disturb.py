"""Sounds as other speakers, rooms and recorders would have them, so that a model learns what these leave as it is."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from training.contract import Array
from training.spec.models import Disturbance


def sound(spec: Disturbance, samples: Array, rate_hz: int, chance: np.random.Generator) -> Array:
    """One sound, float32 [length], at another speed, later, louder or softer, and in noise."""
    if chance.random() >= spec.share:
        return samples
    speed = 1 + chance.uniform(-spec.speed, spec.speed)
    places = np.arange(max(1, int(len(samples) / speed))) * speed
    found = np.interp(places, np.arange(len(samples)), samples)
    before = int(chance.uniform(0, spec.shift_s) * rate_hz)
    found = np.concatenate([np.zeros(before), found])
    if spec.noise_db is not None:
        loudness = np.sqrt(np.mean(np.square(samples)))
        below_db = chance.uniform(spec.noise_db, spec.noise_db + 30)
        found = found + chance.standard_normal(len(found)) * loudness * 10 ** (-below_db / 20)
    gain = 10 ** (chance.uniform(-spec.gain_db, spec.gain_db) / 20)
    louder: Array = (found * gain).astype(np.float32)
    return louder


def spectra(spec: Disturbance, bands: Tensor) -> Tensor:
    """Log-mel spectra [n, mels, frames] with all frequencies moved, and some bands and frames blanked. By torch's
    random numbers."""
    rows, mels, frames = bands.shape
    plain, as_it_is = bands, torch.rand(rows) >= spec.share
    if spec.warp_bands:
        shift = (torch.rand(rows, 1) * 2 - 1) * spec.warp_bands
        places = (torch.arange(mels)[None, :] + shift).clamp(0, mels - 1)
        low = places.floor().long().clamp(max=mels - 2)
        share = (places - low)[:, :, None]
        picked = [bands.gather(1, at[:, :, None].expand(-1, -1, frames)) for at in (low, low + 1)]
        bands = picked[0] * (1 - share) + picked[1] * share
    for axis, size, most in ((1, mels, spec.hidden_bands), (2, frames, spec.hidden_frames)):
        if most:
            wide = torch.rand(rows, 1) * most
            start = torch.rand(rows, 1) * (size - wide)
            at = torch.arange(size)[None, :]
            bands = bands * ((at < start) | (at >= start + wide)).unsqueeze(3 - axis).to(bands.dtype)
    return torch.where(as_it_is[:, None, None], plain, bands)
