"""A dry run counts arithmetic, traffic and memory of code that touches no data, and tells it that data is full."""

from __future__ import annotations

import gc

import pytest
import torch

from editors.planning.dry_run import DryRun


def on_meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


class TestCounts:
    def test_a_product(self):
        with DryRun() as run:
            a, b = on_meta(3, 5), on_meta(5, 7)
            with run.count() as cost:
                a @ b
        assert cost.operations == {(torch.float32, 2 * 3 * 5 * 7, 4 * (15 + 35 + 21)): 1}
        assert (cost.flops, cost.moved_bytes) == (210, 284)

    @pytest.mark.parametrize(
        ("work", "moved"),
        [
            (lambda x, y: x + y, 3 * 400),
            (lambda x, y: x.copy_(y), 2 * 400),
            (lambda x, y: x.zero_(), 400),
            (lambda x, y: torch.empty_like(x), 0),
            (lambda x, y: x.double(), 400 + 800),
            (lambda x, y: x[:1].expand(10, 10) + y, 40 + 400 + 400),
            (lambda x, y: torch.nn.functional.embedding(on_meta(2, dtype=torch.int64), x), 16 + 2 * 80),
        ],
        ids=["add", "copy", "zero", "empty", "cast", "expand", "embedding"],
    )
    def test_the_bytes_that_are_read_and_written(self, work, moved):
        with DryRun() as run:
            x, y = on_meta(10, 10), on_meta(10, 10)
            with run.count() as cost:
                work(x, y)
        assert cost.moved_bytes == moved
        assert cost.operations.total() == 1 + (moved == 16 + 2 * 80)  # its empty indices are made inside

    def test_views_as_nothing(self):
        with DryRun() as run:
            x = on_meta(10, 10)
            with run.count() as cost:
                x.T[2:].reshape(4, 20).unsqueeze(0).detach()
        assert not [key for key in cost.operations if key[2]] or cost.moved_bytes == 2 * 4 * 80

    def test_what_autograd_runs(self):
        with DryRun() as run:
            x, w = on_meta(3, 5).requires_grad_(), on_meta(5, 7)
            with run.count() as cost:
                (x @ w).sum().backward()
        assert cost.flops == 2 * (2 * 3 * 5 * 7)

    def test_the_most_that_is_alive_at_once(self):
        with DryRun() as run:
            x = on_meta(100)
            with run.count() as cost:
                y = x + 1
                del y
                z = x * 2
                w = z.view(10, 10)
                del z
            assert (cost.held_bytes, cost.peak_bytes, run.live_bytes) == (400, 800, 800)
            del w
            assert run.live_bytes == 400

    def test_what_autograd_keeps(self):
        with DryRun() as run:
            x = on_meta(100).requires_grad_()
            with run.count() as cost:
                y = x.exp().sum()
            assert cost.peak_bytes == run.live_bytes == 400 + 400 + 4
            y.backward()
            del y
            gc.collect()
            assert run.live_bytes == 400 + 400  # the gradient


class TestAnswers:
    """Every mask is full and every check passes."""

    def test_masks(self):
        with DryRun():
            x, mask = on_meta(4, 3), on_meta(4, dtype=torch.bool)
            assert x[mask].shape == (4, 3)
            assert mask.nonzero().tolist() == [[0], [1], [2], [3]]
            assert torch.bincount(on_meta(6, dtype=torch.int64), minlength=5).shape == (5,)

    def test_checks(self):
        with DryRun():
            x = on_meta(4)
            assert x.isfinite().all()
            assert torch.equal(x, x)
            assert bool((x < 0).any())

    def test_values_that_leave_the_device_are_not_zero(self):
        with DryRun():
            values = on_meta(2, 2, dtype=torch.bfloat16).cpu()
        assert values.dtype == torch.bfloat16
        assert values.tolist() == [[1, 1], [1, 1]]

    def test_real_tensors_are_real(self):
        with DryRun() as run, run.count() as cost:
            assert torch.equal(torch.ones(3).nonzero(), torch.tensor([[0], [1], [2]]))
            assert not torch.equal(torch.ones(3), torch.zeros(3))
        assert not cost.operations
        assert run.live_bytes == 0
