"""INT8 weights and activations for vLLM, rounded to nearest: no calibration, a second's work."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from training.contract import Weights
from training.models.generator import Generator, to_compress

LOG = logging.getLogger("training")

_INT8_MAX = 127


def quantize(model: Generator) -> Weights:
    """Every linear layer but lm_head to INT8, the rest to bfloat16, in the layout that compressed-tensors calls
    `int-quantized` (vLLM and transformers read it)."""
    network = to_compress(model, "w8a8")
    linear = {name for name, part in network.named_modules() if isinstance(part, torch.nn.Linear)} - {"lm_head"}
    tied = network.config.tie_word_embeddings
    tensors: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer in linear:
            tensors[name], tensors[f"{layer}.weight_scale"] = round_to_nearest(tensor)
        elif not (tied and name == "lm_head.weight"):
            tensors[name] = tensor.to(torch.bfloat16).contiguous()
    return Weights(tensors, {"dtype": "bfloat16", "quantization_config": _W8A8_CONFIG})


def round_to_nearest(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] → INT8 of the same shape, and fp32 scales [out, 1]; symmetric. Of a row's candidate scales, from the
    one that just holds its largest weight down to 0.7 of that, the one with the least squared error is taken: cutting
    off an outlier often costs less than coarser steps for all the others."""
    widest = weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / _INT8_MAX
    best, least = widest, torch.full_like(widest, torch.inf)
    for share in torch.linspace(1.0, 0.7, 31):
        scale = widest * share
        error = (_rounded(weight, scale) * scale - weight).square().sum(1, keepdim=True)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return _rounded(weight, best).to(torch.int8), best


def _rounded(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).round().clamp(-_INT8_MAX, _INT8_MAX)


_W8A8_CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
            },
        }
    },
}  # fmt: skip
