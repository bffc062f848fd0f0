"""The statistics of a step are those of all its rows, merged in one order."""

from __future__ import annotations

import copy

import torch

from editors.mend.training.processes import ALONE
from editors.mend.training.statistics import merge_statistics
from tests.editors.mend.training.runs import assert_same_state, trainer


def captures(run, count: int) -> dict:
    return {index: micro.captured for index, micro in enumerate(run._prepare("captures", count))}


class TestMergeStatistics:
    def test_of_one_micro_batch_is_the_editors_own_update_bit_for_bit(self, base, tmp_path):
        run = trainer(base, tmp_path)
        run.calibrate()
        captured = captures(run, 1)
        own = copy.deepcopy(run.editor)
        own.update_statistics(captured[0])
        merge_statistics(run.editor, captured, 1, ALONE)
        assert_same_state(run.editor.state_dict(), own.state_dict())

    def test_of_several_is_over_all_of_their_rows(self, base, tmp_path):
        run = trainer(base, tmp_path)
        captured = captures(run, 3)
        run = trainer(base, tmp_path)
        merge_statistics(run.editor, captured, 3, ALONE)
        for name, members in run.editor.groups.items():
            u = torch.cat([c.u[m][c.delta[m].any(1) & c.u[m].any(1)] for c in captured.values() for m in members])
            counted = run.editor.networks[name].u_statistics
            assert counted.count == len(u)
            torch.testing.assert_close(counted.mean, u.mean(0), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(counted.m2 / (len(u) - 1), u.var(0), rtol=1e-4, atol=1e-6)

    def test_does_not_depend_on_the_order_in_which_they_were_captured(self, linear, tmp_path):
        run, other = trainer(linear, tmp_path), trainer(linear, tmp_path)
        captured = captures(run, 3)
        run = trainer(linear, tmp_path)
        merge_statistics(run.editor, captured, 3, ALONE)
        merge_statistics(other.editor, dict(reversed(captured.items())), 3, ALONE)
        assert_same_state(run.editor.state_dict(), other.editor.state_dict())

    def test_without_any_row_changes_nothing(self, linear, tmp_path):
        run = trainer(linear, tmp_path)
        run.calibrate()
        before = copy.deepcopy(run.editor.state_dict())
        merge_statistics(run.editor, {}, 2, ALONE)
        assert_same_state(run.editor.state_dict(), before)
