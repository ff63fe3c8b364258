"""Convolutions and dense layers on images; with dense ones alone, an MLP on pixels."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from training.contract import Array, Classes, Inputs, Rows, pieces
from training.errors import RecipeError
from training.model import Model
from training.models import warp
from training.spec.models import Cnn


class ImageClassifier(Model):
    """Takes `image` as it is in a file: bytes, [n, height, width] or with three colours behind."""

    task = "classify"
    names_in = ("image",)
    names_out = ("scores", "logits")

    def __init__(self, spec: Cnn, shape: tuple[int, ...], labels: tuple[str, ...], *, mean: Array, std: Array) -> None:
        super().__init__()
        self.spec = spec
        self.labels = labels
        self.augments = spec.warp is not None
        self.sample = {"image": np.zeros((2, *shape), np.uint8)}
        self.register_buffer("mean", torch.as_tensor(mean))
        self.register_buffer("std", torch.as_tensor(std))
        height, width, colours = (*shape, 1)[:3]
        layers: list[nn.Module] = []
        for number, channels in enumerate(spec.channels, 1):
            layers.append(nn.Conv2d(colours, channels, 3, padding=1, bias=not spec.norm))
            layers += [nn.BatchNorm2d(channels)] if spec.norm else []
            layers.append(nn.ReLU())
            if number in spec.pool_after:
                layers.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
            colours = channels
        layers.append(nn.Flatten())
        inputs = colours * height * width
        for outputs in spec.dense:
            layers += [*_dropout(spec), nn.Linear(inputs, outputs), nn.ReLU()]
            inputs = outputs
        self.layers = nn.Sequential(*layers, *_dropout(spec), nn.Linear(inputs, len(labels)))

    def feed(self, inputs: Inputs) -> tuple[Tensor, ...]:
        return (torch.from_numpy(np.asarray(inputs["image"])),)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Pixels, 0 to 255 → scores [n, labels], and the logits behind them."""
        pixels = (image.to(torch.float32) - self.mean) / self.std
        planes = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        logits = self.layers(planes)
        return logits.softmax(-1), logits

    def augment(self, inputs: Inputs, chance: np.random.Generator) -> Inputs:
        if self.spec.warp is None:
            return inputs
        return {"image": warp.warped(self.spec.warp, np.asarray(inputs["image"]), chance)}


def build(spec: Cnn, rows: Rows) -> ImageClassifier:
    """New, its weights drawn from torch's random numbers; pixels are scaled as the training rows' are spread."""
    targets, images = rows.train.targets, rows.train.inputs.get("image")
    if not isinstance(targets, Classes) or images is None:
        raise RecipeError("the model 'cnn' is for images with one label each")
    if bad := [it for it in spec.pool_after if it > len(spec.channels)]:
        raise RecipeError(f"model.pool_after names convolution {bad[0]}; there are {len(spec.channels)}")
    if min(images.shape[1:3]) < 2 ** len(spec.pool_after):
        raise RecipeError(f"model.pool_after halves images of {images.shape[1:3]} pixels until nothing is left of them")
    mean, std = _spread(images)
    model = ImageClassifier(spec, images.shape[1:], targets.labels, mean=mean, std=std)
    model.eval()
    model.to(memory_format=torch.channels_last)  # a fifth less time to learn on CPUs; nothing else depends on it
    return model


def _spread(images: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of all pixels, the latter at least 1; float32, by colour if there are colours."""
    axes = (0, 1, 2)
    count = math.prod(images.shape[:3])
    # Of integers, so nothing is lost on the way.
    total = sum(it.sum(axes, dtype=np.int64) for it in pieces(images))
    squares = sum(np.square(it, dtype=np.int64).sum(axes) for it in pieces(images))
    mean = total / count
    variance = np.maximum(squares / count - mean**2, 1)
    return np.asarray(mean, np.float32), np.asarray(np.sqrt(variance), np.float32)


def _dropout(spec: Cnn) -> list[nn.Module]:
    return [nn.Dropout(spec.dropout)] if spec.dropout else []
