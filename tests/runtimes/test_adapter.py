"""An adapter is looked at before an engine opens it: what does not fit its base, or could execute, is refused."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import pytest

from runtimes.adapter import check, find
from runtimes.artifact import Artifact, Folder, Hub, Shelf, open_folder
from runtimes.integrity import Rejected, ShelfFault
from tests import lora

BASE = {"model.layers.0.self_attn.q_proj.weight": (8, 6), "model.layers.0.mlp.down_proj.weight": (6, 12)}


@pytest.fixture
def base(tmp_path: Path) -> Folder:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    lora.safetensors(folder / "model.safetensors", BASE)
    found = open_folder(folder)
    assert isinstance(found, Folder)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A rank-4 adapter for it."""
    return lora.adapter(tmp_path / "adapter", BASE, rank=4)


def test_one_that_fits_is_taken(base: Folder, folder: Path) -> None:
    check(folder, base=base, rank_max=4)


def test_a_rank_above_the_engines_is_refused(base: Folder, folder: Path) -> None:
    with pytest.raises(Rejected, match="rank 4, and the engine was started for 1 at most: raise `adapter_rank_max`"):
        check(folder, base=base, rank_max=1)


@pytest.mark.parametrize(
    ("of", "match"),
    {
        "deeper": ({"model.layers.9.self_attn.q_proj.weight": (8, 6)}, "layers.9.* does not have: it is of another"),
        "wider in": ({"model.layers.0.self_attn.q_proj.weight": (8, 7)}, r"lora_A.weight is 4×7, .* must be 4×6"),
        "wider out": ({"model.layers.0.self_attn.q_proj.weight": (9, 6)}, r"lora_B.weight is 9×4, .* must be 8×4"),
    }.values(),
)
def test_one_for_another_model_is_refused(
    base: Folder, tmp_path: Path, of: Mapping[str, tuple[int, int]], match: str
) -> None:
    with pytest.raises(Rejected, match=match):
        check(lora.adapter(tmp_path / "alien", of, rank=4), base=base, rank_max=16)


def test_a_rank_that_is_not_the_one_it_says_is_refused(base: Folder, folder: Path) -> None:
    lora.change(folder, r=8)
    with pytest.raises(Rejected, match=r"lora_A.weight is 4×6, .* at rank 8 it must be 8×6"):
        check(folder, base=base, rank_max=16)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "IA3"}, "adapters with peft_type IA3 are not served"),
        ({"use_dora": True}, "with DoRA"),
        ({"bias": "all"}, "with biases"),
        ({"modules_to_save": ["lm_head"]}, "whole layers"),
        ({"rank_pattern": {"q_proj": 8}}, "ranks that differ"),
        ({"r": "four"}, "not an adapter's configuration"),
    ],
)
def test_what_no_engine_computes_is_refused(base: Folder, folder: Path, changes: dict[str, object], match: str) -> None:
    lora.change(folder, **changes)
    with pytest.raises(Rejected, match=match):
        check(folder, base=base, rank_max=16)


def _pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _cut(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"\x80\x04K\x01.")


def _missing(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def _whole(folder: Path) -> None:
    lora.safetensors(folder / "adapter_model.safetensors", {"base_model.model.lm_head.weight": (8, 8)})


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (_pickle, "type that could execute code"),
        (_cut, "not a safetensors file"),
        (_missing, "has no adapter_model.safetensors"),
        (_whole, "no low-rank weight"),
    ],
)
def test_what_is_no_adapter_is_refused(base: Folder, folder: Path, spoil: Callable[[Path], None], match: str) -> None:
    spoil(folder)
    with pytest.raises(Rejected, match=match):
        check(folder, base=base, rank_max=16)


def test_of_packed_weights_only_the_outputs_are_known(tmp_path: Path, folder: Path) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    shapes = {
        "model.layers.0.self_attn.q_proj.weight_packed": (8, 1),
        "model.layers.0.mlp.down_proj.weight_packed": (6, 2),
    }
    lora.safetensors(packed / "model.safetensors", shapes)
    check(folder, base=Folder(packed), rank_max=16)


@pytest.fixture
def shelf(tmp_path: Path, base: Folder) -> Shelf:
    shelf = Shelf(tmp_path / "shelf")
    lora.published(shelf, base.path, name="base")
    return shelf


@pytest.mark.parametrize("fits", ["tiny 1.0", "base@{version}"])
def test_it_fits_what_it_was_trained_on(shelf: Shelf, folder: Path, fits: str) -> None:
    base = shelf.resolve("base")
    fits = fits.format(version=base.manifest.version)
    made = lora.published(shelf, folder, name="persona", format="adapter", fits=fits)
    assert find("persona@stable", shelf, base=base, rank_max=16).version == made.version
    assert find("persona@stable", shelf, base=Hub("some/model"), rank_max=16).version == made.version


def test_it_is_refused_on_a_base_that_has_learnt_since(shelf: Shelf, base: Folder, folder: Path) -> None:
    manifest = shelf.resolve("base").manifest
    lineage = msgspec.structs.replace(manifest.lineage, rows_train=1)
    lora.published(shelf, base.path, name="tuned", lineage=lineage)
    lora.published(shelf, folder, name="persona", format="adapter", fits="tiny 1.0")
    with pytest.raises(
        Rejected, match=r"persona was trained on tiny 1.0, and tuned@\w+ is tuned@\w+: train it on that"
    ):
        find("persona", shelf, base=shelf.resolve("tuned"), rank_max=16)


def test_a_whole_model_is_no_adapter(shelf: Shelf) -> None:
    with pytest.raises(ShelfFault, match="base is a model in safetensors format and no adapter"):
        find("base", shelf, base=shelf.resolve("base"), rank_max=16)


def test_one_that_was_changed_on_the_shelf_is_refused(shelf: Shelf, folder: Path) -> None:
    lora.published(shelf, folder, name="persona", format="adapter", fits="tiny 1.0")
    found = shelf.resolve("persona")
    assert isinstance(found, Artifact)
    file = found.path / "adapter_config.json"
    file.chmod(0o644)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 99}))
    with pytest.raises(Rejected, match="not the file that was published"):
        find("persona", shelf, base=shelf.resolve("base"), rank_max=16)


def test_what_it_fits_is_part_of_its_version(shelf: Shelf, folder: Path) -> None:
    versions = {
        lora.published(shelf, folder, name="p", format="adapter", fits=fits).version for fits in ("a 1.0", "b 1.0")
    }
    assert len(versions) == 2
