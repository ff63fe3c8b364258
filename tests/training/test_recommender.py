"""Ratings: splits, models that are solved, towers that learn, and what a client of each gets."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from runtimes.artifact import Shelf
from training import recipe as recipes
from training.contract import Choices, Rows, objects
from training.errors import DataError, RecipeError
from training.evaluation import measures, scoring
from training.model import predict
from training.models import ease, factors
from training.spec import Recipe
from training.spec.data import Ratings
from training.spec.floors import Biases, Popularity
from training.spec.models import Ease, Factors

USERS, ITEMS = 40, 30


def ratings(prefix: str = "") -> str:
    """Even users like even items and odd users odd ones; each has rated two thirds, ever later ones in time."""
    lines = ["user,item,rating,timestamp"]
    for user in range(USERS):
        for item in range(ITEMS):
            if (user * 7 + item * 5) % 3:
                stars = 4.5 if user % 2 == item % 2 else 1.5
                lines.append(f"{prefix}{user},{prefix}{item},{stars},{(item * 11 + user) % ITEMS}")
    return "\n".join(lines)


def load(tmp_path: Path, content: str, **fields: object) -> Rows:
    (tmp_path / "ratings.csv").write_text(content)
    return msgspec.convert({"kind": "ratings", "train": str(tmp_path / "ratings.csv")} | fields, Ratings).load()


def test_ratings_that_are_all_test_ratings_too_are_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"each of .*ratings.csv is also in the test part"):
        load(tmp_path, "user,item,rating\n1,2,3\n1,3,4\n", test=str(tmp_path / "ratings.csv"))


def recipe(tmp_path: Path, **changes: object) -> Recipe:
    file = tmp_path / "ratings.csv"
    file.write_text(ratings())
    fields: dict[str, object] = {
        "name": "tiny",
        "about": "for tests",
        "data": {"kind": "ratings", "train": str(file), "wanted": "top", "split": "last"},
        "model": {"kind": "ease", "penalty": 5, "top": 20},
        "floor": {"kind": "popularity"},
        "gate": {"recall_20_times_floor_min": 1.0},
    }
    return msgspec.convert(fields | changes, Recipe)


RATING = {"data": {"kind": "ratings", "train": "ratings.csv"}, "floor": {"kind": "biases"}}


def test_the_last_ratings_of_each_user_are_to_test_with(tmp_path: Path) -> None:
    content = "user,item,rating,timestamp\n1,10,3,30\n1,11,4,10\n1,12,5,20\n1,13,4,40\n2,10,1,2\n2,14,2,1\n"
    rows = load(tmp_path, content, split="last", test_share=0.5)
    assert list(zip(*(it.tolist() for it in rows.test.inputs.values()), strict=True)) == [(1, 10), (1, 13), (2, 10)]


def test_the_hash_of_user_and_item_decides_otherwise_and_adding_rows_moves_none(tmp_path: Path) -> None:
    def pairs(rows: Rows) -> set[tuple[object, ...]]:
        return set(zip(*(it.tolist() for it in rows.test.inputs.values()), strict=True))

    before = pairs(load(tmp_path, ratings()))
    assert 0.1 < len(before) / (ratings().count("\n")) < 0.3
    assert before <= pairs(load(tmp_path, ratings() + "\n99,99,3,5"))


def test_of_two_ratings_of_an_item_the_later_one_counts(tmp_path: Path) -> None:
    rows = load(tmp_path, "user,item,rating,timestamp\n1,10,3,30\n1,10,5,20\n2,11,4,9\n2,10,4,9\n", test_share=0.5)
    both = rows.both
    found = dict(zip(both.inputs["item"].tolist(), measures_of(both), strict=True))
    assert len(both) == 3
    assert (1, 3.0) in zip(both.inputs["user"].tolist(), measures_of(both), strict=True)
    assert found[11] == 4


def measures_of(examples: object) -> list[float]:
    found: list[float] = examples.targets.values.tolist()  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize(
    ("content", "fields", "says"),
    [
        ("user,item\n1,2\n", {}, "no column 'rating'"),
        ("user,item,rating\n1,2,3\n1,3,good\n", {}, "row 2: 'rating' is 'good'"),
        ("user,item,rating\n1,2,3\n1,3,1e39\n", {}, "row 2: 'rating' is '1e39', more than float32"),
        ("user,item,rating\n1,2,3\n,3,4\n", {}, "row 2: 'user' is empty"),
        ("user,item,rating\n1,2,3\n1,3,4\n", {"split": "last"}, "no column 'timestamp'"),
        ("user,item,rating,timestamp\n1,2,3,1\n", {"split": "last"}, "no ratings to test with"),
    ],
)
def test_ratings_that_cannot_be_used_are_refused_with_their_place(
    tmp_path: Path, content: str, fields: dict[str, object], says: str
) -> None:
    with pytest.raises(DataError, match=says):
        load(tmp_path, content, **fields)


def test_factors_find_what_biases_cannot(tmp_path: Path) -> None:
    made = recipe(tmp_path)
    data = Ratings(train=made.data.train or "")  # type: ignore[union-attr]
    made = msgspec.structs.replace(
        made, data=data, model=Factors(width=2), floor=Biases(), gate={"rmse_max": 0.6, "rmse_under_floor_min": 0.5}
    )
    shelf = Shelf(tmp_path / "shelf")
    manifest = recipes.run(made, shelf, tmp_path / "runs")
    assert manifest.task == "predict"
    asked = {"user": np.array([2, 3, 2, 999, 999]), "item": np.array([4, 4, 999, 4, 999])}
    answer = scoring.served(shelf.resolve("tiny"), asked)["value"]
    assert answer[0] > 3.7
    assert answer[1] < 2.3
    assert ((answer >= 1.5) & (answer <= 4.5)).all()


@pytest.mark.parametrize(
    ("model", "trainer"),
    [
        ({"kind": "ease", "penalty": 5, "top": 20}, None),
        ({"kind": "two-tower", "width": 8, "top": 20}, {"kind": "gradient", "epochs": 30, "rate": 0.03, "batch": 8}),
    ],
    ids=["ease", "two-tower"],
)
def test_a_user_gets_what_they_like_and_have_not_had(
    tmp_path: Path, model: dict[str, object], trainer: dict[str, object] | None
) -> None:
    made = recipe(tmp_path, model=model, trainer=trainer)
    shelf = Shelf(tmp_path / "shelf")
    manifest = recipes.run(made, shelf, tmp_path / "runs")
    assert manifest.after["recall_20"] > 0.9
    rows = made.data.load()
    targets = rows.train.targets
    assert isinstance(targets, Choices)
    answer = scoring.served(shelf.resolve("tiny"), {"user": rows.train.inputs["user"]})
    for user, had, items, scores in zip(
        rows.train.inputs["user"].tolist(),
        targets.items,
        answer["item"].tolist(),
        answer["score"].tolist(),
        strict=True,
    ):
        assert not set(had) & set(items)
        assert scores == sorted(scores, reverse=True)
        assert items[0] % 2 == user % 2
        # Fewer than 20 are left to this user: the rest is none.
        assert [it for it in items if it == -1] == [-1] * (20 - len(set(range(ITEMS)) - set(had)))


def test_whom_it_does_not_know_gets_what_most_like(tmp_path: Path) -> None:
    made = recipe(tmp_path)
    shelf = Shelf(tmp_path / "shelf")
    recipes.run(made, shelf, tmp_path / "runs")
    rows = made.data.load()
    stranger = scoring.served(shelf.resolve("tiny"), {"user": np.array([10**12])})
    counts = np.bincount([item for liked in rows.train.targets.liked() for item in liked])  # type: ignore[attr-defined]
    assert counts[stranger["item"][0]].tolist() == sorted(counts, reverse=True)[:20]


def test_names_are_as_good_as_numbers(tmp_path: Path) -> None:
    file = tmp_path / "named.csv"
    file.write_text(ratings("n"))
    made = recipe(tmp_path)
    data = msgspec.structs.replace(made.data, train=str(file))
    shelf = Shelf(tmp_path / "shelf")
    recipes.run(msgspec.structs.replace(made, data=data), shelf, tmp_path / "runs")
    answer = scoring.served(shelf.resolve("tiny"), {"user": objects(["n4", "nobody"])})["item"]
    assert all(it == "" or it.startswith("n") for it in answer.flat)
    assert int(answer[0, 0].removeprefix("n")) % 2 == 0


def test_ease_by_users_is_ease_by_items(tmp_path: Path) -> None:
    rows = load(tmp_path, ratings(), wanted="top", split="last")
    model = ease.build(Ease(penalty=3, top=20), rows)
    given = model.liked[1:].double().numpy()
    inverse = np.linalg.inv(given.T @ given + 3 * np.eye(given.shape[1]))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    import torch

    found = model.scores(torch.arange(1, len(given) + 1))
    np.testing.assert_allclose(found.numpy(), given @ weights, atol=1e-4)


def test_the_graph_answers_as_torch(tmp_path: Path) -> None:
    made = recipe(tmp_path)
    shelf = Shelf(tmp_path / "shelf")
    recipes.run(made, shelf, tmp_path / "runs")
    rows = made.data.load()
    asked = {"user": np.append(rows.test.inputs["user"], -5)}
    wanted, found = predict(made.model.build(rows), asked), scoring.served(shelf.resolve("tiny"), asked)
    np.testing.assert_allclose(found["score"], wanted["score"], atol=1e-4)


def test_more_rounds_do_no_harm(tmp_path: Path) -> None:
    rows = load(tmp_path, ratings())
    errors = [
        measures.measure(rows.test.targets, predict(factors.build(it, rows), rows.test.inputs))["rmse"]
        for it in (Factors(width=8, rounds=8), Factors(width=8, rounds=60))
    ]
    assert errors[1] <= errors[0] + 0.02


def test_recall_and_ndcg_are_those_of_the_textbook() -> None:
    targets = Choices(objects([(1, 2, 3), (7,), (9,)]), objects([(5.0, 4.0, 1.0), (5.0,), (2.0,)]), 4.0)
    items = np.stack([np.arange(2, 22), np.arange(100, 120), np.arange(9, 29)])
    found = measures.measure(targets, {"item": items})
    assert found["recall_20"] == pytest.approx((1 / 2 + 0) / 2)
    assert found["ndcg_20"] == pytest.approx((1 / (1 + 1 / np.log2(3)) + 0) / 2)
    assert found["coverage"] == pytest.approx(2 / 3)


def test_popularity_shows_nobody_what_they_have_had(tmp_path: Path) -> None:
    rows = load(tmp_path, ratings(), wanted="top", split="last")
    found = Popularity().predict(rows.train, rows.test, model=None, seed=0)["item"]
    had = dict(zip(rows.train.inputs["user"].tolist(), rows.train.targets.items, strict=True))  # type: ignore[attr-defined]
    for user, items in zip(rows.test.inputs["user"].tolist(), found.tolist(), strict=True):
        fresh = ITEMS - len(had[user])
        assert not set(had[user]) & set(items[:fresh])


def test_a_model_for_another_question_is_refused(tmp_path: Path) -> None:
    rated, top = load(tmp_path, ratings()), load(tmp_path, ratings(), wanted="top")
    with pytest.raises(RecipeError, match=r"data\.wanted = 'top'"):
        ease.build(Ease(), rated)
    with pytest.raises(RecipeError, match=r"data\.wanted = 'rating'"):
        factors.build(Factors(), top)
    with pytest.raises(RecipeError, match=r"data\.wanted = 'top'"):
        Popularity().predict(rated.train, rated.test, model=None, seed=0)
    with pytest.raises(RecipeError, match=r"data\.wanted = 'rating'"):
        Biases().predict(top.train, top.test, model=None, seed=0)
