"""A small encoder that learns from a large one what it says of each row, how sure it is, and where it puts it.
https://arxiv.org/abs/1503.02531, https://arxiv.org/abs/1910.01108"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from training.contract import Array, Classes, Examples, Inputs, Rows, Targets
from training.errors import RecipeError
from training.model import Model, predict, row_losses, weighted
from training.models.encoder import Classifier
from training.run import Run
from training.spec.compression import Distill
from training.trainers import gradient

LOG = logging.getLogger("training")


class Taught(Classes, frozen=True, kw_only=True):
    """Labels, and what the teacher makes of the rows."""

    logits: Array
    """float32 [n, labels]."""
    embedding: Array
    """float32 [n, width]."""


class Lesson(Model):
    """A student, and what it loses by differing from its teacher."""

    names_out = ("scores", "logits", "embedding")

    def __init__(self, student: Classifier, *, temperature: float) -> None:
        super().__init__()
        self.student = student
        self.temperature = temperature

    def feed(self, inputs: Inputs) -> tuple[Tensor, ...]:
        return self.student.feed(inputs)

    def costs(self, inputs: Inputs) -> Array:
        return self.student.costs(inputs)

    def augment(self, inputs: Inputs, chance: np.random.Generator) -> Inputs:
        return self.student.augment(inputs, chance)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """What the student says, and where it puts each row."""
        [embedding] = self.student.embedder(input_ids, attention_mask)
        logits = self.student.linear(embedding)
        return logits.softmax(-1), logits, embedding

    def loss(self, outputs: tuple[Tensor, ...], targets: Targets, weights: Tensor) -> Tensor:
        """Cross entropy of the labels, what its softened scores lack of the teacher's (a divergence), and one minus the
        cosine of the embeddings, added."""
        assert isinstance(targets, Taught)
        named, warm = self.named(outputs), self.temperature
        soft = nn.functional.kl_div(
            (named["logits"] / warm).log_softmax(-1),
            (torch.from_numpy(targets.logits) / warm).log_softmax(-1),
            reduction="none",
            log_target=True,
        ).sum(-1)
        apart = 1 - (named["embedding"] * torch.from_numpy(targets.embedding)).sum(-1)
        return weighted(row_losses(named, targets) + warm**2 * soft + apart, weights)

    def head(self) -> Sequence[nn.Parameter]:
        return self.student.head()


def distill(spec: Distill, teacher: Model, rows: Rows, run: Run) -> Classifier:
    """A copy of the teacher with some of its layers, taught by all of it."""
    if not isinstance(teacher, Classifier) or not isinstance(rows.train.targets, Classes):
        raise RecipeError("compress = 'distill' is for text classifiers: an encoder, and rows with one label each")
    lesson = Lesson(_student(spec, teacher), temperature=spec.temperature)
    gradient.fit(spec.trainer, lesson, _taught(teacher, rows.train), run)
    return lesson.student


def _student(spec: Distill, teacher: Classifier) -> Classifier:
    student = copy.deepcopy(teacher)
    encoder = student.embedder.encoder
    layers = encoder.encoder.layer
    if unknown := [at for at in spec.layers if at >= len(layers)]:
        raise RecipeError(f"compress.layers has {unknown[0]}; the teacher's layers are 0 to {len(layers) - 1}")
    encoder.encoder.layer = nn.ModuleList([layers[at] for at in spec.layers])
    encoder.config.num_hidden_layers = len(spec.layers)
    return student


def _taught(teacher: Classifier, examples: Examples) -> Examples:
    LOG.info("distill: asking the teacher about %d rows", len(examples))
    assert isinstance(examples.targets, Classes)
    embedding = predict(teacher.embedder, examples.inputs)["embedding"]
    with torch.inference_mode():
        logits = teacher.linear(torch.from_numpy(embedding)).numpy()
    targets = Taught(**msgspec.structs.asdict(examples.targets), logits=logits, embedding=embedding)
    return Examples(examples.inputs, targets, examples.slices)
