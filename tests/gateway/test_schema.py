"""The documents that the data plane serves of itself."""

import pytest
from litestar import Litestar
from litestar.testing import AsyncTestClient

from gateway.edge.schema import documents


@pytest.mark.parametrize(
    ("path", "kind"), [("/docs", "text/html; charset=utf-8"), ("/openapi.json", "application/json")]
)
async def test_a_document_names_its_kind_once(path: str, kind: str) -> None:
    async with AsyncTestClient(Litestar(documents(), openapi_config=None)) as client:
        answer = await client.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
