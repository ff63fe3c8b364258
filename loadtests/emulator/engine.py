"""What engine is emulated, chosen by `kind` in a TOML file: how long answers are, and when each token is due."""

from __future__ import annotations

import itertools
import math
import random
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple, Protocol

import msgspec
from msgspec import Meta

from loadtests.emulator.recording import RecordingFault, read

SHIPPED = Path(__file__).parent / "engines"

Seconds = Annotated[float, Meta(ge=0, le=3_600)]
Tokens = Annotated[int, Meta(ge=1, le=1_000_000)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
Rate = Annotated[float, Meta(gt=0, le=1e9)]


class EngineFault(Exception):
    """The engine can't be used; the message names the file and the field."""


class Plan(NamedTuple):
    """What one call gets, whatever else is under way."""

    tokens: int
    """Of each choice, unless the request says otherwise."""
    waits_s: Iterator[float]
    """Before the first token and before each further one, without end."""


class Planner(Protocol):
    """Plans calls by their number: the same ones for the same seed."""

    def __call__(self, number: int, /) -> Plan: ...


class Pace(msgspec.Struct, tag="pace", tag_field="kind", frozen=True, forbid_unknown_fields=True):
    """Every call alike. Zeros are as fast as it can be written."""

    first_token_s: Seconds = 0.0
    """From the request to the first token; an answer that is not streamed takes as long as one that is."""
    token_s: Seconds = 0.0
    """From each token to the next."""
    tokens: Tokens = 16

    @property
    def instant(self) -> bool:
        return self.first_token_s == self.token_s == 0

    def planner(self) -> Planner:
        return lambda _: Plan(self.tokens, itertools.chain((self.first_token_s,), itertools.repeat(self.token_s)))


class Spread(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A lognormal distribution: half are below the median, most near it, a few far above."""

    median_s: Annotated[float, Meta(gt=0, le=3_600)]
    sigma: Annotated[float, Meta(ge=0, le=3)] = 0.0
    """Of the logarithm: two thirds are within a factor of e to the sigma."""

    def draw(self, chance: random.Random) -> float:
        return chance.lognormvariate(math.log(self.median_s), self.sigma)


class Lognormal(msgspec.Struct, tag="lognormal", tag_field="kind", frozen=True, forbid_unknown_fields=True):
    """Times vary at random."""

    first_token: Spread
    token: Spread
    tokens: Tokens = 16
    seed: int = 1

    def planner(self) -> Planner:
        def plan(number: int) -> Plan:
            # A chance of its own for each call: what it gets does not depend on how calls overlap.
            chance = random.Random(self.seed << 32 | number)  # noqa: S311 - repeatable is what it must be
            gaps_s = (self.token.draw(chance) for _ in itertools.count())
            return Plan(self.tokens, itertools.chain((self.first_token.draw(chance),), gaps_s))

        return plan


class Replay(msgspec.Struct, tag="replay", tag_field="kind", frozen=True, forbid_unknown_fields=True):
    """The times of a real engine, as `headrace-load record` wrote them down: the calls in turn, again and again."""

    recording: str
    """The file; one of the shipped, or a path."""

    def planner(self) -> Planner:
        """Raises EngineFault if the recording can't be read."""
        path = SHIPPED / self.recording
        try:
            calls = read(path if path.exists() else Path(self.recording))
        except RecordingFault as fault:
            raise EngineFault(str(fault)) from None

        def plan(number: int) -> Plan:
            call = calls[number % len(calls)]
            gaps_s = itertools.cycle(call.gaps_s or (0.0,))
            return Plan(len(call.gaps_s) + 1, itertools.chain((call.first_token_s,), gaps_s))

        return plan


class Batching(msgspec.Struct, tag="batching", tag_field="kind", frozen=True, forbid_unknown_fields=True):
    """Calls that share an engine, as they share vLLM: it works in steps, in each of which every running call gets a
    token and waiting prompts are read. A step takes `step_s`, and what its prompts and calls take at their rates."""

    prefill_tokens_per_s: Rate
    decode_tokens_per_s: Rate
    """Of all running calls together, were there no `step_s`."""
    step_s: Annotated[float, Meta(ge=0, le=60)] = 0.0
    tokens: Tokens = 128
    max_num_seqs: Count = 16
    """Choices that run at once; further calls wait."""
    max_num_batched_tokens: Count = 2_048
    """Of prompts, read in one step."""
    block_tokens: Annotated[int, Meta(ge=1, le=1_024)] = 16
    kv_blocks: Count = 4_096
    """Room for the tokens of running calls; and as many blocks of prompts are remembered by the prefix cache."""


Engine = Pace | Lognormal | Replay | Batching


def load(name: str) -> Engine:
    """A shipped engine by its name, or a TOML file by its path. Raises EngineFault."""
    path = Path(name) if name.endswith(".toml") else SHIPPED / f"{name}.toml"
    try:
        engine: Engine = msgspec.convert(tomllib.loads(path.read_text()), Engine)
        return engine
    except FileNotFoundError:
        raise EngineFault(
            f"there is no engine {name!r}; name a .toml file, or one of: {', '.join(shipped())}"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise EngineFault(f"engine {path} can't be read: {error}") from None
    except msgspec.ValidationError as error:
        raise EngineFault(f"engine {name}: {str(error).replace('$.', '')}") from None


def shipped() -> list[str]:
    """Names of the engines that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))
