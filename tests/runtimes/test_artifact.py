"""The Shelf: what is published comes back whole, and what has been tampered with does not come back at all."""

import json
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtimes.artifact import (
    MANIFEST,
    Artifact,
    Card,
    Folder,
    Hub,
    Lineage,
    Manifest,
    NotFound,
    Shelf,
    locate,
    open_folder,
    verify,
)
from runtimes.integrity import Rejected, ShelfFault
from tests.fakes import FakeClock

LINEAGE = Lineage(
    recipe="intent",
    recipe_hash="ab" * 32,
    base="base 1.0",
    base_licence="MIT",
    data="cd" * 8,
    rows_train=3,
    rows_test=2,
    seed=0,
    packages={"torch": "2"},
)


def card(**changes: object) -> Card:
    fields = {
        "name": "intent",
        "task": "classify",
        "format": "onnx",
        "tokens_max": 16,
        "lineage": LINEAGE,
        "labels": ("no", "yes"),
    }
    return Card(**fields | changes)  # type: ignore[arg-type]


def fill(folder: Path, content: bytes = b"weights") -> Path:
    (folder / "deep").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(content)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "deep" / "note.txt").write_text("inert")
    return folder


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "shelf")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return fill(tmp_path / "source")


@pytest.fixture
def published(shelf: Shelf, source: Path) -> Artifact:
    manifest = shelf.publish(source, card())
    artifact = shelf.resolve(f"intent@{manifest.version}")
    for folder in (artifact.path, artifact.path / "deep"):
        folder.chmod(0o755)
    return artifact


def test_what_no_reader_would_take_for_a_manifest_is_not_published(shelf: Shelf, source: Path) -> None:
    with pytest.raises(Rejected, match=r"what is to be its manifest is not a manifest .*\$\.after"):
        shelf.publish(source, card(after={"auc": math.nan}))
    assert shelf.versions("intent") == []


def test_what_is_published_is_found_under_its_version_and_verified(shelf: Shelf, source: Path) -> None:
    manifest = shelf.publish(source, card(after={"accuracy": 0.5}))
    found = shelf.resolve(f"intent@{manifest.version}")
    verify(found)
    assert found.manifest == manifest
    assert (found.path / "deep" / "note.txt").read_text() == "inert"
    assert manifest.size_bytes == sum(len((source / it).read_bytes()) for it in manifest.files)
    assert set(manifest.files) == {"model.onnx", "tokenizer.json", "deep/note.txt"}


def test_the_same_content_is_the_same_version_whatever_it_scored(shelf: Shelf, source: Path) -> None:
    first = shelf.publish(source, card(after={"accuracy": 0.5}))
    again = shelf.publish(source, card(after={"accuracy": 0.6}))
    assert again == first
    assert shelf.versions("intent") == [first.version]


@pytest.mark.parametrize(
    "change",
    [{"labels": ("yes", "no")}, {"tokens_max": 8}, {"thresholds": {"yes": 0.5}}, {"name": "other"}],
    ids=lambda it: next(iter(it)),
)
def test_whatever_changes_the_answers_changes_the_version(
    shelf: Shelf, source: Path, change: dict[str, object]
) -> None:
    assert shelf.publish(source, card()).version != shelf.publish(source, card(**change)).version


def test_a_failed_publication_leaves_nothing_behind(shelf: Shelf, source: Path) -> None:
    (source / "weights.pkl").write_bytes(b"\x80\x04.")
    with pytest.raises(Rejected, match=r"weights\.pkl"):
        shelf.publish(source, card())
    assert [it.name for it in (shelf.root / "intent").iterdir()] == [".lock"]


def test_what_a_killed_publisher_left_is_cleared_and_never_listed(shelf: Shelf, source: Path) -> None:
    fill(shelf.root / "intent" / ".incoming-dead")
    assert shelf.names() == []
    version = shelf.publish(source, card()).version
    assert shelf.versions("intent") == [version]
    assert not (shelf.root / "intent" / ".incoming-dead").exists()


def _elsewhere(place: Path) -> None:
    place.rename(place.with_name("elsewhere"))
    place.symlink_to(place.with_name("elsewhere"))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a changed file": lambda at: rewrite(at / "model.onnx", b"Weights"),
    "a missing file": lambda at: (at / "model.onnx").unlink(),
    "a further file": lambda at: (at / "further.txt").write_text("x"),
    "a manifest that is none": lambda at: rewrite(at / MANIFEST, b"{"),
    "no manifest": lambda at: (at / MANIFEST).unlink(),
    "a file in place of the folder": lambda at: (at.rename(at.with_name("elsewhere")), at.write_text("")),
    "a link in place of the folder": _elsewhere,
}


@pytest.mark.parametrize("damage", list(DAMAGES)[:-1])
def test_publishing_the_same_again_puts_a_damaged_version_right(
    published: Artifact, shelf: Shelf, source: Path, damage: str
) -> None:
    shelf.promote("intent", published.manifest.version)
    DAMAGES[damage](published.path)
    assert shelf.publish(source, card()).version == published.manifest.version
    found = shelf.resolve("intent")
    verify(found)
    assert (found.path / "model.onnx").read_bytes() == b"weights"
    assert [it.name for it in found.path.parent.glob(".incoming-*")] == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_alias_moves_to_a_damaged_version(
    published: Artifact, shelf: Shelf, source: Path, tmp_path: Path, damage: str
) -> None:
    other = shelf.publish(fill(tmp_path / "other", b"more"), card()).version
    shelf.promote("intent", published.manifest.version)
    shelf.promote("intent", other)
    DAMAGES[damage](published.path)
    with pytest.raises(ShelfFault):
        shelf.promote("intent", published.manifest.version)
    with pytest.raises(ShelfFault):
        shelf.rollback("intent")
    assert shelf.aliases("intent") == {"stable": other}


def test_a_name_alone_means_stable(published: Artifact, shelf: Shelf) -> None:
    shelf.promote("intent", published.manifest.version)
    assert shelf.resolve("intent") == shelf.resolve("intent@stable") == published


def test_an_alias_that_was_forgotten_is_not_stable(published: Artifact, shelf: Shelf) -> None:
    shelf.promote("intent", published.manifest.version)
    with pytest.raises(NotFound, match="ends where an alias or a version should stand"):
        shelf.resolve("intent@")


def test_promotion_moves_the_alias_and_rollback_moves_it_back(shelf: Shelf, source: Path, tmp_path: Path) -> None:
    old = shelf.publish(source, card()).version
    new = shelf.publish(fill(tmp_path / "new", b"more"), card()).version
    for version in (old, new, new):
        shelf.promote("intent", version)
    assert shelf.aliases("intent") == {"stable": new}
    assert shelf.rollback("intent") == old
    assert shelf.resolve("intent").manifest.version == old
    with pytest.raises(NotFound, match="no earlier promotion"):
        shelf.rollback("intent")
    assert shelf.resolve("intent").manifest.version == old


def test_aliases_of_one_name_do_not_disturb_each_other(published: Artifact, shelf: Shelf) -> None:
    shelf.promote("intent", published.manifest.version)
    shelf.promote("intent", published.manifest.version, alias="canary")
    assert set(shelf.aliases("intent")) == {"stable", "canary"}


def test_promotions_from_many_threads_are_all_kept(published: Artifact, shelf: Shelf) -> None:
    names = [f"alias-{number}" for number in range(16)]
    threads = [
        threading.Thread(target=shelf.promote, args=("intent", published.manifest.version, name)) for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(shelf.aliases("intent")) == set(names)


def test_an_alias_cannot_look_like_a_version(published: Artifact, shelf: Shelf) -> None:
    with pytest.raises(ShelfFault, match="cannot be an alias"):
        shelf.promote("intent", published.manifest.version, alias="0123456789ab")


def test_what_is_missing_is_answered_with_what_there_is(published: Artifact, shelf: Shelf) -> None:
    version = published.manifest.version
    shelf.promote("intent", version)
    with pytest.raises(NotFound, match="it has intent"):
        shelf.resolve("intend@stable")
    with pytest.raises(NotFound, match=f"it has stable, {version}"):
        shelf.resolve("intent@canary")
    with pytest.raises(NotFound, match="headrace-train run"):
        Shelf(shelf.root / "nowhere").resolve("intent")


@pytest.mark.parametrize("name", ["../intent", "/etc", "a/b", "", ".", "..", "Intent", "x" * 65, "a\0b"])
def test_no_name_leads_off_the_shelf(shelf: Shelf, source: Path, name: str) -> None:
    with pytest.raises(ShelfFault):
        shelf.publish(source, card(name=name))
    with pytest.raises(NotFound):
        shelf.resolve(f"{name}@stable")
    assert not shelf.root.exists()


def rewrite(file: Path, content: bytes) -> None:
    file.chmod(0o644)
    file.write_bytes(content)


def edit_manifest(artifact: Artifact, **changes: object) -> Artifact:
    file = artifact.path / MANIFEST
    content = json.loads(file.read_bytes()) | changes
    file.write_text(json.dumps(content))
    found = open_folder(artifact.path)
    assert isinstance(found, Artifact)
    return found


Hostile = Callable[[Path], object]

FILES: dict[str, Hostile] = {
    "a flipped bit": lambda at: rewrite(at / "model.onnx", b"veights"),
    "a longer file": lambda at: rewrite(at / "model.onnx", b"weights!"),
    "a missing file": lambda at: (at / "model.onnx").unlink(),
    "an unlisted file": lambda at: (at / "more.txt").write_text("more"),
    "an unlisted file below": lambda at: (at / "deep" / MANIFEST).write_text("{}"),
    "a symbolic link to a file": lambda at: relink(at / "model.onnx", os.symlink),
    "a symbolic link to a folder": lambda at: (at / "etc").symlink_to("/etc"),
    "a hard link": lambda at: relink(at / "model.onnx", os.link),
    "a pipe": lambda at: os.mkfifo(at / "pipe.json"),
}


def relink(file: Path, link: Callable[[Path, Path], None]) -> None:
    outside = file.parent.parent / "outside.onnx"
    file.rename(outside)
    link(outside, file)


@pytest.mark.parametrize("tamper", FILES.values(), ids=FILES.keys())
def test_a_tampered_folder_is_rejected(published: Artifact, tamper: Hostile) -> None:
    tamper(published.path)
    with pytest.raises(Rejected):
        verify(published)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {"/etc/passwd": "sha256:" + "0" * 64}},
        {"files": {"../outside.onnx": "sha256:" + "0" * 64}},
        {"files": {"deep/../model.onnx": "sha256:" + "0" * 64}},
        {"files": {"./model.onnx": "sha256:" + "0" * 64}},
        {"files": {"": "sha256:" + "0" * 64}},
        {"files": {"deep": "sha256:" + "0" * 64}},
        {"files": {}},
        {"labels": ["yes", "no"]},
        {"thresholds": {"yes": 0.0}},
        {"tokens_max": 1 << 30},
        {"version": "0" * 12},
        {"lineage": msgspec.to_builtins(LINEAGE) | {"recipe_hash": "ef" * 32}},
    ],
    ids=str,
)
def test_a_tampered_manifest_is_rejected(published: Artifact, changes: dict[str, object]) -> None:
    with pytest.raises(Rejected):
        verify(edit_manifest(published, **changes))


def test_a_manifest_of_another_artifact_is_rejected(published: Artifact, shelf: Shelf) -> None:
    edit_manifest(published, name="other")
    with pytest.raises(Rejected, match="other@"):
        shelf.resolve(f"intent@{published.manifest.version}")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b" " * (5 << 20)],
    ids=["empty", "cut", "list", "bytes", "deep", "big"],
)
def test_a_manifest_that_is_none_is_rejected(published: Artifact, content: bytes) -> None:
    (published.path / MANIFEST).write_bytes(content)
    with pytest.raises(Rejected, match=r"manifest\.json"):
        open_folder(published.path)


def test_a_manifest_that_is_a_link_is_not_followed(published: Artifact) -> None:
    manifest = published.path / MANIFEST
    manifest.rename(published.path.parent / "outside.json")
    manifest.symlink_to(published.path.parent / "outside.json")
    with pytest.raises(Rejected, match=r"manifest\.json"):
        open_folder(published.path)


def test_a_version_that_is_a_link_is_not_followed(published: Artifact, shelf: Shelf, tmp_path: Path) -> None:
    published.path.rename(tmp_path / "elsewhere")
    published.path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NotFound):
        shelf.resolve(f"intent@{published.manifest.version}")


CONTENT: dict[str, tuple[str, bytes]] = {
    "auto_map": ("config.json", b'{"auto_map": {"AutoModel": "modeling.Evil"}}'),
    "auto_map below": ("deep/tokenizer_config.json", b'[{"a": [{"auto_map": {}}]}]'),
    "auto_map escaped": ("config.json", b'{"auto\\u005fmap": {}}'),
    "auto_map in capitals": ("CONFIG.JSON", b'{"auto_map": {}}'),
    "no JSON": ("config.json", b"import os"),
    "endless JSON": ("config.json", b"[" * 200_000),
    "external data": ("second.onnx", b"\x12\x0a\n\x08location\x12\x0b/etc/passwd"),
    "external data, long-winded": ("second.onnx", b"\x8a\x00\x88\x80\x00location\x12\x0b/etc/passwd"),
    "operators of some library": ("second.onnx", b"\x42\x09\x0a\x05.mine\x10\x01"),
    "operators of some library, said twice": ("second.onnx", b"\x42\x0c\x0a\x02ai\x0a\x04mine\x10\x01"),
    "an empty graph": ("second.onnx", b""),
} | {
    name: (name, b"content")
    for name in (
        "pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl", "model.pickle", "model.joblib",
        "model.npy", "model.npz", "model.h5", "model.keras", "model.tar", "model.zip", "model.gguf", "modeling.py",
        "modeling.pyc", "native.so", "run.sh", "hook.pth", "model.PKL", "no_suffix", ".hidden", "page.html",
    )
}  # fmt: skip


@pytest.mark.parametrize(("name", "content"), CONTENT.values(), ids=CONTENT.keys())
def test_what_could_execute_or_reach_out_is_not_published(
    shelf: Shelf, source: Path, name: str, content: bytes
) -> None:
    (source / name).write_bytes(content)
    with pytest.raises(Rejected):
        shelf.publish(source, card())
    assert shelf.names() == []


@pytest.mark.parametrize(("name", "content"), CONTENT.values(), ids=CONTENT.keys())
def test_what_could_execute_or_reach_out_is_not_loaded_even_if_a_manifest_lists_it(
    published: Artifact, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes
) -> None:
    # A publisher that does not look: the manifest it writes is consistent in itself.
    (published.path / name).write_bytes(content)
    with monkeypatch.context() as patched:
        patched.setattr("runtimes.integrity.inspect", lambda file: None)
        from runtimes.artifact import seal

        manifest = seal(published.path, card(), created_s=0.0)
    assert name in manifest.files
    with pytest.raises(Rejected):
        verify(Artifact(published.path, manifest))


def test_an_endless_folder_is_rejected(published: Artifact) -> None:
    for number in range(1001):
        (published.path / f"{number}.txt").touch()
    with pytest.raises(Rejected, match="more than 1000 files"):
        verify(published)


@given(at=st.integers(0, 6), mask=st.integers(1, 255))
def test_any_flipped_bit_is_noticed(tmp_path_factory: pytest.TempPathFactory, at: int, mask: int) -> None:
    folder = fill(tmp_path_factory.mktemp("bits") / "source")
    from runtimes.artifact import seal

    manifest = seal(folder, card(), created_s=0.0)
    content = bytearray((folder / "model.onnx").read_bytes())
    content[at] ^= mask
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(Rejected, match=r"model\.onnx"):
        verify(Artifact(folder, manifest))


def generator(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_a_reference_names_the_shelf_a_folder_or_the_hub(
    published: Artifact, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.promote("intent", published.manifest.version)
    own = generator(tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    assert locate("intent", shelf) == published
    assert locate(f"intent@{published.manifest.version}", shelf) == published
    assert locate("intent@stable", shelf) == published
    assert locate(str(published.path), shelf) == published
    assert locate(str(own), shelf) == Folder(own)
    assert locate("./own", shelf) == locate("own", shelf) == Folder(own)
    assert locate("organisation/name-1.5B", shelf) == Hub("organisation/name-1.5B")


def test_the_shelf_goes_before_a_folder_of_the_same_name(
    published: Artifact, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.promote("intent", published.manifest.version)
    generator(tmp_path / "intent")
    monkeypatch.chdir(tmp_path)
    assert locate("intent", shelf) == published
    assert locate("./intent", shelf) == Folder(tmp_path / "intent")


@pytest.mark.parametrize("reference", ["", "nothing", "a/b/c", "/a/b", "../x", "nothing@stable", "org/na me", "org/"])
def test_a_reference_to_nothing_says_what_the_shelf_holds(published: Artifact, shelf: Shelf, reference: str) -> None:
    with pytest.raises(NotFound, match=r"it has intent|is not a folder"):
        locate(reference, shelf)


def test_a_folder_with_links_is_fine_when_it_is_the_users_own(tmp_path: Path) -> None:
    own = generator(tmp_path / "own")
    (own / "model.safetensors").rename(tmp_path / "blob")
    (own / "model.safetensors").symlink_to(tmp_path / "blob")
    assert open_folder(own) == Folder(own)


def test_a_folder_of_pickles_is_rejected_with_advice(tmp_path: Path) -> None:
    own = generator(tmp_path / "own")
    (own / "model.safetensors").rename(own / "pytorch_model.bin")
    with pytest.raises(Rejected, match="convert it to safetensors"):
        open_folder(own)


def test_the_shelf_lists_every_version_with_the_older_first(shelf: Shelf, source: Path, tmp_path: Path) -> None:
    old = shelf.publish(source, card())
    new = shelf.publish(fill(tmp_path / "new", b"more"), card())
    shelf.publish(source, card(name="another"))
    assert shelf.list(new.name) == [old, new]
    assert all(isinstance(it, Manifest) for it in shelf.list(new.name))


@pytest.mark.parametrize(
    "content", [b"{", b"\xff", b'{"stable": 3}', b"[" * 100_000], ids=["cut", "bytes", "3", "deep"]
)
def test_damaged_aliases_are_named_as_the_cause_and_a_promotion_begins_them_anew(
    published: Artifact, shelf: Shelf, content: bytes
) -> None:
    version = published.manifest.version
    (shelf.root / "intent" / "aliases.json").write_bytes(content)
    for use in (
        lambda: shelf.resolve("intent"),
        lambda: shelf.rollback("intent"),
        lambda: shelf.check("intent"),
        lambda: shelf.sweep("intent", keep=0),
    ):
        with pytest.raises(Rejected, match=r"aliases\.json is damaged .*promote intent@VERSION"):
            use()
    assert shelf.resolve(f"intent@{version}") == published
    shelf.promote("intent", version, "canary")
    assert shelf.aliases("intent") == {"canary": version}


HOUR_S = 3600.0


def aged(shelf: Shelf, folder: Path, count: int, clock: FakeClock) -> list[str]:
    """So many versions, oldest first, all published more than an hour ago."""
    versions = []
    for number in range(count):
        version = shelf.publish(fill(folder / f"aged-{number}", b"%d" % number), card()).version
        old_s = clock.wall_s()
        os.utime(shelf.root / "intent" / version, (old_s, old_s))
        versions.append(version)
        clock.advance(1)
    clock.advance(HOUR_S)
    return versions


def test_a_version_that_no_alias_meant_lately_is_swept_away(tmp_path: Path) -> None:
    clock = FakeClock()
    shelf = Shelf(tmp_path / "shelf", clock=clock)
    never, first, second, third = aged(shelf, tmp_path, 4, clock)
    for version in (first, second, third):
        shelf.promote("intent", version)
    assert [it.version for it in shelf.unused("intent", keep=1)] == [never, first]
    assert [it.version for it in shelf.sweep("intent", keep=1)] == [never, first]
    assert shelf.versions("intent") == sorted([second, third])
    assert shelf.aliases("intent") == {"stable": third}
    assert {it.name for it in (shelf.root / "intent").iterdir()} == {".lock", "aliases.json", second, third}


def test_no_alias_can_go_back_to_what_was_swept_away(tmp_path: Path) -> None:
    clock = FakeClock()
    shelf = Shelf(tmp_path / "shelf", clock=clock)
    first, second = aged(shelf, tmp_path, 2, clock)
    for version in (first, second):
        shelf.promote("intent", version)
    shelf.sweep("intent", keep=0)
    with pytest.raises(NotFound, match="no earlier promotion"):
        shelf.rollback("intent")
    with pytest.raises(NotFound, match=first):
        shelf.promote("intent", first)
    assert shelf.aliases("intent") == {"stable": second}


def test_what_was_published_within_an_hour_is_never_swept_away(tmp_path: Path) -> None:
    clock = FakeClock()
    shelf = Shelf(tmp_path / "shelf", clock=clock)
    [old] = aged(shelf, tmp_path, 1, clock)
    young = shelf.publish(fill(tmp_path / "young", b"young"), card()).version
    assert [it.version for it in shelf.unused("intent", keep=0)] == [old]
    shelf.publish(tmp_path / "aged-0", card())  # again: whoever did means to promote it
    os.utime(shelf.root / "intent" / old, (clock.wall_s(), clock.wall_s()))
    assert shelf.sweep("intent", keep=0) == []
    assert shelf.versions("intent") == sorted([old, young])
