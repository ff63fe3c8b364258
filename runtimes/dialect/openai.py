"""OpenAI-shaped JSON ⇄ named arrays, for the models that speak tensors: every path, and how it is translated. All
of it is pure: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from runtimes.dialect import Translation
from runtimes.dialect.classification import Classification
from runtimes.dialect.embeddings import Embeddings
from runtimes.dialect.moderation import Moderation
from runtimes.dialect.score import Rerank, Score

TRANSLATIONS: Mapping[str, Translation] = MappingProxyType(
    {
        "/v1/embeddings": Embeddings,
        "/v1/score": Score,
        "/v1/rerank": Rerank,
        "/v1/classify": Classification,
        "/v1/moderations": Moderation,
    }
)
"""Path → how it is translated."""
