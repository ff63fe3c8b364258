import base64
import json
from typing import Any

import numpy as np
import pytest
from openai.types import CreateEmbeddingResponse

from runtimes.contract import InferReply, Invalid
from runtimes.dialect.openai import CELLS_MAX, ROWS_MAX, TRANSLATIONS, Classification, Embeddings
from tests.fakes import FakePredictor

VECTORS = np.array([[0.1, -0.5, 2.0], [1.0, 0.0, 3e-8]], np.float32)
SCORES = np.array([[0.2, 0.7, 0.1], [0.5, 0.25, 0.25]], np.float32)
LABELS = ("refund", "card", "login")
PREDICTOR = FakePredictor(task="classify", answer=InferReply({}, tokens_in=0), labels=LABELS)


def parsed(path: str, **body: Any) -> Any:
    return TRANSLATIONS[path].parse(
        json.dumps({"model": "m"} | body).encode(), predictor=PREDICTOR, deadline_s=7.0, flow="acme"
    )


def answered(call: Any, outputs: dict[str, Any]) -> Any:
    reply = InferReply(outputs=outputs, tokens_in=9)
    return json.loads(call.answer(reply, model="mine", predictor=PREDICTOR, id="classify-1", created_s=1_700_000_000))


@pytest.mark.parametrize("path", TRANSLATIONS)
@pytest.mark.parametrize(("given", "rows"), [("a b", ["a b"]), (["a", "b"], ["a", "b"])])
def test_texts_become_one_object_array(path: str, given: Any, rows: list[str]) -> None:
    request = parsed(path, input=given).request
    assert request.inputs.keys() == {"text"}
    assert request.inputs["text"].dtype == object
    assert request.inputs["text"].tolist() == rows
    assert request.deadline_s == 7.0


@pytest.mark.parametrize(
    ("given", "ids", "mask"),
    [
        ([4, 5], [[4, 5]], [[1, 1]]),
        ([[4, 5], [0]], [[4, 5], [0, 0]], [[1, 1], [1, 0]]),
    ],
)
def test_token_ids_pass_through_padded(given: Any, ids: Any, mask: Any) -> None:
    inputs = parsed("/v1/embeddings", input=given).request.inputs
    assert (inputs["input_ids"].tolist(), inputs["attention_mask"].tolist()) == (ids, mask)


@pytest.mark.parametrize("path", TRANSLATIONS)
@pytest.mark.parametrize(
    "given",
    ["", [], [""], ["a", ""], [[]], [[1], []], ["a", 1], [1, "a"], [[1], "a"], [-1], [2**31], [1.5], {}, 5, None],
)
def test_an_input_of_the_wrong_kind_is_refused_by_name(path: str, given: Any) -> None:
    with pytest.raises(Invalid) as refused:
        parsed(path, input=given)
    assert refused.value.param == "input"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"dimensions": "x"}, "dimensions"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"user": 5}, "user"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"model": None}, "model"),
    ],
)
def test_a_wrong_field_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(Invalid) as refused:
        parsed("/v1/embeddings", **{"input": "x", **body})
    assert refused.value.param == param


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"model":"m","input":' + b"[" * 100_000])
def test_what_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(Invalid):
        Embeddings.parse(body, predictor=PREDICTOR, deadline_s=7.0, flow="acme")


def test_more_rows_than_openai_takes_are_refused_with_both_numbers() -> None:
    with pytest.raises(Invalid, match=rf"{ROWS_MAX + 1} entries; at most {ROWS_MAX}"):
        parsed("/v1/embeddings", input=["x"] * (ROWS_MAX + 1))
    assert len(parsed("/v1/embeddings", input=["x"] * ROWS_MAX).request.inputs["text"]) == ROWS_MAX


def test_a_short_body_cannot_ask_for_a_large_array() -> None:
    with pytest.raises(Invalid, match="once padded"):
        parsed("/v1/embeddings", input=[[1]] * (ROWS_MAX - 1) + [[1] * (CELLS_MAX // ROWS_MAX + 1)])


def test_nulls_are_as_good_as_nothing() -> None:
    call = parsed("/v1/embeddings", input="x", encoding_format=None, dimensions=None, user=None)
    assert call.encoding == "float"


def test_an_error_quotes_no_value_of_the_body() -> None:
    with pytest.raises(Invalid) as refused:
        parsed("/v1/embeddings", input=["my secret", 5])
    assert "secret" not in str(refused.value)
    assert refused.value.__cause__ is None


def test_embeddings_are_answered_as_openai_does() -> None:
    body = answered(parsed("/v1/embeddings", input=["a", "b"]), {"embedding": VECTORS})
    answer = CreateEmbeddingResponse.model_validate(body, strict=True)
    assert [item.embedding for item in answer.data] == VECTORS.tolist()
    assert [item.index for item in answer.data] == [0, 1]
    assert (answer.model, answer.usage.prompt_tokens, answer.usage.total_tokens) == ("mine", 9, 9)


def test_base64_is_little_endian_float32() -> None:
    body = answered(parsed("/v1/embeddings", input="a", encoding_format="base64"), {"embedding": VECTORS})
    decoded = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in body["data"]]
    np.testing.assert_array_equal(decoded, VECTORS)


def test_only_the_models_own_dimensions_are_answered() -> None:
    assert answered(parsed("/v1/embeddings", input="a", dimensions=3), {"embedding": VECTORS})["data"]
    with pytest.raises(Invalid) as refused:
        answered(parsed("/v1/embeddings", input="a", dimensions=2), {"embedding": VECTORS})
    assert refused.value.param == "dimensions"


def test_a_classification_is_answered_as_vllm_does_with_scores_by_name() -> None:
    body = answered(parsed("/v1/classify", input=["a", "b"]), {"scores": SCORES, "logits": SCORES})
    assert {key: body[key] for key in ("id", "object", "created", "model")} == {
        "id": "classify-1",
        "object": "list",
        "created": 1_700_000_000,
        "model": "mine",
    }
    assert [(item["index"], item["label"], item["num_classes"]) for item in body["data"]] == [
        (0, "card", 3),
        (1, "refund", 3),
    ]
    assert [item["probs"] for item in body["data"]] == SCORES.tolist()
    assert body["data"][1]["scores"] == {"refund": 0.5, "card": 0.25, "login": 0.25}
    assert body["usage"] == {"prompt_tokens": 9, "total_tokens": 9, "completion_tokens": 0}


def test_each_translation_says_which_task_answers_it() -> None:
    assert (Embeddings.tasks, Classification.tasks) == ({"embed"}, {"classify"})
