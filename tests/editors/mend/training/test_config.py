"""Options that make no sense are refused by name, and the schedule is the one that is named."""

from __future__ import annotations

import math

import pytest

from editors.errors import TrainingOptionsInvalid
from editors.mend.training.config import TrainingConfig, flag


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"batch": 0}, "--batch is 0; it must be at least 1"),
            ({"c_edit": -0.1}, "--c-edit is -0.1; it must be at least 0"),
            ({"learning_rate": math.nan}, "--learning-rate is nan"),
            ({"learning_rate": math.inf}, "--learning-rate is inf"),
            ({"self_share": 1.5}, "--self-share is 1.5; it must be at most 1"),
            ({"schedule": "step"}, "--schedule is 'step'; it must be one of cosine, linear, constant"),
            ({"precision": "float8"}, "--precision is 'float8'"),
            ({"batch": 10, "accumulate": 3}, "--batch a multiple of 3"),
            ({"batch": 12, "accumulate": 3, "together": 8}, "--batch a multiple of 24"),
        ],
    )
    def test_that_make_no_sense_are_refused_by_name(self, options, said):
        with pytest.raises(TrainingOptionsInvalid, match=said):
            TrainingConfig(**options)

    def test_must_give_every_process_as_much_to_do(self):
        config = TrainingConfig(batch=12, accumulate=4)
        for processes in (1, 2, 4):
            config.require_shares(processes)
        for processes in (3, 8):
            with pytest.raises(TrainingOptionsInvalid, match=f"multiple of {processes}"):
                config.require_shares(processes)

    def test_must_leave_each_group_different_prompts(self):
        config = TrainingConfig(batch=12, together=4)
        config.require_groups(range(4), range(9))
        with pytest.raises(TrainingOptionsInvalid, match="one of them has 3"):
            config.require_groups(range(9), range(3))

    def test_have_the_names_of_the_command_line(self):
        assert flag("c_edit") == "--c-edit"


class TestSchedule:
    @pytest.mark.parametrize(
        ("schedule", "half", "end"), [("cosine", 0.525, 0.05), ("linear", 0.525, 0.05), ("constant", 1, 1)]
    )
    def test_rises_to_one_and_ends_where_it_should(self, schedule, half, end):
        config = TrainingConfig(steps=1000, warmup=10, schedule=schedule)
        assert config.rate(0) == pytest.approx(0.1, rel=1e-2)
        assert config.rate(9) == pytest.approx(1, rel=1e-2)
        assert config.rate(500) == pytest.approx(half)
        assert config.rate(1000) == pytest.approx(end)
        assert config.rate(2000) == pytest.approx(end)

    def test_of_cosine_stays_high_longer_than_linear(self):
        cosine, linear = (
            TrainingConfig(steps=1000, warmup=0, schedule=name).rate(250) for name in ("cosine", "linear")
        )
        assert cosine > linear + 0.05

    def test_has_no_warm_up_where_none_is_wanted(self):
        assert TrainingConfig(warmup=0).rate(0) == 1


class TestDifferences:
    def test_are_told_by_what_they_mean(self):
        saved = {"rank": 8, "seed": 1, "steps": 5, "batch": 24}
        found = TrainingConfig(rank=16, seed=1, steps=9, batch=12).differences(saved)
        assert found == {
            "shape": ["--rank was 8, now it is 16"],
            "run": ["--batch was 24, now it is 12"],
            "free": ["--steps was 5, now it is 9"],
        }

    def test_count_an_option_that_was_not_saved_as_its_default(self):
        assert TrainingConfig(together=2).differences({})["run"] == ["--together was 1, now it is 2"]
