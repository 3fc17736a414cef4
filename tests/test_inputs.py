"""What layers are given: rows that give the layer's own output, taken alike whoever else is asked for."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from compressors import inputs as inputs_file
from compressors.errors import Infeasible
from compressors.inputs import layer_inputs
from compressors.pipeline import Batch
from tests.zoo import build, images

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv": (nn.Conv2d(4, 6, 3), (4, 9, 7)),
    "stride and padding": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2)), (4, 9, 7)),
    "dilation": (nn.Conv2d(4, 6, 3, dilation=(2, 1)), (4, 9, 7)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), (4, 9, 7)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding="same"), (4, 9, 7)),
    "reflected": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 9, 7)),
    "sequence": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 9)),
    "linear": (nn.Linear(4, 6), (4,)),
    "linear over places": (nn.Linear(4, 6), (5, 4)),
}


def batches(shape: tuple[int, ...], count: int = 2, size: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [((torch.randn(size, *shape, generator=generator),), None) for _ in range(count)]


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_times_weights_are_the_output(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs_file, "ROWS", 1 << 20)
    layer, shape = LAYERS[kind]
    given = batches(shape)
    ((owner, rows),) = layer_inputs(nn.Sequential(layer), {"0": ("0",)}, lambda: given, 0)
    assert owner == "0"
    parts = getattr(layer, "groups", 1)
    weight = layer.get_parameter("weight").flatten(1).reshape(parts, -1, rows.shape[2])
    made = torch.einsum("npi,poi->npo", rows, weight).flatten(1) + layer.get_parameter("bias")
    with torch.no_grad():
        outputs = torch.cat([layer(*x).flatten(0, -2) if "linear" in kind else _places(layer(*x)) for x, _ in given])
    torch.testing.assert_close(made, outputs)


def _places(output: Tensor) -> Tensor:
    return output.movedim(1, -1).flatten(0, -2)


def calibration() -> Iterator[Batch]:
    return (((images(32, seed),), None) for seed in range(20))


def test_no_more_rows_than_the_limit_and_no_more_examples() -> None:
    found = dict(layer_inputs(build("plain"), {"a.0": ("a.0",), "head": ("head",)}, calibration, 0))
    assert found["a.0"].shape == (4096, 1, 27)
    assert found["head"].shape == (256, 1, 32)


def test_layers_with_one_weight_are_heard_together() -> None:
    found = dict(layer_inputs(build("tied"), {"first": ("first", "second")}, calibration, 0))
    assert found["first"].shape == (512, 1, 32)


def test_the_seed_decides_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model, groups = build("residual"), {name: (name,) for name in ("stem.0", "down.0", "head")}
    together = dict(layer_inputs(model, groups, calibration, 0))
    monkeypatch.setattr(inputs_file, "LIMIT_BYTES", 1)
    for owner, rows in layer_inputs(model, groups, calibration, 0):
        assert torch.equal(rows, together[owner])
    other = dict(layer_inputs(model, groups, calibration, 1))
    assert not torch.equal(other["stem.0"], together["stem.0"])


def test_nobody_listens_any_more_afterwards() -> None:
    model = build("plain")
    list(layer_inputs(model, {"head": ("head",)}, calibration, 0))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_layer_that_nothing_reaches_is_named() -> None:
    with pytest.raises(Infeasible, match="head: no calibration example reaches it"):
        list(layer_inputs(build("plain"), {"head": ("head",)}, lambda: iter(()), 0))


class Named(nn.Module):
    """Calls its layer by the name of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=x)  # type: ignore[no-any-return]


def test_an_input_given_by_its_name_counts() -> None:
    given = batches((4,))
    ((_, rows),) = layer_inputs(Named(), {"layer": ("layer",)}, lambda: given, 0)
    assert torch.equal(rows[:, 0], torch.cat([x[0] for x, _ in given]))
