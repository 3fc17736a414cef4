"""Separable convolutions: what they begin with, what they cost, what is refused, and that both runs in 8 bits."""

import copy
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compressors.errors import Infeasible
from compressors.fisher import diagonal_fisher
from compressors.layers import read_layers
from compressors.lowrank import LowRank
from compressors.pipeline import Context, compress
from compressors.plan import CompressionPlan, Scalar, Settings, Step, Target
from compressors.quantize import Quantize
from compressors.separable import Separable, separated
from tests.context import make_context
from tests.test_fisher import batches, divergence, rank_correlation, trained
from tests.test_runtimes import RUNTIMES, int8_kernels, runtime_of
from tests.zoo import NETS, build, images

OWNERS: dict[str, list[str]] = {
    "plain": ["a.0", "b.0"],
    "residual": ["stem.0", "block.a.0", "block.b.0", "down.0"],
    "concat": ["a.0", "b.0", "c.0"],
    "depthwise": ["stem.0", "point.0"],
    "tied": [],
    "reused": ["stem.0", "twice.0"],
    "attention": [],
    "heads": [],
}
every_net = pytest.mark.parametrize("net", NETS)


def separate(model: nn.Module, replaced: Mapping[str, Scalar]) -> Mapping[str, Settings]:
    step = Step("separable", {name: {"replace": replace} for name, replace in replaced.items()})
    return Separable().apply(model, step, make_context(model), 0).achieved


@every_net
def test_convolutions_wider_than_a_pixel_are_offered(net: str) -> None:
    assert list(Separable().groups(build(net), (images(),))) == OWNERS[net]


def test_it_begins_as_close_as_one_kernel_a_channel_can_be() -> None:
    weight = torch.randn(7, 4, 9, generator=torch.Generator().manual_seed(0)).double()
    depthwise, pointwise = separated(weight)
    assert (depthwise.shape, pointwise.shape) == ((4, 1, 9), (7, 4, 1))
    lost = pointwise * depthwise.transpose(0, 1) - weight
    for channel in range(4):
        tail = torch.linalg.svdvals(weight[:, channel])[1:]
        assert lost[:, channel].norm().item() == pytest.approx(tail.norm().item())


class Strided(nn.Module):
    """Convolutions with everything that one can have, of one dimension and of two."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 16, (3, 5), stride=2, padding=4, dilation=2, padding_mode="reflect")
        self.line, self.head = nn.Conv1d(16, 8, 3, padding="same", bias=False), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.wide(x)).flatten(2)
        return self.head(self.line(x).mean(2))  # type: ignore[no-any-return]


def test_a_layer_that_is_separable_computes_the_same() -> None:
    torch.manual_seed(0)
    model = Strided().eval()
    with torch.no_grad():
        for layer in (model.wide, model.line):
            depthwise, pointwise = separated(layer.weight.flatten(2))
            layer.weight.copy_((pointwise * depthwise.transpose(0, 1)).reshape(layer.weight.shape))
    expected = model(images(4))
    achieved = separate(model, {"wide": True, "line": True})
    torch.testing.assert_close(model(images(4)), expected, rtol=1e-4, atol=1e-5)
    assert achieved["wide"] == {"replace": True, "weights": (3 * 15 + 3 * 16) / (3 * 15 * 16)}
    assert [type(layer) for layer in model.get_submodule("line").children()] == [nn.Conv1d, nn.Conv1d]


@every_net
def test_effects_say_what_is_left(net: str) -> None:
    model, example = build(net), (images(),)
    before = {layer.name: layer for layer in read_layers(model, example)}
    fisher = diagonal_fisher(model, [(example, None)], examples=2)
    questions: list[tuple[str, Settings]] = [(name, {"replace": True}) for name in OWNERS[net]]
    effects = Separable().effects(model, example, questions, fisher)
    separate(model, dict.fromkeys(OWNERS[net], True))
    after = read_layers(model, example)
    for name, effect in zip(OWNERS[net], effects, strict=True):
        share = effect.inputs[name]
        parts = [layer for layer in after if layer.name.startswith(f"{name}.")]
        assert len(parts) == 2
        assert sum(layer.macs for layer in parts) == pytest.approx(share * before[name].macs)
        weights = sum(layer.weight_shape[0] * layer.weight_shape[1] * 9 ** (i == 0) for i, layer in enumerate(parts))
        out, inputs, *_ = before[name].weight_shape
        assert weights == pytest.approx(share * out * inputs * 9)
        assert effect.loss > 0


def test_what_is_left_alone_says_so() -> None:
    model = build("plain")
    expected = model(images())
    assert separate(model, {"a.0": False}) == {"a.0": {"replace": False}}
    assert torch.equal(model(images()), expected)


@pytest.mark.parametrize(
    ("net", "replaced", "reason"),
    [
        ("plain", {"a.0": 1}, r"replace of a\.0 is 1: expected true or false"),
        ("plain", {"a.1": True}, r"no layer a\.1: possible are a\.0, b\.0, head"),
        ("residual", {"shortcut": True}, r"replace of shortcut is true: that takes 1\.03 times its weights"),
        ("plain", {"head": True}, r"replace of head is true: that takes 1\.20 times its weights"),
        ("depthwise", {"depth.0": True}, r"no layer depth\.0"),
    ],
)
def test_what_cannot_be_done_is_infeasible(net: str, replaced: Mapping[str, Scalar], reason: str) -> None:
    with pytest.raises(Infeasible, match=reason) as caught:
        separate(build(net), replaced)
    assert "\n" not in caught.value.reason


def test_a_layer_is_replaced_once() -> None:
    model = build("plain")
    steps = (
        Step("lowrank", {"b.0": {"rank": 0.25}}, {"align": 1, "form": "tucker", "whiten": False}),
        Step("separable", {"b.0": {"replace": True}}),
    )
    plan = CompressionPlan(Target("any", "fp32"), steps)
    with pytest.raises(Infeasible, match=r"separable has no layer b\.0"):
        compress(model, plan, {"lowrank": LowRank(), "separable": Separable()}, make_context(model))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("net", ["residual", "reused"])
def test_both_layers_are_computed_in_8_bits(runtime: str, net: str, tmp_path: Path) -> None:
    model = build(net)
    steps = (
        Step("separable", {name: {"replace": True} for name in OWNERS[net]}),
        Step("quantize", {name: {"bits": 8} for name in OWNERS[net]}, {"group_size": 32}),
    )
    plan = CompressionPlan(Target(runtime, "fp32"), steps)
    artifact = compress(model, plan, {"separable": Separable(), "quantize": Quantize()}, make_context(model))
    assert list(artifact.numbers) == sorted(f"{name}.{part}" for name in OWNERS[net] for part in (0, 1))
    context = make_context(artifact.model)
    deployed = runtime_of(runtime).deploy(artifact, context, tmp_path / "made", tmp_path / "cache")
    calls = len(artifact.numbers) + 2 * (net == "reused")
    assert int8_kernels(deployed) == calls


def test_predictions_rank_layers_as_measurements_do() -> None:
    model, pictures = trained()
    fisher = diagonal_fisher(model, batches(pictures), examples=64)
    example = (pictures[:2],)
    context = Context(model, example, list, list, None)
    owners = list(Separable().groups(model, example))
    assert len(owners) == 4
    effects = Separable().effects(model, example, [(name, {"replace": True}) for name in owners], fisher)
    measured = []
    for name in owners:
        moved = copy.deepcopy(model)
        Separable().apply(moved, Step("separable", {name: {"replace": True}}), context, 0)
        measured.append(divergence(model, moved, pictures))
    assert rank_correlation([effect.loss for effect in effects], measured) > 0.7
