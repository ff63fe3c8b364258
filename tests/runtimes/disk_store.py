"""A store that several processes share, with a bucket's rules: a file is there whole or not at all, and `create` only
ever makes a new one. As a program: one of several publishers that are at it at once."""

import os
import secrets
import sys
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from runtimes.remote_shelf import RemoteShelf
from tests import tiny


class Disk(LocalFileSystem):  # type: ignore[misc]
    protocol = "disk"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        place = Path(self._strip_protocol(path))
        draft = place.with_name(f".{secrets.token_hex(8)}")
        draft.write_bytes(value)
        try:
            if mode == "create":
                os.link(draft, place)
            else:
                draft.replace(place)
        finally:
            draft.unlink(missing_ok=True)

    def put_file(self, path1: str, path2: str, **options: Any) -> None:
        self.pipe_file(path2, Path(path1).read_bytes())

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = super()._strip_protocol(path.removeprefix("disk://"))
        return stripped


def shelf(folder: Path, who: str) -> RemoteShelf:
    fsspec.register_implementation("disk", Disk, clobber=True)
    return RemoteShelf(f"disk://{folder}/store", folder / who)


def main(folder: Path, number: int, each: int) -> None:
    place = shelf(folder, f"publisher-{number}")
    made = folder / f"made-{number}"
    common = place.publish(made, tiny.card("classify", thresholds={"card": 0.0})).version
    for step in range(each):
        mine = place.publish(made, tiny.card("classify", thresholds={"card": 1 + number + step / 100})).version
        place.promote("tiny", mine, f"own-{number}")
        place.promote("tiny", common if step % 2 else mine, "common")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
