"""Weights taken out of an encoder, and the rest trained on so that it makes up for them."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from training.contract import Examples, Rows
from training.errors import RecipeError
from training.model import Model
from training.models.encoder import TextModel
from training.run import Run
from training.spec.compression import PruneStructure, PruneWeights
from training.trainers import gradient

LOG = logging.getLogger("training")

_ROWS = 1024
"""Training rows by which heads and columns are judged."""
_BATCH = 32


def weights(spec: PruneWeights, model: Model, rows: Rows, run: Run) -> Model:
    """The smallest weights of each linear layer of the encoder zero, and kept so while the others learn on."""
    model = copy.deepcopy(model)
    linear = [it for layer in _layers(model) for it in layer.modules() if isinstance(it, nn.Linear)]
    for it in linear:
        prune.l1_unstructured(it, "weight", spec.share)
    model = gradient.fit(spec.trainer, model, rows.train, run)
    for it in linear:
        prune.remove(it, "weight")
    return model


def structure(spec: PruneStructure, model: Model, rows: Rows, run: Run) -> Model:
    """Without the heads and feed-forward columns that the loss depends on least, in each layer as many, so that what is
    left are smaller matrices."""
    model = copy.deepcopy(model)
    chance = np.random.default_rng(run.derived("rows"))
    judges = rows.train.take(chance.permutation(len(rows.train))[:_ROWS])
    before = sum(it.numel() for layer in _layers(model) for it in layer.parameters())
    for layer, (heads, columns) in zip(_layers(model), _importance(model, judges), strict=True):
        _keep_heads(layer.attention, _best(heads, spec.heads))
        _keep_columns(layer, _best(columns, spec.columns))
    left = sum(it.numel() for layer in _layers(model) for it in layer.parameters())
    LOG.info("prune: %.1f of %.1f million weights left in the layers", left / 1e6, before / 1e6)
    return gradient.fit(spec.trainer, model, rows.train, run)


def _layers(model: Model) -> Any:
    if not isinstance(model, TextModel) or not hasattr(model, "embedder"):
        raise RecipeError("compress = 'prune-…' is for text classifiers on an encoder")
    return model.embedder.encoder.encoder.layer


def _importance(model: Model, examples: Examples) -> list[tuple[Tensor, Tensor]]:
    """Of each layer's heads and columns: by how much the loss would change, to first order, if they were switched off;
    means over batches of its size. https://arxiv.org/abs/1905.10650"""
    model.eval()
    layers = _layers(model)
    found = [
        (torch.zeros(it.attention.self.num_attention_heads), torch.zeros(it.output.dense.in_features)) for it in layers
    ]
    order = np.argsort(model.costs(examples.inputs), kind="stable")
    for start in range(0, len(order), _BATCH):
        part = examples.take(order[start : start + _BATCH])
        loss = model.loss(model(*model.feed(part.inputs)), part.targets, torch.ones(len(part)))
        model.zero_grad()
        loss.backward()
        for layer, (heads, columns) in zip(layers, found, strict=True):
            heads += _pull(layer.attention.output.dense).view(len(heads), -1).sum(1).abs()
            columns += _pull(layer.output.dense).abs()
    model.zero_grad()
    return found


def _pull(linear: nn.Linear) -> Tensor:
    """What the loss would change by if an input of the layer were a little stronger, [inputs]."""
    assert linear.weight.grad is not None
    return (linear.weight.grad * linear.weight.detach()).sum(0)


def _best(importance: Tensor, removed: float) -> Tensor:
    """Indices of those to keep, in order."""
    count = max(1, round(len(importance) * (1 - removed)))
    return importance.topk(count).indices.sort().values


def _keep_heads(attention: Any, heads: Tensor) -> None:
    inner = attention.self
    width = inner.attention_head_size
    kept = (heads[:, None] * width + torch.arange(width)).flatten()
    for name in ("query", "key", "value"):
        setattr(inner, name, _rows_of(getattr(inner, name), kept))
    attention.output.dense = _inputs_of(attention.output.dense, kept)
    inner.num_attention_heads, inner.all_head_size = len(heads), len(kept)


def _keep_columns(layer: Any, columns: Tensor) -> None:
    layer.intermediate.dense = _rows_of(layer.intermediate.dense, columns)
    layer.output.dense = _inputs_of(layer.output.dense, columns)


def _rows_of(linear: nn.Linear, kept: Tensor) -> nn.Linear:
    """The same layer with only these outputs."""
    return _linear(linear.weight[kept], linear.bias[kept])


def _inputs_of(linear: nn.Linear, kept: Tensor) -> nn.Linear:
    """The same layer with only these inputs."""
    return _linear(linear.weight[:, kept], linear.bias)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        made.weight.copy_(weight)
        made.bias.copy_(bias)
    return made
