"""Sound, as whole WAV files, as a graph reads it: `samples` [n, width] float32 from -1 to 1, zeros behind the end of
each, and `lengths` [n] int64."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from runtimes import wav
from runtimes.artifact import Artifact
from runtimes.contract import Invalid, Tensor
from runtimes.graph import Graph
from runtimes.integrity import Rejected

if TYPE_CHECKING:
    from runtimes.contract import Array

QUICK_SAMPLES = 1 << 16
"""What is read before another thread could begin with it."""


class Audio:
    """What is read as sound. Safe for threads. Rows are as wide as the graph, so that none moves another's answer."""

    batched = True
    counts_tokens = False

    def __init__(self, artifact: Artifact, graph: Graph, *, who: str) -> None:
        rate_hz = artifact.manifest.sample_rate_hz
        assert rate_hz is not None
        kinds = {it.name: (it.datatype, it.shape) for it in graph.inputs}
        width = kinds.get("samples", ("", (-1, -1)))[1][-1]
        if width < 1 or kinds != {"samples": ("FP32", (-1, width)), "lengths": ("INT64", (-1,))}:
            raise Rejected(
                f"{who} reads sound and its graph takes {sorted(kinds)}; it must take `samples` tensor(float) "
                "[n, width], of one width, and `lengths` tensor(int64) [n]"
            )
        self._who = who
        self._rate_hz = rate_hz
        self._width = width
        self._truncate = artifact.manifest.truncate
        self.inputs = (Tensor("audio", "BYTES", (-1,)),)
        self.outputs = tuple(it for it in graph.outputs if it.shape[:1] == (-1,))

    def check(self, inputs: Mapping[str, Array]) -> None:
        """Raise Invalid, naming the input, unless `rows` can work on these. Cheap: reads shapes and types."""
        for name in sorted(inputs.keys() ^ {"audio"}):
            what = "is no input of" if name in inputs else "is missing; it is the input of"
            raise Invalid(f"`{name}` {what} {self._who}, which takes `audio`: WAV files", param=name)
        files = inputs["audio"]
        if files.dtype.kind != "O" or files.ndim != 1 or not files.size:
            raise Invalid(
                f"`audio` must be BYTES of the shape [n], n ≥ 1; got {files.dtype} {list(files.shape)}", param="audio"
            )
        if not all(isinstance(it, bytes | str) for it in files):
            raise Invalid("`audio` must hold WAV files as bytes", param="audio")

    def count(self, inputs: Mapping[str, Array]) -> int:
        return len(inputs["audio"])

    def pieces(self, inputs: Mapping[str, Array], rows_max: int) -> Iterator[tuple[Mapping[str, Array], bool]]:
        """The same rows in the same order, a few at a time, with their numbers; and whether `rows` takes long."""
        files = inputs["audio"]
        for start in range(0, len(files), rows_max):
            part = files[start : start + rows_max]
            yield {"audio": part, "row": np.arange(start, start + len(part))}, len(part) * self._width > QUICK_SAMPLES

    def rows(self, piece: Mapping[str, Array]) -> list[tuple[Array, int, Hashable]]:
        """Each one's samples, its cost, and what it goes together with. Raises Invalid for what is no such file."""
        return [(self._samples(file, row), 1, None) for file, row in zip(piece["audio"], piece["row"], strict=True)]

    def feed(self, contents: Sequence[Array]) -> dict[str, Array]:
        """What the graph reads of one batch."""
        return window(contents, self._width)

    def _samples(self, file: bytes | str, row: int) -> Array:
        # Bytes that happen to be UTF-8 may arrive as text.
        content = file.encode(errors="surrogatepass") if isinstance(file, str) else file
        try:
            return wav.read(content, rate_hz=self._rate_hz, samples_max=self._width, truncate=self._truncate)
        except ValueError as error:
            hint = "; in JSON a file goes as base64, with the parameter `content_type`: `base64`"
            raise Invalid(
                f"`audio`: entry {row} {error}{hint if 'RIFF' in str(error) else ''}", param="audio"
            ) from None


def window(sounds: Sequence[Array], width: int) -> dict[str, Array]:
    """`samples` and `lengths` of sounds that are no longer than `width`."""
    samples = np.zeros((len(sounds), width), np.float32)
    for at, sound in enumerate(sounds):
        samples[at, : len(sound)] = sound
    return {"samples": samples, "lengths": np.array([len(it) for it in sounds], np.int64)}
