"""The gradient network begins as the identity, and does not stay it."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from editors.mend.network import GradientNetwork, RunningStatistics
from editors.mend.variant import Variant

D_IN, D_OUT, LAYERS = 6, 4, 3


def some_rows(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    u = 3 + 2 * torch.randn(rows, D_IN, generator=generator)
    delta = 1e-3 * torch.randn(rows, D_OUT, generator=generator)
    return u, delta, torch.randint(LAYERS, (rows,), generator=generator)


@pytest.fixture
def network() -> GradientNetwork:
    torch.manual_seed(0)
    network = GradientNetwork(D_IN, D_OUT, Variant(rank=3), LAYERS)
    u, delta, _ = some_rows(50, seed=1)
    network.update_statistics(u, delta)
    return network


def shaken(network: GradientNetwork) -> GradientNetwork:
    """As if it had been trained: no parameter is where it began."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return network


class TestAtTheStart:
    def test_is_the_identity_on_normalised_rows(self, network):
        u, delta, layer = some_rows(9)
        new_u, new_delta = network(u, delta, layer)
        torch.testing.assert_close(new_u, network.u_statistics.normalise(u), rtol=0, atol=0)
        torch.testing.assert_close(new_delta, network.delta_statistics.normalise(delta), rtol=0, atol=0)

    def test_every_entry_of_u_has_a_gradient_although_relu_stands_at_zero(self, network):
        u, delta, layer = some_rows(9)
        sum(part.square().sum() for part in network(u, delta, layer)).backward()
        for block in network.blocks:
            assert block.u.grad.ne(0).all()
            assert block.bias.grad.ne(0).all()

    def test_two_steps_of_training_move_every_matrix(self, network):
        u, delta, layer = some_rows(30)
        before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
        optimizer = torch.optim.Adam(network.parameters(), 1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            new_u, new_delta = network(u, delta, layer)
            ((new_u - 2 * u).square().sum() + (new_delta - 1).square().sum()).backward()
            optimizer.step()
        for name, parameter in network.named_parameters():
            assert not torch.equal(parameter, before[name]), name
        assert all(block.u.abs().amax(1).gt(0).all() for block in network.blocks)


class TestRows:
    def test_without_gradient_come_out_as_zeros(self, network):
        u, delta, layer = some_rows(6)
        u[1], delta[4] = 0, 0
        new_u, new_delta = shaken(network)(u, delta, layer)
        assert new_u.any(1).tolist() == new_delta.any(1).tolist() == [True, False, True, True, False, True]

    def test_do_not_depend_on_each_other(self, network):
        u, delta, layer = some_rows(6)
        together = shaken(network)(u, delta, layer)
        for row in range(6):
            part = slice(row, row + 1)
            alone = network(u[part], delta[part], layer[part])
            for whole, own in zip(together, alone, strict=True):
                torch.testing.assert_close(whole[part], own)

    def test_follow_the_formula_with_the_scale_and_shift_of_their_layer(self, network):
        u, delta, layer = some_rows(8)
        shaken(network)
        expected = []
        for row, m in enumerate(layer.tolist()):
            h = torch.cat([network.u_statistics.normalise(u[row]), network.delta_statistics.normalise(delta[row])])
            for b in network.blocks:
                h = h + torch.relu(b.scale[m] * (b.u @ (b.v @ h) + b.bias) + b.shift[m])
            expected.append(h)
        torch.testing.assert_close(torch.cat(network(u, delta, layer), 1), torch.stack(expected), rtol=1e-4, atol=1e-5)

    def test_of_one_layer_do_not_move_with_the_rows_of_another(self, network):
        u, delta, _ = some_rows(5)
        layer = torch.zeros(5, dtype=torch.int64)
        before = shaken(network)(u, delta, layer)
        with torch.no_grad():
            for block in network.blocks:
                block.scale[1:] += 1
                block.shift[1:] += 1
        assert all(torch.equal(a, b) for a, b in zip(before, network(u, delta, layer), strict=True))


class TestStatistics:
    @settings(max_examples=40, deadline=None)
    @given(cuts=st.lists(st.integers(0, 60), max_size=6), seed=st.integers(0, 99))
    def test_merged_in_batches_equal_all_at_once(self, cuts, seed):
        rows, _, _ = some_rows(60, seed)
        edges = [0, *sorted(cuts), 60]
        running = RunningStatistics(D_IN)
        for start, end in itertools.pairwise(edges):
            running.update(rows[start:end])
        exact = rows.double()
        assert running.count == 60
        torch.testing.assert_close(running.mean.double(), exact.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close((running.m2 / 59).double(), exact.var(0), rtol=1e-4, atol=1e-6)

    def test_normalise_to_mean_zero_and_deviation_one(self):
        rows, _, _ = some_rows(200)
        running = RunningStatistics(D_IN)
        running.update(rows)
        normal = running.normalise(rows)
        torch.testing.assert_close(normal.mean(0), torch.zeros(D_IN), rtol=0, atol=1e-5)
        torch.testing.assert_close(normal.std(0), torch.ones(D_IN), rtol=1e-4, atol=0)

    def test_do_not_change_while_editing_even_in_training_mode(self, network):
        before = {name: tensor.clone() for name, tensor in network.named_buffers()}
        for mode in (True, False):
            network.train(mode)(*some_rows(7))
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.named_buffers())

    def test_leave_out_rows_without_gradient(self, network):
        other = GradientNetwork(D_IN, D_OUT, Variant(rank=3), LAYERS)
        u, delta, _ = some_rows(50, seed=1)
        nothing = torch.zeros(5, D_OUT)
        other.update_statistics(torch.cat([u, u[:5]]), torch.cat([delta, nothing]))
        for (name, tensor), (_, mine) in zip(network.named_buffers(), other.named_buffers(), strict=True):
            assert torch.equal(tensor, mine), name

    def test_are_saved_with_the_network_count_included(self, network):
        other = GradientNetwork(D_IN, D_OUT, Variant(rank=3), LAYERS)
        other.load_state_dict(network.state_dict())
        u, delta, _ = some_rows(20, seed=3)
        network.update_statistics(u, delta)
        other.update_statistics(u, delta)
        assert other.u_statistics.count == 70
        for (name, tensor), (_, mine) in zip(network.named_buffers(), other.named_buffers(), strict=True):
            assert torch.equal(tensor, mine), name
