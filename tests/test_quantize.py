from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from compressors.errors import Infeasible
from compressors.fisher import Fisher, diagonal_fisher
from compressors.layers import read_layers
from compressors.pipeline import KERNELS, Applied, LayerNumbers
from compressors.plan import Scalar, Settings, Step
from compressors.quantize import BITS, ROUNDINGS, Quantize
from compressors.replace import put
from compressors.rounding import closest_scales, dequantize, nearest, widest_scales
from evaluators.onnxruntime import OnnxRuntime
from evaluators.openvino import OpenVINO
from evaluators.runtime import Runtime, Support
from tests.context import make_context, quantize_groups
from tests.zoo import build, images


def quantize(model: nn.Module, bits: Mapping[str, Scalar], group_size: Scalar = 32, **shared: Scalar) -> Applied:
    step = Step("quantize", {layer: {"bits": b} for layer, b in bits.items()}, {"group_size": group_size, **shared})
    return Quantize().apply(model, step, make_context(model), 0)


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


def cost(model: nn.Module, layer: str, bits: int, **shared: Scalar) -> tuple[float, float]:
    """Errors of the weights and, where it was seen to, of the output."""
    achieved = quantize(model, {layer: bits}, **shared).achieved[layer]
    return float(achieved["relative_error"]), float(achieved.get("output_error", float("nan")))


def peaked(net: str) -> nn.Module:
    """With weights as training leaves them: many small ones and few large ones, so that clipping makes a difference."""
    model = build(net)
    for layer in read_layers(model, (images(),)):
        weight = model.get_parameter(f"{layer.name}.weight").data
        weight.copy_(weight.pow(3) * weight.norm() / weight.pow(3).norm())
    return model


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("layer", ["up", "query"])
def test_roundings_cost_the_weights_and_the_output_what_they_should(layer: str, bits: int) -> None:
    model = peaked("attention")
    near = cost(model, layer, bits, rounding="nearest", bias_correction=True)
    clipped = cost(model, layer, bits, rounding="mse", bias_correction=True)
    fitted, further = (cost(model, layer, bits, rounding=r) for r in ("gptq", "descent"))
    assert clipped[0] <= min(near[0], fitted[0], further[0])
    assert further[1] <= 1.01 * fitted[1]
    assert fitted[1] < 0.9 * clipped[1]


def test_convolutions_are_rounded_for_their_output_too() -> None:
    model = peaked("depthwise")
    for layer in ("stem.0", "depth.0", "point.0"):
        numbers, weight = quantize(model, {layer: 8}, rounding="gptq").numbers[layer], f"{layer}.weight"
        assert numbers.values is not None
        assert numbers.scales is not None
        assert numbers.values.shape == model.get_parameter(weight).shape
        assert numbers.scales.shape == (len(numbers.values), 1)
        _, near = cost(model, layer, 8, rounding="mse", bias_correction=True)
        assert cost(model, layer, 8, rounding="gptq")[1] < near


def test_8_bits_to_the_nearest_are_left_to_the_runtime() -> None:
    applied = quantize(build("plain"), {"head": 8, "a.0": 8}, rounding="nearest", calibration="mse", symmetric=True)
    assert applied.numbers["head"] == LayerNumbers(8, calibration="mse", symmetric=True)
    assert applied.achieved == {"head": {"bits": 8}, "a.0": {"bits": 8}}


def test_plans_that_name_nothing_mean_what_they_meant() -> None:
    applied = quantize(build("attention"), {"up": 4, "down": 8})
    values, scales = quantize_groups(build("attention").get_parameter("up.weight"), 4, 32)
    numbers = applied.numbers["up"]
    assert numbers.values is not None
    assert numbers.scales is not None
    assert torch.equal(numbers.values, values)
    assert torch.equal(numbers.scales, scales)
    assert applied.numbers["down"] == LayerNumbers(8)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(("layer", "bits"), [("up", 4), ("up", 3), ("query", 2)])
def test_offsets_lose_less_of_weights_that_lie_to_one_side(layer: str, bits: int, rounding: str) -> None:
    model = build("attention")
    weight = model.get_parameter(f"{layer}.weight").data
    weight.abs_()
    plain, shifted = (quantize(model, {layer: bits}, rounding=rounding, asymmetric=a) for a in (False, True))
    off = [float(applied.achieved[layer]["relative_error"]) for applied in (plain, shifted)]
    assert off[1] < 0.7 * off[0]
    numbers = shifted.numbers[layer]
    assert plain.numbers[layer].offsets is None
    assert numbers.values is not None
    assert numbers.scales is not None
    assert numbers.offsets is not None
    assert numbers.offsets.shape == numbers.scales.shape
    error = (dequantize(numbers.values, numbers.scales, numbers.offsets) - weight).norm() / weight.norm()
    assert float(error) == pytest.approx(off[1])
    fisher = diagonal_fisher(model, make_context(model).calibration(), examples=16)
    questions = [(layer, {"bits": bits, "group_size": 32, "asymmetric": a}) for a in (False, True)]
    without, with_offsets = (e.loss for e in Quantize().effects(model, (images(),), questions, fisher))
    assert with_offsets < 0.7 * without, "predicted as well"


def test_8_bits_have_no_offsets() -> None:
    for settings in ({"rounding": "mse"}, {"weights_alone": True}):
        assert quantize(build("attention"), {"up": 8}, asymmetric=True, **settings).numbers["up"].offsets is None


@pytest.mark.parametrize(("layer", "bits"), [("up", 4), ("up", 8), ("query", 8)])
def test_the_mean_error_of_the_output_goes_into_the_bias(layer: str, bits: int) -> None:
    """On data like that which was looked at; the weights are clipped, so that there is an error to speak of."""
    model = build("attention")
    numbers = quantize(model, {layer: bits}, rounding="nearest", bias_correction=True).numbers[layer]
    assert numbers.values is not None
    assert numbers.scales is not None
    assert numbers.shift is not None
    module = model.get_submodule(layer)
    seen: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].flatten(0, -2)))
    with torch.no_grad():
        model(images(32, seed=1))
    handle.remove()
    rounded = dequantize(numbers.values, numbers.scales)
    error = (torch.cat(seen) @ (rounded - module.get_parameter("weight")).T).mean(0)
    assert (error + numbers.shift).norm() < 0.02 * error.norm()


def test_predictions_know_the_rounding() -> None:
    model = peaked("attention")
    fisher = diagonal_fisher(model, make_context(model).calibration(), examples=16)
    shared: dict[str, Scalar] = {"group_size": 32}
    questions = [("up", {"bits": bits, **shared, "rounding": r}) for bits in (4, 8) for r in ROUNDINGS]
    losses = [effect.loss for effect in Quantize().effects(model, (images(),), questions, fisher)]
    for near, mse, gptq, descent in (losses[:4], losses[4:]):
        assert near >= mse == gptq == descent
    assert losses[0] > losses[1]
    tensor: dict[str, Scalar] = {"bits": 8, "per_channel": False, "rounding": "nearest"}
    refused: dict[str, Scalar] = {**tensor, "rounding": "mse"}
    coarse, none = Quantize().effects(model, (images(),), [("up", tensor), ("up", refused)], fisher)
    assert coarse.loss > losses[4]
    assert none.loss == float("inf")


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


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_rows_of_an_embedding_have_no_output_to_see_to(rounding: str) -> None:
    model = Language().eval()
    context = replace(make_context(build("plain")), example=(torch.zeros(2, 2).long(),))
    step = Step("quantize", {"embed": {"bits": 3}}, {"rounding": rounding, "bias_correction": True})
    numbers = Quantize().apply(model, step, context, 0).numbers["embed"]
    scales = (widest_scales if rounding == "nearest" else closest_scales)(model.embed.weight, 3, 24)
    assert numbers.values is not None
    assert numbers.scales is not None
    assert torch.equal(numbers.scales, scales)
    assert torch.equal(numbers.values, nearest(model.embed.weight, scales, 3))
    assert numbers.shift is None


@pytest.mark.parametrize(
    ("net", "layer", "bits"), [("attention", "up", 3), ("depthwise", "depth.0", 2), ("plain", "b.0", 4)]
)
def test_what_is_only_stored_is_rounded_for_its_output_too(net: str, layer: str, bits: int) -> None:
    model = peaked(net)
    clipped = cost(model, layer, bits, rounding="mse", bias_correction=True)
    fitted, further = (cost(model, layer, bits, rounding=r) for r in ("gptq", "descent"))
    assert clipped[0] < min(fitted[0], further[0])
    assert further[1] <= 1.01 * fitted[1]
    assert fitted[1] < 0.95 * clipped[1]
    numbers = quantize(model, {layer: bits}, rounding="gptq", bias_correction=True).numbers[layer]
    assert numbers.shift is not None
    assert numbers.calibration == "minmax"


def test_layers_in_the_place_of_one_are_rounded_each_for_its_own_output() -> None:
    model = build("attention")
    put(model, "up", [nn.Linear(32, 16, bias=False), nn.Linear(16, 64)])
    clipped = quantize(model, {"up": 4}, rounding="mse", bias_correction=True)
    fitted = quantize(model, {"up": 4}, rounding="gptq")
    assert fitted.numbers.keys() == {"up.0", "up.1"}
    for name, numbers in fitted.numbers.items():
        before = clipped.numbers[name].values
        assert numbers.values is not None
        assert before is not None
        assert not torch.equal(numbers.values, before)
    assert fitted.achieved["up"]["group_size"] == 32, "the larger of two"
    assert float(fitted.achieved["up"]["output_error"]) < 0.95 * float(clipped.achieved["up"]["output_error"])


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


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("rounding", "up", r"rounding is up: expected one of nearest, mse, gptq, descent"),
        ("calibration", 3, r"calibration is 3: expected one of minmax, percentile, entropy, mse"),
        ("bias_correction", 1, r"bias_correction is 1: expected true or false"),
        ("symmetric", "no", r"symmetric is no: expected true or false"),
    ],
)
def test_unknown_settings_are_infeasible_at_every_width(key: str, value: Scalar, reason: str) -> None:
    for bits in (4, 8, 32):
        with pytest.raises(Infeasible, match=reason):
            quantize(build("attention"), {"up": bits}, **{key: value})


@pytest.mark.parametrize("shared", [{"rounding": "gptq"}, {"bias_correction": True}])
def test_one_scale_for_all_channels_is_the_runtimes_to_choose(shared: Mapping[str, Scalar]) -> None:
    with pytest.raises(Infeasible, match="per_channel is False"):
        quantize(build("plain"), {"a.0": 8}, per_channel=False, **shared)
    assert not quantize(build("plain"), {"a.0": 8}, per_channel=False).numbers["a.0"].per_channel


def test_the_model_is_not_touched() -> None:
    model = build("attention")
    before: Settings = {name: p.sum().item() for name, p in model.named_parameters()}
    quantize(model, {"up": 4, "down": 8})
    assert before == {name: p.sum().item() for name, p in model.named_parameters()}


@pytest.mark.parametrize("runtime", [OnnxRuntime(), OpenVINO()])
def test_what_is_computed_and_not_only_stored_is_what_runtimes_have_kernels_for(runtime: Runtime) -> None:
    kernels = {
        (kind, bits)
        for kind in BITS
        for bits in BITS[kind]
        if runtime.support(kind, bits) is Support.KERNEL and bits < 32
    }
    assert kernels == KERNELS
