"""Training: the loss is the one that is written down, a stopped run equals an unbroken one, divergence is caught."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from editors.base_model import BaseModel, weights_digest
from editors.capture import capture
from editors.errors import CheckpointUnreadable, TrainingDiverged
from editors.mend.checkpoint import load_checkpoint
from editors.mend.corpus import Corpus, locality_positions
from editors.mend.editor import MendEditor
from editors.mend.recipe import train
from editors.mend.training import Trainer, TrainingConfig, Validation, _Divergence
from editors.mend.variant import VARIANTS, variant_named
from editors.targets import resolve_targets
from editors.text import Tokens
from editors.views import UpperBlocks
from tests.editors.dense import changed, logits, loss
from tests.editors.mend.examples import capitals, data_set, languages
from tests.small import small_base

SMALL = {
    "rank": 4, "steps": 6, "batch": 4, "learning_rate": 1e-3, "warmup": 1,
    "validate_every": 3, "validation_edits": 32, "samples": 4,
}  # fmt: skip
SAMPLES = (Tokens((5, 9, 40, 41, 42)), Tokens((7, 8, 99)), Tokens((12, 13, 14, 15, 16, 17)))


def trainer(base: BaseModel, folder: Path, initial: int = 0, **config: object) -> Trainer:
    """initial: seed of the networks before training, which a resumed run must not depend on."""
    targets = resolve_targets(base.model)
    upper = UpperBlocks(base.model, targets)
    corpus = Corpus(base, upper, [data_set(capitals(2)[:5]), data_set(languages()[:5])], SAMPLES)
    held_out = Corpus(base, upper, [data_set(capitals(2)[5:]), data_set(languages()[5:])], SAMPLES)
    torch.manual_seed(initial)
    whole = TrainingConfig(**(SMALL | config))
    editor = MendEditor(targets, variant_named(whole.variant, whole.rank))
    return Trainer(editor, upper, corpus, held_out, whole, folder)


def nothing(_figures: object) -> None:
    pass


class Interrupted(Exception):
    pass


def run_until(run: Trainer, step: int) -> None:
    """As when the process is stopped just after a step."""

    def stop(_losses: dict[str, float]) -> None:
        if run.progress.step == step:
            raise Interrupted

    with pytest.raises(Interrupted):
        run.run(stop, nothing)


def flat(state: object) -> list[object]:
    if isinstance(state, dict):
        return [x for key in sorted(state, key=str) for x in (str(key), *flat(state[key]))]
    if isinstance(state, list | tuple):
        return [x for item in state for x in flat(item)]
    return [state]


def assert_same_state(one: object, other: object) -> None:
    """Equal to the last bit, through dictionaries and lists."""
    for a, b in zip(flat(one), flat(other), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or (a != a and b != b)


@pytest.fixture(scope="module")
def linear() -> BaseModel:
    return small_base()


class TestLoss:
    def test_is_on_the_paraphrase_and_on_the_neighbours_of_densely_edited_models(self, base, tmp_path):
        run = trainer(base, tmp_path, batch=5, self_share=0.0)
        run.calibrate()
        run.editor.log_steps.data += 3.0  # enough to be seen
        editor, upper, config = copy.deepcopy(run.editor), run.upper, run.config
        got = run.step()

        rng = random.Random(f"{config.seed}-0")
        batch = run.corpus.draw(rng, 5, self_share=0.0, unrelated=config.unrelated)
        edits = [text.tokens for text in batch.edits]
        captured = capture(upper, upper.below([tokens.inputs for tokens in edits]), edits)
        editor.update_statistics(captured)
        proposal = editor(captured)
        models = [changed(base.model, editor.targets, proposal.rows_of(editor.targets, edit)) for edit in range(5)]
        nll = torch.stack([loss(models[o], t.tokens) for o, t in zip(batch.target_owner, batch.targets, strict=True)])
        assert got["edit"] == pytest.approx(nll.mean().item(), rel=1e-4)

        scored: dict[int, list[float]] = {}
        for row, position in zip(*locality_positions(rng, batch.locality), strict=True):
            read = batch.locality[row].tokens.prompt[: position + 1]
            before = logits(base.model, read)[-1].log_softmax(-1)
            after = logits(models[batch.locality_owner[row]], read)[-1].log_softmax(-1)
            scored.setdefault(row, []).append(F.kl_div(after, before, log_target=True, reduction="sum").item())
        sums = {True: 0.0, False: 0.0}
        for row, values in scored.items():
            sums[batch.locality_near[row]] += batch.locality_weight[row] * sum(values) / len(values) / 5
        assert got["neighbour"] == pytest.approx(sums[True], rel=1e-3)
        assert got["unrelated"] == pytest.approx(sums[False], rel=1e-3)
        weighed = config.c_edit * got["edit"] + config.c_neighbour * sums[True] + config.c_unrelated * sums[False]
        assert got["loss"] == pytest.approx(weighed, rel=1e-3)
        assert sums[True] > 1e-3

    def test_divergence_is_kl_with_its_own_gradient(self):
        torch.manual_seed(0)
        base, edited = torch.randn(2, 5, 7, dtype=torch.float64)
        edited.requires_grad_()
        expected = F.kl_div(edited.log_softmax(-1), base.log_softmax(-1), log_target=True, reduction="none").sum(-1)
        torch.testing.assert_close(_Divergence.apply(edited, base), expected)
        assert torch.autograd.gradcheck(lambda logits: _Divergence.apply(logits, base), (edited,))

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_reaches_every_parameter_of_the_editor(self, base, tmp_path, variant):
        run = trainer(base, tmp_path, variant=variant)
        run.calibrate()
        before = {name: parameter.detach().clone() for name, parameter in run.editor.named_parameters()}
        for run.progress.step in range(2):
            run.step()
        unmoved = [name for name, parameter in run.editor.named_parameters() if torch.equal(parameter, before[name])]
        assert unmoved == []

    def test_comes_down(self, base, tmp_path):
        run = trainer(base, tmp_path, steps=25, batch=8, learning_rate=3e-2, validate_every=25, c_edit=1.0)
        losses: list[float] = []
        run.run(lambda figures: losses.append(figures["loss"]), nothing)
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5])

    def test_leaves_the_base_model_alone(self, base, tmp_path):
        trainer(base, tmp_path).run(nothing, nothing)
        assert weights_digest(base.model) == base.digest
        assert not any(parameter.requires_grad for parameter in base.model.parameters())


class TestResume:
    @pytest.mark.parametrize("stopped_at", [3, 4])
    def test_equals_a_run_that_was_never_stopped(self, base, tmp_path, stopped_at):
        """Weights, statistics, optimiser and schedule; at 4 the last saved step is 3, and one is done again."""
        unbroken = trainer(base, tmp_path / "unbroken")
        seen: list[dict[str, float]] = []
        unbroken.run(seen.append, nothing)

        run_until(trainer(base, tmp_path / "broken"), stopped_at)
        resumed = trainer(base, tmp_path / "broken", initial=123)
        resumed.resume()
        assert resumed.progress.step == 3
        seen_again: list[dict[str, float]] = []
        resumed.run(seen_again.append, nothing)

        assert_same_state(seen[3:], seen_again)
        assert_same_state(unbroken.editor.state_dict(), resumed.editor.state_dict())
        assert_same_state(unbroken.optimizer.state_dict(), resumed.optimizer.state_dict())
        assert_same_state(unbroken.scheduler.state_dict(), resumed.scheduler.state_dict())
        assert_same_state(unbroken.progress.history, resumed.progress.history)
        assert unbroken.progress.best_step == resumed.progress.best_step

    def test_has_statistics_and_moments_to_go_on_from(self, linear, tmp_path):
        run_until(trainer(linear, tmp_path), 3)
        saved = torch.load(tmp_path / "training.pt", weights_only=True)
        counts = [value for name, value in saved["editor"].items() if name.endswith("count")]
        assert counts
        assert all(count > 0 for count in counts)
        assert len(saved["optimizer"]["state"]) == len(list(trainer(linear, tmp_path).editor.parameters()))
        assert saved["scheduler"]["last_epoch"] == 3

    def test_of_a_finished_run_does_nothing(self, linear, tmp_path):
        run = trainer(linear, tmp_path)
        run.run(nothing, nothing)
        again = trainer(linear, tmp_path)
        again.resume()
        again.run(lambda _: pytest.fail("it went on"), lambda _: pytest.fail("it went on"))
        assert_same_state(run.editor.state_dict(), again.editor.state_dict())

    def test_from_a_damaged_file_says_so(self, linear, tmp_path):
        run_until(trainer(linear, tmp_path), 3)
        path = tmp_path / "training.pt"
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(CheckpointUnreadable, match=r"training\.pt"):
            trainer(linear, tmp_path).resume()

    def test_of_an_editor_of_another_rank_says_so(self, linear, tmp_path):
        run_until(trainer(linear, tmp_path), 3)
        with pytest.raises(CheckpointUnreadable, match=r"training\.pt"):
            trainer(linear, tmp_path, rank=5).resume()


class TestSeed:
    def test_fixes_the_run(self, linear, tmp_path):
        runs = [trainer(linear, tmp_path / str(number), seed=seed) for number, seed in enumerate((0, 0, 1))]
        for run in runs:
            run.run(nothing, nothing)
        one, same, other = (run.editor.state_dict() for run in runs)
        assert_same_state(one, same)
        assert not torch.equal(one["log_steps"], other["log_steps"])

    def test_does_not_read_the_generators_of_others(self, linear, tmp_path):
        one, other = trainer(linear, tmp_path / "1"), trainer(linear, tmp_path / "2")
        one.run(nothing, nothing)
        torch.manual_seed(77)
        random.seed(77)
        other.run(lambda _: torch.rand(1), nothing)
        assert_same_state(one.editor.state_dict(), other.editor.state_dict())


class TestDivergence:
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_stops_the_run_and_keeps_the_last_good_state(self, linear, tmp_path, value):
        run = trainer(linear, tmp_path)
        kept: list[bytes] = []

        def ruin(_losses: dict[str, float]) -> None:
            if run.progress.step == 4:
                kept.append((tmp_path / "training.pt").read_bytes())
                run.editor.log_steps.data.fill_(value)

        with pytest.raises(TrainingDiverged, match="step 4"):
            run.run(ruin, nothing)
        assert (tmp_path / "training.pt").read_bytes() == kept[0]
        again = trainer(linear, tmp_path)
        again.resume()
        again.run(nothing, nothing)
        assert again.progress.step == 6

    def test_of_the_gradient_alone_is_caught_before_it_is_saved(self, linear, tmp_path):
        run = trainer(linear, tmp_path, c_edit=1e6)  # so large that the gradient overflows before the loss

        def ruin(_losses: dict[str, float]) -> None:
            if run.progress.step == 5:  # the next step is saved
                for network in run.editor.networks.values():
                    block = network.blocks[0]  # its output stays what it was, but its scale's gradient overflows
                    block.scale.data.zero_()
                    block.bias.data.fill_(3e38)

        with pytest.raises(TrainingDiverged, match="step 5"):
            run.run(ruin, nothing)
        saved = torch.load(tmp_path / "training.pt", weights_only=True)
        assert saved["progress"]["step"] == 3
        assert all(tensor.isfinite().all() for tensor in saved["editor"].values())


class TestStopping:
    def test_comes_early_once_nothing_gets_better(self, linear, tmp_path):
        run = trainer(
            linear, tmp_path, steps=50, learning_rate=0.0, step_learning_rate=0.0, validate_every=2, patience=3
        )
        best: list[int] = []
        run.run(nothing, lambda _: best.append(run.progress.step))
        # Statistics still move, so a later step may be best; after it, three validations bring nothing.
        assert run.progress.step == best[-1] + 3 * 2 < 50
        assert run.progress.best_step == best[-1]

    def test_validates_at_the_last_step_too(self, linear, tmp_path):
        run = trainer(linear, tmp_path, steps=5, validate_every=3)
        run.run(nothing, nothing)
        assert [entry["step"] for entry in run.progress.history] == [3, 5]

    def test_tells_only_of_validations_that_are_better(self, linear, tmp_path):
        run = trainer(linear, tmp_path, steps=8, validate_every=1)
        scores: list[float] = []
        run.run(nothing, lambda validation: scores.append(validation.score))
        assert scores == sorted(set(scores))
        assert run.progress.best_score == scores[-1] == max(e["held out score"] for e in run.progress.history)


class TestCalibration:
    @staticmethod
    def first_loss(run: Trainer) -> float:
        rng = random.Random(f"{run.config.seed}-calibration")
        batch = run.corpus.draw(rng, 2 * run.config.batch, self_share=0.0, unrelated=run.config.unrelated)
        with torch.no_grad():
            return run._loss(batch, random.Random(0), update_statistics=False)[0].item()

    def test_picks_the_power_of_two_with_the_least_loss(self, base, tmp_path):
        run = trainer(base, tmp_path)
        start = run.editor.log_steps.detach().clone()
        run.calibrate()
        powers = (run.editor.log_steps.detach() - start) / math.log(2)
        exponent = round(powers[0].item())
        torch.testing.assert_close(powers, torch.full_like(powers, exponent), rtol=0, atol=1e-4)
        best = self.first_loss(run)
        for other in {max(-10, exponent - 1), min(6, exponent + 1)} - {exponent}:
            run.editor.log_steps.data = start + other * math.log(2)
            assert self.first_loss(run) >= best

    def test_passes_over_steps_that_are_not_finite(self, linear, tmp_path):
        run = trainer(linear, tmp_path)
        run.editor.log_steps.data.fill_(math.log(1e12))  # from some power of two on, float32 overflows
        run.calibrate()
        assert math.isfinite(self.first_loss(run))
        run.editor.log_steps.data.fill_(math.log(1e12) + 6 * math.log(2))
        assert not math.isfinite(self.first_loss(run))

    def test_is_done_once_not_again_after_resuming(self, linear, tmp_path):
        run_until(trainer(linear, tmp_path), 3)
        resumed = trainer(linear, tmp_path)
        resumed.resume()
        before = resumed.editor.log_steps.detach().clone()
        run_until(resumed, 4)
        assert (resumed.editor.log_steps - before).abs().max() < 0.1  # a power of two would be 0.69


class TestValidation:
    def test_score_is_a_harmonic_mean_of_what_was_measured(self):
        assert Validation(1.0, 0.5, 1.0, 0.5).score == pytest.approx(4 / 6)
        assert Validation(1.0, 0.5, math.nan, 0.5).score == pytest.approx(3 / 5)
        assert Validation(0.0, 1.0, 1.0, 1.0).score < 1e-5

    def test_of_an_editor_that_does_nothing_is_the_base_itself(self, base, tmp_path):
        run = trainer(base, tmp_path)
        run.calibrate()
        run.editor.log_steps.data.fill_(-100)
        figures = run.validate()
        assert (figures.neighbour, figures.unrelated) == (1.0, 1.0)
        assert figures.efficacy == figures.paraphrase == 0.0

    def test_is_the_same_every_time_and_changes_nothing(self, linear, tmp_path):
        run = trainer(linear, tmp_path)
        run.calibrate()
        before = copy.deepcopy(run.editor.state_dict())
        assert run.validate() == run.validate()
        assert_same_state(before, run.editor.state_dict())


class TestPrecision:
    def test_bfloat16_trains_too(self, linear, tmp_path):
        run = trainer(linear, tmp_path, precision="bfloat16", steps=2)
        run.run(nothing, nothing)
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in run.editor.parameters())


def recipe(base: BaseModel, folder: Path, **more: object) -> Validation | None:
    training, validation = data_set(capitals(2) + languages(), "all.json").split(6)
    config = TrainingConfig(**(SMALL | {"steps": 3}))
    return train(base, [training], [validation], config, folder, **more)


@pytest.fixture(scope="module")
def trained(linear: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Validation]:
    folder = tmp_path_factory.mktemp("recipe") / "mine"
    return folder, recipe(linear, folder, command="mend train --data all.json")


class TestRecipe:
    def test_leaves_the_best_editor_with_its_card(self, linear, trained):
        folder, figures = trained
        checkpoint = load_checkpoint(folder, linear)
        card = json.loads((folder / "card.json").read_text())
        assert card["validation"] == dataclasses.asdict(figures)
        assert card["command"] == "mend train --data all.json"
        assert card["config"]["rank"] == checkpoint.editor.variant.rank == 4
        assert card["step"] == 3
        assert [(entry["name"], entry["examples"]) for entry in card["training_data"]] == [("all.json", 8)]
        assert [(entry["name"], entry["examples"]) for entry in card["validation_data"]] == [("all.json", 6)]

    def test_gives_the_same_editor_twice_with_or_without_a_cache(self, linear, trained, tmp_path):
        folder, figures = trained
        assert recipe(linear, tmp_path / "again", cache=tmp_path / "cache") == figures
        assert load_checkpoint(tmp_path / "again", linear).digest == load_checkpoint(folder, linear).digest

    def test_resumed_after_its_end_changes_nothing(self, linear, trained):
        folder, _ = trained
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert recipe(linear, folder, resume=True) is None
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
