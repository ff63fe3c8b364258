"""What a request asks for. Only what matters is decoded: of a prompt, no more than its length is ever used."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from loadtests.emulator.dialect import WORD, Route
from loadtests.emulator.fault import Fault, FaultError, parse

BYTES_A_TOKEN = 4
"""Of the prompt as it stands in the request, JSON's own included: no tokenizer's count, yet always the same."""
TOKENS_MAX = 1_000_000


class Refused(Exception):
    """The request can't be answered; the message says why."""


class Ask(msgspec.Struct, frozen=True):
    """A well-formed request to generate."""

    route: Route
    model: str
    stream: bool
    usage: bool
    usage_each: bool
    choices: int
    """`n` of each prompt."""
    tokens_max: int | None
    ignore_eos: bool
    """The answer is `tokens_max` long, whatever is usual (vLLM's)."""
    prompt: bytes
    """As it stands in the request."""
    prompt_tokens: int
    salt: str
    """Calls share a cached prefix only if they share this (vLLM's `cache_salt`)."""
    word: bytes
    """Each token's text, as it stands in JSON."""
    fault: Fault | None

    def tokens(self, usual: int) -> int:
        """How many the answer has, of each choice, where it would usually have so many."""
        if self.tokens_max is None:
            return usual
        return self.tokens_max if self.ignore_eos else min(usual, self.tokens_max)


def read(path: bytes, body: bytes) -> Ask | None:
    """None if the path is not one that generates. Raises Refused."""
    route = ROUTES.get(path)
    if route is None:
        return None
    try:
        asked = BODY.decode(body)
        fault = parse(asked.emulate.fault) if asked.emulate.fault else None
        prompts = _prompts(asked.prompt) if route is Route.completions else 1
    except (msgspec.DecodeError, RecursionError, FaultError) as error:
        raise Refused(f"the body can't be taken: {error}") from None
    prompt = {Route.chat: asked.messages, Route.completions: asked.prompt, Route.responses: asked.input}[route]
    if not prompt:
        raise Refused(f"the body has no {PROMPT_FIELDS[route]}")
    if asked.n and route is Route.responses:
        raise Refused("there is no `n` in responses")
    options = asked.stream_options or _StreamOptions()
    limits = (asked.max_completion_tokens, asked.max_tokens, asked.max_output_tokens)
    usage = bool(options.include_usage)
    return Ask(
        route=route,
        model=asked.model,
        stream=bool(asked.stream),
        usage=usage,
        usage_each=usage and bool(options.continuous_usage_stats),
        choices=(asked.n or 1) * prompts,
        tokens_max=next((limit for limit in limits if limit is not None), None),
        ignore_eos=bool(asked.ignore_eos),
        prompt=bytes(prompt),
        prompt_tokens=len(memoryview(prompt)) // BYTES_A_TOKEN + 1,
        salt=asked.cache_salt or "",
        word=WORD if asked.emulate.word is None else msgspec.json.encode(asked.emulate.word)[1:-1],
        fault=fault,
    )


def _prompts(raw: msgspec.Raw) -> int:
    """How many: completions take a text, texts, or either as lists of token ids."""
    if not raw:
        return 1
    prompts = PROMPTS.decode(raw)
    return len(prompts) if isinstance(prompts, list) and not isinstance(prompts[0], int) else 1


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class _Emulate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is asked of the emulator itself, in the field `emulate`."""

    fault: str | None = None
    """A fault this call is to meet, e.g. `rst@3`."""
    word: Annotated[str, Meta(min_length=1, max_length=1024)] | None = None
    """The text of every token: a canary."""


Count = Annotated[int, Meta(ge=1, le=TOKENS_MAX)]


class _Body(msgspec.Struct):
    model: str
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    max_output_tokens: Count | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    ignore_eos: bool | None = None
    cache_salt: str | None = None
    emulate: _Emulate = _Emulate()


BODY = msgspec.json.Decoder(_Body)
PROMPTS = msgspec.json.Decoder(str | Annotated[list[int | str | list[int]], Meta(min_length=1, max_length=2048)])
ROUTES = {route.encode(): route for route in Route}
PROMPT_FIELDS = {Route.chat: "messages", Route.completions: "prompt", Route.responses: "input"}
