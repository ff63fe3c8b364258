"""Text generation as Triton's backends for language models have it, and as a completion in OpenAI's dialect. Pure.

`text_input` becomes the prompt, a completion's text `text_output`; parameters go on by their names, unknown ones
included, as they would on `/v1/completions`. Those in `sampling_parameters`, a JSON object in a string, are taken like
those beside it, which win where both say the same name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from runtimes.contract import Invalid, Tensor
from runtimes.dialect import decoded
from runtimes.dialect.bounded import require_values
from runtimes.dialect.elements import Message, Part, count, quoted, require_datatype, values

INPUTS = (
    Tensor("text_input", "BYTES", (1,)),
    Tensor("stream", "BOOL", (1,), optional=True),
    Tensor("sampling_parameters", "BYTES", (1,), optional=True),
    Tensor("exclude_input_in_output", "BOOL", (1,), optional=True),
)
OUTPUTS = (Tensor("text_output", "BYTES", (-1,)),)


class Generation(NamedTuple):
    """What is asked for."""

    id: str
    prompt: str
    stream: bool
    parameters: Mapping[str, Any]

    @property
    def tokens_out_max(self) -> int | None:
        found: int | None = self.parameters.get("max_tokens")
        return found

    def body(self, model: str, *, stream: bool) -> bytes:
        """For `/v1/completions`."""
        return msgspec.json.encode({"model": model, "prompt": self.prompt, "stream": stream, **self.parameters})


class Said(NamedTuple):
    """What a completion, or a chunk of one, says."""

    text: str
    finished: bool


def from_json(body: bytes) -> Generation:
    """Triton's generate extension: inputs and parameters are fields of one object. Raises Invalid."""
    require_values("The body", body)
    fields = decoded(_FIELDS, body)
    id, parameters = fields.pop("id", ""), fields.pop("parameters", {})
    if not isinstance(id, str):
        raise Invalid("`id` must be a string.", param="id")
    if not isinstance(parameters, dict):
        raise Invalid("`parameters` must be an object.", param="parameters")
    return _asked(id, fields | parameters)


def from_message(message: Message) -> Generation:
    """The same as tensors of one element each. Raises Invalid."""
    declared = {tensor.name: tensor for tensor in INPUTS}
    fields: dict[str, Any] = {}
    for part in message.parts:
        tensor = declared.get(part.name)
        if tensor is None:
            raise Invalid(
                f"input `{part.name}` is none of the model's; it takes {', '.join(declared)}.", param=part.name
            )
        if part.name in fields:
            raise Invalid(f"input `{part.name}` is given twice.", param=part.name)
        fields[part.name] = _only(part, tensor)
    for wanted in message.outputs:
        if wanted.name != OUTPUTS[0].name:
            raise Invalid(f"output `{wanted.name}` is none of the model's; it gives `text_output`.", param=wanted.name)
        if wanted.classes:
            raise Invalid("output `text_output` has no classes; leave `classification` out.", param=wanted.name)
    return _asked(message.id, {**fields, **message.parameters})


def said(completion: bytes) -> Said | None:
    """Of a completion's first choice; None if it has none, as a chunk that only says usage. Raises Invalid if it is no
    completion."""
    choices = decoded(_COMPLETION, completion).choices
    return Said(choices[0].text or "", choices[0].finish_reason is not None) if choices else None


def _only(part: Part, tensor: Tensor) -> Any:
    """The one element of an input of the shape [1] or [1, 1]."""
    if require_datatype(part) != tensor.datatype:
        raise Invalid(f"input `{part.name}` is {part.datatype}; the model takes {tensor.datatype}.", param=part.name)
    if count(part) != 1:
        raise Invalid(f"input `{part.name}` must hold one element; its shape is {list(part.shape)}.", param=part.name)
    (element,) = values(part)
    if not isinstance(element, bytes):
        return element
    try:
        return element.decode()
    except UnicodeDecodeError:
        raise Invalid(f"input `{part.name}` is not valid UTF-8.", param=part.name) from None


def _asked(id: str, fields: dict[str, Any]) -> Generation:
    sampling = _single(fields.pop("sampling_parameters", None))
    if sampling is not None:
        fields = _sampling(sampling) | fields
    prompt = _single(fields.pop("text_input", None))
    if not isinstance(prompt, str):
        raise Invalid("`text_input` must be one string.", param="text_input")
    # Engines refuse that too, but by the name of `prompt`.
    if not prompt:
        raise Invalid("`text_input` is empty; send the text to go on from.", param="text_input")
    stream = fields.pop("stream", None)
    if stream not in (None, True, False):
        raise Invalid("`stream` must be true or false.", param="stream")
    excludes = fields.pop("exclude_input_in_output", None)
    if excludes is False:
        fields["echo"] = True
    for name in OURS:
        fields.pop(name, None)
    parameters: dict[str, Any] = {}
    for name, value in fields.items():
        if name in REFUSED:
            raise Invalid(f"`{name}` is not taken here: {REFUSED[name]}.", param=name)
        if name in WORDS and not (value := _words(name, value)):
            continue
        parameters[RENAMED.get(name, name)] = _number(name, value)
    # By it a call is reckoned before any engine sees it.
    if not 0 <= (parameters.get("max_tokens") or 0) <= TOKENS_OUT_MAX:
        raise Invalid(f"`max_tokens` must be from 0 to {TOKENS_OUT_MAX}.", param="max_tokens")
    return Generation(id, prompt, stream is True, parameters)


def _single(given: Any) -> Any:
    """Triton takes a list of one element for that element."""
    return given[0] if isinstance(given, list) and len(given) == 1 else given


def _sampling(given: Any) -> dict[str, Any]:
    """As Triton's backend for vLLM takes them. Raises Invalid."""
    what, param = "`sampling_parameters`", "sampling_parameters"
    if not isinstance(given, str):
        raise Invalid(f"{what} must be one string that holds a JSON object.", param=param)
    json = given.encode()
    require_values(what, json, param=param)
    return decoded(_FIELDS, json, what=what, param=param)


def _words(name: str, value: Any) -> list[str]:
    """Some as TensorRT-LLM's backend takes them, whose clients send an empty string for none; engines refuse that."""
    words = [value or ""] if isinstance(value, str | None) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise Invalid(f"`{name}` must be a string or a list of strings.", param=name)
    return [word for word in words if word]


def _number(name: str, value: Any) -> Any:
    """Triton's clients send numbers as strings now and then; engines want them as numbers."""
    kind = NUMBERS.get(RENAMED.get(name, name))
    if kind is not None and value is not None:
        try:
            value = msgspec.convert(value, kind, strict=False)
        except msgspec.ValidationError:
            raise Invalid(f"`{name}` must be a number.", param=name) from None
    if isinstance(value, float) and not math.isfinite(value):
        raise Invalid(f"`{quoted(name)}` must be a finite number.", param=quoted(name))
    return value


#: As OpenAI's routes have it.
TOKENS_OUT_MAX = 2**31

NUMBERS: Mapping[str, type] = MappingProxyType(
    {
        **dict.fromkeys(("max_tokens", "min_tokens", "seed", "top_k"), int),
        **dict.fromkeys(("temperature", "top_p", "min_p"), float),
        **dict.fromkeys(("presence_penalty", "frequency_penalty", "repetition_penalty"), float),
    }
)
WORDS = frozenset({"bad_words", "stop_words"})
#: As TensorRT-LLM's backend calls them.
RENAMED: Mapping[str, str] = MappingProxyType({"stop_words": "stop", "random_seed": "seed"})
#: Triton's own, about how a request is handled and not about what is generated.
OURS = (
    *("triton_enable_empty_final_response", "binary_data_output", "timeout", "priority"),
    *("sequence_id", "sequence_start", "sequence_end"),
)
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "model": "the model is named by the request's path, or model_name",
        "prompt": "the prompt is `text_input`",
        "stream_options": "usage is recorded by the gateway",
        "n": "one `text_output` is made for a request",
        "best_of": "one `text_output` is made for a request",
    }
)


class _Choice(msgspec.Struct):
    text: str | None = None
    finish_reason: str | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice] = []


_FIELDS = msgspec.json.Decoder(dict[str, Any])
_COMPLETION = msgspec.json.Decoder(_Completion)
