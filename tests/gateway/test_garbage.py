"""A call leaves nothing that only the garbage collector could find: looking for it cost a twentieth of all work."""

import asyncio
import gc
from pathlib import Path

import pytest

from tests.profile.__main__ import ANSWER, BODY, PLAIN, STREAM_HEAD, Rig, framed

DONE = framed(b"data: [DONE]\n\n") + b"0\r\n\r\n"
ANSWERS = {"whole": (BODY, ANSWER), "streamed": (BODY[:-1] + b',"stream":true}', STREAM_HEAD + framed(PLAIN) + DONE)}
CALLS = 50


@pytest.mark.parametrize("kind", ANSWERS)
async def test_a_call_leaves_no_garbage(tmp_path: Path, kind: str) -> None:
    body, answer = ANSWERS[kind]
    rig = Rig(tmp_path)
    await rig.journal.open()
    await rig.runtime.open()
    await rig.upstream(answer)
    client, transport = rig.connected()
    length = b"Content-Length: %d"
    request = rig.request.replace(BODY, body).replace(length % len(BODY), length % len(body))

    async def call() -> None:
        before = rig.journal.written_bytes
        client.data_received(request)
        while rig.journal.written_bytes == before:
            await asyncio.sleep(0)

    await call()
    gc.collect()
    gc.disable()
    try:
        for _ in range(CALLS):
            await call()
        found = gc.collect()
    finally:
        gc.enable()
    assert transport.written > CALLS * 100
    assert found < CALLS, f"{found} objects of {CALLS} calls"
    client.connection_lost(None)
    await rig.journal.aclose()
