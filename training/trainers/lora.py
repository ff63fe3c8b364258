"""Low-rank updates beside frozen weights, by peft."""

from __future__ import annotations

from typing import Any

import peft
from torch import nn

from training.model import Model
from training.spec.trainers import Lora


def attach(spec: Lora, model: Model) -> Model:
    """The same model with an update beside each linear layer that the spec names; all else is frozen, but the head."""
    new = {id(it) for it in model.head()}
    head = {name.rpartition(".")[0] for name, it in model.named_parameters() if id(it) in new}
    config = peft.LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=[*spec.targets],
        exclude_modules=[*head],
        bias="none",
    )
    peft.inject_adapter_in_model(config, model)
    for parameter in model.head():
        parameter.requires_grad_(True)
    return model


def merge(model: Model) -> Model:
    """Each update added to the weights that it stands beside, and taken away."""
    for module in [*model.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, peft.tuners.lora.LoraLayer):
                child.merge()
                setattr(module, name, _plain(child))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def _plain(layer: Any) -> nn.Module:
    found = layer.get_base_layer()
    assert isinstance(found, nn.Module)
    return found
