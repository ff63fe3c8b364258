"""Texts with slips in them: what happens to a text, how often, and only where it is learnt from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtimes.artifact import Shelf
from training import recipe as recipes
from training.contract import Classes, Examples, Inputs, strings
from training.errors import Interrupted, RecipeError
from training.model import predict
from training.models.encoder import Classifier
from training.models.noise import _NEIGHBOURS, noisy
from training.run import Run
from training.spec import Recipe
from training.spec.models import Noise
from training.trainers import gradient

Make = Callable[..., Recipe]
TEXT = "Where is my parcel? It hasn't arrived, and the order was paid twice!"
GRADIENT = {"kind": "gradient", "epochs": 3, "rate": 1e-3, "batch": 4, "checkpoint_s": 1e-9}
ALL = {"typos": 0.1, "words_dropped": 0.1, "words_swapped": 0.1, "punctuation": 0.3, "case": 0.3}


def heard(spec: Noise, text: str = TEXT, times: int = 400, seed: int = 0) -> list[str]:
    found: list[str] = noisy(spec, strings([text] * times), np.random.default_rng(seed)).tolist()
    return found


# ---- what happens to a text ---------------------------------------------------------------------------------


def test_a_text_to_which_nothing_happens_is_as_it_was() -> None:
    for text in (TEXT, "  two\tblanks,\n\nand  lines ", "我的包裹在哪里？", "", "?!"):
        assert heard(Noise(), text, 3) == [text] * 3
        assert heard(Noise(share=0.0, typos=0.5, case=1.0), text, 3) == [text] * 3


def test_the_same_chance_makes_the_same_slips_and_another_one_others() -> None:
    assert heard(Noise(**ALL), seed=1) == heard(Noise(**ALL), seed=1)
    assert heard(Noise(**ALL), seed=1) != heard(Noise(**ALL), seed=2)


def test_a_letter_is_doubled_left_out_exchanged_or_a_neighbour_of_it() -> None:
    found = {*heard(Noise(typos=0.3), "at")}
    slips = (
        {"aat", "t", "ta", "att"} | {f"{key}t" for key in _NEIGHBOURS["a"]} | {f"a{key}" for key in _NEIGHBOURS["t"]}
    )
    assert slips < found
    assert {*_NEIGHBOURS["a"]} == {*"qwsz"}
    assert not any(it.isdigit() or it.isspace() for text in found for it in text)
    assert {*heard(Noise(typos=0.9), "A")} == {"A", "AA", *_NEIGHBOURS["a"].upper()}


def test_what_is_no_letter_is_not_mistyped() -> None:
    for text in ("12 345,00 €", "… -- ?!", "\U0001f4e6"):
        assert heard(Noise(typos=0.9), text, 50) == [text] * 50


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3])
def test_slips_are_as_frequent_as_the_recipe_says(rate: float) -> None:
    letters = "b" * 20_000  # doubled, left out or a neighbour: each shows; two exchanged do not
    text = heard(Noise(typos=rate), letters, 1)[0]
    other = sum(it != "b" for it in text)
    assert abs(other / (len(letters) * rate / 4) - 1) < 0.2
    words = " ".join(["word"] * 20_000)
    assert abs(1 - len(heard(Noise(words_dropped=rate), words, 1)[0].split()) / 20_000 - rate) < 0.02
    marks = "a." * 20_000
    assert abs(1 - heard(Noise(punctuation=rate), marks, 1)[0].count(".") / 20_000 - rate) < 0.02
    changed = [it != TEXT for it in heard(Noise(share=rate, case=1.0), times=5000)]
    assert abs(np.mean(changed) - rate) < 0.03
    shouted = [it for it in heard(Noise(case=rate), times=5000) if it != TEXT]
    assert abs(len(shouted) / 5000 - rate) < 0.03
    assert {*shouted} == {TEXT.upper(), TEXT.lower()}


def test_exchanged_words_are_neighbours_and_none_is_lost() -> None:
    found = {*heard(Noise(words_swapped=0.3), "one two  three")}
    assert {"two one  three", "one three  two"} < found
    assert all(sorted(it.split()) == ["one", "three", "two"] for it in found)


def test_no_text_is_left_empty() -> None:
    for text in ("help", "?!", "a", "yes no"):
        for spec in (Noise(words_dropped=0.99), Noise(punctuation=0.99), Noise(typos=0.99), Noise(**ALL)):
            assert all(it.strip() for it in heard(spec, text, 50))


# ---- where it happens ---------------------------------------------------------------------------------------


def noised(classify: Make, noise: Mapping[str, float] = ALL, **changes: Any) -> Recipe:
    changes = {"trainer": GRADIENT, "compress": [], "gate": {"accuracy_min": 0.0}} | changes
    return classify(model={"noise": {**noise}}, **changes)


def test_an_interrupted_run_with_noise_goes_on_to_the_bit(
    classify: Make, tmp_path: Path, stop_at_the_third: Callable[[], list[int]]
) -> None:
    recipe = noised(classify)
    one = recipes.run(recipe, Shelf(tmp_path / "one"), tmp_path / "runs")
    stop_at_the_third()
    with pytest.raises(Interrupted):
        recipes.run(recipe, Shelf(tmp_path / "two"), tmp_path / "others")
    other = recipes.run(recipe, Shelf(tmp_path / "two"), tmp_path / "others", resume=True)
    assert other.files == one.files


def test_a_changed_text_is_learnt_with_its_own_label(
    classify: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt: list[tuple[str, int]] = []
    loss = gradient.Descent._loss

    def watched(it: gradient.Descent, outputs: Any, rows: Examples, weights: Any) -> Any:
        assert isinstance(rows.targets, Classes)
        learnt.extend(zip(rows.inputs["text"], rows.targets.index.tolist(), strict=True))
        return loss(it, outputs, rows, weights)

    monkeypatch.setattr(gradient.Descent, "_loss", watched)
    recipe = noised(classify, {"words_swapped": 0.5})  # words stay as they are, so each tells its label
    rows = recipe.data.load()
    recipe.trainer.fit(recipe.model.build(rows), rows.train, Run(tmp_path, seed=0))  # type: ignore[union-attr]
    assert len(learnt) == 3 * len(rows.train)
    assert not {text for text, _ in learnt} <= {*rows.train.inputs["text"]}
    assert all(label == int("card" in text.split()) for text, label in learnt)


def test_only_rows_that_are_learnt_from_are_changed_and_each_time_anew(
    classify: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = noised(classify, {"typos": 0.3}, trainer={**GRADIENT, "validation": 0.3})
    rows = recipe.data.load()
    given: list[str] = []
    made: list[str] = []
    read: list[str] = []
    augment, feed = Classifier.augment, Classifier.feed

    def watched(model: Classifier, inputs: Inputs, chance: np.random.Generator) -> Inputs:
        found = augment(model, inputs, chance)
        given.extend(inputs["text"])
        made.extend(found["text"])
        return found

    def fed(model: Classifier, inputs: Inputs) -> Any:
        read.extend(inputs["text"])
        return feed(model, inputs)

    monkeypatch.setattr(Classifier, "augment", watched)
    monkeypatch.setattr(Classifier, "feed", fed)
    recipes.run(recipe, Shelf(tmp_path / "shelf"), tmp_path / "runs")
    learnt, held = {*given}, {*rows.train.inputs["text"]} - {*given}
    assert learnt < {*rows.train.inputs["text"]}
    assert len(held) == round(0.3 * len(rows.train))
    assert held < {*read}  # what is validated comes as it is
    assert len({*made}) > 2 * len(learnt)  # three epochs


def test_a_model_with_noise_answers_as_one_without(classify: Make) -> None:
    rows = classify().data.load()
    outputs = []
    for recipe in (classify(), noised(classify)):
        torch.manual_seed(0)
        model = recipe.model.build(rows)
        assert isinstance(model, Classifier)
        outputs.append(predict(model, rows.test.inputs)["logits"])
    np.testing.assert_array_equal(outputs[0], outputs[1])


def test_noise_for_a_model_that_is_frozen_is_refused(classify: Make, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="use trainer 'gradient'"):
        recipes.run(noised(classify, trainer={"kind": "probe"}), Shelf(tmp_path / "shelf"), tmp_path / "runs")


def test_noise_for_an_embedder_is_refused(classify: Make, tmp_path: Path) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text("left,right,similarity\nwhere is my parcel,the order,1\ncard declined,please pay,0\n")
    recipe = noised(classify, data={"kind": "pairs", "test": str(file)}, trainer=None)
    with pytest.raises(RecipeError, match=r"model\.noise"):
        recipe.model.build(recipe.data.load())


def test_a_student_learns_from_noisy_texts_what_its_teacher_says_of_the_clean_ones(
    classify: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed: list[int] = []
    augment = Classifier.augment

    def watched(model: Classifier, inputs: Inputs, chance: np.random.Generator) -> Inputs:
        changed.append(len(model.embedder.encoder.encoder.layer))
        return augment(model, inputs, chance)

    monkeypatch.setattr(Classifier, "augment", watched)
    taught = [{"kind": "distill", "layers": [0], "trainer": GRADIENT}]
    recipes.run(noised(classify, compress=taught), Shelf(tmp_path / "shelf"), tmp_path / "runs")
    assert {*changed} == {1, 2}
