import base64
import json
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import CreateEmbeddingResponse, ModerationCreateResponse

from runtimes.contract import InferReply, InferRequest, Invalid
from runtimes.dialect import Series
from runtimes.dialect.entries import IDS_MAX, ROWS_MAX, WINDOW_BYTES, WINDOW_ROWS
from runtimes.dialect.openai import TRANSLATIONS
from tests.fakes import FakePredictor

LABELS = ("refund", "card", "login")
PREDICTOR = FakePredictor(task="classify", answer=InferReply({}, tokens_in=0), labels=LABELS)
PREDICTOR.thresholds = {"refund": 0.5, "login": 0.25}
INPUT = ("/v1/embeddings", "/v1/classify", "/v1/moderations")
"""What takes an `input`."""


def parsed(path: str, **body: Any) -> Series:
    asked = TRANSLATIONS[path].parse(
        json.dumps({"model": "m"} | body).encode(), predictor=PREDICTOR, deadline_s=7.0, flow="acme"
    )
    assert isinstance(asked, Series)
    return asked


def told(asked: Series, model: Callable[[InferRequest], InferReply]) -> tuple[list[InferRequest], list[bytes]]:
    """What the model is asked, and what is written."""
    requests, parts = [], []
    steps = asked.steps(model="mine", predictor=PREDICTOR, id="hr-1", created_s=1_700_000_000)
    step = next(steps, None)
    while step is not None:
        if isinstance(step, bytes):
            parts.append(step)
            step = next(steps, None)
        else:
            requests.append(step)
            step = steps.send(model(step))
    return requests, parts


def reads(request: InferRequest) -> InferReply:
    """A model: a row's vector and scores depend on its text or ids alone. Each has 3 tokens."""
    (name, *_) = request.inputs
    rows = [str(row if name == "text" else [it for it in row.tolist() if it]) for row in request.inputs[name]]
    seeds = [sum(map(ord, row)) + len(row) for row in rows]
    vectors = np.array([np.random.default_rng(seed).normal(size=5) for seed in seeds], np.float32)
    scores = np.abs(vectors[:, :3]) / np.abs(vectors[:, :3]).sum(axis=1, keepdims=True)
    return InferReply({"embedding": vectors, "scores": scores}, tokens_in=3 * len(rows))


def says(embedding: Any = None, scores: Any = None, tokens_in: int = 9) -> Callable[[InferRequest], InferReply]:
    given = {"embedding": embedding, "scores": scores}
    outputs = {name: np.array(rows, np.float32) for name, rows in given.items() if rows is not None}
    return lambda _: InferReply(outputs, tokens_in=tokens_in)


def answered(asked: Series, model: Callable[[InferRequest], InferReply] = reads) -> Any:
    return json.loads(b"".join(told(asked, model)[1]))


def asked_of(asked: Series) -> InferRequest:
    (request,) = told(asked, reads)[0]
    return request


# ---- what goes to the model


@pytest.mark.parametrize("path", INPUT)
@pytest.mark.parametrize(("given", "rows"), [("a b", ["a b"]), (["a", "b"], ["a", "b"]), (['"é\n'], ['"é\n'])])
def test_texts_become_one_object_array(path: str, given: Any, rows: list[str]) -> None:
    request = asked_of(parsed(path, input=given))
    assert request.inputs.keys() == {"text"}
    assert request.inputs["text"].dtype == object
    assert request.inputs["text"].tolist() == rows
    assert (request.deadline_s, request.flow) == (7.0, "acme")


@pytest.mark.parametrize(
    ("given", "ids", "mask"),
    [
        ([4, 5], [[4, 5]], [[1, 1]]),
        ([[4, 5], [0]], [[4, 5], [0, 0]], [[1, 1], [1, 0]]),
    ],
)
def test_token_ids_pass_through_padded(given: Any, ids: Any, mask: Any) -> None:
    inputs = asked_of(parsed("/v1/embeddings", input=given)).inputs
    assert (inputs["input_ids"].tolist(), inputs["attention_mask"].tolist()) == (ids, mask)


BAD = [
    *("", [], [""], ["a", ""], [[]], [[1], []], ["a", 1], [1, "a"], [[1], "a"], ["a", [1]], [-1], [2**31], [1.5]),
    *({}, 5, None, True, [True], [None], [{}], [[[1]]], [["a"]]),
]


@pytest.mark.parametrize("path", INPUT)
@pytest.mark.parametrize("given", BAD, ids=json.dumps)
def test_an_input_of_the_wrong_kind_is_refused_by_name(path: str, given: Any) -> None:
    with pytest.raises(Invalid) as refused:
        parsed(path, input=given)
    assert refused.value.param == "input"


@pytest.mark.parametrize("name", ["text_1", "text_2", "queries", "documents"])
@pytest.mark.parametrize("given", [*BAD, [1], [[1]]], ids=json.dumps)
def test_a_side_of_the_wrong_kind_is_refused_by_name(name: str, given: Any) -> None:
    sides = ("text_1", "text_2") if name.startswith("text") else ("queries", "documents")
    with pytest.raises(Invalid) as refused:
        parsed("/v1/score", **(dict.fromkeys(sides, "a") | {name: given}))
    assert refused.value.param == name


@pytest.mark.parametrize("name", ["query", "documents"])
@pytest.mark.parametrize("given", [*BAD, [1], [[1]], [{"text": ""}], [{"text": 5}], [{"image": "x"}]], ids=json.dumps)
def test_what_is_to_be_ranked_is_refused_by_name(name: str, given: Any) -> None:
    with pytest.raises(Invalid) as refused:
        parsed("/v1/rerank", **({"query": "a", "documents": ["a"]} | {name: given}))
    assert refused.value.param == name


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {"input": "x", "dimensions": "x"}, "dimensions"),
        ("/v1/embeddings", {"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ("/v1/embeddings", {"input": "x", "user": 5}, "user"),
        ("/v1/embeddings", {"input": "x", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ("/v1/embeddings", {"input": "x", "model": None}, "model"),
        ("/v1/embeddings", {}, "input"),
        ("/v1/classify", {"input": "x", "encoding_format": "float"}, "encoding_format"),
        ("/v1/moderations", {"input": "x", "stream": True}, "stream"),
        ("/v1/moderations", {}, "input"),
        ("/v1/score", {}, "queries"),
        ("/v1/score", {"text_1": "a"}, "text_2"),
        ("/v1/score", {"text_2": "a"}, "text_1"),
        ("/v1/score", {"queries": "a"}, "documents"),
        ("/v1/score", {"text_1": "a", "text_2": "b", "queries": "a"}, "queries"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": "a"}, "text_1"),
        ("/v1/rerank", {"query": "a"}, "documents"),
        ("/v1/rerank", {"documents": ["a"]}, "query"),
        ("/v1/rerank", {"query": ["a", "b"], "documents": ["a"]}, "query"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "top_n": -1}, "top_n"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "return_documents": "yes"}, "return_documents"),
    ],
)
def test_a_wrong_field_is_refused_by_name(path: str, body: dict[str, Any], param: str) -> None:
    with pytest.raises(Invalid) as refused:
        parsed(path, **body)
    assert refused.value.param == param


@pytest.mark.parametrize("path", TRANSLATIONS)
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"model":"m","input":' + b"[" * 100_000])
def test_what_is_not_json_is_refused(path: str, body: bytes) -> None:
    with pytest.raises(Invalid):
        TRANSLATIONS[path].parse(body, predictor=PREDICTOR, deadline_s=7.0, flow="acme")


@pytest.mark.parametrize("entry", ["x", '"[,', "", [1]])
def test_more_entries_than_there_may_be_are_refused_with_both_numbers(entry: Any) -> None:
    with pytest.raises(Invalid, match=rf"{ROWS_MAX + 1} entries; at most {ROWS_MAX}"):
        parsed("/v1/embeddings", input=[entry] * (ROWS_MAX + 1))
    with pytest.raises(Invalid, match=rf"{ROWS_MAX + 1} entries"):
        parsed("/v1/rerank", query="a", documents=[{"text": entry}] * (ROWS_MAX + 1))


def test_as_many_as_there_may_be_are_taken() -> None:
    requests, _ = told(parsed("/v1/embeddings", input=['"[,'] * ROWS_MAX), says([[1]] * WINDOW_ROWS))
    assert sum(len(request.inputs["text"]) for request in requests) == ROWS_MAX


def test_a_short_body_cannot_ask_for_a_large_array() -> None:
    with pytest.raises(Invalid, match=f"more than {IDS_MAX} token ids"):
        parsed("/v1/embeddings", input=[1] * (IDS_MAX + 1))
    asked = parsed("/v1/embeddings", input=[*[[1]] * 5_000, [1] * IDS_MAX, *[[1]] * 5_000])
    requests, _ = told(asked, reads)
    assert max(request.inputs["input_ids"].size for request in requests) == IDS_MAX


def test_nulls_are_as_good_as_nothing() -> None:
    assert answered(parsed("/v1/embeddings", input="x", encoding_format=None, dimensions=None, user=None))["data"]
    ranked = answered(parsed("/v1/rerank", query="x", documents=["x"], top_n=None, return_documents=None))
    assert ranked["results"][0]["document"] == {"text": "x"}


def test_an_error_quotes_no_value_of_the_body() -> None:
    for path, body in [
        ("/v1/embeddings", {"input": ["my secret", 5]}),
        ("/v1/moderations", {"input": [{"type": "secret"}]}),
        ("/v1/moderations", {"input": [{"type": "text", "text": 5, "secret": 1}]}),
        ("/v1/rerank", {"query": "secret", "documents": [{"text": ["secret"]}]}),
    ]:
        with pytest.raises(Invalid) as refused:
            parsed(path, **body)
        assert "secret" not in str(refused.value)
        assert refused.value.__cause__ is None


# ---- windows

ROWS = st.lists(st.text(min_size=1, max_size=6) | st.integers(1, 3000).map("x".__mul__), min_size=1, max_size=700)


@settings(max_examples=40, deadline=None)
@given(rows=ROWS)
def test_rows_go_to_the_model_in_order_a_window_at_a_time(rows: list[str]) -> None:
    requests, _ = told(parsed("/v1/classify", input=rows), reads)
    windows = [request.inputs["text"].tolist() for request in requests]
    assert [row for window in windows for row in window] == rows
    for window in windows:
        assert len(window) <= WINDOW_ROWS
        assert len(window) == 1 or len(window) * max(len(json.dumps(row)) for row in window) <= 6 * WINDOW_BYTES


@settings(max_examples=25, deadline=None)
@given(rows=ROWS, other=st.integers(0, 10), size=st.integers(1, 300), data=st.data())
def test_the_answer_is_the_same_however_it_is_cut(rows: list[str], other: int, size: int, data: st.DataObject) -> None:
    """By a model that has all rows at once."""
    path, body = data.draw(
        st.sampled_from(
            [
                *((path, {"input": rows}) for path in INPUT),
                ("/v1/embeddings", {"input": rows, "encoding_format": "base64"}),
                ("/v1/embeddings", {"input": [[ord(char) for char in row] for row in rows]}),
                ("/v1/score", {"text_1": rows[0], "text_2": rows}),
                ("/v1/score", {"queries": rows, "documents": rows[other:] + rows[:other]}),
                ("/v1/rerank", {"query": rows[0], "documents": rows}),
                ("/v1/rerank", {"query": "?", "documents": [{"text": row} for row in rows], "top_n": size}),
            ]
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtimes.dialect.entries.WINDOW_ROWS", size)
        cut, parts = told(parsed(path, **body), reads)
        patch.setattr("runtimes.dialect.entries.WINDOW_ROWS", 10_000)
        patch.setattr("runtimes.dialect.entries.WINDOW_BYTES", 1 << 30)
        (_,), whole = told(parsed(path, **body), reads)
    assert len(cut) >= len(rows) / size
    assert b"".join(parts) == b"".join(whole)


def test_an_answer_is_written_before_the_next_window_is_asked_for() -> None:
    steps = parsed("/v1/embeddings", input=["x"] * (2 * WINDOW_ROWS)).steps(
        model="mine", predictor=PREDICTOR, id="hr-1", created_s=1
    )
    first = next(steps)
    assert isinstance(first, InferRequest)
    kinds = [type(steps.send(reads(first)))]
    while (step := next(steps)) and isinstance(step, bytes):
        kinds.append(type(step))
    assert kinds == [bytes] * (WINDOW_ROWS // 16)
    assert isinstance(step, InferRequest)


# ---- what comes back

VECTORS = [[0.1, -0.5, 2.0], [1.0, 0.0, 3e-8]]
SCORES = [[0.2, 0.7, 0.1], [0.5, 0.25, 0.25]]


def test_embeddings_are_answered_as_openai_does() -> None:
    body = answered(parsed("/v1/embeddings", input=["a", "b"]), says(VECTORS))
    answer = CreateEmbeddingResponse.model_validate(body, strict=True)
    np.testing.assert_array_equal(np.float32([item.embedding for item in answer.data]), np.float32(VECTORS))
    assert [item.index for item in answer.data] == [0, 1]
    assert (answer.model, answer.usage.prompt_tokens, answer.usage.total_tokens) == ("mine", 9, 9)


def test_base64_is_little_endian_float32() -> None:
    body = answered(parsed("/v1/embeddings", input=["a", "b"], encoding_format="base64"), says(VECTORS))
    decoded = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in body["data"]]
    np.testing.assert_array_equal(decoded, np.float32(VECTORS))


def test_only_the_models_own_dimensions_are_answered() -> None:
    assert answered(parsed("/v1/embeddings", input="a", dimensions=3), says(VECTORS[:1]))["data"]
    with pytest.raises(Invalid) as refused:
        answered(parsed("/v1/embeddings", input="a", dimensions=2), says(VECTORS[:1]))
    assert refused.value.param == "dimensions"


def test_a_classification_is_answered_as_vllm_does_with_scores_by_name() -> None:
    body = answered(parsed("/v1/classify", input=["a", "b"]), says(scores=SCORES))
    assert {key: body[key] for key in ("id", "object", "created", "model")} == {
        "id": "hr-1",
        "object": "list",
        "created": 1_700_000_000,
        "model": "mine",
    }
    assert [(item["index"], item["label"], item["num_classes"]) for item in body["data"]] == [
        (0, "card", 3),
        (1, "refund", 3),
    ]
    assert body["data"][1]["probs"] == SCORES[1]
    assert body["data"][1]["scores"] == {"refund": 0.5, "card": 0.25, "login": 0.25}
    assert body["usage"] == {"prompt_tokens": 9, "total_tokens": 9, "completion_tokens": 0}


def test_a_moderation_is_answered_as_openai_does_with_the_labels_that_have_a_threshold() -> None:
    body = answered(parsed("/v1/moderations", input=["a", "b"]), says(scores=SCORES))
    answer = ModerationCreateResponse.construct(**body)
    assert (answer.id, answer.model, len(answer.results)) == ("hr-1", "mine", 2)
    assert body["results"][0]["flagged"] is False
    assert body["results"][1] == {
        "flagged": True,
        "categories": {"refund": True, "login": True},
        "category_scores": {"refund": 0.5, "login": 0.25},
        "category_applied_input_types": {"refund": ["text"], "login": ["text"]},
    }


def test_parts_are_one_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert asked_of(parsed("/v1/moderations", input=parts)).inputs["text"].tolist() == ["a\nb"]


def test_an_image_is_refused_by_name() -> None:
    with pytest.raises(Invalid, match="image_url") as refused:
        parsed("/v1/moderations", input=[{"type": "image_url", "image_url": {"url": "http://example.com/a.png"}}])
    assert refused.value.param == "input"


def test_a_classifier_without_thresholds_moderates_nothing() -> None:
    plain = FakePredictor(task="classify", answer=InferReply({}, tokens_in=0), labels=LABELS)
    body = b'{"model":"m","input":"x"}'
    with pytest.raises(Invalid, match="m has no thresholds") as refused:
        TRANSLATIONS["/v1/moderations"].parse(body, predictor=plain, deadline_s=7.0, flow="acme")
    assert refused.value.param == "model"


def test_scores_are_cosines_in_vllms_shape() -> None:
    vectors = [[3, 0], [5, 0], [0, 1], [-2, 0], [0, 0]]
    body = answered(parsed("/v1/score", text_1="a", text_2=["b", "c", "d", "e"]), says(vectors))
    assert body == {
        "id": "hr-1",
        "object": "list",
        "created": 1_700_000_000,
        "model": "mine",
        "data": [{"index": at, "object": "score", "score": score} for at, score in enumerate([1, 0, -1, 0])],
        "usage": {"prompt_tokens": 9, "total_tokens": 9},
    }


def test_equal_texts_are_no_more_than_equal() -> None:
    vectors = np.array([[0.1, 0.2, 0.7]] * 2, np.float32)
    row = vectors[0] / np.sqrt(np.square(vectors[0]).sum())
    assert np.square(row).sum() > 1, "a row whose length is rounded up"
    body = answered(parsed("/v1/score", text_1="a", text_2=["a"]), says(vectors))
    assert [it["score"] for it in body["data"]] == [1]


def test_as_many_on_both_sides_are_scored_pair_by_pair() -> None:
    asked = parsed("/v1/score", queries=["a", "b"], documents=["c", "d"])
    request = asked_of(asked)
    assert request.inputs["text"].tolist() == ["a", "b", "c", "d"]
    body = answered(
        parsed("/v1/score", queries=["a", "b"], documents=["c", "d"]), says([[1, 0], [0, 1], [1, 0], [1, 0]])
    )
    assert [it["score"] for it in body["data"]] == [1, 0]


def test_documents_are_ranked_by_score_then_as_they_came() -> None:
    vectors = [[1, 0], [0, 1], [1, 0], [-1, 0], [2, 0]]
    given: list[Any] = ["a", {"text": "b é"}, "c", "d"]
    body = answered(parsed("/v1/rerank", query="q", documents=given), says(vectors))
    assert body == {
        "id": "hr-1",
        "model": "mine",
        "usage": {"prompt_tokens": 9, "total_tokens": 9},
        "results": [
            {"index": 1, "document": {"text": "b é"}, "relevance_score": 1},
            {"index": 3, "document": {"text": "d"}, "relevance_score": 1},
            {"index": 0, "document": {"text": "a"}, "relevance_score": 0},
            {"index": 2, "document": {"text": "c"}, "relevance_score": -1},
        ],
    }


def test_only_so_many_of_the_best_come_back_and_their_texts_if_wanted() -> None:
    asked = parsed("/v1/rerank", query="q", documents=["a", "b", "c"], top_n=1, return_documents=False)
    assert answered(asked, says([[1, 0], [0, 1], [1, 0], [-1, 0]]))["results"] == [{"index": 1, "relevance_score": 1}]


def test_each_translation_says_which_task_answers_it() -> None:
    for path, it in TRANSLATIONS.items():
        assert it.tasks == {"classify" if path in ("/v1/classify", "/v1/moderations") else "embed"}


def test_a_body_of_many_short_texts_is_never_all_decoded() -> None:
    """By what Python allocates; memory of a whole gateway is in tests/e2e/test_batch_memory.py."""
    import tracemalloc

    body = msgspec.json.encode({"model": "m", "input": ["some fifty characters, as a short message would be"] * 20_000})
    tracemalloc.start()
    try:
        asked = TRANSLATIONS["/v1/classify"].parse(body, predictor=PREDICTOR, deadline_s=7.0, flow="acme")
        assert isinstance(asked, Series)
        steps = asked.steps(model="mine", predictor=PREDICTOR, id="hr-1", created_s=1)
        step = next(steps, None)
        while step is not None:
            step = next(steps, None) if isinstance(step, bytes) else steps.send(says(scores=SCORES)(step))
        assert tracemalloc.get_traced_memory()[1] < 2 * len(body)
    finally:
        tracemalloc.stop()
