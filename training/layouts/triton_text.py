"""Text in, what the graph beside it answers out: tokenizes, and asks Triton for the rest.

Runs in Triton's Python backend, which needs the packages numpy and tokenizers for it, and nothing else.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton
from tokenizers import Tokenizer


class TritonPythonModel:
    """By this name the backend looks for it."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        said = {name: value["string_value"] for name, value in config["parameters"].items()}
        self.graph = said["graph"]
        self.inputs = said["inputs"].split()
        self.truncate = said["truncate"] == "true"
        self.tokens_max = int(said["tokens_max"])
        self.outputs = [it["name"] for it in config["output"]]
        folder = Path(args["model_repository"], args["model_version"])
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self.tokens_max)

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self.answer(request) for request in requests]

    def answer(self, request: Any) -> Any:
        raw = triton.get_input_tensor_by_name(request, "text").as_numpy().ravel()
        try:
            encoded = self.tokenizer.encode_batch([it.decode() for it in raw])
        except UnicodeDecodeError:
            return refused("text is not UTF-8")
        if not self.truncate and any(it.overflowing for it in encoded):
            return refused(f"a text has more than {self.tokens_max} tokens")
        ids = np.zeros((len(encoded), max(len(it.ids) for it in encoded)), np.int64)
        mask = np.zeros_like(ids)
        for row, it in enumerate(encoded):
            ids[row, : len(it.ids)] = it.ids
            mask[row, : len(it.ids)] = 1
        feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        answer = triton.InferenceRequest(
            model_name=self.graph,
            inputs=[triton.Tensor(name, feed[name]) for name in self.inputs],
            requested_output_names=self.outputs,
        ).exec()
        if answer.has_error():
            return triton.InferenceResponse(error=answer.error())
        return triton.InferenceResponse([triton.get_output_tensor_by_name(answer, it) for it in self.outputs])


def refused(why: str) -> Any:
    return triton.InferenceResponse(error=triton.TritonError(why, triton.TritonError.INVALID_ARG))
