"""Sounds by their log-mel spectrum. All of it is in the graph; reading the file is the runtime's."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from runtimes import audio, wav
from training.contract import Array, Classes, Inputs, Rows
from training.errors import RecipeError
from training.model import Model
from training.models import disturb
from training.models.spectrum import LogMel
from training.spec.models import Speech

_UNHEARD = -1e4
"""In place of what is no part of a sound, where the largest is looked for."""


class SpeechClassifier(Model):
    """Takes `audio`: WAV files, as bytes; or samples that were read already."""

    task = "classify"
    names_in = ("samples", "lengths")
    names_out = ("scores", "logits")

    def __init__(self, spec: Speech, labels: tuple[str, ...], *, rate_hz: int) -> None:
        super().__init__()
        self.spec = spec
        self.labels = labels
        self.augments = spec.disturb.share > 0
        self.rate_hz = rate_hz
        self.width = round(spec.seconds_max * rate_hz)
        self.sample = {"audio": _column([np.zeros(self.width, np.float32)] * 2)}
        self.spectrum = LogMel(spec.mels, rate_hz=rate_hz)
        self.first = _block(spec.mels, spec.channels)
        self.second = _block(spec.channels, spec.channels)
        self.gru = nn.GRU(spec.channels, spec.hidden, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(spec.dropout)
        self.linear = nn.Linear(2 * spec.hidden, len(labels))

    def feed(self, inputs: Inputs) -> tuple[Tensor, ...]:
        fed = audio.window([self._read(it) for it in inputs["audio"]], self.width)
        return torch.from_numpy(fed["samples"]), torch.from_numpy(fed["lengths"])

    def forward(self, samples: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        """Samples [n, width] and how many of them are the sound's → scores [n, labels], and the logits behind them."""
        bands, there = self.spectrum(samples, lengths)
        if self.training:
            bands = disturb.spectra(self.spec.disturb, bands)
        # Frames behind the end stay zero, whatever biases add: a sound is answered alike at any width.
        bands = self.first(bands * there) * there[:, :, ::2]
        bands = self.second(bands) * there[:, :, ::4]
        heard, _ = self.gru(bands.transpose(1, 2))
        largest = heard.masked_fill(there[:, 0, ::4, None] == 0, _UNHEARD).amax(1)
        logits = self.linear(self.dropout(largest))
        return logits.softmax(-1), logits

    def augment(self, inputs: Inputs, chance: np.random.Generator) -> Inputs:
        sounds = [self._read(it) for it in inputs["audio"]]
        return {"audio": _column([disturb.sound(self.spec.disturb, it, self.rate_hz, chance) for it in sounds])}

    def axes(self) -> dict[str, dict[int, str]]:
        return {name: {0: "n"} for name in (*self.names_in, *self.names_out)}

    def card(self) -> dict[str, Any]:
        return super().card() | {"sample_rate_hz": self.rate_hz, "truncate": self.spec.truncate}

    def _read(self, it: bytes | Array) -> Array:
        if isinstance(it, bytes):
            return wav.read(it, rate_hz=self.rate_hz, samples_max=self.width, truncate=True)
        return it[: self.width]


def build(spec: Speech, rows: Rows) -> SpeechClassifier:
    """New, its weights drawn from torch's random numbers."""
    targets, sounds = rows.train.targets, rows.train.inputs.get("audio")
    if not isinstance(targets, Classes) or sounds is None:
        raise RecipeError("the model 'speech' is for sounds with one label each")
    rate_hz = wav.rate_hz(sounds[0])
    model = SpeechClassifier(spec, targets.labels, rate_hz=rate_hz)
    longest = max(len(wav.read(it, rate_hz=rate_hz, samples_max=1 << 31)) for it in sounds)
    if longest > model.width and not spec.truncate:
        raise RecipeError(
            f"a training sound lasts {longest / rate_hz:.2f} s: raise model.seconds_max, or set model.truncate"
        )
    model.eval()
    return model


def _block(inputs: int, outputs: int) -> nn.Module:
    """Of half as many frames."""
    convolution = nn.Conv1d(inputs, outputs, 5, stride=2, padding=2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm1d(outputs), nn.ReLU())


def _column(sounds: list[Array]) -> Array:
    """Of sounds of any lengths."""
    found = np.empty(len(sounds), object)
    for at, sound in enumerate(sounds):
        found[at] = sound
    return found
