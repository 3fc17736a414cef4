"""Where channels can be scaled: found only where the model answers as before, whatever stands between the layers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

from compressors.scaling import Place, places, rescale
from tests.prenorm import Gated, Transformer, made
from tests.zoo import NETS, build, images


class Between(nn.Module):
    """Two linear layers and something between them, which sees small values only."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.up, self.between, self.down = nn.Linear(36, 8), between, nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(0.1 * self.up(x.reshape(len(x), 12, 36))))  # type: ignore[no-any-return]


class Gain(nn.Module):
    """A norm whose factor is one more than its weight, as in some language models."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(36))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (36,)) * (1 + self.weight)


def around(middle: Callable[[Tensor, nn.Linear, nn.Linear], Tensor], feeder: nn.Module) -> nn.Module:
    """A feeder of 36 channels, and two layers that may read it."""

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.feeder, self.a, self.b = feeder, nn.Linear(36, 36), nn.Linear(36, 36)

        def forward(self, x: Tensor) -> Tensor:
            return middle(self.feeder(x.reshape(len(x), 12, 36)), self.a, self.b)

    return made(Around)


def test_of_a_transformer_norms_and_values_have_a_place() -> None:
    assert places(made(Transformer), (images(),)) == {
        "first": Place("first", ("query", "key", "value")),
        "value": Place("value", ("out",)),
        "second": Place("second", ("up",)),
        "last": Place("last", ("head",)),
    }


def test_of_a_gated_one_so_has_what_the_gate_is_multiplied_with() -> None:
    assert places(made(Gated), (images(),)) == {
        "norm": Place("norm", ("gate", "up")),
        "up": Place("up", ("down",)),
    }


def test_a_norm_that_is_added_to_something_has_none() -> None:
    assert places(build("attention"), (images(),)) == {"value": Place("value", ("out",))}


@pytest.mark.parametrize("net", [net for net in NETS if net != "attention"])
def test_convolutions_and_tied_layers_have_none(net: str) -> None:
    assert places(build(net), (images(),)) == {}


@pytest.mark.parametrize(
    ("between", "exact"),
    [
        (nn.Identity(), True),
        (nn.ReLU(), True),
        (nn.LeakyReLU(), True),
        (nn.Dropout(0.5), True),
        (nn.GELU(), False),
        (nn.Tanh(), False),
        (nn.Softmax(-1), False),
        (nn.Hardswish(), False),
        # Nothing is cut off in the example: only channels that are made larger show that it could be.
        (nn.ReLU6(), False),
        (nn.Hardtanh(-9, 9), False),
        (nn.LayerNorm(8, elementwise_affine=False), False),
    ],
)
def test_what_is_not_in_proportion_stands_in_the_way(between: nn.Module, exact: bool) -> None:
    found = places(made(lambda: Between(between)), (images(),))
    assert found == ({"up": Place("up", ("down",))} if exact else {})


@pytest.mark.parametrize(
    "middle",
    [
        lambda x, a, b: a(x) + x,
        lambda x, a, b: a(x) + F.linear(x, b.weight),
        lambda x, a, b: a(a(x)) + b(x),
        lambda x, a, b: a(x) + b(x.flip(-1)),
        lambda x, a, b: a(x) + b(torch.zeros_like(x)),
        lambda x, a, b: a(F.pad(x[..., 1:], (1, 0), value=1.0)) + b(x),
    ],
    ids=["added", "read by no layer", "called twice", "permuted", "nothing to see", "a channel replaced"],
)
def test_whoever_else_reads_the_channels_stands_in_the_way(
    middle: Callable[[Tensor, nn.Linear, nn.Linear], Tensor],
) -> None:
    assert "feeder" not in places(around(middle, nn.LayerNorm(36)), (images(),))


def test_a_layer_may_be_called_by_the_name_of_its_input() -> None:
    model = around(lambda x, a, b: a(input=x) + b(x), nn.LayerNorm(36))
    assert places(model, (images(),))["feeder"] == Place("feeder", ("a", "b"))


def test_a_weight_that_is_no_plain_factor_is_left_alone() -> None:
    assert places(around(lambda x, a, b: a(x) + b(x), Gain()), (images(),)) == {}


def test_a_module_with_two_users_is_left_alone() -> None:
    model = around(lambda x, a, b: a(x) + b(x), nn.LayerNorm(36))
    model.other = nn.Linear(36, 36)
    model.other.weight = model.get_parameter("a.weight")
    assert places(model, (images(),)) == {}


@pytest.mark.parametrize("kind", [Transformer, Gated])
def test_scaling_changes_weights_and_no_answer(kind: type[nn.Module]) -> None:
    model, scaled = made(kind), made(kind)
    for place in places(model, (images(),)).values():
        width = len(scaled.get_parameter(f"{place.feeder}.weight"))
        rescale(scaled, place, torch.logspace(-2, 2, width)[torch.randperm(width)])
        assert not torch.allclose(
            scaled.get_parameter(f"{place.feeder}.weight"), model.get_parameter(f"{place.feeder}.weight")
        )
    with torch.no_grad():
        torch.testing.assert_close(scaled(images(8, 5)), model(images(8, 5)), rtol=1e-4, atol=1e-5)


def test_looking_for_places_changes_nothing() -> None:
    model = made(Transformer)
    places(model, (images(),))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), made(Transformer).parameters(), strict=True))
    assert not any(module._forward_pre_hooks for module in model.modules())
