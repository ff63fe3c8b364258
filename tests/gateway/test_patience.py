"""How long a client means to wait: it may shorten its call's life, and never lengthen it."""

import pytest

from gateway.edge.patience import patience_s
from gateway.errors import BadRequest

LEFT_MS = b"x-envoy-expected-rq-timeout-ms"
PYTHON_S, NODE_S = b"x-stainless-read-timeout", b"x-stainless-timeout"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("given", "means_s"), [(b"1500", 1.5), (b"0", 0), (b"600000", 600), (b"999999999999", 600)])
def test_what_is_left_of_a_call_is_believed_up_to_the_gateway_s_own_bound(
    given: bytes, means_s: float, stream: bool
) -> None:
    assert patience_s({LEFT_MS: given}, stream=stream, s_max=600) == means_s


@pytest.mark.parametrize("given", [b"", b"-1", b"1.5", b"5s", b"1e3", b"1" * 13, b"inf", "٣".encode()])
def test_what_is_no_number_is_refused(given: bytes) -> None:
    with pytest.raises(BadRequest, match="x-envoy-expected-rq-timeout-ms"):
        patience_s({LEFT_MS: given}, stream=False, s_max=600)


@pytest.mark.parametrize(
    ("fields", "means_s"),
    [
        ({}, 600),
        ({PYTHON_S: b"600.0"}, 600),
        ({PYTHON_S: b"5"}, 5),
        ({PYTHON_S: b"0.5"}, 0.5),
        ({PYTHON_S: b"900"}, 600),
        ({PYTHON_S: b"None"}, 600),
        ({PYTHON_S: b"nan"}, 600),
        ({NODE_S: b"5"}, 6),  # 5.999 s is said as 5
        ({NODE_S: b"0"}, 1),
        ({NODE_S: b"900"}, 600),
        ({PYTHON_S: b"5", LEFT_MS: b"2000"}, 2),
        ({PYTHON_S: b"1", LEFT_MS: b"2000"}, 1),
    ],
)
def test_an_sdk_s_own_time_bounds_an_answer_in_one_piece(fields: dict[bytes, bytes], means_s: float) -> None:
    assert patience_s(fields, stream=False, s_max=600) == means_s


def test_of_a_stream_it_bounds_the_silences_and_not_the_whole() -> None:
    assert patience_s({PYTHON_S: b"5", NODE_S: b"5"}, stream=True, s_max=600) == 600
