from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compressors.errors import Infeasible
from compressors.fisher import Fisher
from compressors.pipeline import Applied
from compressors.plan import Scalar, Settings, Step
from compressors.quantize import Quantize, dequantize, quantize_groups
from compressors.replace import put
from tests.context import make_context
from tests.zoo import build, images


def quantize(model: nn.Module, bits: Mapping[str, Scalar], group_size: Scalar = 32) -> Applied:
    step = Step("quantize", {layer: {"bits": b} for layer, b in bits.items()}, {"group_size": group_size})
    return Quantize().apply(model, step, make_context(model), 0)


def weights(seed: int, rows: int = 4, width: int = 64, spread: float = 1.0) -> Tensor:
    """A few outliers among many small values, as in trained layers."""
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(rows, width, generator=generator) ** 3


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
@given(st.integers(0, 999))
def test_clipping_never_costs_more_than_no_clipping(seed: int) -> None:
    weight = weights(seed)
    values, scales = quantize_groups(weight, 4, 32)
    plain = weight.reshape(4, 2, 32).abs().amax(-1, keepdim=True) / 7
    unclipped = ((weight.reshape(4, 2, 32) / plain).round() * plain).flatten(1)
    assert (dequantize(values, scales) - weight).norm() <= (unclipped - weight).norm() * (1 + 1e-5)


def test_numbers_on_the_grid_come_back_exactly() -> None:
    values = torch.randint(-7, 8, (3, 32), generator=torch.Generator().manual_seed(0))
    values[:, 0] = 7
    back = dequantize(*quantize_groups(values * 0.25, 4, 32))
    assert torch.equal(back, values * 0.25)


def test_a_group_of_zeros_stays_zero() -> None:
    values, scales = quantize_groups(torch.zeros(2, 32), 4, 16)
    assert not values.any()
    assert scales.isfinite().all()


def test_bits_decide_what_is_attached() -> None:
    applied = quantize(build("attention"), {"embed": 32, "query": 8, "up": 4})
    assert applied.numbers.keys() == {"query", "up"}
    assert applied.numbers["query"].bits == 8
    assert applied.numbers["query"].values is None
    assert applied.numbers["up"].bits == 4
    assert applied.achieved["embed"] == {"bits": 32}
    assert applied.achieved["query"] == {"bits": 8}


def test_four_bits_say_what_they_cost() -> None:
    model = build("attention")
    applied = quantize(model, {"up": 4})
    numbers, achieved = applied.numbers["up"], applied.achieved["up"]
    assert numbers.values is not None
    assert numbers.scales is not None
    weight = model.get_parameter("up.weight").detach()
    error = (dequantize(numbers.values, numbers.scales) - weight).norm() / weight.norm()
    assert achieved["relative_error"] == pytest.approx(error.item())
    assert 0 < error < 0.15
    assert (achieved["group_size"], numbers.group_size) == (32, 32)


def test_layers_with_one_weight_tensor_share_their_numbers() -> None:
    model = build("tied")
    assert Quantize().groups(model, (images(),))["first"] == ("first", "second")
    numbers = quantize(model, {"first": 4}).numbers
    assert numbers["first"].values is not None
    assert numbers["first"].values is numbers["second"].values


def test_what_stands_in_a_layers_place_is_called_by_its_name() -> None:
    model = build("attention")
    put(model, "up", [nn.Linear(32, 4, bias=False), nn.Linear(4, 64)])
    groups = Quantize().groups(model, (images(),))
    assert groups["up"] == ("up.0", "up.1")
    assert list(groups) == list(Quantize().groups(build("attention"), (images(),)))
    applied = quantize(model, {"up": 8, "down": 32})
    assert applied.numbers.keys() == {"up.0", "up.1"}
    assert applied.achieved == {"up": {"bits": 8}, "down": {"bits": 32}}


def test_a_factor_too_narrow_for_groups_of_4_bits_gets_8() -> None:
    model = build("attention")
    put(model, "up", [nn.Linear(32, 4, bias=False), nn.Linear(4, 64)])
    applied = quantize(model, {"up": 4})
    assert {name: numbers.bits for name, numbers in applied.numbers.items()} == {"up.0": 4, "up.1": 8}
    told = applied.achieved["up"]
    assert (told["bits"], told["group_size"]) == (8, 32)
    assert 0 < float(told["relative_error"]) < 0.15
    with pytest.raises(Infeasible, match=r"bits of up\.0 is 5"):
        quantize(model, {"up": 5})


class Language(nn.Module):
    """The table that tokens are looked up in is the last layer's weight, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 24), nn.Linear(24, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))  # type: ignore[no-any-return]


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_embeddings_are_stored_with_what_is_tied_to_them(bits: int) -> None:
    model = Language().eval()
    context = replace(make_context(build("plain")), example=(torch.zeros(2, 2).long(),))
    assert Quantize().groups(model, context.example) == {"embed": ("embed", "head")}
    applied = Quantize().apply(model, Step("quantize", {"embed": {"bits": bits}}), context, 0)
    numbers = applied.numbers["embed"]
    assert applied.numbers["head"] is numbers
    assert numbers.values is not None
    assert numbers.scales is not None
    assert numbers.scales.shape == (10, 1), "a row has one scale where no group size is asked"
    assert applied.achieved["embed"]["group_size"] == 24
    assert len(set(numbers.values.flatten().tolist())) <= 2**bits


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize(("layer", "group_size", "got"), [("b.0", 32, 16), ("b.0", 16, 16), ("a.0", 16, 27)])
def test_convolutions_are_rounded_along_their_flattened_rows(bits: int, layer: str, group_size: int, got: int) -> None:
    model = build("plain")
    applied = quantize(model, {layer: bits}, group_size)
    numbers, achieved = applied.numbers[layer], applied.achieved[layer]
    weight = model.get_parameter(f"{layer}.weight").detach()
    assert numbers.values is not None
    assert numbers.scales is not None
    assert numbers.values.shape == weight.shape
    assert (numbers.group_size, achieved["group_size"], numbers.scales.shape[1]) == (got, got, weight[0].numel() // got)
    error = (dequantize(numbers.values.flatten(1), numbers.scales) - weight.flatten(1)).norm() / weight.norm()
    assert achieved["relative_error"] == pytest.approx(error.item())
    assert error < 2.0 ** (1 - bits) + 0.1


def test_fewer_bits_lose_more_and_only_kernels_compute_in_them() -> None:
    model = build("attention")
    squares = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    questions = [("up", {"bits": bits, "group_size": 32}) for bits in (32, 8, 6, 4, 3, 2)]
    effects = Quantize().effects(model, (images(),), questions, Fisher(squares, {}))
    losses = [effect.loss for effect in effects]
    assert losses[0] == 0
    assert losses == sorted(losses)
    assert [dict(effect.bits) for effect in effects] == [{"up": 32}, {"up": 8}, {}, {"up": 4}, {}, {}]
    assert [dict(effect.stored) for effect in effects] == [{}, {}, {"up": 6}, {}, {"up": 3}, {"up": 2}]


@pytest.mark.parametrize(("width", "asked", "got"), [(64, 32, 32), (64, 128, 64), (48, 32, 16), (432, 64, 16)])
def test_a_group_size_that_does_not_fit_becomes_smaller(width: int, asked: int, got: int) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(432, width), nn.Linear(width, 5)).eval()
    assert quantize(model, {"2": 4}, asked).achieved["2"]["group_size"] == got


@pytest.mark.parametrize(
    ("net", "bits", "group_size", "reason"),
    [
        ("plain", {"a.0": 5}, 32, r"bits of a\.0 is 5: a conv layer can have \(2, 3, 4, 6, 8, 32\)"),
        ("plain", {"head": 16}, 32, r"bits of head is 16: a linear layer can have \(2, 3, 4, 6, 8, 32\)"),
        ("plain", {"a.0": 3}, 8, r"group_size is 8: expected a whole number, 16 or more"),
        ("plain", {"head": 8.0}, 32, r"bits of head is 8\.0"),
        ("plain", {"head": 4}, 0, r"group_size is 0"),
        ("plain", {"head": 4}, "big", r"group_size is big"),
        ("plain", {"a.1": 8}, 32, r"no layer a\.1: possible are a\.0, b\.0, head"),
        ("tied", {"second": 8}, 32, r"no layer second"),
        ("attention", {"embed": 4}, 32, r"bits of embed is 4, but no power of two from 16 up divides its 36 inputs"),
    ],
)
def test_what_cannot_be_done_is_infeasible(
    net: str, bits: Mapping[str, Scalar], group_size: Scalar, reason: str
) -> None:
    with pytest.raises(Infeasible, match=reason):
        quantize(build(net), bits, group_size)


def test_the_model_is_not_touched() -> None:
    model = build("attention")
    before: Settings = {name: p.sum().item() for name, p in model.named_parameters()}
    quantize(model, {"up": 4, "down": 8})
    assert before == {name: p.sum().item() for name, p in model.named_parameters()}
