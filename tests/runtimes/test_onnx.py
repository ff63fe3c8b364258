import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from runtimes.artifact import Shelf, seal
from runtimes.contract import Expired, InferReply, InferRequest, Invalid, Load, Overloaded, Site, Unavailable
from runtimes.onnx import Onnx, OnnxRuntime
from runtimes.session import CHARS_PER_TOKEN, CHARS_PER_TOKEN_MAX, PIECE_CHARS, Session, batches, pieces
from tests import tiny
from tests.fakes import FakeClock, until

DEADLINE_S = 1_060.0
LONG = ["card " * (PIECE_CHARS // 5)] * 6
"""Texts each of which is a piece of its own."""


class HeldClock(FakeClock):
    """A clock at which every thread but the test's own waits its turn: the worker asks before each piece and batch."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self._ours = threading.get_ident()
        self._turns = threading.Semaphore(0)

    def now_s(self) -> float:
        if threading.get_ident() != self._ours:
            self.asked += 1
            assert self._turns.acquire(timeout=10)
        return super().now_s()

    def let_go(self, turns: int = 1_000) -> None:
        self._turns.release(turns)


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
        (InferRequest({"image": np.zeros((1, 3))}, DEADLINE_S), None),
        (InferRequest({"input_ids": np.ones((1, 1), np.int64)}, DEADLINE_S), None),
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


async def test_a_cancelled_call_that_waits_never_runs(site: Site) -> None:
    clock = HeldClock()
    async with opened(Onnx(artifact="tiny"), site, clock) as runtime:
        first = asyncio.create_task(runtime.infer(texts("card")))
        second = asyncio.create_task(runtime.infer(texts("login")))
        await until(lambda: runtime.load() == Load(running=1, waiting=1))
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        assert runtime.load() == Load(running=1, waiting=0)
        clock.let_go()
        await first
    assert clock.asked == 2  # the first call's tokens and its batch


async def test_a_call_that_waits_past_its_deadline_never_runs(site: Site) -> None:
    clock = HeldClock()
    async with opened(Onnx(artifact="tiny"), site, clock) as runtime:
        first = asyncio.create_task(runtime.infer(texts("card")))
        late = asyncio.create_task(runtime.infer(texts("login", deadline_s=1_001.0)))
        await until(lambda: runtime.load() == Load(running=1, waiting=1))
        clock.advance(2)
        clock.let_go()
        await first
        with pytest.raises(Expired):
            await late
    assert runtime.load() == Load(running=0, waiting=0)


async def test_one_call_more_than_may_wait_is_refused(site: Site) -> None:
    clock = HeldClock()
    async with opened(Onnx(artifact="tiny", waiting_max=2), site, clock) as runtime:
        calls = [asyncio.create_task(runtime.infer(texts("card"))) for _ in range(3)]
        await until(lambda: runtime.load() == Load(running=1, waiting=2))
        with pytest.raises(Overloaded):
            await runtime.infer(texts("card"))
        clock.let_go()
        assert all(isinstance(reply, InferReply) for reply in await asyncio.gather(*calls))


async def test_a_short_call_overtakes_the_rest_of_a_long_one(site: Site) -> None:
    clock = HeldClock()
    done: list[str] = []
    async with opened(Onnx(artifact="tiny", batch_max=1), site, clock) as runtime:
        long = asyncio.create_task(runtime.infer(texts(*["card"] * 20)))
        long.add_done_callback(lambda _: done.append("long"))
        await until(lambda: clock.asked == 1)
        short = asyncio.create_task(runtime.infer(texts("login")))
        short.add_done_callback(lambda _: done.append("short"))
        await until(lambda: runtime.load().waiting == 1)
        clock.let_go()
        await asyncio.gather(long, short)
    assert done == ["short", "long"]


async def test_a_short_call_gets_its_turn_between_the_pieces_of_a_long_one(site: Site) -> None:
    clock = HeldClock()
    async with opened(Onnx(artifact="tiny"), site, clock) as runtime:
        long = asyncio.create_task(runtime.infer(texts(*LONG)))
        await until(lambda: clock.asked == 1)
        short = asyncio.create_task(runtime.infer(texts("login")))
        await until(lambda: runtime.load().waiting == 1)
        clock.let_go(4)  # both calls' first turn, then their second: the short one needs no more
        await short
        assert not long.done()
        clock.let_go()
        await long
    assert clock.asked == 2 + 2 * len(LONG)  # a turn for each text to be tokenized, and one to be run


@pytest.mark.parametrize("late", [False, True])
async def test_a_long_call_that_is_left_or_late_stops_at_its_next_piece(site: Site, late: bool) -> None:
    clock = HeldClock()
    async with opened(Onnx(artifact="tiny"), site, clock) as runtime:
        long = asyncio.create_task(runtime.infer(texts(*LONG, deadline_s=1_001.0)))
        await until(lambda: clock.asked == 1)
        clock.let_go(1)
        await until(lambda: clock.asked == 2)
        if late:
            clock.advance(2)
        else:
            long.cancel()
        clock.let_go()
        with pytest.raises(Expired if late else asyncio.CancelledError):
            await long
        await runtime.infer(texts("login"))
    assert clock.asked == 2 + 2  # of the long one's six pieces, two had their turn


async def test_by_default_every_row_goes_through_the_graph_alone(site: Site) -> None:
    clock = HeldClock()
    clock.let_go()
    async with opened(Onnx(artifact="tiny"), site, clock) as runtime:
        await runtime.infer(texts("card", "login", "money"))
    assert clock.asked == 1 + 3  # short texts are tokenized together


async def test_closing_lets_calls_under_way_finish(site: Site) -> None:
    clock = HeldClock()
    runtime = Onnx(artifact="tiny", batch_max=1).build(site, clock=clock)
    await runtime.open()
    call = asyncio.create_task(runtime.infer(texts("card", "login")))
    await until(lambda: runtime.load().running == 1)
    closing = asyncio.create_task(runtime.aclose())
    await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        await runtime.infer(texts("card"))
    clock.let_go()
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
    [ids] = session.tokens({"text": np.array([text], object)})
    # The end token is the last one in either case.
    assert ids.tolist() == [*whole[:-1][: tiny.TOKENS_MAX - 1], whole[-1]]


@pytest.mark.parametrize("word", ["card", "cardcardcard" * 10, "漢", "é"])
def test_where_a_long_text_is_cut_leaves_its_tokens_alone(word: str, session: Session) -> None:
    for shift in range(2 * len(word)):  # every place in a word at which a first reading may end
        text = "x" * shift + f" {word}" * (CHARS_PER_TOKEN * tiny.TOKENS_MAX)
        whole = untruncated().encode(text).ids
        [ids] = session.tokens({"text": np.array([text], object)})
        assert ids.tolist() == [*whole[: tiny.TOKENS_MAX - 1], whole[-1]]


def test_a_special_token_that_a_cut_goes_through_is_read_again(session: Session) -> None:
    unread = CHARS_PER_TOKEN * tiny.TOKENS_MAX - len("[SE")
    text = ("card " * (tiny.TOKENS_MAX - 3)).ljust(unread) + "[SEP]" + " card" * 100
    [ids] = session.tokens({"text": np.array([text], object)})
    assert ids.tolist() == [2, *[5] * (tiny.TOKENS_MAX - 3), 3, 3]


def test_a_text_of_nothing_but_blanks_is_read_only_so_far(session: Session) -> None:
    blanks = " " * (CHARS_PER_TOKEN_MAX * tiny.TOKENS_MAX)
    near, far = session.tokens({"text": np.array([f"{blanks[:-4]}card", f"{blanks}card"], object)})
    assert (near.tolist(), far.tolist()) == ([2, 5, 3], [2, 3])


@given(lengths=st.lists(st.integers(0, 2 * PIECE_CHARS), min_size=1, max_size=30))
def test_pieces_hold_every_text_in_order_and_little_at_once(lengths: list[int]) -> None:
    given_ = np.array(["x" * length for length in lengths], object)
    found = [piece["text"].tolist() for piece in pieces({"text": given_})]
    assert list(chain(*found)) == given_.tolist()
    assert all(len(piece) == 1 or sum(map(len, piece)) <= PIECE_CHARS for piece in found)
    # No two neighbours would fit into one.
    assert all(sum(map(len, [*one, two[0]])) > PIECE_CHARS for one, two in pairwise(found))


@given(lengths=st.lists(st.integers(1, 600), min_size=1, max_size=80), rows_max=st.integers(1, 40))
def test_batches_hold_every_row_once_with_little_padding(lengths: list[int], rows_max: int) -> None:
    plan = batches([np.zeros(length, np.int64) for length in lengths], rows_max=rows_max)
    assert sorted(index for batch in plan for index in batch) == list(range(len(lengths)))
    for batch in plan:
        sizes = [lengths[index] for index in batch]
        assert len(batch) <= rows_max
        assert max(sizes) <= max(16, 2 * min(sizes))
