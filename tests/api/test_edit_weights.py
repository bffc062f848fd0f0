"""GET /edits/{edit_id}/weights: how far one edit alone moves the base's weights."""

from __future__ import annotations

import math

import pytest
import torch

from editors.base_model import load_base_model
from tests.api.answers import assert_problem
from tests.api.conftest import engine_of
from tests.service_fixtures import Standing, save_completed_editor, save_editor


def weights(client, edit_id: str) -> list[dict]:
    answer = client.get(f"/edits/{edit_id}/weights")
    assert answer.status_code == 200, answer.text
    assert answer.headers["etag"] == f'"{client.get("/revision").json()["revision"]}"'
    assert answer.json()["id"] == edit_id
    return answer.json()["items"]


def moved(client) -> dict[str, tuple[list[int], float, float]]:
    """Of each weight of the live model: shape as [out, in], norm of its change, and that of the base's."""
    engine = engine_of(client)
    found = {}
    for target in engine.checkpoint.editor.targets:
        base, live = (target.oriented(model.get_parameter(target.name)).double()
                      for model in (engine.base.model, engine.weights.live.model))  # fmt: skip
        found[target.name] = list(base.shape), (live - base).norm().item(), base.norm().item()
    return found


def agree(items: list[dict], expected: dict[str, tuple[list[int], float, float]]) -> None:
    assert [each["name"] for each in items] == list(expected)
    for each in items:
        shape, norm, whole = expected[each["name"]]
        assert each["shape"] == shape
        assert each["norm"] == pytest.approx(norm, rel=1e-3, abs=1e-4)  # the live weights are rounded to float32
        assert each["relative"] == pytest.approx(each["norm"] / whole)
        assert (each["rank"] > 0) == (each["norm"] > 0)
        assert each["rank"] <= min(shape)


def test_are_those_of_the_live_model_where_no_other_edit_is(client, bodies):
    made = client.post("/edits", json=bodies[0]).json()
    items = weights(client, made["id"])
    agree(items, moved(client))
    assert any(each["norm"] > 0 for each in items)


def test_are_the_same_whatever_became_of_the_edit_and_of_others(client, bodies):
    made = client.post("/edits", json=bodies[0]).json()
    alone = weights(client, made["id"])
    other = client.post("/edits", json=bodies[1]).json()
    assert weights(client, made["id"]) == alone != weights(client, other["id"])
    client.delete(f"/edits/{made['id']}")
    standing = Standing.of(engine_of(client))
    assert weights(client, made["id"]) == alone
    assert Standing.of(engine_of(client)) == standing


@pytest.mark.parametrize("save", [save_editor, save_completed_editor])
def test_of_an_edit_by_either_kind_of_editor_until_compaction_drops_its_factors(serve, folders, tmp_path, bodies, save):
    editor = save(tmp_path / "editor", load_base_model(str(folders.base_model)))
    with serve(tmp_path / "data", editor=str(editor)) as client:
        engine = engine_of(client)
        made = next(
            edit.json() for body in (*bodies, *more(bodies))
            if (edit := client.post("/edits", json=body)).status_code == 201
        )  # fmt: skip
        items = weights(client, made["id"])
        agree(items, moved(client))
        assert sum(each["rank"] for each in items) >= 1
        client.delete(f"/edits/{made['id']}")
        assert weights(client, made["id"]) == items
        assert engine.ledger.compact().dropped_factors == 1
        answer = client.get(f"/edits/{made['id']}/weights")
        assert answer.status_code == 410
        assert assert_problem(answer, "factors_dropped")["id"] == made["id"]
        assert client.get(f"/edits/{made['id']}").status_code == 200


def more(bodies) -> list[dict]:
    """Other answers to the same prompts."""
    return [{**body, "correction": f" {answer}"} for body in bodies for answer in ("Rome", "Oslo", "Vienna", "x")]


def test_of_one_that_there_is_not_is_not_found(client):
    assert_problem(client.get("/edits/edit_x/weights"), "edit_not_found")


def test_are_numbers_that_torch_agrees_with(client, bodies):
    """The change itself, formed as a whole."""
    made = client.post("/edits", json=bodies[0]).json()
    engine = engine_of(client)
    for each in weights(client, made["id"]):
        change = engine.weights.state.accumulators[each["name"]].double() * 2.0**-32
        assert each["norm"] == pytest.approx(change.norm().item(), rel=1e-6)
        assert math.isfinite(each["relative"])
        # Up to the grid, whose rounding has every rank.
        assert each["rank"] == torch.linalg.matrix_rank(change, atol=1e-6)
