"""Curves keep a whole run in bounded space, the plot is drawn from them, TensorBoard reads what was logged."""

from __future__ import annotations

import math
import struct
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from editors.errors import TrainingOptionsInvalid
from editors.mend.training.journal import PLOT, POINTS, Curve, Journal, _smooth, require_tensorboard

FIGURES = {"edit": 2.0, "neighbour": 0.0, "unrelated": 0.5, "loss": 2.5, "gradient": 1.0, "learning rate": 2e-4}
MEASURED = {"efficacy": 0.9, "paraphrase": 0.5, "neighbour": math.nan, "unrelated": 0.8, "score": 0.7}
HELD_OUT = {f"held out {name}": value for name, value in MEASURED.items()}


class TestCurve:
    def test_holds_every_step_of_a_short_run(self):
        curve = Curve()
        for step in range(1, POINTS):
            curve.add(step, {"loss": float(step)})
        assert curve.points == [{"step": step, "loss": step} for step in range(1, POINTS)]

    def test_averages_over_longer_stretches_of_a_long_one_and_loses_none(self):
        curve = Curve()
        steps = 5 * POINTS + 3
        for step in range(1, steps + 1):
            curve.add(step, {"loss": float(step)})
        assert POINTS / 2 <= len(curve.points) < POINTS
        assert curve.stretch == 8
        assert [point["step"] for point in curve.points] == [point["loss"] for point in curve.points]
        covered = len(curve.points) * curve.stretch
        assert covered + len(curve.pending) == steps
        assert sum(point["loss"] for point in curve.points) * curve.stretch == covered * (covered + 1) / 2

    def test_smoothed_is_the_mean_of_the_last_stretch(self):
        points = [{"step": step, "loss": float(step % 2)} for step in range(100)]
        steps, means = _smooth(points, "loss")
        assert steps == list(range(100))
        assert means[:2] == [0.0, 0.5]
        assert set(means[3:]) == {0.5}


class TestPlot:
    def test_is_a_picture_that_is_replaced_whole(self, tmp_path):
        curve = Curve()
        with Journal(tmp_path, None, 0) as journal:
            for step in range(1, 4):
                curve.add(step, FIGURES)
                journal.plot(curve, [{"step": step, **FIGURES, **HELD_OUT}])
        raw = (tmp_path / PLOT).read_bytes()
        assert raw.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", raw[16:24])
        assert (width, height) == (800, 700)
        assert [path.name for path in tmp_path.iterdir()] == [PLOT]

    def test_of_a_run_that_has_measured_nothing_is_drawn_too(self, tmp_path):
        curve = Curve()
        curve.add(1, FIGURES)
        Journal(tmp_path, None, 0).plot(curve, [])
        assert (tmp_path / PLOT).is_file()


class TestTensorBoard:
    def logged(self, folder) -> EventAccumulator:
        events = EventAccumulator(str(folder))
        events.Reload()
        return events

    def test_has_every_step_and_every_validation(self, tmp_path):
        with Journal(tmp_path, tmp_path / "board", 0) as journal:
            journal.step(1, FIGURES)
            journal.step(2, FIGURES | HELD_OUT)
        events = self.logged(tmp_path / "board")
        assert set(events.Tags()["scalars"]) == {
            "loss/edit", "loss/neighbour", "loss/unrelated", "loss/loss", "step/gradient", "step/learning_rate",
            "held_out/efficacy", "held_out/paraphrase", "held_out/neighbour", "held_out/unrelated", "held_out/score",
        }  # fmt: skip
        assert [(e.step, e.value) for e in events.Scalars("loss/edit")] == [(1, 2.0), (2, 2.0)]
        assert [e.step for e in events.Scalars("held_out/score")] == [2]
        assert events.Scalars("step/learning_rate")[0].value == pytest.approx(2e-4)

    def test_of_a_resumed_run_forgets_what_is_done_again(self, tmp_path):
        with Journal(tmp_path, tmp_path / "board", 0) as journal:
            for step in (1, 2, 3):
                journal.step(step, FIGURES)
        with Journal(tmp_path, tmp_path / "board", 1) as journal:
            journal.step(2, FIGURES | {"edit": 9.0})
        edits = self.logged(tmp_path / "board").Scalars("loss/edit")
        assert [(event.step, event.value) for event in edits] == [(1, 2.0), (2, 9.0)]

    def test_that_is_not_installed_is_said_with_what_to_install(self, monkeypatch):
        require_tensorboard()
        monkeypatch.setitem(sys.modules, "tensorboard", None)
        with pytest.raises(TrainingOptionsInvalid, match="pip install tensorboard"):
            require_tensorboard()
