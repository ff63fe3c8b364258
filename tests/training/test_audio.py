"""Sounds: how they are read, disturbed, learnt and served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from runtimes.artifact import Shelf, verify
from runtimes.contract import Invalid
from tests.sounds import pcm
from training import recipe as recipes
from training.contract import Classes
from training.errors import DataError, RecipeError
from training.evaluation.scoring import served
from training.export import export
from training.model import predict
from training.models import disturb, speech
from training.models.spectrum import LogMel
from training.spec import Recipe
from training.spec.data import Audio
from training.spec.models import Disturbance, Speech

RATE_HZ = 4000
PATTERN = r"(?P<label>[a-z]+)_(?P<speaker>[a-z]+)_\d+"
SPEAKERS = {"ann": 1.0, "bob": 0.9, "cy": 1.1}
SPEECH = Speech(seconds_max=0.3, mels=16, channels=8, hidden=8)


def tone(slope: float, length: int, seed: int = 0, *, pitch: float = 1.0, rate_hz: int = RATE_HZ) -> bytes:
    """From 300 Hz up to 1,200, or down if the slope is -1."""
    chance = np.random.default_rng(seed)
    pitch_hz = pitch * np.linspace(300, 1200, length)[:: int(slope)]
    wave = 0.5 * np.sin(2 * np.pi * np.cumsum(pitch_hz) / rate_hz) + 0.02 * chance.standard_normal(length)
    return pcm(np.int16(wave * 32767).tolist(), rate_hz=rate_hz)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rising and falling tones, by three speakers of their own pitch."""
    folder = tmp_path / "sounds"
    folder.mkdir()
    for label, slope in (("up", 1), ("down", -1)):
        for speaker, share in SPEAKERS.items():
            for number in range(8):
                content = tone(slope, 600 + 40 * number, number, pitch=share)
                (folder / f"{label}_{speaker}_{number}.wav").write_bytes(content)
    return folder


# ---- how they are read -------------------------------------------------------------------------------------


def test_a_file_s_name_says_what_is_in_it_and_who_said_it(folder: Path) -> None:
    rows = Audio(train=str(folder), pattern=PATTERN).load()
    assert isinstance(rows.train.targets, Classes)
    assert rows.train.targets.labels == ("down", "up")
    assert len(rows.both) == 48
    assert set(rows.both.slices["speaker"]) == set(SPEAKERS)
    assert all(it.startswith(b"RIFF") for it in rows.both.inputs["audio"])


def test_a_folder_for_each_label_will_do(tmp_path: Path) -> None:
    for label in "ab":
        (tmp_path / label).mkdir()
        for number in range(10):
            (tmp_path / label / f"{number}.wav").write_bytes(tone(1, 200, number + 10 * (label == "b")))
    rows = Audio(train=str(tmp_path)).load()
    assert isinstance(rows.train.targets, Classes)
    assert rows.train.targets.labels == ("a", "b")
    assert rows.train.slices == {}


def test_a_sound_in_both_parts_is_in_the_test_part_only(folder: Path, tmp_path: Path) -> None:
    test = tmp_path / "test"
    test.mkdir()
    for name in ("up_ann_0", "down_ann_0"):
        (test / f"{name}.wav").write_bytes((folder / f"{name}.wav").read_bytes())
    rows = Audio(train=str(folder), test=str(test), pattern=PATTERN).load()
    assert (len(rows.train), len(rows.test)) == (46, 2)
    assert "2 training sounds" in rows.notes[0]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"no sound", "is no RIFF"),
        (tone(1, 200)[:-2], "is cut off"),
        (pcm([]), "has no samples"),
        (tone(1, 200, rate_hz=8000), "8000 samples a second"),
    ],
    ids=["text", "cut off", "empty", "another rate"],
)
def test_a_corrupt_file_is_named(folder: Path, content: bytes, says: str) -> None:
    (folder / "up_zoe_0.wav").write_bytes(content)
    with pytest.raises(DataError, match=rf"up_zoe_0\.wav .*{says}"):
        Audio(train=str(folder), pattern=PATTERN).load()


def test_sounds_that_are_all_test_sounds_too_are_said_to_be(folder: Path) -> None:
    with pytest.raises(DataError, match=r"each of .*sounds is also in the test part"):
        Audio(train=str(folder), test=str(folder), pattern=PATTERN).load()


def test_names_and_patterns_that_say_nothing_are_refused(folder: Path) -> None:
    with pytest.raises(RecipeError, match="no regular expression"):
        Audio(train=str(folder), pattern="(").load()
    with pytest.raises(RecipeError, match=r"group \(\?P<label>"):
        Audio(train=str(folder), pattern=".*").load()
    (folder / "other.wav").write_bytes(tone(1, 200))
    with pytest.raises(DataError, match=r"other\.wav: 'other' does not fit"):
        Audio(train=str(folder), pattern=PATTERN).load()


# ---- how they are heard ------------------------------------------------------------------------------------


def test_a_tone_is_loudest_in_its_own_band_whatever_its_loudness() -> None:
    times = torch.arange(1200) / RATE_HZ
    bands = LogMel(16, rate_hz=RATE_HZ).bands(
        torch.stack([(2 * torch.pi * hz * times).sin() for hz in (200, 800, 1700)])
    )
    loudest = bands.mean(2).argmax(1).tolist()
    assert loudest == sorted(set(loudest))


def test_the_spectrum_is_numpy_s() -> None:
    log_mel = LogMel(16, rate_hz=RATE_HZ)
    samples = torch.randn(1, log_mel.window + 3 * log_mel.hop, generator=torch.Generator().manual_seed(0))
    hann = np.sin(np.pi * np.arange(log_mel.window) / log_mel.window) ** 2
    frames = [samples[0, at * log_mel.hop :][: log_mel.window].numpy() * hann for at in range(4)]
    power = np.abs(np.fft.rfft(frames)) ** 2
    np.testing.assert_allclose(
        log_mel.bands(samples)[0].numpy(), np.log(log_mel.filters.numpy() @ power.T + 1e-6), rtol=1e-3, atol=1e-3
    )


def test_silence_behind_a_sound_changes_nothing_of_its_spectrum() -> None:
    log_mel = LogMel(16, rate_hz=RATE_HZ)
    samples = torch.zeros(2, 1200)
    samples[:, :500] = torch.randn(500, generator=torch.Generator().manual_seed(0))
    bands, there = log_mel(samples, torch.tensor([500, 500]))
    assert there[0].sum() == (500 - log_mel.window) // log_mel.hop + 1
    assert (bands[:, :, there[0, 0] == 0] == 0).all()
    shorter, _ = log_mel(samples[:, :500], torch.tensor([500, 500]))
    np.testing.assert_allclose(bands[:, :, : shorter.shape[2]], shorter, atol=1e-5)


def test_a_sound_shorter_than_a_frame_is_one_frame() -> None:
    _, there = LogMel(16, rate_hz=RATE_HZ)(torch.randn(1, 1200), torch.tensor([3]))
    assert there.sum() == 1


# ---- how they are disturbed --------------------------------------------------------------------------------


def test_a_sound_that_is_not_disturbed_is_as_it_was() -> None:
    samples = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    np.testing.assert_allclose(disturb.sound(Disturbance(), samples, RATE_HZ, np.random.default_rng(0)), samples)
    bands = torch.randn(2, 16, 20)
    torch.testing.assert_close(disturb.spectra(Disturbance(), bands), bands)


def test_each_disturbance_stays_within_its_bounds() -> None:
    samples = np.full(1000, 0.1, np.float32)

    def many(**spec: Any) -> list[Any]:
        return [disturb.sound(Disturbance(**spec), samples, RATE_HZ, np.random.default_rng(at)) for at in range(50)]

    lengths = [len(it) for it in many(speed=0.2)]
    assert 820 < min(lengths) < 900 and 1100 < max(lengths) < 1260
    silences = [int((it == 0).sum()) for it in many(shift_s=0.05)]
    assert 0 <= min(silences) < 40 and 160 < max(silences) <= 200
    gains = [20 * np.log10(it.max() / 0.1) for it in many(gain_db=6)]
    assert -6 <= min(gains) < -3 and 3 < max(gains) <= 6.001
    noises = [20 * np.log10(0.1 / (it - samples).std()) for it in many(noise_db=20)]
    assert 19 < min(noises) < 26 and 44 < max(noises) < 51


def test_bands_are_moved_and_hidden() -> None:
    torch.manual_seed(0)
    bands = torch.arange(16.0)[None, :, None].expand(40, 16, 20)
    moved = disturb.spectra(Disturbance(warp_bands=2), bands)[:, 8, 0] - 8
    assert 1 < moved.abs().max() <= 2
    ones = torch.ones(40, 16, 20)
    for spec, axis, most in ((Disturbance(hidden_bands=6), 1, 6), (Disturbance(hidden_frames=6), 2, 6)):
        hidden = (disturb.spectra(spec, ones) == 0).all(3 - axis).sum(1)
        assert 3 < hidden.max() <= most + 1


# ---- what is made of them ----------------------------------------------------------------------------------


def test_the_graph_answers_as_torch_and_neighbours_do_not_matter(folder: Path) -> None:
    from tests.training.test_compression import session

    rows = Audio(train=str(folder), pattern=PATTERN).load()
    torch.manual_seed(0)
    model = speech.build(SPEECH, rows)
    graph = session(export(model))
    sounds = {"audio": rows.train.inputs["audio"][:5]}
    samples, lengths = (it.numpy() for it in model.feed(sounds))
    together = graph.run(["logits"], {"samples": samples, "lengths": lengths})[0]
    np.testing.assert_allclose(together, predict(model, sounds)["logits"], atol=1e-4)
    for at in range(5):
        alone = graph.run(["logits"], {"samples": samples[at : at + 1], "lengths": lengths[at : at + 1]})[0]
        np.testing.assert_allclose(alone[0], together[at], atol=1e-5)


def test_training_sounds_longer_than_the_window_are_refused_or_cut(folder: Path) -> None:
    rows = Audio(train=str(folder), pattern=PATTERN).load()
    short = msgspec.structs.replace(SPEECH, seconds_max=0.1)
    with pytest.raises(RecipeError, match=r"lasts 0\.\d\d s: raise model.seconds_max"):
        speech.build(short, rows)
    assert speech.build(msgspec.structs.replace(short, truncate=True), rows).width == 400


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "name": "tones",
        "about": "for tests",
        "data": {"kind": "audio", "train": str(folder), "pattern": PATTERN},
        "model": {"kind": "speech", "seconds_max": 0.3, "mels": 16, "channels": 8, "hidden": 8,
                  "disturb": {"speed": 0.1, "noise_db": 20, "hidden_bands": 2}},
        "trainer": {"kind": "gradient", "epochs": 6, "rate": 0.02, "batch": 8},
        "floor": {"kind": "spectrum", "mels": 16},
        "gate": {"accuracy_min": 0.9, "batch_drift_max": 1e-5},
    }  # fmt: skip
    return msgspec.convert(fields | changes, Recipe)


def test_a_run_ends_with_a_graph_that_takes_files(folder: Path, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    manifest = recipes.run(recipe_of(folder, folds_by="speaker"), shelf, tmp_path / "runs")
    assert (manifest.task, manifest.labels, manifest.sample_rate_hz) == ("classify", ("down", "up"), RATE_HZ)
    assert manifest.after["folds_accuracy"] > 0.8
    assert "accuracy[speaker=ann]" in manifest.after
    found = shelf.resolve("tones")
    verify(found)
    files = np.empty(2, object)
    files[:] = [tone(1, 500, 99), tone(-1, 900, 98)]
    answers = served(found, {"audio": files})
    assert answers["label"].tolist() == ["up", "down"]
    files[1] = files[1][:50]
    with pytest.raises(Invalid, match="entry 1"):
        served(found, {"audio": files})


def test_a_fold_is_what_one_speaker_said(folder: Path) -> None:
    from training.evaluation import folds

    examples = Audio(train=str(folder), pattern=PATTERN).load().both
    held = folds._by_value(examples, "speaker")
    assert [*held] == sorted(SPEAKERS)
    assert sorted(np.concatenate([*held.values()])) == [*range(len(examples))]
    assert {*examples.slices["speaker"][held["bob"]]} == {"bob"}
    with pytest.raises(RecipeError, match="no slice of these rows; they have speaker"):
        folds._by_value(examples, "room")
