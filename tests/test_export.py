"""Export: every layer finds its nodes, whatever the nesting; what cannot be exported says why."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from compressors.errors import Infeasible
from compressors.layers import read_layers
from compressors.pipeline import Artifact, LayerNumbers
from compressors.plan import CompressionPlan, Target
from compressors.replace import put
from compressors.rounding import closest_grid, less_offsets, nearest
from evaluators.export import calibration_arrays, check_parity, export, layer_nodes, once, wanted
from evaluators.runtime import CODEBOOK, Array, Support
from tests.context import quantize_groups
from tests.zoo import NETS, build, images


def artifact(model: nn.Module, numbers: dict[str, LayerNumbers] | None = None) -> Artifact:
    return Artifact(model.eval(), CompressionPlan(Target("any", "fp32")), "prefix", {}, numbers or {}, {})


def nodes_of(model: nn.Module, example: Tensor, cache: Path) -> dict[str, list[str]]:
    return layer_nodes(onnx.load(export(artifact(model), (example,), cache)), model)


@pytest.mark.parametrize("net", NETS)
def test_every_layer_of_the_zoo_has_its_nodes(net: str, tmp_path: Path) -> None:
    model = build(net)
    found = nodes_of(model, images(), tmp_path)
    assert found.keys() == {layer.name for layer in read_layers(model, (images(),))}
    names = [name for nodes in found.values() for name in nodes]
    assert len(names) == len(set(names))


def test_a_reused_module_has_one_node_per_call(tmp_path: Path) -> None:
    assert nodes_of(build("reused"), images(), tmp_path)["twice.0"] == [
        "/twice/twice.0/Conv",
        "/twice/twice.0_1/Conv",
    ]


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 1)
        self.downsample = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(x) + self.downsample(x)  # type: ignore[no-any-return]


class _Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(_Block(), _Block())
        self.inner = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])})

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(x).mean((2, 3))
        for i in range(3):
            x = self.get_submodule(f"inner.blocks.{i}")(x)
        return x


class _Underscore(nn.Module):
    """Two calls of `conv` beside a layer whose name looks like the second of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv_2 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_2(self.conv(self.conv(x)))  # type: ignore[no-any-return]


class _Ambiguous(_Underscore):
    def __init__(self) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_1(super().forward(x))  # type: ignore[no-any-return]


class _MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mha, self.head = nn.Embedding(7, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(self.mha(x, x, x, need_weights=False)[0])  # type: ignore[no-any-return]


def _replaced() -> nn.Module:
    """Layers with others in their place: within containers, as attributes, called twice."""
    model = build("residual")
    for name in ("block.a.0", "shortcut"):
        conv = model.get_submodule(name)
        put(model, name, [nn.Conv2d(16, 4, 1, bias=False), nn.Conv2d(4, len(conv.get_parameter("weight")), 1)])
    put(model, "block.a.0.0", [nn.Conv2d(16, 4, 1)])
    put(model, "head", [nn.Linear(32, 2, bias=False), nn.Linear(2, 5)])
    return model


GRAPHS: dict[str, tuple[Callable[[], nn.Module], Tensor, set[str]]] = {
    "nested": (
        _Nested,
        torch.ones(2, 4, 5, 5),
        {f"layer1.{i}.{x}" for i in (0, 1) for x in ("conv1", "downsample.0")}
        | {f"inner.blocks.{i}" for i in range(3)},
    ),
    "underscore": (_Underscore, torch.ones(2, 4, 5, 5), {"conv", "conv_2"}),
    "multi-head attention, whose projections are no layers": (_MultiHead, torch.ones(2, 6).long(), {"embed", "head"}),
    "a bare layer": (lambda: nn.Linear(4, 3), torch.ones(2, 4), {""}),
    "layers with others in their place": (
        _replaced,
        images(),
        {
            "stem.0",
            "block.a.0.0.0",
            "block.a.0.1",
            "block.b.0",
            "down.0",
            "shortcut.0",
            "shortcut.1",
            "head.0",
            "head.1",
        },
    ),
    "one module under two names": (
        lambda: nn.Sequential(*[nn.Linear(4, 4)] * 2),
        torch.ones(2, 4),
        {"0"},
    ),
}


@pytest.mark.parametrize("graph", GRAPHS)
def test_layers_are_found_by_scope(graph: str, tmp_path: Path) -> None:
    make, example, expected = GRAPHS[graph]
    model = make().eval()
    assert nodes_of(model, example, tmp_path).keys() == expected
    assert expected <= {layer.name for layer in read_layers(model, (example,))}


def test_the_calls_of_a_layer_are_told_from_a_layer_with_a_number(tmp_path: Path) -> None:
    assert {k: len(v) for k, v in nodes_of(_Underscore(), torch.ones(2, 4, 5, 5), tmp_path).items()} == {
        "conv": 2,
        "conv_2": 1,
    }


def test_a_name_that_can_be_read_as_two_layers_belongs_to_neither(tmp_path: Path) -> None:
    assert "conv_1" not in nodes_of(_Ambiguous(), torch.ones(2, 4, 5, 5), tmp_path)


def test_a_prefix_is_exported_once(tmp_path: Path) -> None:
    first = export(artifact(build("plain")), (images(),), tmp_path)
    written = first.stat().st_mtime_ns
    assert export(artifact(build("residual")), (images(),), tmp_path).stat().st_mtime_ns == written
    assert [path.name for path in first.parent.iterdir()] == ["float.onnx"]


def test_the_second_of_two_makers_of_a_folder_takes_the_first_ones(tmp_path: Path) -> None:
    def make(path: Path, winner: str) -> None:
        path.mkdir()
        (path / winner).touch()

    def lose(path: Path) -> None:
        make(tmp_path / "target", "first")
        make(path, "second")

    assert [file.name for file in once(tmp_path / "target", lose).iterdir()] == ["first"]


class _Bessel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)  # type: ignore[no-any-return]


def test_an_operator_without_onnx_form_is_named(tmp_path: Path) -> None:
    with pytest.raises(Infeasible, match="bessel_j0") as caught:
        export(artifact(_Bessel()), (torch.ones(2, 3),), tmp_path)
    assert "\n" not in caught.value.reason


class _FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(len(x))


def test_a_size_that_became_a_constant_is_found_out() -> None:
    with pytest.raises(Infeasible, match=r"off by 0\.33"):
        check_parity(artifact(_FixedBatch()), (torch.ones(2, 3),), lambda x: 2 * x)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_an_output_that_is_no_number_is_refused(wrong: float) -> None:
    with pytest.raises(Infeasible, match="NaN or infinity"):
        check_parity(artifact(nn.Identity()), (torch.ones(2, 3),), lambda x: x * wrong)


def test_another_output_shape_is_refused() -> None:
    with pytest.raises(Infeasible, match="shape"):
        check_parity(artifact(nn.Identity()), (torch.ones(2, 3),), lambda x: x[:2])


def accept(kind: str, bits: int) -> Support:
    return Support.REFUSED if bits == 2 else Support.KERNEL


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        (LayerNumbers(2), "no 2-bit linear"),
        (LayerNumbers(4), "4 bits with no integer values"),
        (LayerNumbers(4, torch.ones(5, 32, dtype=torch.int8)), "integer values with scales"),
        (LayerNumbers(6, torch.ones(5, 32, dtype=torch.int8), torch.ones(5, 1)), "at 4 and at 8 bits"),
        (LayerNumbers(8, torch.ones(5, 32, dtype=torch.int8), torch.ones(5, 2)), "8 bits with 2 scales a row"),
    ],
)
def test_numbers_that_cannot_be_placed_are_refused_with_the_layer(
    numbers: LayerNumbers, reason: str, tmp_path: Path
) -> None:
    subject = artifact(build("plain"), {"head": numbers})
    graph = onnx.load(export(subject, (images(),), tmp_path))
    with pytest.raises(Infeasible, match=f"head: .*{reason}"):
        wanted(subject, graph, "any", accept)


def test_integer_values_need_the_weight_they_stand_for(tmp_path: Path) -> None:
    model = build("plain")
    numbers = LayerNumbers(4, torch.ones(5, 32, dtype=torch.int8), torch.ones(5, 1), 32)
    graph = onnx.load(export(artifact(model), (images(),), tmp_path))
    asked = wanted(artifact(model, {"head": numbers}), graph, "any", accept)
    assert asked.grouped.keys() == {"/head/Gemm"}
    assert asked.grouped["/head/Gemm"] is numbers
    with torch.no_grad():
        model.get_parameter("head.weight").add_(1)
    with pytest.raises(Infeasible, match="the exporter changed its weight"):
        wanted(artifact(model, {"head": numbers}), graph, "any", accept)


def test_scales_take_what_a_batch_norm_does_to_a_channel(tmp_path: Path) -> None:
    model = build("plain")
    norm, weight = model.get_submodule("a.1"), model.get_parameter("a.0.weight").detach()
    with torch.no_grad():
        norm.get_parameter("weight")[:3] = torch.tensor([-2.0, 0.0, 1.0])
    values, scales = quantize_groups(weight.flatten(1), 8, 27)
    numbers = LayerNumbers(8, values.reshape(weight.shape), scales, shift=torch.ones(16))
    graph = onnx.load(export(artifact(model), (images(),), tmp_path))
    asked = wanted(artifact(model, {"a.0": numbers}), graph, "any", accept)
    (placed,), (shift,) = asked.given.values(), asked.shifts.values()
    assert placed.values is not None
    assert placed.scales is not None
    deviation = (norm.get_buffer("running_var") + 1e-5).sqrt()
    factors = norm.get_parameter("weight").detach() / deviation
    assert torch.equal(placed.values[0], -values[0].reshape(weight.shape[1:]))
    assert not placed.values[1].any()
    assert torch.equal(placed.values[2:], values[2:].reshape(-1, *weight.shape[1:]))
    assert (placed.scales > 0).all()
    torch.testing.assert_close(placed.scales[2:, 0], scales[2:, 0] * factors[2:])
    torch.testing.assert_close(torch.from_numpy(shift), factors.reshape(-1, 1, 1))


def test_offsets_take_it_too(tmp_path: Path) -> None:
    model = build("plain")
    model.get_submodule("a.1").get_parameter("weight").data.fill_(0.5)
    weight = model.get_parameter("a.0.weight").detach()
    scales, offsets = closest_grid(weight.flatten(1), 3, 27)
    values = nearest(less_offsets(weight.flatten(1), offsets), scales, 3).reshape(weight.shape)
    numbers = LayerNumbers(3, values, scales, 27, offsets)
    graph = onnx.load(export(artifact(model), (images(),), tmp_path))
    (stored,) = wanted(artifact(model, {"a.0": numbers}), graph, "any", lambda *_: Support.STORAGE).packed.values()
    factors = 0.5 / (model.get_submodule("a.1").get_buffer("running_var").numpy() + 1e-5) ** 0.5
    assert stored.offsets is not None
    np.testing.assert_allclose(stored.offsets, offsets.numpy() * factors[:, None], rtol=1e-4)


def test_layers_of_one_graph_have_one_recipe(tmp_path: Path) -> None:
    model = build("plain")
    graph = onnx.load(export(artifact(model), (images(),), tmp_path))
    numbers = {"a.0": LayerNumbers(8), "head": LayerNumbers(8, calibration="mse")}
    with pytest.raises(Infeasible, match=r"disagree .*minmax-channel for a\.0, mse-channel for head"):
        wanted(artifact(model, numbers), graph, "any", accept)
    alike = {"a.0": LayerNumbers(8, symmetric=True), "head": LayerNumbers(32)}
    assert str(wanted(artifact(model, alike), graph, "any", accept).recipe) == "minmax-channel-symmetric"


def test_a_layer_that_is_only_stored_has_no_recipe(tmp_path: Path) -> None:
    model = build("plain")
    graph = onnx.load(export(artifact(model), (images(),), tmp_path))
    table = LayerNumbers(8, torch.zeros(5, 32, dtype=torch.uint8), codebook=torch.ones(1))
    numbers = {"a.0": LayerNumbers(8, calibration="mse"), "head": table}

    def support(form: str, bits: int) -> Support:
        return Support.STORAGE if form == CODEBOOK else accept(form, bits)

    asked = wanted(artifact(model, numbers), graph, "any", support)
    assert asked.int8 == {"/a/a.0/Conv"}
    assert asked.packed.keys() == {"/head/Gemm"}
    assert asked.recipe.calibration == "mse"


def test_calibration_stops_at_the_limit() -> None:
    fed = calibration_arrays(build("plain"), lambda: (((images(8, seed),), None) for seed in range(9)), 20)
    sizes = [len(batch["input_0"]) for batch in fed]
    assert sizes == [8, 8, 4]
    first: Array = fed[0]["input_0"]
    np.testing.assert_array_equal(first, images(8, 0).numpy())
