"""Flags from several sources, n-grams inside the graph, the blend of both, and what `/v1/moderations` makes of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from runtimes.artifact import Shelf
from runtimes.clock import SystemClock
from runtimes.contract import Site
from runtimes.dialect.moderation import Moderation
from runtimes.onnx import Onnx
from training import catalogue
from training import recipe as recipes
from training.contract import Flags, Inputs
from training.errors import DataError, RecipeError
from training.export import export
from training.model import Model
from training.models.ngrams import PAD, TfIdf
from training.spec import Recipe
from training.spec.data import Flagged, Source
from training.spec.trainers import Blend
from training.trainers.blend import threshold

Make = Callable[..., Recipe]

LETTERS = "abcdefghijklmnopqrstuvwx"


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Source, ...]:
    """A file that knows of one flag, one of two of which one is not always known, and one of rows without any."""
    (tmp_path / "a.csv").write_text(
        "prompt,type\n" + "".join(f"card twice {it},bad\nhelp {it},good\n" for it in LETTERS)
    )
    known = [{"text": f"parcel declined {it}", "late": 1} for it in LETTERS]
    other = [{"text": [f"my order {it}", "and more"], "late": 0, "rude": int(it < "m")} for it in LETTERS]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, [*known, *other])))
    (tmp_path / "c.csv").write_text("text\n" + "\n".join(f"where is {it}" for it in LETTERS))
    return (
        Source(name="a", file=str(tmp_path / "a.csv"), text="prompt", flags={"odd": "type=bad"}),
        Source(name="b", file=str(tmp_path / "b.jsonl"), flags={"late": "late", "rude": "rude"}),
        Source(name="c", file=str(tmp_path / "c.csv"), without=("odd", "late"), part="test", rows=5),
    )


def test_what_a_source_says_nothing_about_is_unknown(sources: tuple[Source, ...]) -> None:
    rows = Flagged(sources).load()
    every = rows.both
    assert isinstance(every.targets, Flags)
    assert every.targets.labels == ("odd", "late", "rude")
    of = dict(zip(every.inputs["text"], every.targets.values.tolist(), strict=True))
    unknown = pytest.approx(float("nan"), nan_ok=True)
    assert of["card twice a"] == [1, unknown, unknown]
    assert of["help a"] == [0, unknown, unknown]
    assert of["parcel declined a"] == [unknown, 1, unknown]
    assert of["my order a"] == [unknown, 0, 1]
    assert of["where is a"] == [0, 0, unknown]
    assert set(rows.test.slices["source"]) == {"a", "b", "c"}
    assert (rows.test.slices["source"] == "c").sum() == 5
    assert "c" not in rows.train.slices["source"]


def test_a_flag_that_is_neither_0_nor_1_is_refused_with_its_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,bad\na,1\nb,7\n")
    with pytest.raises(DataError, match=r"rows\.csv, row 2: 'bad' is 7, neither 0 nor 1"):
        Flagged((Source(name="a", file=str(file), flags={"bad": "bad"}),)).load()


def test_being_without_a_flag_that_nobody_has_is_a_typing_error(sources: tuple[Source, ...]) -> None:
    wrong = msgspec.structs.replace(sources[2], without=("lat",))
    with pytest.raises(DataError, match=r"'c' is without 'lat'"):
        Flagged((*sources[:2], wrong)).load()


def test_files_in_lists_are_found_and_known_by_their_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.csv").write_text("text,bad\na,1\n")
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        'name = "mine"\nabout = ""\n[data]\nkind = "flags"\n[[data.sources]]\nname = "a"\nflags = { bad = "bad" }\n'
        'file = "$HEADRACE_DATA/rows.csv"\n[[data.sources]]\nname = "b"\nfile = "data/rows.csv"\n'
        '[model]\nkind = "encoder"\npackage = "p"\nlicence = ""\ntokens_max = 8\n[gate]\n'
    )
    read = catalogue.read(str(recipe))
    monkeypatch.delenv("HEADRACE_DATA", raising=False)
    with pytest.raises(RecipeError, match=r"data\.sources\.0\.file is \$HEADRACE_DATA/rows\.csv: set HEADRACE_DATA"):
        catalogue.with_files(read)
    monkeypatch.setenv("HEADRACE_DATA", str(tmp_path / "data"))
    data = catalogue.with_files(read).data
    assert isinstance(data, Flagged)
    assert [it.file for it in data.sources] == [str(tmp_path / "data" / "rows.csv")] * 2
    before = catalogue.fingerprint(read)
    (tmp_path / "data" / "rows.csv").write_text("text,bad\na,0\n")
    assert catalogue.fingerprint(read) != before


class Counting(Model):
    """Nothing but n-grams."""

    names_in = ("ids",)
    names_out = ("weights",)
    sample: ClassVar[Inputs] = {"ids": np.array([[1, 2, 3], [3, 2, 1]])}

    def __init__(self, tfidf: TfIdf) -> None:
        super().__init__()
        self.tfidf = tfidf

    def feed(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        return (torch.from_numpy(inputs["ids"]),)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.tfidf(ids),)

    def axes(self) -> dict[str, dict[int, str]]:
        return super().axes() | {"ids": {0: "n", 1: "tokens"}}


def test_ngrams_are_counted_by_onnx_as_by_torch() -> None:
    chance = np.random.default_rng(0)
    rows = chance.integers(1, 6, (40, 9))
    tfidf = TfIdf(rows.tolist(), longest=3, most=80).eval()
    assert {len(it) for it in tfidf.pool} == {1, 2, 3}
    ids = torch.from_numpy(chance.integers(1, 8, (7, 11)))
    ids[2, 4:] = PAD
    ids[3, 1:] = PAD
    graph = onnx.load_from_string(export(Counting(tfidf)).content)
    assert "TfIdfVectorizer" in {it.op_type for it in graph.graph.node}
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    wanted = tfidf(ids).numpy()
    np.testing.assert_allclose(session.run(None, {"ids": ids.numpy()})[0], wanted, atol=1e-6)
    wider = torch.nn.functional.pad(ids, (0, 5), value=PAD)
    np.testing.assert_allclose(session.run(None, {"ids": wider.numpy()})[0], wanted, atol=1e-6)


def test_ngrams_weigh_as_those_of_scikit_learn() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    rows = np.random.default_rng(0).integers(1, 9, (30, 8))
    tfidf = TfIdf(rows.tolist(), longest=2, most=1000)
    vectors = TfidfVectorizer(token_pattern=r"\S+", ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    wanted = vectors.fit_transform([" ".join(map(str, it)) for it in rows])
    columns = [vectors.vocabulary_[" ".join(map(str, it))] for it in tfidf.pool]
    np.testing.assert_allclose(tfidf(torch.from_numpy(rows)).numpy(), wanted.toarray()[:, columns], atol=1e-6)


def test_the_threshold_is_where_f1_is_highest_within_the_false_alarms_allowed() -> None:
    logits = np.array([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    wanted = np.array([True, False, True, True, False, False])
    assert threshold(logits, wanted, 0.5) == 1.5
    assert threshold(logits, wanted, 0.1) == 4.5


def test_of_thresholds_that_the_rows_cannot_tell_apart_the_one_with_the_fewest_flagged_is_taken() -> None:
    # 99 flagged rows, then one that is not, then the last flagged one: with it F1 is 0.99502, without it 0.99497.
    wanted = np.array([True] * 99 + [False, True, False])
    logits = np.arange(len(wanted), 0, -1.0)
    assert threshold(logits, wanted, 1.0) == (logits[98] + logits[99]) / 2


def test_categories_reach_a_client_of_moderations(classify: Make, sources: tuple[Source, ...], tmp_path: Path) -> None:
    recipe = classify(
        name="guard",
        trainer=None,
        model={"kind": "blended-encoder", "package": "tiny-base", "licence": "none", "tokens_max": 16},
        gate={"false_alarms_odd[source=c]_max": 0.5, "batch_drift_max": 1e-3},
        floor={"kind": "ngrams", "unit": "both"},
        folds=2,
    )
    changes = {
        "data": Flagged(sources, test_share=0.4),
        "trainer": msgspec.convert({"kind": "blend", "folds": 2}, Blend),
    }
    shelf = Shelf(tmp_path / "shelf")
    manifest = recipes.run(msgspec.structs.replace(recipe, **changes), shelf, tmp_path / "runs")
    assert manifest.thresholds == {"odd": 0.5, "late": 0.5, "rude": 0.5}
    assert manifest.after["pooled_false_alarms_odd"] <= 0.5
    answer = asyncio.run(_moderated(shelf, ["card twice please", "where is please"]))
    assert [it["categories"]["odd"] for it in answer["results"]] == [True, False]
    assert answer["results"][0]["flagged"]


async def _moderated(shelf: Shelf, texts: list[str]) -> dict[str, Any]:
    """The body of the answer to `/v1/moderations`, by the runtime and the dialect that the gateway has for it."""
    runtime = Onnx(artifact="guard", provider="cpu").build(
        Site(model="guard", replica="here", state=shelf.root, shelf=shelf)
    )
    await runtime.open()
    body = json.dumps({"model": "guard", "input": texts}).encode()
    asked = Moderation.parse(body, predictor=runtime, deadline_s=SystemClock().now_s() + 60, flow="acme")
    steps, written = asked.steps(model="guard", predictor=runtime, id="hr-1", created_s=0), []
    step = next(steps, None)
    while step is not None:
        if isinstance(step, bytes):
            written.append(step)
            step = next(steps, None)
        else:
            step = steps.send(await runtime.infer(step))
    await runtime.aclose()
    found: dict[str, Any] = json.loads(b"".join(written))
    return found
