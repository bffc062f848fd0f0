"""Both forms of a ridge regression are the same one, and a thread of its own solves it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from editors.errors import StateOverflow
from editors.ridge import Ridge, _single_thread, reproducibly

D_IN, D_OUT = 24, 7
SAME_KEYS = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)


def problem(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    keys = torch.nn.functional.normalize(torch.randn(rows, D_IN, generator=generator, dtype=torch.float64))
    return keys, torch.randn(rows, D_OUT, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("rows", [0, 1, 5, 23, 24, 25, 100])
@pytest.mark.parametrize("ridge", [1e-3, 1.0, 30.0])
class TestForms:
    def test_agree(self, rows, ridge):
        keys, changes = problem(rows)
        dual, primal = Ridge.dual(keys, changes, ridge), Ridge.primal(keys.T @ keys, keys.T @ changes, ridge)
        some = torch.eye(D_IN, dtype=torch.float64)[:, :3]
        torch.testing.assert_close(dual.solution, primal.solution, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(dual.invert(some), primal.invert(some), rtol=1e-9, atol=1e-9)
        assert dual.degrees_of_freedom() == pytest.approx(primal.degrees_of_freedom(), abs=1e-9)

    def test_solve_what_they_say(self, rows, ridge):
        keys, changes = problem(rows)
        inverse = torch.linalg.inv(keys.T @ keys + ridge * torch.eye(D_IN, dtype=torch.float64))
        solved = Ridge.dual(keys, changes, ridge)
        torch.testing.assert_close(solved.solution, inverse @ keys.T @ changes, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(solved.invert(torch.eye(D_IN).double()), inverse, rtol=1e-9, atol=1e-9)
        assert solved.degrees_of_freedom() == pytest.approx((keys.T @ keys @ inverse).trace().item(), abs=1e-9)


class TestRidge:
    @pytest.mark.parametrize("rows", [1, 5, 23])
    def test_that_vanishes_leaves_every_key_its_change(self, rows):
        keys, changes = problem(rows)
        errors = [(keys @ Ridge.dual(keys, changes, ridge).solution - changes).abs().max() for ridge in (1, 1e-4, 1e-9)]
        assert errors[0] > 0.1 > errors[1] > 1e-6 > errors[2]

    def test_too_small_for_keys_that_are_the_same_is_refused(self):
        with pytest.raises(StateOverflow, match=r"alike that they cannot be solved for \(ridge 1e-30\)"):
            Ridge.dual(SAME_KEYS, torch.ones(2, D_OUT, dtype=torch.float64), 1e-30)
        with pytest.raises(StateOverflow):
            Ridge.primal(torch.ones(2, 2, dtype=torch.float64), torch.ones(2, D_OUT, dtype=torch.float64), 1e-30)


class TestReproducibly:
    CPU = torch.device("cpu")

    @pytest.fixture(autouse=True)
    def as_when_the_process_began(self) -> Iterator[None]:
        threads = torch.get_num_threads()
        torch.set_num_threads(3)
        _single_thread.cache_clear()
        yield
        torch.set_num_threads(threads)

    def test_computes_in_one_thread_whatever_the_others_have(self):
        for threads in (3, 2, 4):
            torch.set_num_threads(threads)
            assert reproducibly(self.CPU, torch.get_num_threads) == 1
            assert torch.get_num_threads() == threads

    def test_leaves_old_and_new_threads_the_number_of_the_process(self):
        seen: list[int] = []
        reproducibly(self.CPU, int)
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert [*seen, torch.get_num_threads()] == [3, 3]

    def test_raises_what_was_raised(self):
        with pytest.raises(StateOverflow):
            reproducibly(self.CPU, Ridge.dual, SAME_KEYS, torch.ones(2, 1, dtype=torch.float64), 1e-30)
