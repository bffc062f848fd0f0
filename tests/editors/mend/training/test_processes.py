"""Several processes come to what one would have come to, and fail together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from editors.mend.training.trainer import STATE
from tests.editors.mend.training.runs import assert_same_state, flat
from tests.editors.mend.training.worker import PIECES

WORKER = ["-m", "tests.editors.mend.training.worker"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ENDS_WITHIN_S = 240
Found = dict[str, Any]


def run(folder: Path, *command: str) -> None:
    # One thread each: with another number of them, sums are rounded in another order.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    ended = subprocess.run(
        [sys.executable, *command, str(folder)], env=environment, capture_output=True, text=True, timeout=ENDS_WITHIN_S
    )
    assert ended.returncode == 0, ended.stderr


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Found, Found, Path]:
    """What one process alone came to, what each of two came to, and the two's folder."""
    alone, two = (tmp_path_factory.mktemp(name) for name in ("alone", "two"))
    run(alone, *WORKER)
    run(two, *TORCHRUN, "2", *WORKER)
    return *(torch.load(file, weights_only=True) for file in (alone / "0.pt", two / "0.pt", two / "1.pt")), two


class TestTwoProcesses:
    def test_are_two(self, found):
        assert [each["count"] for each in found[:3]] == [1, 2, 2]

    @pytest.mark.parametrize("family", ["llama", "t5"])
    def test_with_a_micro_batch_each_train_the_editor_of_one_process_bit_for_bit(self, found, family):
        alone, *two = (each[f"{family} 2"] for each in found[:3])
        for each in two:
            for what in ("editor", "optimizer", "history", "curve"):
                assert_same_state(each[what], alone[what])

    def test_with_several_micro_batches_each_train_it_up_to_rounding(self, found):
        alone, *two = (each["llama 4"] for each in found[:3])
        assert_same_state(two[0], {**two[1], "told": two[0]["told"]})
        for a, b in zip(flat(alone["editor"]), flat(two[0]["editor"]), strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-5) if isinstance(a, torch.Tensor) else a == b

    @pytest.mark.parametrize("family", ["llama", "t5"])
    def test_share_hidden_states_and_answers_bit_for_bit(self, found, family):
        alone, *two = (each[f"{family} 2"] for each in found[:3])
        for each in two:
            assert_same_state(each["states"], alone["states"])
            assert each["answers"] == alone["answers"]
        assert bool(alone["answers"]) == (family == "t5")

    def test_resume_what_the_main_one_reads(self, found):
        for each in found[:3]:
            step, editor = each["llama 2"]["resumed"]
            assert step == 6
            assert_same_state(editor, each["llama 2"]["editor"])

    def test_log_and_save_on_the_main_one_only(self, found):
        _, main, other, folder = found
        assert len(main["llama 2"]["told"]) == 6
        assert other["llama 2"]["told"] == []
        saved = torch.load(folder / "llama-2" / STATE, weights_only=True)
        assert_same_state(saved["editor"], main["llama 2"]["editor"])

    def test_unite_what_each_computed_with_its_very_bits(self, found):
        united = [each["together"]["united"] for each in found[:3]]
        assert torch.equal(united[0], united[1])
        assert torch.equal(united[0], united[2])
        assert united[0].shape == (PIECES, 3)
        assert united[0].all()

    def test_add_what_each_has(self, found):
        alone, *two = (each["together"]["sums"] for each in found[:3])
        assert [tensor.tolist() for tensor in alone] == [[0.0, 0.0], 1.0]
        assert [[tensor.tolist() for tensor in sums] for sums in two] == [[[1.0, 1.0], 2.0]] * 2

    def test_hear_what_the_main_one_computed(self, found):
        assert [each["together"]["from main"] for each in found[:3]] == [{"rank": 0}] * 3

    def test_fail_where_the_main_one_does_with_its_words(self, found):
        assert [each["failing"] for each in found[:3]] == [
            "DataFileError: no such file",
            "DataFileError: no such file",
            "TrainingError: no such file",
        ]

    def test_stop_together_where_one_diverges_with_the_same_error(self, found):
        said = [each["diverging"].replace(str(found[3]), "").split(";")[0] for each in found[:3]]
        assert said == ["TrainingDiverged: the loss is inf at step 4"] * 3
