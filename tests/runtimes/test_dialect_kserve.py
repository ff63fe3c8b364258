"""The Open Inference Protocol's wires and numpy: what the stock client serializes is what arrives, and what can't be is
refused with its name."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tritonclient.grpc import service_pb2
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from runtimes.contract import InferReply, InferRequest, Invalid
from runtimes.dialect import kserve_grpc, kserve_rest, messages
from runtimes.dialect.elements import (
    LISTS_MAX,
    NAMED_MAX,
    RANK_MAX,
    STRINGS_MAX,
    VALUES_MAX,
    Encoded,
    Message,
    Part,
    Wanted,
    joined,
)
from runtimes.dialect.kserve import Tensors
from runtimes.dialect.protobuf import FIELDS_MAX, NESTED_FIELDS_MAX
from runtimes.dialect.tensors import DTYPES, array, listed, raw
from tests.tensors import EVERYTHING, Everything, bodies, declared, requests

MANY = NAMED_MAX + 1
NUMBERS = [name for name in DTYPES if name != "BYTES"]
SHAPES = arrays.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4)
TEXTS = st.lists(st.text(), max_size=6)


def anything(datatype: str) -> st.SearchStrategy[Any]:
    return arrays.arrays(DTYPES[datatype], SHAPES)


def understood(message: Message) -> InferRequest:
    return (
        Tensors(message, lambda outputs, model, version: b"")
        .parse(b"", predictor=Everything(), deadline_s=1, flow="acme")
        .request
    )


# ---- round trips -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("datatype", NUMBERS)
@given(st.data())
def test_numbers_go_out_and_come_in_unchanged(datatype: str, data: st.DataObject) -> None:
    found = data.draw(anything(datatype))
    back = array(Part("x", datatype, found.shape, raw=raw(found, datatype)))  # type: ignore[arg-type]
    np.testing.assert_array_equal(back, found)
    assert back.dtype == found.dtype


@pytest.mark.parametrize("datatype", NUMBERS)
@given(st.data())
def test_numbers_are_the_same_in_json_as_in_bytes(datatype: str, data: st.DataObject) -> None:
    elements = {"allow_nan": False, "allow_infinity": False} if datatype.startswith("FP") else {}
    found = data.draw(arrays.arrays(DTYPES[datatype], SHAPES, elements=elements or None))
    for values in (listed(found, datatype), found.tolist()):  # type: ignore[arg-type]
        body = json.dumps({"inputs": [{"name": "x", "datatype": datatype, "shape": found.shape, "data": values}]})
        (part,) = kserve_rest.read(body.encode(), None).parts
        np.testing.assert_array_equal(array(part), found)


@given(TEXTS)
def test_strings_are_framed_as_the_stock_client_frames_them(texts: list[str]) -> None:
    found = np.array(texts, object)
    expected = serialize_byte_tensor(found).item() if texts else b""
    assert joined(texts) == expected
    back = array(Part("x", "BYTES", (len(texts),), raw=expected))
    assert [it.decode() for it in back] == texts
    assert list(deserialize_bytes_tensor(joined(texts))) == [text.encode() for text in texts]


@given(TEXTS)
def test_strings_are_the_same_in_json(texts: list[str]) -> None:
    body = json.dumps({"inputs": [{"name": "x", "datatype": "BYTES", "shape": [len(texts)], "data": texts}]})
    (part,) = kserve_rest.read(body.encode(), None).parts
    assert array(part).tolist() == texts


@given(st.lists(st.binary(max_size=20), max_size=4))
def test_bytes_that_are_no_text_go_as_base64_in_json(files: list[bytes]) -> None:
    coded = {"name": "x", "datatype": "BYTES", "shape": [len(files)], "data": [b64encode(it).decode() for it in files]}
    body = json.dumps({"inputs": [coded | {"parameters": {"content_type": "base64"}}]})
    (part,) = kserve_rest.read(body.encode(), None).parts
    assert array(part).tolist() == files


@pytest.mark.parametrize(
    ("datatype", "data", "says"),
    [
        ("BYTES", ["AAA"], "entry 0 is not base64"),
        ("BYTES", ["AAAA", "ü==="], "entry 1 is not base64"),
        ("BYTES", ["A A A A"], "entry 0 is not base64"),
        ("UINT8", [1], "is for BYTES"),
    ],
)
def test_what_is_no_base64_is_refused_with_its_entry(datatype: str, data: list[object], says: str) -> None:
    given_ = {"name": "x", "datatype": datatype, "shape": [len(data)], "data": data}
    body = json.dumps({"inputs": [given_ | {"parameters": {"content_type": "base64"}}]})
    with pytest.raises(Invalid, match=says) as refused:
        kserve_rest.read(body.encode(), None)
    assert refused.value.param == "x"


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("name", [name for name in EVERYTHING if name != "FP16"])
def test_the_stock_http_client_is_understood(name: str, binary: bool) -> None:
    head = declared(name)
    found = EVERYTHING[name].reshape(head["shape"])
    given_ = tritonclient.http.InferInput(name, head["shape"], head["datatype"])
    given_.set_data_from_numpy(found, binary_data=binary)
    body, json_bytes = tritonclient.http.InferenceServerClient.generate_request_body([given_], request_id="7")
    message = kserve_rest.read(bytes(body) if isinstance(body, bytes) else body.encode(), json_bytes)
    assert message.id == "7"
    np.testing.assert_array_equal(understood(message).inputs[name], found)


@pytest.mark.parametrize("name", EVERYTHING)
def test_the_stock_grpc_client_is_understood(name: str) -> None:
    head = declared(name)
    found = EVERYTHING[name].reshape(head["shape"])
    given_ = tritonclient.grpc.InferInput(name, head["shape"], head["datatype"])
    given_.set_data_from_numpy(found)
    request = service_pb2.ModelInferRequest(id="7", inputs=[given_._get_tensor()])
    request.raw_input_contents.append(given_._get_content())
    asked = kserve_grpc.read(request.SerializeToString())
    assert asked.message.id == "7"
    np.testing.assert_array_equal(understood(asked.message).inputs[name], found)


def sound() -> Iterable[Message]:
    yield from (kserve_rest.read(body, json_bytes) for body, json_bytes in bodies())
    yield from (kserve_grpc.read(body).message for body in requests())


@pytest.mark.parametrize("message", [*sound()])
def test_every_datatype_is_understood_on_both_wires(message: Message) -> None:
    request = understood(message)
    assert request.inputs
    for name, found in request.inputs.items():
        np.testing.assert_array_equal(found.ravel(), EVERYTHING[name])
        assert found.dtype == EVERYTHING[name].dtype
    assert (request.deadline_s, request.flow, request.outputs) == (1, "acme", ())  # all of them


@given(st.data())
def test_tensors_are_cut_out_of_a_message_as_protobuf_reads_them(data: st.DataObject) -> None:
    body = data.draw(st.sampled_from([*requests()]) | st.binary())
    at = data.draw(st.integers(0, len(body)))
    body = body[:at] + data.draw(st.binary(max_size=12) | st.just(b"\x3a\0") | st.just(b"\xba\0\0")) + body[at:]
    try:
        rest, raws = kserve_grpc.cut(body)
    except Invalid:
        with contextlib.suppress(DecodeError):
            refused = messages.ModelInferRequest.FromString(body)
            refused.DiscardUnknownFields()  # a group, which protobuf still reads
            assert refused.ByteSize() < len(body)
        return
    try:
        whole = messages.ModelInferRequest.FromString(body)
    except DecodeError:
        with pytest.raises(DecodeError):
            messages.ModelInferRequest.FromString(rest)
        return
    found = messages.ModelInferRequest.FromString(rest)
    assert raws == [*whole.raw_input_contents]
    del whole.raw_input_contents[:]
    assert found == whole


def test_a_column_of_texts_is_a_list_of_texts() -> None:
    message = Message("", (Part("text", "BYTES", (2, 1), raw=joined(["a", "b"])),), (), {})
    assert understood(message).inputs["text"].tolist() == ["a", "b"]


def test_what_has_one_element_a_row_is_told_as_a_column() -> None:
    written: list[Encoded] = []

    def write(outputs: list[Encoded], model: str, version: str) -> bytes:
        written.extend(outputs)
        return b""

    texts = np.array(["a", "b"], object)
    for shape in (2, 1), (2,):
        message = Message("", (Part("text", "BYTES", shape, raw=joined(texts)),), (Wanted("text"), Wanted("BOOL")), {})
        asked = Tensors(message, write).parse(b"", predictor=Everything(), deadline_s=0, flow="")
        reply = InferReply({"text": asked.request.inputs["text"], "BOOL": np.ones((2, 2), bool)}, 1)
        asked.answer(reply, model="m", predictor=Everything(), id="", created_s=0)
    assert [it.shape for it in written] == [(2, 1), (2, 2)] * 2


def test_bytes_that_are_no_text_stay_bytes() -> None:
    message = Message("", (Part("BYTES", "BYTES", (1, 2), raw=joined([b"\xff", b"a"])),), (), {})
    assert understood(message).inputs["BYTES"].tolist() == [[b"\xff", b"a"]]


@pytest.mark.parametrize(
    ("datatype", "row", "labels", "classes", "best"),
    [
        ("FP32", [0.25, 0.75], ("no", "yes"), 1, ["0.750000:1:yes"]),
        ("FP32", [0.25, 0.75], (), 9, ["0.750000:1", "0.250000:0"]),
        ("FP32", [0.25, 0.75], ("of another output",), 1, ["0.750000:1"]),
        ("FP64", [0.5, 0.5], (), 2, ["0.500000:0", "0.500000:1"]),
        ("UINT8", [0, 255], (), 2, ["255:1", "0:0"]),
        ("INT64", [-(2**63), 2**63 - 1], (), 1, [f"{2**63 - 1}:1"]),
        ("BOOL", [False, True], (), 1, ["1:1"]),
    ],
)
def test_classes_are_the_best_columns_as_triton_tells_them(
    datatype: str, row: list[Any], labels: tuple[str, ...], classes: int, best: list[str]
) -> None:
    predictor = Everything()
    predictor.labels = labels
    outputs = [{"name": datatype, "parameters": {"classification": classes}}]
    body = {"inputs": [declared("BOOL") | {"data": [True, False]}], "outputs": outputs}
    written: list[Encoded] = []

    def write(outputs: list[Encoded], model: str, version: str) -> bytes:
        written.extend(outputs)
        return b""

    message = kserve_rest.read(json.dumps(body).encode(), None)
    asked = Tensors(message, write).parse(b"", predictor=predictor, deadline_s=0, flow="")
    reply = InferReply({datatype: np.array([row, row], DTYPES[datatype])}, 1)
    asked.answer(reply, model="m", predictor=predictor, id="", created_s=0)
    assert written == [Encoded(datatype, "BYTES", (2, len(best)), best * 2)]


# ---- answers -----------------------------------------------------------------------------------------------

OUTPUTS = [
    Encoded("FP32", "FP32", (2,), b"\0\0\x80?\0\0\0\0"),
    Encoded("text", "BYTES", (1,), joined(["ü"])),
]


def test_an_answer_in_bytes_is_read_by_the_stock_http_client() -> None:
    told = kserve_rest.write(OUTPUTS, id="7", model="m", version="v1")
    result = tritonclient.http.InferResult.from_response_body(told.body, False, told.json_bytes)
    assert result.as_numpy("FP32").tolist() == [1, 0]
    assert result.as_numpy("text").tolist() == ["ü".encode()]
    head = result.get_response()
    assert (head["id"], head["model_name"], head["model_version"]) == ("7", "m", "v1")


def test_an_answer_in_json_is_read_by_the_stock_http_client() -> None:
    outputs = [Encoded("FP32", "FP32", (2,), [1.0, 0.0]), Encoded("text", "BYTES", (1,), ["ü"])]
    told = kserve_rest.write(outputs, id="", model="m", version="v1")
    assert told.json_bytes is None
    result = tritonclient.http.InferResult.from_response_body(told.body)
    assert (result.as_numpy("FP32").tolist(), result.as_numpy("text").tolist()) == ([1, 0], ["ü"])
    assert "id" not in result.get_response()


def test_an_answer_over_grpc_is_read_by_the_stock_client() -> None:
    answer = service_pb2.ModelInferResponse.FromString(kserve_grpc.write(OUTPUTS, id="7", model="m", version="v1"))
    result = tritonclient.grpc.InferResult(answer)
    assert (result.as_numpy("FP32").tolist(), result.as_numpy("text").tolist()) == ([1, 0], ["ü".encode()])
    assert (answer.id, answer.model_name, answer.model_version) == ("7", "m", "v1")


@pytest.mark.parametrize("final", [None, True, False])
@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 2_100_000])
def test_an_answer_is_what_protobuf_would_write(size: int, final: bool | None) -> None:
    outputs = [Encoded("a", "UINT8", (size,), b"a" * size), Encoded("b", "BYTES", (1, 1), b"\x01\0\0\0b")]
    for id in ("", "7", "ü" * (size % 1000)):
        answer = messages.ModelInferResponse.FromString(
            kserve_grpc.write(outputs, id=id, model="m", version="v1", final=final)
        )
        parameters = {} if final is None else {"triton_final_response": {"bool_param": final}}
        told = [{"name": it.name, "datatype": it.datatype, "shape": it.shape} for it in outputs]
        assert answer == messages.ModelInferResponse(
            model_name="m",
            model_version="v1",
            id=id,
            outputs=told,
            raw_output_contents=[it.data for it in outputs],
            parameters=parameters,
        )


def test_requests_that_are_alike_but_for_their_elements_are_told_apart() -> None:
    request = service_pb2.ModelInferRequest(model_name="m", id="7")
    request.inputs.add(name="a", datatype="UINT8", shape=[2])
    for elements in (b"ab", b"cd", b"ab"):
        del request.raw_input_contents[:]
        request.raw_input_contents.append(elements)
        body = request.SerializeToString()
        asked = kserve_grpc.read(body)
        [part] = asked.message.parts
        assert (part.name, part.datatype, part.shape, bytes(part.raw or b"")) == ("a", "UINT8", (2,), elements)
        assert (asked.model, asked.message.id, asked.size) == ("m", "7", len(body))
    request.raw_input_contents.append(b"one more than inputs")
    for _ in range(2):
        with pytest.raises(Invalid, match="2 raw_input_contents were sent for 1 inputs"):
            kserve_grpc.read(request.SerializeToString())


def test_few_requests_and_answers_are_remembered() -> None:
    for number in range(kserve_grpc.KNOWN_MAX + 1):
        request = service_pb2.ModelInferRequest(model_name=f"m{number}")
        request.inputs.add(name="a", datatype="UINT8", shape=[1])
        request.raw_input_contents.append(b"a")
        assert kserve_grpc.read(request.SerializeToString()).model == f"m{number}"
        kserve_grpc.write([], id="", model=f"m{number}", version="1")
    assert kserve_grpc._known.cache_info().currsize == kserve_grpc.KNOWN_MAX
    assert kserve_grpc._head.cache_info().currsize == kserve_grpc.KNOWN_MAX
    before = kserve_grpc._known.cache_info().misses
    request.id = "7" * kserve_grpc.KNOWN_BYTES_MAX
    kserve_grpc.read(request.SerializeToString())
    assert kserve_grpc._known.cache_info().misses == before  # it was not even asked for


@pytest.mark.parametrize("wanted", [["FP32"], ["BYTES", "FP32"], list(EVERYTHING)])
def test_only_what_is_asked_for_is_answered_in_the_order_it_is_asked_for(wanted: list[str]) -> None:
    outputs = [{"name": name} for name in wanted]
    body = {"inputs": [declared("BOOL") | {"data": [True, False]}], "outputs": outputs}
    written: list[str] = []

    def write(outputs: list[Encoded], model: str, version: str) -> bytes:
        written.extend(it.name for it in outputs)
        return f"{model} {version}".encode()

    predictor = Everything()
    asked = Tensors(kserve_rest.read(json.dumps(body).encode(), None), write).parse(
        b"", predictor=predictor, deadline_s=0, flow=""
    )
    assert asked.request.outputs == tuple(wanted)
    reply = InferReply(dict(EVERYTHING), 0)
    assert asked.answer(reply, model="m", predictor=predictor, id="", created_s=0) == b"m v7"
    assert written == wanted


def test_classes_of_a_server_elsewhere_are_in_its_own_words() -> None:
    wanted = [
        {"name": "FP32", "parameters": {"classification": 2}},
        {"name": "INT8", "parameters": {"classification": 1}},
    ]
    body = {"inputs": [declared("BOOL") | {"data": [True, False]}], "outputs": wanted}
    written: list[Encoded] = []

    def write(outputs: list[Encoded], model: str, version: str) -> bytes:
        written.extend(outputs)
        return b""

    predictor = Everything()
    predictor.versions, predictor.labels = ("1",), ()
    asked = Tensors(kserve_rest.read(json.dumps(body).encode(), None), write).parse(
        b"", predictor=predictor, deadline_s=0, flow=""
    )
    assert asked.request.classes == {"FP32": 2, "INT8": 1}
    found = np.array([b"7.0:1:cat", b"2.0:0:dog"], object)
    asked.answer(InferReply({"FP32": found, "INT8": found[:1]}, 0), model="m", predictor=predictor, id="", created_s=0)
    assert [(it.name, it.datatype, it.data) for it in written] == [
        ("FP32", "BYTES", ["7.0:1:cat", "2.0:0:dog"]),
        ("INT8", "BYTES", ["7.0:1:cat"]),
    ]


@pytest.mark.parametrize("versions", [(), ("1",)])
def test_texts_have_no_classes_wherever_they_come_from(versions: tuple[str, ...]) -> None:
    wanted = [{"name": "BYTES", "parameters": {"classification": 1}}]
    body = json.dumps({"inputs": [declared("BOOL") | {"data": [True, False]}], "outputs": wanted}).encode()
    predictor = Everything()
    predictor.versions = versions
    translation = Tensors(kserve_rest.read(body, None), lambda outputs, model, version: b"")
    with pytest.raises(Invalid, match="`classification` is of numbers"):
        translation.parse(b"", predictor=predictor, deadline_s=0, flow="")


@pytest.mark.parametrize("number", [-1, 1 << 32, 1 << 63, 1 << 70])
def test_a_number_of_classes_is_one_that_a_tensor_may_have(number: int) -> None:
    wanted = [{"name": "FP32", "parameters": {"classification": number}}]
    body = json.dumps({"inputs": [declared("BOOL") | {"data": [True, False]}], "outputs": wanted}).encode()
    with pytest.raises(Invalid, match="must be a number of classes"):
        kserve_rest.read(body, None)


@pytest.mark.parametrize("outputs", [[], [{"name": "BOOL"}, {"name": "FP32"}]])
def test_of_a_model_that_gives_less_than_it_declares_what_there_is_is_told(outputs: list[Any]) -> None:
    body = {"inputs": [declared("BOOL") | {"data": [True, False]}], "outputs": outputs}
    written: list[str] = []

    def write(outputs: list[Encoded], model: str, version: str) -> bytes:
        written.extend(it.name for it in outputs)
        return version.encode()

    predictor = Everything()
    asked = Tensors(kserve_rest.read(json.dumps(body).encode(), None), write).parse(
        b"", predictor=predictor, deadline_s=0, flow=""
    )
    reply = InferReply({"FP32": EVERYTHING["FP32"]}, 0, version="3")
    assert asked.answer(reply, model="m", predictor=predictor, id="", created_s=0) == b"3"
    assert written == ["FP32"]


def test_an_output_that_is_no_text_goes_as_bytes_only() -> None:
    with pytest.raises(Invalid, match="UTF-8"):
        listed(np.array([b"\xff"], object), "BYTES")


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64"])
def test_an_output_that_is_no_finite_number_goes_as_bytes_only(number: float, datatype: Any) -> None:
    found = np.array([0, number], DTYPES[datatype])
    with pytest.raises(Invalid, match=r"NaN or infinity, .* as binary data"):
        listed(found, datatype)
    assert raw(found, datatype) == found.tobytes()


@pytest.mark.parametrize("of_all", [True, False, None])
@pytest.mark.parametrize("of_one", [True, False, None])
def test_an_output_s_own_word_on_bytes_comes_before_that_of_all(of_one: bool | None, of_all: bool | None) -> None:
    output = {"name": "FP32", "parameters": {} if of_one is None else {"binary_data": of_one}}
    about = {"x": 1, "y": 0.5, "z": "a"} | ({} if of_all is None else {"binary_data_output": of_all})
    asked = {"inputs": [declared("INT64") | {"data": [1, 2]}], "outputs": [output], "parameters": about}
    message = kserve_rest.read(json.dumps(asked, indent=1).encode(), None)
    assert message.outputs == (Wanted("FP32", bool(of_all) if of_one is None else of_one),)
    assert message.parameters == about


# ---- what is refused ---------------------------------------------------------------------------------------


def rest(changes: dict[str, Any], name: str = "INT64") -> Callable[[], InferRequest]:
    body = {"inputs": [declared(name) | {"data": [1, 2]} | changes]}
    return lambda: understood(kserve_rest.read(json.dumps(body).encode(), None))


def binary(size: Any, *, json_bytes: int | None = None, tail: bytes = bytes(16)) -> Callable[[], InferRequest]:
    head = json.dumps({"inputs": [declared("INT64") | {"parameters": {"binary_data_size": size}}]}).encode()
    said = len(head) if json_bytes is None else json_bytes
    return lambda: understood(kserve_rest.read(head + tail, said))


def body(text: bytes, json_bytes: int | None = None) -> Callable[[], InferRequest]:
    return lambda: understood(kserve_rest.read(text, json_bytes))


def classes(name: str, count: Any) -> Callable[[], InferRequest]:
    outputs = [{"name": name, "parameters": {"classification": count}}]
    return body(json.dumps({"inputs": [declared("INT64") | {"data": [1, 2]}], "outputs": outputs}).encode())


def parameters(**given: Any) -> Callable[[], InferRequest]:
    return body(json.dumps({"inputs": [declared("INT64") | {"data": [1, 2]}], "parameters": given}).encode())


def in_bytes(said: Any) -> Callable[[], InferRequest]:
    outputs = [{"name": "FP32", "parameters": {"binary_data": said}}]
    return body(json.dumps({"inputs": [declared("INT64") | {"data": [1, 2]}], "outputs": outputs}).encode())


def asks(**fields: Any) -> Callable[[], InferRequest]:
    return lambda: understood(kserve_grpc.read(messages.ModelInferRequest(**fields).SerializeToString()).message)


def grpc(*raws: bytes, outputs: Sequence[Any] = (), **changes: Any) -> Callable[[], InferRequest]:
    name = changes.get("name", "INT64")
    request = messages.ModelInferRequest(inputs=[declared(name) | changes], raw_input_contents=raws, outputs=outputs)
    return lambda: understood(kserve_grpc.read(request.SerializeToString()).message)


def strings(framed: bytes, count: int = 2) -> Callable[[], InferRequest]:
    return lambda: understood(Message("", (Part("text", "BYTES", (count,), raw=framed),), (), {}))


DEEP = b"[" * 90 + b"]" * 90
REFUSED: dict[str, tuple[Callable[[], InferRequest], str | None, str]] = {
    # what is wrong: (the request, the field that is named, what is said)
    "no JSON": (body(b"{"), None, "not valid JSON"),
    "JSON that is no UTF-8": (body(b'{"inputs":[{"name":"\xff"}]}'), None, "UTF-8"),
    "no inputs": (body(b'{"inputs":[]}'), "inputs", "no inputs"),
    "inputs left out": (body(b"{}"), "inputs", "inputs"),
    "inputs of another type": (body(b'{"inputs":5}'), "inputs", "array"),
    "a name of another type": (rest({"name": 5}), "inputs", "str"),
    "an unknown input": (rest({"name": "nobody"}), "nobody", "none of the model's"),
    "an unknown datatype": (rest({"datatype": "INT128"}), "INT64", "unknown datatype, INT128; known"),
    "a datatype without end": (rest({"datatype": "x" * 10_000}), "INT64", "unknown datatype, x{99}…; known"),
    "BF16": (rest({"datatype": "BF16"}), "INT64", "BF16"),
    "another datatype": (rest({"datatype": "INT32"}), "INT64", "INT32; the model takes INT64"),
    "another rank": (rest({"shape": [2]}), "INT64", r"\[2\]; the model takes \[-1, 2\]"),
    "another size": (rest({"shape": [2, 1]}), "INT64", r"takes \[-1, 2\]"),
    "a negative size": (rest({"shape": [-1, 2]}), "INT64", "negative"),
    "a size beyond all memory": (rest({"shape": [2**62, 2]}), "INT64", "more than"),
    "a product that overflows": (rest({"shape": [2**32, 2**32]}), "INT64", "more than"),
    "an empty axis beside a huge one": (rest({"shape": [0, 2**40]}), "INT64", "more than"),
    "a size that is no integer": (rest({"shape": [1.5, 2]}), "INT64", "`shape` must be a list of whole numbers"),
    "a shape that is no list": (rest({"shape": {"rows": 1}}), "INT64", "`shape` must be a list of whole numbers"),
    "a size beyond any integer": (rest({"shape": [10**400, 2]}), "INT64", r"beyond ±2\^63"),
    "a negative size beyond any": (rest({"shape": [-(10**400), 2]}), "INT64", r"beyond ±2\^63"),
    "a name without end": (rest({"name": "x" * 10_000}), None, "no name is longer than 256"),
    "an output's name without end": (
        body(json.dumps({"inputs": [], "outputs": [{"name": "x" * 10_000}]}).encode()), None, "no name is longer"
    ),
    "gRPC's name without end": (asks(inputs=[declared("INT64") | {"name": "x" * 10_000}]), None, "no name is longer"),
    "very many inputs": (body(json.dumps({"inputs": [declared("INT64")] * MANY}).encode()), "inputs", "at most"),
    "very many outputs": (
        body(json.dumps({"inputs": [], "outputs": [{"name": "x"}] * MANY}).encode()), "outputs", "at most"
    ),
    "very many parameters": (
        body(json.dumps({"inputs": [], "parameters": dict.fromkeys(map(str, range(MANY)))}).encode()),
        "parameters",
        "at most",
    ),
    "parameters that are none": (body(b'{"inputs":[],"parameters":null}'), "parameters", "`parameters`: Expected"),
    "a parameter that is a list": (parameters(x=[1]), "x", "`x` must be a string, a number or a boolean"),
    "a parameter that is an object": (parameters(x={}), "x", "`x` must be a string, a number or a boolean"),
    "a parameter that is null": (parameters(x=None), "x", "`x` must be a string, a number or a boolean"),
    "a parameter's name without end": (parameters(**{"x" * 10_000: []}), f"{'x' * 99}…", "`x{99}…` must be a string"),
    "bytes wanted in a string": (parameters(binary_data_output="true"), "binary_data_output", "must be true or false"),
    "bytes wanted by a number": (parameters(binary_data_output=1), "binary_data_output", "must be true or false"),
    "an output's bytes wanted in a string": (in_bytes("yes"), "FP32", "`binary_data` must be true or false"),
    "an output's bytes wanted by a number": (in_bytes(1), "FP32", "`binary_data` must be true or false"),
    "an output's bytes wanted by null": (in_bytes(None), "FP32", "`binary_data` must be true or false"),
    "gRPC's very many inputs": (asks(inputs=[declared("INT64")] * MANY), "inputs", "at most"),
    "gRPC's very many outputs": (asks(outputs=[{"name": "x"}] * MANY), "outputs", "at most"),
    "gRPC's very many parameters": (
        asks(parameters={str(index): {"int64_param": 1} for index in range(MANY)}), "parameters", "at most"
    ),
    "gRPC's very many parameters of an output": (
        asks(outputs=[{"name": "x", "parameters": {str(index): {"int64_param": 1} for index in range(MANY)}}]),
        "parameters",
        "at most",
    ),
    "gRPC's very many tensors": (asks(raw_input_contents=[b""] * 5 * MANY), None, f"more than {FIELDS_MAX} inputs"),
    "gRPC's groups, which nobody writes": (
        lambda: understood(kserve_grpc.read(b"\x0b\x0c").message), None, "no inference.ModelInferRequest"
    ),
    "gRPC's very many axes": (grpc(shape=[1] * (RANK_MAX + 1)), "INT64", "axes"),
    "very many axes": (rest({"shape": [1] * (RANK_MAX + 1)}), "INT64", "axes"),
    "too few elements": (rest({"data": [1]}), "INT64", "1 elements"),
    "too many elements": (rest({"data": [1, 2, 3]}), "INT64", "3 elements"),
    "ragged rows": (rest({"shape": [2, 2], "data": [[1, 2], [3]]}), "INT64", "ragged"),
    "rows beside elements": (rest({"shape": [2, 2], "data": [[1, 2], 3]}), "INT64", "ragged"),
    "rows nested too deeply": (rest({"data": [[[1, 2]]]}), "INT64", "ragged"),
    "rows nested without end": (
        body(b'{"inputs":[{"name":"INT64","datatype":"INT64","shape":[1,2],"data":%b}]}' % DEEP), "INT64", "ragged"
    ),
    "data that is no list": (rest({"data": 5}), "INT64", "list of INT64"),
    "null": (rest({"data": [1, None]}), "INT64", "list of INT64"),
    "a fraction where ids are wanted": (rest({"data": [1, 2.5]}), "INT64", "list of INT64"),
    "a boolean where ids are wanted": (rest({"data": [1, True]}), "INT64", "list of INT64"),
    "NaN where ids are wanted": (
        body(b'{"inputs":[{"name":"INT64","datatype":"INT64","shape":[1,2],"data":[1,NaN]}]}'), None, "not valid JSON"
    ),
    "an integer too large": (rest({"data": [1, 2**63]}), "INT64", "number that INT64 can't"),
    "an integer too small": (rest({"data": [1, -1]}, "UINT8"), "UINT8", "number that UINT8 can't"),
    "a number too large for FP32": (rest({"data": [1, 1e300]}, "FP32"), "FP32", "number that FP32 can't"),
    "a number too large for FP16": (rest({"data": [1, 1e6]}, "FP16"), "FP16", "number that FP16 can't"),
    "a number too large for any": (
        body(b'{"inputs":[{"name":"FP64","datatype":"FP64","shape":[1,2],"data":[1,1e999]}]}'), "FP64",
        "number that FP64 can't",
    ),
    "an integer too large for any": (
        rest({"data": [1, 10**400]}, "FP64"), "FP64", "number that FP64 can't"
    ),
    "a size of a tensor that is too large for any": (
        body(b'{"inputs":[{"name":"FP64","datatype":"FP64","shape":[1%b]}]}' % (b"0" * 5000)), "FP64", "whole numbers"
    ),
    "a number as BOOL": (rest({"data": [1, 0]}, "BOOL"), "BOOL", "list of BOOL"),
    "a number as text": (rest({"data": ["a", 5]}, "text"), "text", "list of BYTES"),
    "half a character": (
        body(b'{"inputs":[{"name":"text","datatype":"BYTES","shape":[1],"data":["\\ud800"]}]}'), None, "not valid JSON"
    ),
    "very many strings": (rest({"shape": [STRINGS_MAX + 1], "data": []}, "text"), "text", "at most"),
    "very many numbers in JSON": (rest({"shape": [VALUES_MAX, 2], "data": []}), "INT64", "binary data"),
    "more numbers than can be": (rest({"data": [0] * (VALUES_MAX + 1)}), "INT64", "more than"),
    "neither data nor bytes": (body(b'{"inputs":[{"name":"a","datatype":"INT8","shape":[1]}]}'), "a", "neither"),
    "both of them": (rest({"parameters": {"binary_data_size": 1}}), "INT64", "both"),
    "shared memory": (rest({"parameters": {"shared_memory_region": "x"}}), "INT64", "not served"),
    "an input twice": (
        body(json.dumps({"inputs": [declared("INT64") | {"data": [1, 2]}] * 2}).encode()), "INT64", "twice"
    ),
    "an unknown output": (
        body(json.dumps({"inputs": [declared("INT64") | {"data": [1, 2]}], "outputs": [{"name": "x"}]}).encode()),
        "x",
        "none of the model's",
    ),
    "an output twice": (
        body(
            json.dumps(
                {"inputs": [declared("INT64") | {"data": [1, 2]}], "outputs": [{"name": "FP32"}, {"name": "FP32"}]}
            ).encode()
        ),
        "outputs",
        "twice",
    ),
    "gRPC's classes of texts": (
        grpc(bytes(16), outputs=[{"name": "text", "parameters": {"classification": {"int64_param": 3}}}]),
        "text",
        "numbers in rows",
    ),
    "classes of texts": (classes("text", 3), "text", "numbers in rows"),
    "a number of classes that is none": (classes("FP32", "3"), "FP32", "must be a number of classes"),
    "less than no classes": (classes("FP32", -1), "FP32", "must be a number of classes"),
    "fewer bytes than the shape takes": (binary(8, tail=bytes(8)), "INT64", "brings 8 bytes; INT64 .* takes 16"),
    "bytes that are not there": (binary(17), "INT64", "16 are left"),
    "a negative number of bytes": (binary(-1), "INT64", "must be a number of bytes"),
    "a number of bytes that is none": (binary("16"), "INT64", "must be a number of bytes"),
    "bytes that belong to nobody": (binary(16, tail=bytes(20)), None, "4 bytes behind its JSON"),
    "a JSON length beyond the body": (binary(16, json_bytes=10_000), None, "Inference-Header-Content-Length"),
    "a JSON length amid the JSON": (
        binary(16, json_bytes=10), None, "up to byte 10, where Inference-Header-Content-Length .* not valid JSON"
    ),
    "a JSON length amid the bytes": (binary(16, json_bytes=120), None, "not valid JSON"),
    "a JSON length of nothing": (binary(16, json_bytes=0), None, "Length is 0: .* then the bytes"),
    "bytes alone": (body(bytes(16), 0), None, "bytes alone is not served"),
    "nothing at all": (body(b"", 0), None, "bytes alone is not served"),
    "a string's length without its end": (strings(b"\5\0\0\0abcd"), "text", "ends within"),
    "half a string's length": (strings(b"\1\0\0\0a\1\0"), "text", "ends within"),
    "a string's length of four billion": (strings(b"\xff\xff\xff\xff"), "text", "ends within"),
    "a string too few": (strings(joined(["a"])), "text", "ends within"),
    "a string too many": (strings(joined(["a"] * 3)), "text", "5 bytes more"),
    "a text that is no UTF-8": (strings(joined([b"a", b"\xff"])), "text", "entry 1 is not valid UTF-8"),
    "a text in JSON that is no UTF-8": (
        body(b'{"inputs":[{"name":"text","datatype":"BYTES","shape":[1],"data":["\xff"]}]}'), "text", "not valid UTF-8"
    ),
    "a BOOL of two": (grpc(b"\1\2", name="BOOL"), "BOOL", "0 or 1"),
    "no message": (lambda: understood(kserve_grpc.read(b"\xff\xff").message), None, "no inference.ModelInferRequest"),
    "raw contents for fewer inputs": (grpc(bytes(16), bytes(16)), None, "2 raw_input_contents"),
    "contents beside raw contents": (grpc(bytes(16), contents={"int64_contents": [1, 2]}), "INT64", "beside"),
    "contents of another datatype": (grpc(contents={"fp32_contents": [1, 2]}), "INT64", "go as int64_contents"),
    "contents too few": (grpc(contents={"int64_contents": [1]}), "INT64", "1 elements"),
    "FP16 as a list": (grpc(name="FP16", contents={"fp32_contents": [1, 2]}), "FP16", "raw_input_contents only"),
    "an INT8 of 300": (grpc(name="INT8", contents={"int_contents": [1, 300]}), "INT8", "number that INT8 can't"),
    "a raw length that lies": (grpc(bytes(15)), "INT64", "brings 15 bytes"),
    "gRPC's BF16": (grpc(bytes(4), datatype="BF16"), "INT64", "BF16"),
    "gRPC's shared memory": (
        grpc(parameters={"shared_memory_region": {"string_param": "x"}}), "INT64", "not served"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_can_t_be_understood_is_refused_by_name(what: str) -> None:
    ask, param, says = REFUSED[what]
    with pytest.raises(Invalid, match=says) as refused:
        ask()
    assert refused.value.param == param


def test_a_number_that_is_none_may_be_given_as_a_float() -> None:
    part = Part("x", "FP32", (2,), raw=np.array([np.nan, np.inf], "<f4").tobytes())
    np.testing.assert_array_equal(array(part), [np.nan, np.inf])


@pytest.mark.parametrize("size", [-1, 1 << 62])
def test_a_shape_that_can_t_be_is_refused_before_a_call_is_reckoned_by_it(size: int) -> None:
    asked = declared("INT64") | {"shape": [size, 2]}
    with pytest.raises(Invalid, match="shape"):
        kserve_rest.read(json.dumps({"inputs": [asked | {"data": [1, 2]}]}).encode(), None)
    with pytest.raises(Invalid, match="shape"):
        kserve_grpc.read(messages.ModelInferRequest(inputs=[asked]).SerializeToString())


# ---- what would take much more memory than it came in ------------------------------------------------------

TEXT = b'{"name":"text","datatype":"BYTES","shape":[1],"data":["a"]%b}'


def many(what: bytes, count: int) -> bytes:
    return b",".join([what] * count)


SWOLLEN: dict[str, tuple[bytes, str | None]] = {
    # what there is much of: (the body, what is said of it; None if nobody reads it)
    "a parameter": (b'{"parameters":{"a":[%b]},"inputs":[%b]}' % (many(b"[]", 500_000), TEXT % b""), "not taken"),
    "parameters": (
        b'{"parameters":{%b},"inputs":[]}' % b",".join(b'"%d":1' % index for index in range(100_000)), "not taken"
    ),
    "a field that nobody knows": (b'{"x":[%b],"inputs":[%b]}' % (many(b"[]", 500_000), TEXT % b""), None),
    "an input's parameter that nobody knows": (
        b'{"inputs":[%b]}' % (TEXT % b',"parameters":{"x":[%b]}') % many(b"[]", 500_000), None
    ),
    "an output's parameter that nobody knows": (
        b'{"inputs":[%b],"outputs":[{"name":"text","parameters":{"x":[%b]}}]}' % (TEXT % b"", many(b"[]", 500_000)),
        None,
    ),
    "inputs": (b'{"inputs":[%b]}' % many(b'{"name":"a","datatype":"a","shape":[]}', 50_000), "at most 256 inputs"),
    "outputs": (b'{"inputs":[],"outputs":[%b]}' % many(b'{"name":"a"}', 100_000), "at most 256 outputs"),
    "a shape": (
        b'{"inputs":[{"name":"a","datatype":"INT64","shape":[%b],"data":[1]}]}' % many(b"1", 500_000), "16 axes"
    ),
    "lists for a text": (
        b'{"inputs":[{"name":"text","datatype":"BYTES","shape":[1],"data":[%b]}]}' % many(b"[]", 500_000),
        f"more than {STRINGS_MAX} elements",
    ),
    "texts for one": (
        b'{"inputs":[{"name":"text","datatype":"BYTES","shape":[1],"data":[%b]}]}' % many(b'""', 500_000),
        f"more than {STRINGS_MAX} elements",
    ),
    "lists for numbers": (
        b'{"inputs":[{"name":"INT64","datatype":"INT64","shape":[1,2],"data":[%b]}]}' % many(b"[]", 500_000),
        f"more than {LISTS_MAX} lists",
    ),
    "classes": (
        b'{"inputs":[],"outputs":[{"name":"text","parameters":{"classification":[%b]}}]}' % many(b"[]", 500_000),
        "number of classes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SWOLLEN)
def test_a_body_takes_no_more_than_its_own_size_beside_it_before_it_is_refused(what: str) -> None:
    body, says = SWOLLEN[what]
    tracemalloc.start()
    try:
        if says is None:
            assert understood(kserve_rest.read(body, None)).inputs["text"].tolist() == ["a"]
        else:
            with pytest.raises(Invalid, match=says):
                understood(kserve_rest.read(body, None))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 1.25 * len(body) + 2**19  # one copy to look at, and a piece of 64 KiB taken apart


def test_texts_may_be_as_many_as_are_taken_and_hold_what_they_like() -> None:
    texts = ['[,"\\', "{,,,,"] * (STRINGS_MAX // 2)
    for data in texts, [[it] for it in texts]:
        given_ = {"name": "text", "datatype": "BYTES", "shape": [STRINGS_MAX, 1], "data": data}
        body = json.dumps({"inputs": [given_]}).encode()
        assert understood(kserve_rest.read(body, None)).inputs["text"].tolist() == texts


def field(number: int, content: bytes) -> bytes:
    size, length = len(content), b""
    while size > 0x7F:
        length, size = length + bytes((size & 0x7F | 0x80,)), size >> 7
    return bytes((number << 3 | 2,)) + length + bytes((size,)) + content


@pytest.mark.parametrize(
    "body",
    [
        *(field(number, b"") * (FIELDS_MAX + 1) for number in (4, 5, 6, 7)),
        field(5, field(3, b"\x01" * (VALUES_MAX + 1))),
        field(5, field(5, field(3, b"\x80\x01" * (VALUES_MAX + 1)))),
        field(5, field(5, field(8, b"") * NESTED_FIELDS_MAX)),
        field(5, field(4, b"") * NESTED_FIELDS_MAX),
        field(5, b"\x18\x01" * NESTED_FIELDS_MAX),
        field(6, field(2, b"") * NESTED_FIELDS_MAX),
        b"".join(field(5, field(5, field(8, b"") * (NESTED_FIELDS_MAX // 2))) for _ in range(2)),
    ],
    ids=lambda body: f"{body[:12].hex()} of {len(body)}",
)
def test_a_message_is_counted_before_anything_is_made_of_it(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    messages.ModelInferRequest.FromString(body)  # protobuf itself would
    monkeypatch.setattr(kserve_grpc, "ModelInferRequest", None)
    with pytest.raises(Invalid, match="has more than"):
        kserve_grpc.read(body)


def test_a_message_may_have_as_many_strings_as_are_taken() -> None:
    head = declared("text") | {"shape": [STRINGS_MAX]}
    request = messages.ModelInferRequest(inputs=[head | {"contents": {"bytes_contents": [b"a"] * STRINGS_MAX}}])
    asked = kserve_grpc.read(request.SerializeToString())
    assert understood(asked.message).inputs["text"].tolist() == ["a"] * STRINGS_MAX
