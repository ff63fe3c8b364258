"""From samples to a log-mel spectrum, as a graph of convolutions and products."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from training.contract import Array

_WINDOW_S, _HOP_S = 0.032, 0.01
_LEAST = 1e-6
"""Power that silence has."""


class LogMel(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """Power of each mel band in frames of 32 ms every 10 ms, as a logarithm. Loudness is taken out, and half of how a
    voice and a room colour the bands: without the other half an `s` would not be known."""

    def __init__(self, mels: int, *, rate_hz: int) -> None:
        super().__init__()
        self.window = 2 * round(_WINDOW_S * rate_hz / 2)
        self.hop = round(_HOP_S * rate_hz)
        self.register_buffer("waves", torch.from_numpy(_fourier(self.window)))
        self.register_buffer("filters", torch.from_numpy(_triangles(mels, self.window, rate_hz)))

    def forward(self, samples: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Samples [n, width], of which so many count → bands [n, mels, frames], and whether a frame counts, one or
        zero, [n, 1, frames]."""
        bands = self.bands(samples)
        counted = torch.div(lengths - self.window, self.hop, rounding_mode="floor").clamp(min=0) + 1
        there = (torch.arange(bands.shape[2])[None, :] < counted[:, None]).to(bands.dtype).unsqueeze(1)
        colour = (bands * there).sum(2, keepdim=True) / there.sum(2, keepdim=True)
        return (bands - (colour + colour.mean(1, keepdim=True)) / 2) * there, there

    def bands(self, samples: Tensor) -> Tensor:
        """Samples [n, width] → log-mel spectrum [n, mels, frames]."""
        parts = nn.functional.conv1d(samples.unsqueeze(1), self.waves, stride=self.hop)
        real, imaginary = parts.square().chunk(2, dim=1)
        return (self.filters @ (real + imaginary) + _LEAST).log()


def _fourier(window: int) -> Array:
    """Cosines, then sines, under a Hann window; float32 [2 · frequencies, 1, window]."""
    angle = 2 * np.pi * np.outer(np.arange(window // 2 + 1), np.arange(window)) / window
    hann = np.sin(np.pi * np.arange(window) / window) ** 2
    return np.concatenate([np.cos(angle) * hann, np.sin(angle) * hann])[:, None].astype(np.float32)


def _triangles(mels: int, window: int, rate_hz: int) -> Array:
    """Overlapping, evenly spaced in mel (O'Shaughnessy's 2595 log10(1 + f / 700)); float32 [mels, frequencies]."""
    top = 2595 * np.log10(1 + rate_hz / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, mels + 2) / 2595) - 1)
    frequencies = np.arange(window // 2 + 1) * rate_hz / window
    low, middle, high = (corners[at : at + mels, None] for at in range(3))
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    found: Array = np.minimum(rising, falling).clip(min=0).astype(np.float32)
    return found
