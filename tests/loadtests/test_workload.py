"""What is asked, by whom, and who leaves: left to chance, and the same for the same seed."""

import itertools
from collections import Counter

import msgspec
import pytest

from loadtests.arrivals import TraceLine
from loadtests.scenario import Ask, Cancels, Scenario, Tenant, Words
from loadtests.target import Access, parse
from loadtests.workload import BLOCK_WORDS, Call, block, calls, traced

MANY = 4_000


def test_two_draws_of_a_scenario_are_the_same_and_another_seed_is_not() -> None:
    first, again, other = (
        drawn(prompt_words=Words(median=20), cancels=Cancels(share=0.5), stream=True, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_the_warm_up_asks_something_else() -> None:
    assert drawn(prompt_words=Words(median=20))[0] != drawn(prompt_words=Words(median=20), part="warm-up")[0]


def test_a_scenario_without_variety_asks_always_the_same() -> None:
    assert len({call.wire for call in drawn()}) == 1


def test_tenants_and_kinds_come_by_their_weights_each_tenant_with_its_key() -> None:
    tenants = (Tenant("loud", weight=3), Tenant("quiet"))
    mix = (Ask(model="big", weight=1), Ask(model="small", weight=4, stream=True))
    made = drawn(tenants=tenants, mix=mix, access=Access(keys={"loud": "l", "quiet": "q"}))
    by_tenant = Counter(call.tenant for call in made)
    by_model = Counter(str(msgspec.json.decode(call.wire.partition(b"\r\n\r\n")[2])["model"]) for call in made)
    assert by_tenant["loud"] / MANY == pytest.approx(0.75, abs=0.05)
    assert by_model["small"] / MANY == pytest.approx(0.8, abs=0.05)
    for call in made:
        assert b"authorization: Bearer " + call.tenant[:1].encode() in call.wire


def test_prompts_have_the_lengths_they_were_told() -> None:
    made = drawn(prompt_words=Words(median=50, sigma=1.0, most=300))
    lengths = sorted(len(prompt(call).split()) for call in made)
    assert lengths[MANY // 2] == pytest.approx(50, abs=5)
    assert lengths[-1] == 300


def test_so_many_leave_some_early_and_some_amid_the_stream() -> None:
    made = drawn(stream=True, cancels=Cancels(share=0.4, early=0.25, wait_s_max=0.1, chunks_max=7))
    early = [call.leaves_after_s for call in made if call.leaves_after_s is not None]
    amid = [call.leaves_after_chunks for call in made if call.leaves_after_chunks is not None]
    assert (len(early) + len(amid)) / MANY == pytest.approx(0.4, abs=0.05)
    assert len(early) / MANY == pytest.approx(0.1, abs=0.03)
    assert max(early) <= 0.1
    assert set(amid) == set(range(1, 8))


def test_traced_prompts_are_as_long_and_as_alike_as_the_trace_says() -> None:
    one, other = (
        traced(TraceLine(timestamp=0, input_length=BLOCK_WORDS + 40, output_length=1, hash_ids=ids), block).split()
        for ids in ((1, 2), (1, 3))
    )
    assert len(one) == len(other) == BLOCK_WORDS + 40
    assert one[:BLOCK_WORDS] == other[:BLOCK_WORDS]
    assert one[BLOCK_WORDS:] != other[BLOCK_WORDS:]


def test_a_traced_prompt_without_hashes_is_as_long_all_the_same() -> None:
    assert len(traced(TraceLine(timestamp=0, input_length=7, output_length=1), block).split()) == 7


def drawn(*, part: str = "measured", access: Access = Access(), **fields: object) -> list[Call]:  # noqa: B008 - frozen
    scenario = Scenario(**{"about": "", "model": "m", **fields})  # type: ignore[arg-type]
    return list(itertools.islice(calls(scenario, parse("http://localhost"), access, duration_s=1, part=part), MANY))


def prompt(call: Call) -> str:
    body = msgspec.json.decode(call.wire.partition(b"\r\n\r\n")[2])
    return str(body["messages"][0]["content"])
