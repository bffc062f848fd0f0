"""Training: the loss is the one that is written down, a stopped run equals an unbroken one, divergence is caught."""

from __future__ import annotations

import copy
import dataclasses
import math
import random

import pytest
import torch

from editors.base_model import weights_digest
from editors.errors import BaseModelMismatch, CheckpointNotFound, CheckpointUnreadable, ResumeRefused, TrainingDiverged
from editors.mend.training.objective import LOSSES, Objective
from editors.mend.training.trainer import CALIBRATION_STEPS, Trainer
from tests.editors.mend.training.runs import assert_same_state, nothing, trainer
from tests.editors.mend.variants import VARIANTS

ABLATED = ("shared", "normalise", "sides", "identity", "plain")


class Interrupted(Exception):
    pass


def run_until(run: Trainer, step: int) -> None:
    """As when the process is stopped just after a step."""

    def stop(_losses: dict[str, float]) -> None:
        if run.progress.step == step:
            raise Interrupted

    with pytest.raises(Interrupted):
        run.run(stop, nothing)


class TestLoss:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_reaches_every_parameter_of_the_editor(self, base, tmp_path, variant):
        options = dataclasses.asdict(VARIANTS[variant])
        run = trainer(base, tmp_path, **{name: options[name] for name in ABLATED})
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
        assert_same_state(unbroken.progress.history, resumed.progress.history)
        assert unbroken.curve == resumed.curve
        assert unbroken.progress.best_step == resumed.progress.best_step

    def test_has_statistics_and_moments_to_go_on_from(self, linear, tmp_path):
        run_until(trainer(linear, tmp_path), 3)
        saved = torch.load(tmp_path / "training.pt", weights_only=True)
        counts = [value for name, value in saved["editor"].items() if name.endswith("count")]
        assert counts
        assert all(count > 0 for count in counts)
        assert len(saved["optimizer"]["state"]) == len(list(trainer(linear, tmp_path).editor.parameters()))

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

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"rank": 5}, "--rank was 4, now it is 5"),
            ({"seed": 7}, "--seed was 0, now it is 7"),
            ({"batch": 8}, "--batch"),
        ],
        ids=["rank", "seed", "batch"],
    )
    def test_of_another_run_is_refused_by_name(self, linear, tmp_path, options, named):
        run_until(trainer(linear, tmp_path), 3)
        with pytest.raises(ResumeRefused, match=named):
            trainer(linear, tmp_path, **options).resume()

    def test_of_another_run_is_done_when_asked_for_but_its_best_is_not_compared(self, linear, tmp_path):
        run_until(trainer(linear, tmp_path), 3)
        again = trainer(linear, tmp_path, batch=8)
        assert again.resume(with_changes=True) == ["--batch was 4, now it is 8"]
        assert (again.progress.step, again.progress.best_score, again.progress.best_step) == (3, -1.0, 3)
        again.run(nothing, nothing)

    def test_of_an_editor_of_another_shape_is_not_done_even_when_asked_for(self, linear, tmp_path):
        run_until(trainer(linear, tmp_path), 3)
        with pytest.raises(ResumeRefused, match="another shape: --rank"):
            trainer(linear, tmp_path, rank=5).resume(with_changes=True)

    def test_says_what_may_change_and_goes_on_with_it(self, linear, tmp_path):
        run_until(trainer(linear, tmp_path), 3)
        again = trainer(linear, tmp_path, learning_rate=1e-5, c_edit=0.5, schedule="constant")
        assert again.resume() == [
            "--c-edit was 0.2, now it is 0.5",
            "--learning-rate was 0.001, now it is 1e-05",
            "--schedule was cosine, now it is constant",
        ]
        assert again.progress.best_score > -1
        assert again.step()["learning rate"] == 1e-5
        assert again.optimizer.param_groups[0]["lr"] == 1e-5

    def test_checks_base_model_and_data(self, linear, tmp_path):
        about = {"base model": "sha256:one", "training data": "a.json"}
        run_until(trainer(linear, tmp_path, about=about), 3)
        trainer(linear, tmp_path, about=about).resume()
        other = trainer(linear, tmp_path, about=about | {"base model": "sha256:two"})
        with pytest.raises(BaseModelMismatch, match=r"sha256:one.*sha256:two"):
            other.resume(with_changes=True)
        other = trainer(linear, tmp_path, about=about | {"training data": "b.json"})
        with pytest.raises(ResumeRefused, match=r"training data were a\.json, now they are b\.json"):
            other.resume()
        assert other.resume(with_changes=True) == ["the training data were a.json, now they are b.json"]

    def test_of_a_run_that_never_was_says_so(self, linear, tmp_path):
        with pytest.raises(CheckpointNotFound, match=r"training\.pt"):
            trainer(linear, tmp_path).resume()


class TestMicroBatches:
    def test_give_the_mean_of_their_gradients_from_the_statistics_of_all(self, base, tmp_path):
        run = trainer(base, tmp_path, batch=6, accumulate=3, gradient_clip=0)
        run.calibrate()
        editor = copy.deepcopy(run.editor)
        got = run.step()

        c = run.config
        chosen = run.corpus.choose(random.Random(f"{c.seed}-0"), 6)
        seeds = [random.Random(f"{c.seed}-0-{micro}") for micro in range(3)]
        batches = [
            run.corpus.draw(rng, chosen[2 * micro :][:2], self_share=c.self_share, unrelated=c.unrelated)
            for micro, rng in enumerate(seeds)
        ]
        captures = [run.objective.capture(batch) for batch in batches]
        for captured in captures:
            editor.update_statistics(captured)
        objective = Objective(editor, run.objective.upper, run.corpus, c)
        losses = [
            objective.losses(batch, captured, rng)
            for batch, captured, rng in zip(batches, captures, seeds, strict=True)
        ]
        mean = torch.stack(losses).mean(0)
        mean[-1].backward()
        assert [got[name] for name in LOSSES] == pytest.approx(mean.tolist(), rel=1e-5)
        for (name, mine), expected in zip(run.editor.named_parameters(), editor.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, expected.grad, rtol=1e-4, atol=1e-7, msg=name)
        for (name, mine), expected in zip(run.editor.named_buffers(), editor.buffers(), strict=True):
            torch.testing.assert_close(mine, expected, msg=name)

    def test_are_drawn_by_themselves(self, linear, tmp_path):
        run = trainer(linear, tmp_path, batch=4, accumulate=2)
        first, second = (micro.batch for micro in run._prepare("seed", 2))
        chosen = run.corpus.choose(random.Random("seed"), 4)
        assert first.edits + second.edits == [item.edit for item in chosen]
        assert {len(first.edits), len(second.edits)} == {2}


class TestGradientClip:
    @pytest.mark.parametrize(("limit", "clipped"), [(1e-3, True), (0, False), (1e6, False)])
    def test_limits_the_norm_and_the_norm_before_is_told(self, linear, tmp_path, limit, clipped):
        run = trainer(linear, tmp_path, gradient_clip=limit)
        run.calibrate()
        told = run.step()["gradient"]
        norm = torch.stack([p.grad.norm() for p in run.editor.parameters()]).norm().item()
        assert norm == pytest.approx(limit if clipped else told, rel=1e-2)
        assert told > 1e-3


class TestLearningRate:
    def test_follows_the_schedule_for_networks_and_for_steps(self, linear, tmp_path):
        run = trainer(linear, tmp_path, learning_rate=1e-3, step_learning_rate=1e-1, warmup=2, schedule="linear")
        seen = []

        def note(figures: dict[str, float]) -> None:
            assert figures["learning rate"] == run.optimizer.param_groups[0]["lr"]
            seen.append([group["lr"] for group in run.optimizer.param_groups])

        run.run(note, nothing)
        rates = [run.config.rate(step) for step in range(6)]
        assert seen == [[1e-3 * rate, 1e-1 * rate] for rate in rates]


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
        """Of the calibration's own batches, under the editor as it is."""
        held = copy.deepcopy(run.editor.state_dict())
        micros = run._prepare(f"{run.config.seed}-calibration", CALIBRATION_STEPS)
        run.editor.load_state_dict(held)  # these rows have been counted
        with torch.no_grad():
            return sum(run.objective.losses(m.batch, m.captured, random.Random(0))[-1].item() for m in micros)

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


class TestPrecision:
    def test_bfloat16_trains_too(self, linear, tmp_path):
        run = trainer(linear, tmp_path, precision="bfloat16", steps=2)
        run.calibrate()
        before = run.editor.log_steps.detach().clone()
        run.run(nothing, nothing)
        assert not torch.equal(run.editor.log_steps, before)
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in run.editor.parameters())
        kept = [tensor for state in run.optimizer.state.values() for tensor in state.values()]
        assert kept
        assert {tensor.dtype for tensor in kept} == {torch.float32}
        counted = {name.rsplit(".")[-1]: buffer.dtype for name, buffer in run.editor.named_buffers()}
        assert (counted["mean"], counted["m2"], counted["count"]) == (torch.float32, torch.float32, torch.float64)
