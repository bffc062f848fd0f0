"""Rank and norm from the rows are those of the whole change."""

from __future__ import annotations

import pytest
import torch

from editors.magnitude import Magnitude, magnitude


def rows(count: int, d_in: int = 20, d_out: int = 12, rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    u = torch.randn(count, d_in, generator=generator, dtype=torch.float64)
    delta = torch.randn(count, d_out, generator=generator, dtype=torch.float64)
    if rank is not None:  # the others repeat those
        u = u[torch.arange(count) % rank]
    return u, delta


@pytest.mark.parametrize(("count", "rank"), [(1, None), (4, None), (6, 2), (12, None), (16, None), (40, None), (40, 3)])
def test_is_that_of_the_product(count, rank):
    u, delta = rows(count, rank=rank)
    change = delta.T @ u
    found = magnitude(u, delta)
    assert found.rank == torch.linalg.matrix_rank(change) == min(rank or count, 12)
    assert found.norm == pytest.approx(change.norm().item(), rel=1e-12)


def test_of_rows_that_cancel_is_next_to_nothing():
    u, delta = rows(3)
    found = magnitude(torch.cat([u, u]), torch.cat([delta, -delta]))
    assert found.norm < 1e-12


def test_of_no_rows_is_nothing():
    assert magnitude(*rows(0)) == Magnitude(0, 0.0)
