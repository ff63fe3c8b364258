import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from runtimes.artifact import Shelf, seal
from runtimes.contract import Expired, InferReply, InferRequest, Invalid, Load, Overloaded, Site, Unavailable
from runtimes.onnx import Onnx, OnnxRuntime
from runtimes.session import Session
from runtimes.text import CHARS_PER_TOKEN, CHARS_PER_TOKEN_MAX, PIECE_CHARS
from tests import tiny
from tests.fakes import FakeClock, until

DEADLINE_S = 1_060.0
LONG = ["card " * (PIECE_CHARS // 5)] * 6
"""Texts each of which is a piece of its own."""


class Gate:
    """Holds every batch before it goes through the graph, until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[int] = []
        """Rows of those that came here."""
        self._turns = threading.Semaphore(0)
        run = Session.run

        def held(session: Session, contents: Sequence[Any]) -> dict[str, Any]:
            self.batches.append(len(contents))
            assert self._turns.acquire(timeout=10)
            return run(session, contents)

        monkeypatch.setattr(Session, "run", held)

    def let_go(self, batches: int = 1_000) -> None:
        self._turns.release(batches)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.let_go()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    shelf = Shelf(tmp_path / "shelf")
    (tmp_path / "folder").mkdir()
    tiny.publish(shelf, tmp_path / "folder")
    return Site(model="intent", replica="intent-0", state=tmp_path, shelf=shelf)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    shelf = Shelf(tmp_path_factory.mktemp("shelf"))
    folder = tmp_path_factory.mktemp("folder")
    (folder / "model.onnx").write_bytes(tiny.graph("classify"))
    untruncated().save(str(folder / "tokenizer.json"))
    manifest = shelf.publish(folder, tiny.card("classify"))
    return Session(shelf.resolve(f"tiny@{manifest.version}"), threads=1, provider="cpu")


@asynccontextmanager
async def opened(spec: Onnx, site: Site, clock: FakeClock | None = None) -> AsyncIterator[OnnxRuntime]:
    runtime = spec.build(site, clock=clock or FakeClock())
    await runtime.open()
    try:
        yield runtime
    finally:
        await runtime.aclose()


def untruncated() -> Tokenizer:
    """The tiny tokenizer, except that `[SEP]` in a text is a token: to others, three words."""
    tokenizer = Tokenizer.from_str(json.dumps(tiny.tokenizer()))
    tokenizer.no_padding()
    tokenizer.add_special_tokens(["[SEP]"])
    return tokenizer


def texts(*rows: str, deadline_s: float = DEADLINE_S) -> InferRequest:
    return InferRequest({"text": np.array(rows, object)}, deadline_s)


def tokens(ids: Any, mask: Any) -> InferRequest:
    return InferRequest({"input_ids": np.array(ids), "attention_mask": np.array(mask)}, DEADLINE_S)


def ids_of(session: Session, *rows: str) -> list[Any]:
    return [ids for ids, _, _ in session.reading.rows({"text": np.array(rows, object)})]


@pytest.mark.parametrize("text", ["", " \n"])
def test_a_text_without_a_token_is_refused_whoever_tokenizes_it(tmp_path: Path, text: str) -> None:
    tokenizer = Tokenizer(WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = BertNormalizer(), BertPreTokenizer()
    folder, shelf = tmp_path / "folder", Shelf(tmp_path / "shelf")
    folder.mkdir()
    (folder / "model.onnx").write_bytes(tiny.graph("classify"))
    tokenizer.save(str(folder / "tokenizer.json"))
    manifest = shelf.publish(folder, tiny.card("classify"))
    session = Session(shelf.resolve(f"tiny@{manifest.version}"), threads=1, provider="cpu")
    assert [list(ids) for ids in ids_of(session, "a A")] == [[1, 1]]
    with pytest.raises(Invalid, match="without a single token"):
        ids_of(session, "a", text)


async def test_a_classifier_says_what_it_is_and_scores_each_label(site: Site) -> None:
    async with opened(Onnx(artifact="tiny"), site) as runtime:
        reply = await runtime.infer(texts("refund my money", "password"))
    assert (runtime.task, runtime.labels) == ("classify", tiny.LABELS)
    assert reply.outputs["scores"].shape == reply.outputs["logits"].shape == (2, 3)
    assert reply.outputs["scores"].dtype == np.float32
    assert [tiny.LABELS[it] for it in reply.outputs["scores"].argmax(axis=1)] == ["refund", "login"]


async def test_an_embedder_answers_vectors_of_length_one(site: Site, tmp_path: Path) -> None:
    (tmp_path / "embedder").mkdir()
    tiny.publish(site.shelf, tmp_path / "embedder", task="embed")
    async with opened(Onnx(artifact="tiny@stable"), site) as runtime:
        reply = await runtime.infer(texts("refund", "my card please"))
    assert (runtime.task, runtime.labels) == ("embed", ())
    np.testing.assert_allclose(np.linalg.norm(reply.outputs["embedding"], axis=1), 1, atol=1e-6)


async def test_an_artifact_is_also_found_as_a_folder(site: Site) -> None:
    folder = site.shelf.resolve("tiny").path
    async with opened(Onnx(artifact=str(folder)), site) as runtime:
        assert (await runtime.infer(texts("card"))).outputs["scores"].shape == (1, 3)


async def test_tokens_are_counted_without_padding_and_after_truncation(site: Site) -> None:
    async with opened(Onnx(artifact="tiny"), site) as runtime:
        assert (await runtime.infer(texts("card", "my card please"))).tokens_in == 3 + 5
        assert (await runtime.infer(texts("card " * 1_000))).tokens_in == tiny.TOKENS_MAX


async def test_ids_answer_as_their_text_does(site: Site) -> None:
    async with opened(Onnx(artifact="tiny"), site) as runtime:
        text = await runtime.infer(texts("my card", "login"))
        ids = await runtime.infer(tokens([[2, 8, 5, 3], [2, 6, 3, 0]], [[1, 1, 1, 1], [1, 1, 1, 0]]))
    np.testing.assert_allclose(ids.outputs["scores"], text.outputs["scores"], atol=1e-6)
    assert ids.tokens_in == text.tokens_in == 7


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (InferRequest({"text": np.array(["a"])}, DEADLINE_S), "text"),
        (InferRequest({"text": np.array(["a", None], object)}, DEADLINE_S), "text"),
        (InferRequest({"text": np.array([["a"]], object)}, DEADLINE_S), "text"),
        (InferRequest({"text": np.array([], object)}, DEADLINE_S), "text"),
        (tokens([[1.0]], [[1]]), "input_ids"),
        (tokens([1, 2], [1, 1]), "input_ids"),
        (tokens([[]], [[]]), "input_ids"),
        (tokens([[-1]], [[1]]), "input_ids"),
        (tokens([[len(tiny.WORDS)]], [[1]]), "input_ids"),
        (tokens([[1] * (tiny.TOKENS_MAX + 1)], [[1] * (tiny.TOKENS_MAX + 1)]), "input_ids"),
        (tokens([[1, 2]], [[1]]), "attention_mask"),
        (tokens([[1, 2]], [[0, 1]]), "attention_mask"),
        (tokens([[1, 2]], [[0, 0]]), "attention_mask"),
        (tokens([[1, 2]], [[2, 0]]), "attention_mask"),
        (tokens([[1, 2]], [[1.0, 1.0]]), "attention_mask"),
        (InferRequest({"image": np.zeros((1, 3))}, DEADLINE_S), "image"),
        (InferRequest({"text": np.array(["a"], object), "image": np.zeros((1, 3))}, DEADLINE_S), "image"),
        (InferRequest({"input_ids": np.ones((1, 1), np.int64)}, DEADLINE_S), "attention_mask"),
        (InferRequest({"text": np.array(["a"], object)}, DEADLINE_S, outputs=("scores", "mood")), "mood"),
        (InferRequest({}, DEADLINE_S), None),
    ],
)
async def test_an_input_that_does_not_fit_is_refused_by_name(
    site: Site, request_: InferRequest, param: str | None
) -> None:
    async with opened(Onnx(artifact="tiny"), site) as runtime:
        with pytest.raises(Invalid) as refused:
            await runtime.infer(request_)
        assert refused.value.param == param
        assert runtime.load() == Load(running=0, waiting=0)


async def test_the_answer_does_not_depend_on_how_rows_are_batched(site: Site) -> None:
    rows = ["my card " * size for size in (1, 20, 2, 30, 5)] + ["login", "money"] * 10
    async with opened(Onnx(artifact="tiny", batch_max=4), site) as runtime:
        together = await runtime.infer(texts(*rows))
        alone = [await runtime.infer(texts(row)) for row in rows]
    np.testing.assert_allclose(
        together.outputs["scores"], np.concatenate([it.outputs["scores"] for it in alone]), atol=1e-5
    )
    assert together.tokens_in == sum(it.tokens_in for it in alone)


ONE_BY_ONE = Onnx(artifact="tiny", batch_max=1, batches=1)


async def test_a_cancelled_call_that_waits_never_runs(site: Site, gate: Gate) -> None:
    async with opened(ONE_BY_ONE, site) as runtime:
        first = asyncio.create_task(runtime.infer(texts("card")))
        await until(lambda: runtime.load() == Load(running=1, waiting=0))
        second = asyncio.create_task(runtime.infer(texts("login")))
        await until(lambda: runtime.load() == Load(running=1, waiting=1))
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        assert runtime.load() == Load(running=1, waiting=0)
        gate.let_go()
        await first
    assert gate.batches == [1]


async def test_a_call_that_waits_past_its_deadline_never_runs(site: Site, gate: Gate) -> None:
    clock = FakeClock()
    async with opened(ONE_BY_ONE, site, clock) as runtime:
        first = asyncio.create_task(runtime.infer(texts("card")))
        await until(lambda: runtime.load().running == 1)
        late = asyncio.create_task(runtime.infer(texts("login", deadline_s=1_001.0)))
        await until(lambda: runtime.load().waiting == 1)
        clock.advance(2)
        gate.let_go()
        await first
        with pytest.raises(Expired):
            await late
        assert runtime.load() == Load(running=0, waiting=0)
    assert gate.batches == [1]


async def test_one_call_more_than_may_wait_is_refused(site: Site, gate: Gate) -> None:
    async with opened(Onnx(artifact="tiny", batch_max=1, batches=1, waiting_max=2), site) as runtime:
        first = asyncio.create_task(runtime.infer(texts("card")))
        await until(lambda: runtime.load().running == 1)
        calls = [asyncio.create_task(runtime.infer(texts("card"))) for _ in range(2)]
        await until(lambda: runtime.load() == Load(running=1, waiting=2))
        with pytest.raises(Overloaded):
            await runtime.infer(texts("card"))
        gate.let_go()
        assert all(isinstance(reply, InferReply) for reply in await asyncio.gather(first, *calls))


async def test_a_lone_call_runs_at_once_and_those_that_come_meanwhile_share_a_batch(site: Site, gate: Gate) -> None:
    async with opened(Onnx(artifact="tiny", batches=1), site) as runtime:
        first = asyncio.create_task(runtime.infer(texts("card")))
        await until(lambda: runtime.load().running == 1)
        others = [asyncio.create_task(runtime.infer(texts(*["login"] * rows))) for rows in (1, 2, 3)]
        await until(lambda: runtime.load() == Load(running=1, waiting=3))
        gate.let_go()
        replies = await asyncio.gather(first, *others)
    assert gate.batches == [1, 6]
    assert [reply.batch_rows_max for reply in replies] == [1, 6, 6, 6]
    assert [len(reply.outputs["scores"]) for reply in replies] == [1, 1, 2, 3]


async def test_a_reply_says_how_long_it_waited_and_was_computed(site: Site, gate: Gate) -> None:
    clock = FakeClock()
    async with opened(Onnx(artifact="tiny", batches=1), site, clock) as runtime:
        first = asyncio.create_task(runtime.infer(texts("card")))
        await until(lambda: runtime.load().running == 1)
        second = asyncio.create_task(runtime.infer(texts("login")))
        await until(lambda: runtime.load().waiting == 1)
        clock.advance(3)
        gate.let_go(1)
        reply = await first
        assert (reply.queue_s, reply.compute_s) == (0, 3)
        await until(lambda: len(gate.batches) == 2)
        clock.advance(4)
        gate.let_go()
        reply = await second
        assert (reply.queue_s, reply.compute_s) == (3, 4)


async def test_a_short_call_overtakes_the_rest_of_a_long_one(site: Site, gate: Gate) -> None:
    done: list[str] = []
    async with opened(ONE_BY_ONE, site) as runtime:
        long = asyncio.create_task(runtime.infer(texts(*["card"] * 20)))
        long.add_done_callback(lambda _: done.append("long"))
        await until(lambda: gate.batches == [1])
        short = asyncio.create_task(runtime.infer(texts("login")))
        short.add_done_callback(lambda _: done.append("short"))
        await until(lambda: runtime.load().waiting == 1)
        gate.let_go(3)
        await short
        assert not long.done()
        gate.let_go()
        await long
    assert done == ["short", "long"]


async def test_ten_thousand_rows_are_answered_in_their_order_and_few_of_them_wait_at_once(site: Site) -> None:
    rows = ["my card " * (at % 9) + ("refund", "card", "login")[at % 3] for at in range(10_000)]
    async with opened(Onnx(artifact="tiny", batch_max=8, batches=2), site) as runtime:
        whole = asyncio.create_task(runtime.infer(texts(*rows)))
        most = 0
        while not whole.done():
            most = max(most, runtime._batcher.waiting)
            await asyncio.sleep(0)
        alone = [(await runtime.infer(texts(row))).outputs["scores"] for row in rows[:9]]
    expected = np.concatenate(alone * 1_112)[:10_000]  # they repeat after nine
    np.testing.assert_allclose(whole.result().outputs["scores"], expected, atol=1e-5)
    assert 0 < most <= 2 * 2 * 8


@pytest.mark.parametrize("late", [False, True])
async def test_a_long_call_that_is_left_or_late_stops_at_its_next_batch(site: Site, gate: Gate, late: bool) -> None:
    clock = FakeClock()
    async with opened(ONE_BY_ONE, site, clock) as runtime:
        long = asyncio.create_task(runtime.infer(texts(*LONG, deadline_s=1_001.0)))
        await until(lambda: len(gate.batches) == 1)
        gate.let_go(1)
        await until(lambda: len(gate.batches) == 2)
        if late:
            clock.advance(2)
        else:
            long.cancel()
            await asyncio.gather(long, return_exceptions=True)
        gate.let_go()
        with pytest.raises(Expired if late else asyncio.CancelledError):
            await long
        await runtime.infer(texts("login"))
    assert len(gate.batches) == 2 + 1  # of the long one's six rows, two had their turn


async def test_a_batch_that_fails_is_run_again_call_by_call(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    run = Session.run

    def poisoned(session: Session, contents: Sequence[Any]) -> dict[str, Any]:
        answer = run(session, contents)
        if any(len(ids) == 4 for ids in contents):
            raise Invalid("these can't be computed")
        return answer

    monkeypatch.setattr(Session, "run", poisoned)
    async with opened(Onnx(artifact="tiny", batches=1), site) as runtime:
        first = asyncio.create_task(runtime.infer(texts("card")))
        await until(lambda: len(gate.batches) == 1)
        good = [asyncio.create_task(runtime.infer(texts(word))) for word in ("refund", "login")]
        bad = asyncio.create_task(runtime.infer(texts("my card")))
        await until(lambda: runtime.load().waiting == 3)
        gate.let_go()
        with pytest.raises(Invalid):
            await bad
        replies = await asyncio.gather(first, *good)
    assert [tiny.LABELS[int(it.outputs["scores"].argmax())] for it in replies] == ["card", "refund", "login"]
    assert gate.batches == [1, 3, 1, 1, 1]


async def test_a_worker_outlives_what_nobody_expected(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Session.run
    faults = iter([MemoryError("of the text `card`")])

    def failing(session: Session, contents: Sequence[Any]) -> dict[str, Any]:
        for fault in faults:
            raise fault
        return run(session, contents)

    monkeypatch.setattr(Session, "run", failing)
    async with opened(ONE_BY_ONE, site) as runtime:
        with pytest.raises(Unavailable, match=r"intent-0 failed on a batch of 1 rows \(MemoryError\)"):
            await runtime.infer(texts("card"))
        assert (await runtime.infer(texts("card"))).outputs["scores"].shape == (1, 3)


CALLS = st.tuples(
    st.lists(
        st.sampled_from(["card", "my card please", "refund " * 20, "login " * 60, "money"]), min_size=1, max_size=9
    ),
    st.sampled_from("abc"),
    st.sampled_from([False, False, True]),
)
"""Texts, whose they are, and whether their caller leaves."""


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=st.lists(CALLS, min_size=1, max_size=12), batch_max=st.sampled_from([1, 3, 16]), batches=st.integers(1, 3))
def test_together_calls_are_answered_as_each_alone(
    calls: list[tuple[list[str], str, bool]], batch_max: int, batches: int, site: Site, session: Session
) -> None:
    async def all_of_them() -> list[InferReply | BaseException]:
        async with opened(Onnx(artifact="tiny", batch_max=batch_max, batches=batches), site) as runtime:
            tasks = []
            for rows, flow, leaves in calls:
                request = InferRequest({"text": np.array(rows, object)}, DEADLINE_S, flow)
                tasks.append(asyncio.create_task(runtime.infer(request)))
                await asyncio.sleep(0)
                if leaves:
                    tasks[-1].cancel()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            assert runtime.load() == Load(running=0, waiting=0)
            return found

    for (rows, _, leaves), reply in zip(calls, asyncio.run(all_of_them()), strict=True):
        if isinstance(reply, BaseException):
            assert leaves and isinstance(reply, asyncio.CancelledError)
            continue
        alone = np.concatenate([session.run([ids])["scores"] for ids in ids_of(session, *rows)])
        np.testing.assert_allclose(reply.outputs["scores"], alone, atol=1e-5)
        assert reply.batch_rows_max <= batch_max


async def test_closing_lets_calls_under_way_finish(site: Site, gate: Gate) -> None:
    runtime = ONE_BY_ONE.build(site, clock=FakeClock())
    await runtime.open()
    call = asyncio.create_task(runtime.infer(texts("card", "login")))
    await until(lambda: runtime.load().running == 1)
    closing = asyncio.create_task(runtime.aclose())
    await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        await runtime.infer(texts("card"))
    gate.let_go()
    await closing
    assert (await call).outputs["scores"].shape == (2, 3)


async def test_cuda_that_was_asked_for_is_never_replaced_by_the_cpu(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A machine whose onnxruntime has CUDA and whose driver does not work: the library falls back with a warning.
    import onnxruntime

    runtime = Onnx(artifact="tiny", provider="cuda").build(site)
    with pytest.raises(Unavailable, match=r"headrace\[cuda\]"):
        await runtime.open()
    await runtime.aclose()
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.warns(UserWarning, match="CUDAExecutionProvider"), pytest.raises(Unavailable, match="driver"):
        await runtime.open()
    await runtime.aclose()


def changed(name: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).chmod(0o644)
        (folder / name).write_bytes(content)

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (changed("model.onnx", tiny.graph("embed")), "not the file that was published"),
        (changed("tokenizer.json", b"{}"), "not the file that was published"),
        (changed("manifest.json", b"{}"), "not a manifest"),
        (lambda folder: (folder / "model.onnx").unlink(), "missing"),
    ],
)
async def test_an_artifact_that_changed_is_not_loaded(
    site: Site, change: Callable[[Path], None], complaint: str
) -> None:
    folder = site.shelf.resolve("tiny").path
    change(folder)
    with pytest.raises(Unavailable, match=f"intent-0 cannot start.*{complaint}"):
        await Onnx(artifact=str(folder)).build(site).open()


@pytest.mark.parametrize(
    ("name", "content", "task", "complaint"),
    [
        ("model.onnx", b"nonsense", "classify", "cannot be loaded"),
        ("model.onnx", tiny.graph("embed"), "classify", "no output 'scores'"),
        ("model.onnx", tiny.graph("classify"), "embed", "no output 'embedding'"),
        ("model.onnx", tiny.graph("classify").replace(b"attention_mask", b"token_type_id_"), "classify", "must take"),
        ("tokenizer.json", b"{}", "classify", "tokenizer.json"),
        ("more.onnx", tiny.graph("embed"), "classify", "2 ONNX files"),
    ],
)
async def test_a_model_that_keeps_no_contract_is_not_started(
    site: Site, tmp_path: Path, name: str, content: bytes, task: Literal["embed", "classify"], complaint: str
) -> None:
    folder = tmp_path / "folder"
    (folder / name).write_bytes(content)
    seal(folder, tiny.card(task), created_s=0)
    with pytest.raises(Unavailable, match=complaint):
        await Onnx(artifact=str(folder)).build(site).open()


async def test_an_unknown_artifact_is_an_error_that_says_what_there_is(site: Site) -> None:
    with pytest.raises(Unavailable, match=r"intent-0 cannot start.*tiny"):
        await Onnx(artifact="missing@stable").build(site).open()
    with pytest.raises(Unavailable, match="manifest"):
        await Onnx(artifact="some/model").build(site).open()


@given(
    words=st.lists(st.sampled_from([*tiny.WORDS, " ", "?!", "é", "\U0001f600", "x" * 120]), min_size=1, max_size=9),
    separator=st.sampled_from(["", " ", "\n"]),
    repeats=st.integers(1, 400),
)
def test_a_long_text_has_the_first_tokens_that_all_of_it_has(
    words: list[str], separator: str, repeats: int, session: Session
) -> None:
    text = separator.join(words * repeats)[: CHARS_PER_TOKEN_MAX * tiny.TOKENS_MAX]
    whole = untruncated().encode(text).ids
    [ids] = ids_of(session, text)
    # The end token is the last one in either case.
    assert ids.tolist() == [*whole[:-1][: tiny.TOKENS_MAX - 1], whole[-1]]


@pytest.mark.parametrize("word", ["card", "cardcardcard" * 10, "漢", "é"])
def test_where_a_long_text_is_cut_leaves_its_tokens_alone(word: str, session: Session) -> None:
    for shift in range(2 * len(word)):  # every place in a word at which a first reading may end
        text = "x" * shift + f" {word}" * (CHARS_PER_TOKEN * tiny.TOKENS_MAX)
        whole = untruncated().encode(text).ids
        [ids] = ids_of(session, text)
        assert ids.tolist() == [*whole[: tiny.TOKENS_MAX - 1], whole[-1]]


def test_a_special_token_that_a_cut_goes_through_is_read_again(session: Session) -> None:
    unread = CHARS_PER_TOKEN * tiny.TOKENS_MAX - len("[SE")
    text = ("card " * (tiny.TOKENS_MAX - 3)).ljust(unread) + "[SEP]" + " card" * 100
    [ids] = ids_of(session, text)
    assert ids.tolist() == [2, *[5] * (tiny.TOKENS_MAX - 3), 3, 3]


def test_a_text_of_nothing_but_blanks_is_read_only_so_far(session: Session) -> None:
    blanks = " " * (CHARS_PER_TOKEN_MAX * tiny.TOKENS_MAX)
    near, far = ids_of(session, f"{blanks[:-4]}card", f"{blanks}card")
    assert (near.tolist(), far.tolist()) == ([2, 5, 3], [2, 3])


@given(
    lengths=st.lists(st.integers(0, 2 * PIECE_CHARS), min_size=1, max_size=30), rows_max=st.sampled_from([1, 5, 100])
)
def test_pieces_hold_every_text_in_order_and_little_at_once(
    lengths: list[int], rows_max: int, session: Session
) -> None:
    given_ = np.array(["x" * length for length in lengths], object)
    found = [piece["text"].tolist() for piece, _ in session.reading.pieces({"text": given_}, rows_max)]
    assert list(chain(*found)) == given_.tolist()
    assert all(len(piece) == 1 or sum(map(len, piece)) <= PIECE_CHARS for piece in found)
    assert all(1 <= len(piece) <= rows_max for piece in found)
    # No two neighbours would fit into one.
    assert all(len(one) == rows_max or sum(map(len, [*one, two[0]])) > PIECE_CHARS for one, two in pairwise(found))
