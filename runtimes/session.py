"""A loaded artifact: named arrays in, named arrays out, row by row or a batch at once. Blocking, and safe for threads.

Any ONNX graph will do. One with a tokenizer beside it takes text (see `text`), one with a sample rate in its manifest
sound (see `audio`), any other what its inputs are (see `tensors`). For the task `embed` it has an output `embedding`
[n, width], for `classify` `scores` [n, labels]; whatever else it answers (`logits`) is passed on.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import numpy as np

from runtimes.artifact import Artifact
from runtimes.audio import Audio
from runtimes.batch import BATCH_MAX
from runtimes.contract import Invalid, Tensor, Unavailable
from runtimes.graph import Graph, Provider
from runtimes.integrity import Rejected
from runtimes.tensors import Tensors
from runtimes.text import Text

if TYPE_CHECKING:
    from runtimes.contract import Array


class Reading(Protocol):
    """How inputs become rows, and rows a graph's inputs. A row is its content, its cost, and what it goes with."""

    batched: bool
    """More than one row may go through the graph at once."""
    counts_tokens: bool
    """What a row costs is the number of its tokens."""

    @property
    def inputs(self) -> tuple[Tensor, ...]: ...
    @property
    def outputs(self) -> tuple[Tensor, ...]: ...
    def check(self, inputs: Mapping[str, Array]) -> None: ...
    def count(self, inputs: Mapping[str, Array]) -> int: ...
    def pieces(self, inputs: Mapping[str, Array], rows_max: int) -> Iterator[tuple[Mapping[str, Array], bool]]: ...
    def rows(self, piece: Mapping[str, Array]) -> Sequence[tuple[Any, int, Hashable]]: ...
    def feed(self, contents: Sequence[Any]) -> Mapping[str, Array]: ...


class Session:
    """Loads what it is given: the artifact must have been verified. Raises Rejected or Unavailable."""

    def __init__(self, artifact: Artifact, *, threads: int, provider: Provider) -> None:
        manifest = artifact.manifest
        self.task = manifest.task
        self.labels = manifest.labels
        self.thresholds = manifest.thresholds
        self.version = manifest.version
        self._who = f"{manifest.name}@{manifest.version}"
        files = [name for name in manifest.files if name.endswith(".onnx")]
        if len(files) != 1:
            raise Rejected(f"{self._who} holds {len(files)} ONNX files; it must hold one")
        graph = Graph(artifact.path / files[0], who=self._who, threads=threads, provider=provider)
        self.reading: Reading
        if "tokenizer.json" in manifest.files:
            self.reading = Text(artifact, graph, who=self._who)
        elif manifest.sample_rate_hz is not None:
            self.reading = Audio(artifact, graph, who=self._who)
        else:
            self.reading = Tensors(graph, who=self._who)
        self.batch_max = BATCH_MAX if graph.independent or manifest.tolerance is not None else 1
        """Rows that may go together so that each is answered as alone, or as near to that as the manifest says."""
        if not self.reading.batched:
            self.batch_max = 1
        self.graph = graph
        self._names = np.array(self.labels, object)
        self.inputs, self.outputs = self.reading.inputs, self.reading.outputs
        self._computed = [it.name for it in self.outputs]
        self._inspect()
        if self.task == "classify":
            self.outputs += (Tensor("label", "BYTES", (-1,)),)
        if self.reading.batched:
            self.inputs, self.outputs = _columns(self.inputs), _columns(self.outputs)
        self._given = frozenset(it.name for it in self.outputs)

    def check(self, inputs: Mapping[str, Array], outputs: Sequence[str] = ()) -> None:
        """Raise Invalid, naming the tensor, unless these can be worked on. Cheap: reads shapes, types and ids."""
        self.reading.check(inputs)
        for name in outputs:
            if name not in self._given:
                raise Invalid(f"`{name}` is no output of {self._who}, which has {sorted(self._given)}", param=name)

    def run(self, contents: Sequence[Any]) -> dict[str, Array]:
        """One batch through the graph. Raises Invalid if it cannot be computed."""
        outputs = self.graph.run(self._computed, self.reading.feed(contents))
        if self.reading.batched:
            for name, array in outputs.items():
                if array.shape[:1] != (len(contents),):
                    raise Unavailable(
                        f"{self._who} answers {len(contents)} rows with `{name}` of the shape {list(array.shape)}; "
                        "its first axis is no batch's: export it with a first axis of one size"
                    )
        if self.task == "classify":
            outputs["label"] = self._names[outputs["scores"].argmax(axis=1)]
        return outputs

    def _inspect(self) -> None:
        """Reject a graph that does not keep the contract above, before anyone calls it."""
        needed = {"embed": "embedding", "classify": "scores"}.get(self.task)
        if self.task == "generate":
            raise Rejected(f"{self._who} is made to generate; this runtime can classify, embed and predict")
        if not self._computed:
            raise Rejected(f"{self._who}: the graph has no output that is a tensor with one entry a row")
        if needed is None:
            return
        output = next((it for it in self.outputs if it.name == needed), None)
        if output is None or len(output.shape) != 2:
            raise Rejected(f"{self._who}: the graph has no output {needed!r} [n, width], only {self._computed}")
        if self.task == "classify" and not self.labels:
            raise Rejected(f"{self._who} is a classifier without labels; name them in its manifest")
        if self.task == "classify" and output.shape[1] not in (-1, len(self.labels)):
            raise Rejected(
                f"{self._who}: the graph scores {output.shape[1]} labels, the manifest has {len(self.labels)}"
            )


def _columns(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(msgspec.structs.replace(it, column=len(it.shape) == 1) for it in tensors)
