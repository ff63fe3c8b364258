"""What an engine says it used, and what is assumed where it does not say."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from gateway.call import NULL, Call
from gateway.failure import UNREADABLE, given

#: What can be a number of tokens: far above any context there is, far below where sums of them overflow a database.
TOKENS_MAX = 10**9
Tokens = Annotated[int, Meta(ge=0, le=TOKENS_MAX)]


class Details(msgspec.Struct):
    cached_tokens: Tokens | None = None


class Counts(msgspec.Struct):
    """Usage as chat and completions name it, and as responses and messages do."""

    prompt_tokens: Tokens | None = None
    completion_tokens: Tokens | None = None
    prompt_tokens_details: Details | None = None
    input_tokens: Tokens | None = None
    output_tokens: Tokens | None = None
    input_tokens_details: Details | None = None
    cache_read_input_tokens: Tokens | None = None
    cache_creation_input_tokens: Tokens | None = None

    @property
    def tokens_in(self) -> int | None:
        if self.input_tokens is None:
            return self.prompt_tokens
        # Anthropic counts what came out of the cache, or went into it, apart from the rest.
        return self.input_tokens + (self.cache_read_input_tokens or 0) + (self.cache_creation_input_tokens or 0)

    @property
    def tokens_out(self) -> int | None:
        return self.completion_tokens if self.output_tokens is None else self.output_tokens

    @property
    def tokens_cached(self) -> int | None:
        details = self.prompt_tokens_details or self.input_tokens_details
        return self.cache_read_input_tokens if details is None else details.cached_tokens


COUNTS = msgspec.json.Decoder(Counts)


def said(usage: msgspec.Raw) -> Counts | None:
    """The engine's counts; None if it says none, or none that can be true."""
    if not given(usage):
        return None
    try:
        counts = COUNTS.decode(usage)
    except UNREADABLE:
        return None
    return None if counts.tokens_in is None and counts.tokens_out is None else counts


def count(call: Call, usage: Counts) -> None:
    """Usage so far, never added up: every mention replaces the one before it."""
    call.estimated = False
    if (tokens_in := usage.tokens_in) is not None:
        call.tokens_in = tokens_in
    if (tokens_out := usage.tokens_out) is not None:
        call.tokens_out = tokens_out
    if (tokens_cached := usage.tokens_cached) is not None:
        call.tokens_cached = tokens_cached


def estimate(call: Call, tokens_out: int) -> None:
    """So many tokens more, but never more in all than the call could have been given."""
    call.estimated = True
    call.tokens_in = call.tokens_in or call.tokens_in_estimate
    if call.tokens_out_max is not None:
        tokens_out = min(tokens_out, max(call.tokens_out_max * call.choices - call.tokens_out, 0))
    call.tokens_out += tokens_out


class Lists(msgspec.Struct):
    """All that a call may give a pooling model in any number."""

    input: msgspec.Raw = NULL
    query: msgspec.Raw = NULL
    queries: msgspec.Raw = NULL
    documents: msgspec.Raw = NULL
    text_1: msgspec.Raw = NULL
    text_2: msgspec.Raw = NULL


LISTS = msgspec.json.Decoder(Lists)
ENTRIES = msgspec.json.Decoder(list[msgspec.Raw])


def entries(body: bytes) -> int:
    """How many texts, or lists of token ids, a body gives a pooling model that has taken it."""
    return sum(_entries(given) for given in msgspec.structs.astuple(LISTS.decode(body)) if given != NULL)


def _entries(given: msgspec.Raw) -> int:
    if bytes(given)[:1] != b"[":
        return 1
    found = ENTRIES.decode(given)
    return 1 if found and bytes(found[0])[:1].isdigit() else len(found)
