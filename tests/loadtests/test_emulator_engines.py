"""The engines that can be emulated: when their tokens are due, what their caches remember."""

import itertools
import json
import math
import statistics
from pathlib import Path

import pytest

from loadtests.emulator import Emulator, EngineFault, Pace, serving
from loadtests.emulator.engine import Batching, Lognormal, Plan, Replay, Spread, load, shipped
from loadtests.emulator.prefix import PrefixCache
from loadtests.emulator.recorder import record
from loadtests.emulator.recording import Recorded, RecordingFault, read, write
from loadtests.emulator.scheduler import Scheduler, Sequence
from loadtests.target import parse
from tests.fakes import until
from tests.loadtests.wire import connect, exchange, request

BATCHING = Batching(prefill_tokens_per_s=1_000, decode_tokens_per_s=100, step_s=0.01, tokens=4, max_num_seqs=2)


def waits_s(plan: Plan, count: int) -> list[float]:
    return list(itertools.islice(plan.waits_s, count))


# ---- each call by itself -----------------------------------------------------------------------------------


def test_lognormal_times_have_their_median_and_spread() -> None:
    engine = Lognormal(first_token=Spread(0.2, 0.5), token=Spread(0.03, 0.2))
    plans = [waits_s(engine.planner()(number), 5) for number in range(4_000)]
    firsts, gaps = [plan[0] for plan in plans], [gap for plan in plans for gap in plan[1:]]
    assert statistics.median(firsts) == pytest.approx(0.2, rel=0.05)
    assert statistics.median(gaps) == pytest.approx(0.03, rel=0.05)
    assert statistics.stdev(map(math.log, firsts)) == pytest.approx(0.5, rel=0.05)
    assert statistics.stdev(map(math.log, gaps)) == pytest.approx(0.2, rel=0.05)


def test_the_same_call_of_the_same_seed_takes_the_same_times() -> None:
    engine, other = (Lognormal(first_token=Spread(1, 1), token=Spread(1, 1), seed=seed) for seed in (1, 2))
    assert waits_s(engine.planner()(7), 9) == waits_s(engine.planner()(7), 9)
    assert waits_s(engine.planner()(7), 9) != waits_s(engine.planner()(8), 9)
    assert waits_s(engine.planner()(7), 9) != waits_s(other.planner()(7), 9)


def test_a_recording_is_replayed_call_by_call(tmp_path: Path) -> None:
    calls = [Recorded(9, 0.5, (0.1, 0.2)), Recorded(9, 0.7, ())]
    write(tmp_path / "r", calls)
    assert read(tmp_path / "r") == calls
    planner = Replay(recording=str(tmp_path / "r")).planner()
    assert [planner(number).tokens for number in range(3)] == [3, 1, 3]
    assert waits_s(planner(0), 5) == [0.5, 0.1, 0.2, 0.1, 0.2]
    assert waits_s(planner(1), 2) == [0.7, 0.0]


async def test_an_emulator_can_be_recorded_and_replayed(tmp_path: Path) -> None:
    async with serving(Emulator(Pace(first_token_s=0.02, token_s=0.01, tokens=3)), f"unix:{tmp_path}/s") as address:
        calls = await record(parse(address), model="m", key=None, calls=5, concurrent=2, tokens=3)
    assert [len(call.gaps_s) for call in calls] == [2] * 5
    assert all(call.first_token_s > 0.018 and call.prompt_tokens > 10 for call in calls)
    write(tmp_path / "r", calls)
    async with serving(Emulator(Replay(recording=str(tmp_path / "r"))), "127.0.0.1:0") as address:
        seen = await exchange(address, request(stream=True), until=b"[DONE]")
    assert seen.body.count(b" water") == 3


async def test_a_recording_of_what_fails_says_so(tmp_path: Path) -> None:
    with pytest.raises(RecordingFault, match="unix:/nobody"):
        await record(parse("unix:/nobody"), model="m", key=None, calls=1, concurrent=1, tokens=1)
    async with serving(Emulator(Pace()), "127.0.0.1:0") as address:
        with pytest.raises(RecordingFault, match="it answered 400"):
            await record(parse(address), model="m", key=None, calls=1, concurrent=1, tokens=0)


@pytest.mark.parametrize("name", shipped())
async def test_every_shipped_engine_answers(name: str) -> None:
    emulator = Emulator(load(name))
    async with serving(emulator, "127.0.0.1:0") as address:
        reader, writer = await connect(address)
        writer.write(request(stream=True, max_tokens=1))
        assert b"[DONE]" in await reader.readuntil(b"0\r\n\r\n")
        writer.close()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('kind = "steam"', "steam"),
        ('kind = "pace"\ntoken_s = -1', "token_s"),
        ('kind = "pace"\nspeed = 1', "speed"),
        ('kind = "lognormal"\nfirst_token = { median_s = 0 }\ntoken = { median_s = 1 }', "first_token.median_s"),
        ("kind = ", "can't be read"),
    ],
)
def test_a_wrong_engine_is_refused_by_its_field(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "e.toml").write_text(text)
    with pytest.raises(EngineFault, match=said):
        load(str(tmp_path / "e.toml"))


def test_an_engine_or_a_recording_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineFault, match="no engine 'steam'"):
        load("steam")
    with pytest.raises(EngineFault, match="nowhere"):
        Emulator(Replay(recording="/nowhere"))
    (tmp_path / "empty").touch()
    with pytest.raises(EngineFault, match="no calls in it"):
        Emulator(Replay(recording=str(tmp_path / "empty")))


# ---- calls that share an engine ----------------------------------------------------------------------------


def sequence(
    *, prompt_tokens: int = 100, tokens: int = 4, choices: int = 1, prompt: bytes = b"", salt: str = ""
) -> Sequence:
    return Sequence(prompt=prompt, prompt_tokens=prompt_tokens, salt=salt, choices=choices, tokens=tokens)


def test_a_step_takes_what_its_prompts_and_its_calls_take() -> None:
    scheduler = Scheduler(BATCHING)
    first, second = sequence(), sequence()
    scheduler.add(first)
    durations_s = [step.duration_s for _ in range(2) if (step := scheduler.step())]
    scheduler.add(second)
    durations_s += [step.duration_s for _ in range(4) if (step := scheduler.step())]
    # The first's prompt; a token of it; the second's prompt beside one; both; the second alone, twice.
    assert durations_s == pytest.approx([0.11, 0.02, 0.12, 0.03, 0.02, 0.02])
    assert scheduler.step() is None


def test_calls_wait_for_a_seat_in_the_order_they_came() -> None:
    scheduler = Scheduler(BATCHING)
    calls = [sequence(tokens=2) for _ in range(5)]
    for call in calls:
        scheduler.add(call)
    given = [step.given for _ in range(6) if (step := scheduler.step())]
    assert given == [calls[:2], calls[:2], calls[2:4], calls[2:4], calls[4:], calls[4:]]


def test_every_choice_takes_a_seat_and_too_many_run_alone() -> None:
    scheduler = Scheduler(BATCHING)
    wide, narrow = sequence(choices=3, tokens=1), sequence(tokens=1)
    scheduler.add(wide)
    scheduler.add(narrow)
    assert [step.given for _ in range(2) if (step := scheduler.step())] == [[wide], [narrow]]


def test_a_long_prompt_is_read_in_several_steps_beside_running_calls() -> None:
    scheduler = Scheduler(Batching(prefill_tokens_per_s=1_000, decode_tokens_per_s=100, max_num_batched_tokens=64))
    running, long = sequence(prompt_tokens=10, tokens=9), sequence(prompt_tokens=150, tokens=9)
    scheduler.add(running)
    scheduler.add(long)
    given = [step.given for _ in range(4) if (step := scheduler.step())]
    assert given == [[running], [running], [running, long], [running, long]]


def test_a_call_waits_for_room_in_the_kv_cache() -> None:
    scheduler = Scheduler(Batching(prefill_tokens_per_s=1_000, decode_tokens_per_s=100, kv_blocks=10))
    first, second = sequence(prompt_tokens=90, tokens=10), sequence(prompt_tokens=90, tokens=1)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.step()
    assert (scheduler.blocks, len(scheduler.waiting)) == (7, 1)
    scheduler.drop(first)
    step = scheduler.step()
    assert step is not None and step.given == [second]


def test_a_call_that_is_dropped_gives_up_its_seat_or_its_turn() -> None:
    scheduler = Scheduler(BATCHING)
    calls = [sequence() for _ in range(4)]
    for call in calls:
        scheduler.add(call)
    scheduler.step()
    for gone in (calls[0], calls[2], calls[0]):
        scheduler.drop(gone)
    step = scheduler.step()
    assert step is not None and step.given == [calls[1], calls[3]]


def test_a_prefix_is_found_again_in_whole_blocks() -> None:
    cache = PrefixCache(blocks=100, block_tokens=4)  # blocks of 16 bytes
    assert cache.look_up(b"a" * 40, "") == 0
    cache.store(b"a" * 40, "")
    assert cache.look_up(b"a" * 40, "") == 8
    assert cache.look_up(b"a" * 20 + b"b" * 20, "") == 4
    assert cache.look_up(b"b" * 40, "") == 0
    assert (cache.queried_tokens, cache.hit_tokens) == (44, 12)


def test_a_prefix_is_not_found_by_those_who_do_not_share_its_salt() -> None:
    cache = PrefixCache(blocks=100, block_tokens=4)
    cache.store(b"a" * 40, "tenant-1")
    assert [cache.look_up(b"a" * 40, salt) for salt in ("tenant-1", "tenant-2", "")] == [8, 0, 0]


def test_the_cache_keeps_the_blocks_used_last_and_no_more() -> None:
    cache = PrefixCache(blocks=4, block_tokens=4)
    cache.store(b"a" * 32, "")
    cache.store(b"b" * 32, "")
    assert cache.look_up(b"a" * 32, "") == 8
    cache.store(b"c" * 32, "")
    assert [cache.look_up(letter * 32, "") for letter in (b"a", b"b", b"c")] == [8, 0, 8]
    assert len(cache) == 4


async def test_a_cached_prefix_is_in_the_usage_of_every_route() -> None:
    engine = Batching(prefill_tokens_per_s=1e6, decode_tokens_per_s=1e6, tokens=2)
    prompt = "a" * 1_000
    said = {
        "messages": [{"role": "user", "content": prompt}],
        "prompt": prompt,
        "input": prompt,
        "stream_options": {"include_usage": True},
    }

    async def cached(path: str, salt: str, *, stream: bool = False) -> int:
        seen = await exchange(address, request(path, cache_salt=salt, stream=stream, **said))
        usage = json.loads(seen.events[-2] if stream else seen.body)["usage"]
        return int(usage["input_tokens_details" if "responses" in path else "prompt_tokens_details"]["cached_tokens"])

    async with serving(Emulator(engine), "127.0.0.1:0") as address:
        # A chat's messages are a little longer than the prompt in them.
        for path, tokens in (("/v1/chat/completions", 256), ("/v1/completions", 240), ("/v1/responses", 240)):
            found = [await cached(path, salt) for salt in (path, path, f"other {path}")]
            assert found == [0, tokens, 0]
        assert await cached("/v1/completions", "/v1/completions", stream=True) == 240


async def test_an_engines_running_waiting_and_cache_are_in_its_metrics() -> None:
    engine = Batching(prefill_tokens_per_s=1e6, decode_tokens_per_s=1, tokens=9, max_num_seqs=1, kv_blocks=10)
    emulator = Emulator(engine)
    async with serving(emulator, "127.0.0.1:0") as address:
        reader, writer = await connect(address)
        writer.write(request(stream=True))
        await reader.readuntil(b" water")
        _, waiting = await connect(address)
        waiting.write(request(stream=True))
        await until(lambda: emulator.calls == 2)
        text = (await exchange(address, b"GET /metrics HTTP/1.1\r\n\r\n")).body.decode()
        for said in ("num_requests_running{} 1", "num_requests_waiting{} 1", "kv_cache_usage_perc{} 0.2"):
            assert said.replace("{}", '{engine="0",model_name="emulated"}') in text
        writer.close()
        waiting.close()
        await until(lambda: emulator.aborted == 2)
    assert emulator.pacer.waiting == 0
