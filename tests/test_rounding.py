"""Rounding to few integers: what is clipped, and what seeing to the output gains over seeing to the weights."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressors.rounding import (
    closest_grid,
    closest_scales,
    dequantize,
    descended,
    gptq,
    less_offsets,
    limits,
    nearest,
    output_error,
    widest_grid,
    widest_scales,
)
from tests.context import quantize_groups


def weights(seed: int, rows: int = 4, width: int = 64, spread: float = 1.0) -> Tensor:
    """A few outliers among many small values, as in trained layers."""
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(rows, width, generator=generator) ** 3


def dense(rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(7))


def correlated(seed: int, count: int, width: int, sources: int = 16) -> Tensor:
    """Inputs `(rows, 1, in)` in which few sources speak through many inputs, as behind a wide layer."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(sources, width, generator=generator)
    noise = 0.1 * torch.randn(count, width, generator=generator)
    return (torch.randn(count, sources, generator=generator) @ mixing + noise)[:, None]


def lost(weight: Tensor, values: Tensor, scales: Tensor, inputs: Tensor) -> float:
    """Of the output, given `(out, in)` and so on for a layer of one part."""
    return output_error(weight[None], dequantize(values, scales)[None], inputs)


@settings(deadline=None)  # the first call of an operation is slow on a busy machine
@given(st.integers(0, 999), st.sampled_from([16, 32, 64]), st.sampled_from([1e-20, 1e-3, 1.0, 1e6]))
def test_what_is_not_clipped_is_off_by_half_a_step_at_most(seed: int, group_size: int, spread: float) -> None:
    weight = weights(seed, spread=spread)
    values, scales = quantize_groups(weight, 4, group_size)
    assert values.dtype == torch.int8
    assert values.shape == weight.shape
    assert scales.shape == (4, 64 // group_size)
    assert (scales > 0).all()
    assert values.min() >= -8
    assert values.max() <= 7
    step = scales.repeat_interleave(group_size, 1)
    inside = (weight >= -8.5 * step) & (weight <= 7.5 * step)
    error = (dequantize(values, scales) - weight).abs()
    assert (error[inside] <= 0.5001 * step[inside]).all()
    assert set(values[~inside].tolist()) <= {-8, 7}


@settings(deadline=None)  # the first call of an operation is slow on a busy machine
@given(st.integers(0, 999), st.sampled_from([4, 8]))
def test_clipping_never_costs_more_than_no_clipping(seed: int, bits: int) -> None:
    weight = weights(seed)
    widest = widest_scales(weight, bits, 32)
    unclipped = dequantize(nearest(weight, widest, bits), widest)
    clipped = dequantize(*quantize_groups(weight, bits, 32))
    assert (clipped - weight).norm() <= (unclipped - weight).norm() * (1 + 1e-5)


def test_clipping_gains_on_long_rows() -> None:
    """Among many weights one is always much larger than most."""
    weight = dense(4, 4096)
    widest = widest_scales(weight, 4, 4096)
    unclipped = (dequantize(nearest(weight, widest, 4), widest) - weight).norm()
    assert (dequantize(*quantize_groups(weight, 4, 4096)) - weight).norm() < 0.9 * unclipped


def test_numbers_on_the_grid_come_back_exactly() -> None:
    values = torch.randint(-7, 8, (3, 32), generator=torch.Generator().manual_seed(0))
    values[:, 0] = 7
    back = dequantize(*quantize_groups(values * 0.25, 4, 32))
    assert torch.equal(back, values * 0.25)


Grid = Callable[[Tensor, int, int], tuple[Tensor, Tensor]]


def on_grid(weight: Tensor, grid: Grid, bits: int, group_size: int) -> Tensor:
    """What is left of a weight whose groups have scales and offsets."""
    scales, offsets = grid(weight, bits, group_size)
    assert scales.shape == offsets.shape == (len(weight), weight.shape[1] // group_size)
    return dequantize(nearest(less_offsets(weight, offsets), scales, bits), scales, offsets)


@settings(deadline=None)  # the first call of an operation is slow on a busy machine
@given(st.integers(0, 999), st.sampled_from([2, 3, 4]), st.sampled_from([0.0, 3.0, -50.0]))
def test_with_an_offset_all_steps_are_used_wherever_a_group_lies(seed: int, bits: int, middle: float) -> None:
    weight = weights(seed) + middle
    groups = weight.reshape(4, 2, 32)
    step = (groups.amax(2) - groups.amin(2)) / (2**bits - 1)
    error = (on_grid(weight, widest_grid, bits, 32) - weight).reshape(4, 2, 32).abs()
    assert (error <= 0.501 * step[..., None] + 1e-6 * abs(middle)).all()
    assert on_grid(weight, closest_grid, bits, 32).sub(weight).norm() <= error.norm() * (1 + 1e-5)


def test_clipping_both_ends_gains_on_long_rows() -> None:
    weight = dense(4, 4096) + 1
    unclipped = (on_grid(weight, widest_grid, 4, 4096) - weight).norm()
    assert (on_grid(weight, closest_grid, 4, 4096) - weight).norm() < 0.9 * unclipped


@pytest.mark.parametrize("grid", [widest_grid, closest_grid])
def test_what_had_scales_and_offsets_before_comes_back(grid: Grid) -> None:
    codes = torch.randint(16, (3, 2, 32), generator=torch.Generator().manual_seed(0)).float()
    codes[..., 0], codes[..., 1] = 0, 15
    weight = (codes * torch.tensor([0.25, 0.03])[:, None] - torch.tensor([0.7, 0.11])[:, None]).flatten(1)
    torch.testing.assert_close(on_grid(weight, grid, 4, 32), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grid", [widest_grid, closest_grid])
def test_a_group_of_one_number_stays_that_number(grid: Grid) -> None:
    for number in (0.0, 0.3, -7.0):
        torch.testing.assert_close(on_grid(torch.full((2, 32), number), grid, 4, 16), torch.full((2, 32), number))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_group_of_zeros_stays_zero(bits: int) -> None:
    values, scales = quantize_groups(torch.zeros(2, 32), bits, 16)
    assert not values.any()
    assert scales.isfinite().all()


def test_the_sign_of_8_bits_can_be_turned() -> None:
    assert limits(8) == (-127, 127)
    assert limits(4) == (-8, 7)
    values, _ = quantize_groups(-weights(0), 8, 64)
    assert values.min() == -127


@pytest.mark.parametrize(("bits", "group_size", "share"), [(4, 32, 0.6), (4, 256, 0.6), (8, 256, 0.6)])
def test_seeing_to_the_output_gains_on_correlated_inputs(bits: int, group_size: int, share: float) -> None:
    """On inputs that were not looked at."""
    weight, inputs, fresh = dense(64, 256), correlated(1, 2048, 256), correlated(1, 4096, 256)[2048:]
    scales = closest_scales(weight, bits, group_size)
    near = lost(weight, nearest(weight, scales, bits), scales, fresh)
    fitted = lost(weight, gptq(weight[None], scales[None], bits, inputs)[0], scales, fresh)
    further = lost(weight, descended(weight[None], scales[None], bits, inputs)[0], scales, fresh)
    assert fitted < share * near
    assert further < fitted


def test_on_uncorrelated_inputs_the_nearest_is_as_good() -> None:
    weight, inputs = weights(0), torch.eye(64).repeat(8, 1)[:, None]
    scales = closest_scales(weight, 4, 32)
    for rounding in (gptq, descended):
        assert torch.equal(rounding(weight[None], scales[None], 4, inputs)[0], nearest(weight, scales, 4))


@pytest.mark.parametrize("rounding", [gptq, descended])
def test_values_stay_within_their_bits_and_their_scales(rounding: Callable[..., Tensor]) -> None:
    weight, inputs = weights(2, 8, 64), correlated(0, 512, 64)
    scales = closest_scales(weight, 4, 16)
    before = scales.clone()
    values = rounding(weight[None], scales[None], 4, inputs)
    assert values.dtype == torch.int8
    assert values.shape == (1, 8, 64)
    assert values.min() >= -8
    assert values.max() <= 7
    assert torch.equal(scales, before)


@pytest.mark.parametrize("rounding", [gptq, descended])
def test_what_is_held_at_zero_stays_there_and_the_others_make_up_for_it(rounding: Callable[..., Tensor]) -> None:
    weight, inputs = dense(64, 256), correlated(1, 2048, 256)
    weight[weight.abs() < 0.7] = 0
    scales = closest_scales(weight, 4, 32)
    values = rounding(weight[None], scales[None], 4, inputs)[0]
    assert not values[weight == 0].any()
    assert lost(weight, values, scales, inputs) < 0.8 * lost(weight, nearest(weight, scales, 4), scales, inputs)


def one_by_one(weight: Tensor, scales: Tensor, bits: int, inputs: Tensor) -> Tensor:
    """The same as `gptq` for one part, without blocks: the paper's formulas."""
    rows = inputs[:, 0].double()
    moments = rows.T @ rows / len(rows)
    moments += 0.01 * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.float64)
    steps = scales.double().repeat_interleave(weight.shape[1] // scales.shape[1], 1)
    left, values = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    todo = moments.diagonal().argsort(descending=True, stable=True).tolist()
    while todo:
        inverse = torch.linalg.inv(moments[todo][:, todo])
        i = todo[0]
        values[:, i] = (left[:, i] / steps[:, i]).round().clamp(*limits(bits))
        error = (left[:, i] - values[:, i] * steps[:, i]) / inverse[0, 0]
        left[:, todo] -= error[:, None] * inverse[0]
        todo = todo[1:]
    return values.to(torch.int8)


def test_blocks_and_factors_are_the_papers_formulas() -> None:
    weight, inputs = dense(4, 160), correlated(3, 512, 160)
    scales = closest_scales(weight, 4, 32)
    assert torch.equal(gptq(weight[None], scales[None], 4, inputs)[0], one_by_one(weight, scales, 4, inputs))


def test_descent_gets_where_no_single_weight_can_improve() -> None:
    weight, inputs = weights(5, 6, 48), correlated(5, 512, 48)
    scales = closest_scales(weight, 4, 48)
    values = descended(weight[None], scales[None], 4, inputs)[0]
    rows = inputs[:, 0].double()
    moments = rows.T @ rows / len(rows)
    moments += 0.01 * moments.diagonal().mean() * torch.eye(48, dtype=torch.float64)

    def error(values: Tensor) -> Tensor:
        change = dequantize(values, scales).double() - weight
        return ((change @ moments) * change).sum(1)

    best, better = error(values), 0
    for i in range(48):
        for step in (-1, 1):
            other = values.clone()
            other[:, i] = (other[:, i] + step).clamp(*limits(4))
            better += int((error(other) < best * (1 - 1e-9)).sum())
    assert better <= 6, "of 576 moves"
    assert error(values).sum() <= error(gptq(weight[None], scales[None], 4, inputs)[0]).sum()


def test_parts_do_not_hear_of_each_other() -> None:
    weight, inputs = dense(12, 9).reshape(3, 4, 9), torch.cat([correlated(s, 256, 9, sources=3) for s in range(3)], 1)
    scales = torch.stack([closest_scales(w, 8, 9) for w in weight])
    for rounding in (gptq, descended):
        together = rounding(weight, scales, 8, inputs)
        for i in range(3):
            alone = rounding(weight[i : i + 1], scales[i : i + 1], 8, inputs[:, i : i + 1])
            assert torch.equal(together[i], alone[0])


@pytest.mark.parametrize(
    "inputs", [torch.zeros(16, 1, 64), torch.cat([torch.zeros(16, 1, 32), torch.ones(16, 1, 32)], 2)]
)
def test_inputs_that_are_always_zero_do_no_harm(inputs: Tensor) -> None:
    weight = weights(0)
    scales = closest_scales(weight, 4, 32)
    for rounding in (gptq, descended):
        values = rounding(weight[None], scales[None], 4, inputs)[0]
        assert torch.equal(values[:, :32], nearest(weight, scales, 4)[:, :32])
