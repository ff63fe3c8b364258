"""How long a client means to wait for its answer, by what its request's header says.

A client may shorten its call's life and never lengthen it: an engine should not work for somebody who will have gone.
`x-envoy-expected-rq-timeout-ms` says what is left of the whole call; Envoy and what is built on it send it, and so does
a gateway in front of this one. OpenAI's and Anthropic's SDKs say after what silence they give up, which is the same
only if the answer comes in one piece.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from gateway.call import LEFT_MS
from gateway.errors import BadRequest


def patience_s(fields: Mapping[bytes, bytes], *, stream: bool, s_max: float) -> float:
    """At most `s_max`. Raises BadRequest if the header that was meant for this can't be read."""
    left_ms = fields.get(LEFT_MS)
    if left_ms is not None:
        if not MILLISECONDS.fullmatch(left_ms):
            raise BadRequest(f"The header {LEFT_MS.decode()} takes a whole number of milliseconds.")
        s_max = min(s_max, int(left_ms) / 1000)
    if not stream:
        python_s, node_s = fields.get(b"x-stainless-read-timeout"), fields.get(b"x-stainless-timeout")
        if python_s is not None and SECONDS.fullmatch(python_s):
            s_max = min(s_max, float(python_s))
        if node_s is not None and SECONDS.fullmatch(node_s):
            s_max = min(s_max, float(node_s) + 1)  # it was rounded down
    return s_max


MILLISECONDS = re.compile(rb"[0-9]{1,12}")
SECONDS = re.compile(rb"[0-9]{1,9}(?:\.[0-9]{1,9})?")
