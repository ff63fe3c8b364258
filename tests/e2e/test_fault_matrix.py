"""Each of the emulator's faults, on every route, by both SDKs: an error that the SDK raises, and never a clean end.

What the rules here leave open is in fault_matrix.md, the table of the run, which must be that of this run too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtests.emulator import Entry, Kind
from loadtests.emulator.fault import When, parse
from tests.e2e.emulated import emulating
from tests.e2e.faults import ALONE, CALL_S_MAX, FAULTS, Case, Outcome, Run, by_node, by_python, running, table

TABLE = Path(__file__).parent / "fault_matrix.md"
GRACE_S = 30.0
"""A generous bound, on a machine that has other things to do."""

#: Faults after which all of the answer is there, as a stream and in one piece; its client gets it whole.
WHOLE = {
    True: {Kind.slow_head, Kind.surplus, Kind.long_length, Kind.open_end},
    False: {Kind.slow_head, Kind.surplus, Kind.not_streamed},
}
#: Nothing of an answer had come: another replica may be asked.
UNBEGUN = {Kind.close, Kind.reset, Kind.not_http, Kind.endless_head, Kind.cut_head}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with running(tmp_path_factory.mktemp("matrix")) as run:
        yield run


def must(case: Case, outcome: Outcome) -> bool:
    """Whether it ended as it may."""
    kind = parse(case.fault).kind
    if kind in WHOLE[case.stream]:
        return str(outcome) == "whole"
    if kind is Kind.not_utf8 and outcome.raised is None:
        return str(outcome) == "whole, a token spoiled"
    if case.model != "alone" and str(outcome) == "the other replica":
        return kind not in (Kind.hang, Kind.not_json, Kind.error_event, Kind.undone) and "@2" not in case.fault
    return outcome.raised is not None


def test_an_answer_that_is_not_whole_ends_in_an_error_that_the_sdk_raises(run: Run) -> None:
    asked = [(who, case, outcome) for who, outcomes in run.outcomes.items() for case, outcome in outcomes.items()]
    assert len(asked) == 3 * len(FAULTS) * 2 * 3
    assert [(who, case, outcome) for who, case, outcome in asked if not must(case, outcome)] == []


def test_an_error_before_the_first_byte_has_a_true_status(run: Run) -> None:
    for outcomes in run.outcomes.values():
        for case, outcome in outcomes.items():
            if outcome.raised is not None and (parse(case.fault).kind.when is When.before or not case.stream):
                assert outcome.status in (429, 500, 502, 504) or outcome.raised == "UnicodeDecodeError", (case, outcome)


def test_before_the_first_byte_another_replica_answers(run: Run) -> None:
    met = {case: outcome for case, outcome in run.outcomes["paired"].items() if parse(case.fault).kind in UNBEGUN}
    assert len(met) == len(UNBEGUN) * 2 * 3
    assert {str(outcome) for outcome in met.values()} == {"the other replica"}


def test_none_takes_longer_than_a_call_may(run: Run) -> None:
    slowest = max(outcome.seconds for outcomes in run.outcomes.values() for outcome in outcomes.values())
    assert slowest < CALL_S_MAX + GRACE_S


def test_the_ledger_agrees_with_what_the_engine_wrote(run: Run) -> None:
    """Wherever the engine's own counts were delivered: with every chunk of a chat or a completion, with the end of all
    else. What was cut short before that is estimated, and says so."""
    records = run.gateway.records(run.tenant)
    assert len(records) == sum(map(len, run.outcomes.values()))
    written: dict[str, list[Entry]] = {}
    for entry in run.emulation.entries():
        written.setdefault(entry.id, []).append(entry)
    assert written.keys() <= records.keys()
    exact = 0
    for id, entries in written.items():
        record = records[id]
        (entry,) = entries[-1:]
        assert all(not earlier.tokens for earlier in entries[:-1]), "sent again after a token"
        if record["replica"].endswith("-1") or record["estimated"] or not record["tokens_in"]:
            continue  # answered by another; or estimated; or nothing was delivered
        exact += 1
        assert (record["tokens_in"], record["tokens_out"]) == (entry.prompt_tokens, entry.tokens), (record, entry)
    assert exact > len(ALONE) / 4


def test_the_table_is_that_of_this_run(run: Run) -> None:
    assert TABLE.read_text() == table(run.outcomes), "run `make faults`, and look at what has changed"


async def test_without_a_gateway_the_same_faults_end_cleanly(tmp_path: Path) -> None:
    """So what finds no clean end above would see one."""
    faults = ("not-streamed", "undone@2", "not-sse@2", "error-event@2")
    cases = [case for case in ALONE if case.fault in faults]
    with emulating(tmp_path, "--tokens", "4") as emulation:
        outcomes = (
            await by_python(f"{emulation.url}/v1", "any", cases),
            await by_node(f"{emulation.url}/v1", "any", cases),
        )
    for by_sdk in outcomes:
        lies = {case.fault for case, outcome in by_sdk.items() if not must(case, outcome)}
        assert lies == set(faults), by_sdk
