"""An export is one published revision, whatever the writer does meanwhile."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from editors.base_model import load_base_model, weights_digest
from editors.errors import NothingToExport
from editors.factors import Factors, digest
from editors.formats import INDEX, ExportFormat
from editors.state import SumState
from editors.views import view
from service.failpoints import Failed, arm
from service.ledger import LedgerUnavailable
from tests.ledger.entries import factors_at
from tests.service_fixtures import Standing

TOGGLES = 8


def index_of(folder: Path) -> dict:
    return json.loads((folder / INDEX).read_text(encoding="utf-8"))


def state_of(engine, folder: Path) -> SumState:
    """What the exported factors add up to."""
    state = SumState(engine.checkpoint.editor.targets)
    for edit in index_of(folder)["edits"]:
        raw = (folder / edit["file"]).read_bytes()
        assert digest(raw) == edit["factors_digest"]
        state.add(Factors.from_bytes(raw))
    return state


@pytest.mark.parametrize("format", ExportFormat)
class TestIndex:
    def test_says_what_the_export_is_made_of(self, engine, base, checkpoint, first, second, third, tmp_path, format):
        kept, taken_back, last = (engine.apply(request).applied for request in (first, second, third))
        engine.rollback(taken_back.edit_id)
        index = engine.export(format, tmp_path)
        assert index == index_of(tmp_path)
        assert index["format"] == format
        assert (index["revision"], index["digest"]) == (4, engine.published.digest)
        assert index["base_model"] == {"ref": base.ref, "digest": base.digest}
        assert index["editor"] == {"name": checkpoint.name, "digest": checkpoint.digest, "aggregate": "sum"}
        for edit, applied in zip(index["edits"], (kept, last), strict=True):
            assert edit["id"] == applied.edit_id
            assert edit["revision"] == applied.sequence
            assert (edit["prompt"], edit["correction"]) == (applied.prompt, applied.correction)
            assert edit["factors_digest"] == applied.factors_digest

    def test_lists_every_other_file(self, engine, first, tmp_path, format):
        engine.apply(first)
        index = engine.export(format, tmp_path)
        assert index["files"]
        assert {*index["files"], INDEX} == {
            str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()
        }

    def test_changes_nothing_in_the_engine(self, engine, first, second, tmp_path, format):
        engine.apply(first)
        before = Standing.of(engine)
        engine.export(format, tmp_path)
        assert Standing.of(engine) == before
        assert engine.apply(second).committed


class TestFormats:
    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
    def test_lora_gives_the_logits_of_the_live_model(self, engine, base, first, second, tmp_path):
        for request in (first, second):
            engine.apply(request)
        index = engine.export("lora", tmp_path)
        assert index["rank"] == max(index["ranks"].values()) > 0
        assert index["warning"] is None
        ids = torch.tensor([base.tokenizer(first.prompt).input_ids])
        with torch.no_grad():
            adapted = PeftModel.from_pretrained(view(base.model), tmp_path)(input_ids=ids).logits
            torch.testing.assert_close(adapted, engine.weights.live.model(input_ids=ids).logits, rtol=0, atol=1e-4)
            assert (adapted - base.model(input_ids=ids).logits).abs().max() > 1e-2

    def test_merged_says_what_the_service_says(self, engine, first, tmp_path):
        engine.apply(first)
        engine.export("merged", tmp_path)
        again = load_base_model(str(tmp_path), device="cpu", dtype=torch.float32)
        assert again.digest == weights_digest(engine.weights.live.model)
        ids = again.tokenizer(first.prompt, return_tensors="pt").input_ids
        said = again.model.generate(ids, max_new_tokens=4)[0, ids.shape[1] :]
        text = again.tokenizer.decode(said, skip_special_tokens=True)
        assert text == engine.generate(first.prompt, 4)[0].text

    def test_factors_are_the_bytes_of_the_ledger_and_add_up_to_the_state(self, engine, first, second, tmp_path):
        for request in (first, second):
            engine.apply(request)
        index = engine.export("factors", tmp_path)
        for edit in index["edits"]:
            assert (tmp_path / edit["file"]).read_bytes() == factors_at(engine.ledger, edit["revision"])
        assert state_of(engine, tmp_path).digest() == index["digest"]


class TestNoEdits:
    def test_make_no_adapter(self, engine, first, tmp_path):
        engine.rollback(engine.apply(first).applied.edit_id)
        with pytest.raises(NothingToExport):
            engine.export("lora", tmp_path)

    def test_merged_are_the_base_model(self, engine, base, tmp_path):
        assert engine.export("merged", tmp_path)["edits"] == []
        assert weights_digest(AutoModelForCausalLM.from_pretrained(tmp_path)) == base.digest

    def test_factors_are_an_index_alone(self, engine, tmp_path):
        index = engine.export("factors", tmp_path)
        assert (index["revision"], index["edits"], index["files"]) == (0, [], [])
        assert state_of(engine, tmp_path).digest() == index["digest"]


class TestWhileEditsAreMade:
    def test_every_export_is_the_state_that_it_names(self, engine, base, first, second, tmp_path):
        engine.apply(second)
        without = (engine.published.digest, weights_digest(engine.weights.live.model))
        engine.apply(first)
        with_it = (engine.published.digest, weights_digest(engine.weights.live.model))
        expected = dict([without, with_it])
        done, folders = threading.Event(), (tmp_path / str(number) for number in count())

        def export(format: str) -> list[int]:
            revisions = []
            while not done.is_set():
                index = engine.export(format, folder := next(folders))
                weights = expected[index["digest"]]
                if format == "merged":
                    assert weights_digest(AutoModelForCausalLM.from_pretrained(folder)) == weights
                elif format == "factors":
                    assert state_of(engine, folder).digest() == index["digest"]
                # Even revisions have both edits, odd ones only the second.
                assert len(index["edits"]) == 2 - index["revision"] % 2
                assert (index["digest"] == with_it[0]) == (index["revision"] % 2 == 0)
                revisions.append(index["revision"])
            return revisions

        with ThreadPoolExecutor(len(ExportFormat)) as readers:
            exporting = [readers.submit(export, format) for format in ExportFormat]
            try:
                for _ in range(TOGGLES):
                    (edit,) = [edit for edit in engine.history.all_active() if edit.applied.prompt == first.prompt]
                    engine.rollback(edit.id)
                    engine.apply(first)
            finally:
                done.set()
            revisions = {revision for each in exporting for revision in each.result()}
        assert len(revisions) > 2
        assert engine.published.revision == 2 + 2 * TOGGLES

    def test_does_not_wait_for_an_edit_that_is_being_judged(self, engine, first, tmp_path):
        engine.apply(first)
        with engine._turns.taken(), ThreadPoolExecutor(1) as other:
            for format in ExportFormat:
                other.submit(engine.export, format, tmp_path / format).result(timeout=60)

    def test_leaves_out_what_is_recorded_but_not_yet_live(self, engine, first, second):
        kept = engine.apply(first).applied
        arm("settle=error")
        try:
            with pytest.raises(Failed):
                engine.apply(second)
        finally:
            arm("")
        assert len(engine.history.active_at(2)) == 2
        assert engine.published.revision == 1
        assert [edit.id for edit in engine.history.active_at(1)] == [kept.edit_id]
        engine.catch_up()
        assert engine.published.revision == 2

    def test_knows_what_was_active_at_every_revision(self, engine, first, second):
        one = engine.apply(first).applied.edit_id
        two = engine.apply(second).applied.edit_id
        engine.rollback(one)
        active = [[edit.id for edit in engine.history.active_at(revision)] for revision in range(4)]
        assert active == [[], [one], [one, two], [two]]


class TestWithoutRedis:
    @pytest.fixture
    def cut_off(self, open_engine, own_server, first):
        engine = open_engine(on=own_server)
        engine.apply(first)
        own_server.stop()
        return engine

    @pytest.mark.parametrize("format", ["lora", "factors"])
    def test_the_factors_cannot_be_had(self, cut_off, format, tmp_path):
        with pytest.raises(LedgerUnavailable):
            cut_off.export(format, tmp_path / "out")

    def test_the_weights_can(self, cut_off, tmp_path):
        cut_off.export("merged", tmp_path / "out")
        assert weights_digest(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) == weights_digest(
            cut_off.weights.live.model
        )
