"""Weights that are only stored smaller: their bytes, what the deployed files compute, and how small these are."""

import copy
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

from compressors.errors import Infeasible
from compressors.layers import read_layers, weight_groups
from compressors.pipeline import Artifact, Context, LayerNumbers
from compressors.plan import CompressionPlan, Target
from evaluators.packed import WIDTHS, Packed, pack, packed, unpack, word
from evaluators.packed_onnx import with_packed
from evaluators.packed_openvino import unpacked
from evaluators.runtime import CODEBOOK, Deployed, Support
from tests.test_runtimes import FLOAT_TOLERANCE, RUNTIMES, error, int8_kernels, runtime_of
from tests.zoo import NETS, build, images

every_runtime = pytest.mark.parametrize("name", RUNTIMES)
every_width = pytest.mark.parametrize("bits", WIDTHS)


class Wide(nn.Module):
    """Large enough for its weights to be most of a file."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.depth = (
            nn.Conv2d(3, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.Conv2d(64, 64, 3, padding=1, groups=64),
        )
        self.second, self.head = nn.Conv2d(64, 128, 3, padding=1), nn.Linear(128, 300)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depth(F.relu(self.norm(self.first(x))))
        return self.head(F.relu(self.second(x)).mean((2, 3)))  # type: ignore[no-any-return]


VOCABULARY = 4000


class Language(nn.Module):
    """Looks tokens up, and asks the same table which one comes next."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(VOCABULARY, 48), nn.Linear(48, 48)
        self.head = nn.Linear(48, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(F.relu(self.body(self.embed(tokens))))[:, -1]  # type: ignore[no-any-return]


def tokens(count: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (count, 7), generator=torch.Generator().manual_seed(seed))


def made(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().eval()


def clustered(weight: Tensor, bits: int, seed: int = 0) -> tuple[LayerNumbers, Tensor]:
    """Any indices into any codebook, and the weight that they stand for."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2**bits, weight.shape, generator=generator).to(torch.uint8)
    codebook = torch.randn(2**bits, generator=generator) * weight.std()
    return LayerNumbers(bits, values, codebook=codebook), codebook[values.int()]


def integers(weight: Tensor, bits: int, groups: int = 1) -> tuple[LayerNumbers, Tensor]:
    """Any integers with any scales, several of them with offsets, and the weight that they stand for."""
    generator = torch.Generator().manual_seed(bits)
    shape, half = (len(weight), groups, weight[0].numel() // groups), 2 ** (bits - 1)
    rows = torch.randint(-half, half, shape, generator=generator)
    scales = (torch.rand(len(weight), groups, generator=generator) + 0.5) * weight.detach().std() / half
    offsets = torch.randn(len(weight), groups, generator=generator) * weight.detach().std() if groups > 1 else None
    stood_for = rows * scales[..., None] + (0 if offsets is None else offsets[..., None])
    numbers = LayerNumbers(bits, rows.reshape(weight.shape).to(torch.int8), scales, rows.shape[2], offsets)
    return numbers, stood_for.reshape(weight.shape)


def replaced(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy that computes with other weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer, weight in weights.items():
            other.get_submodule(layer).get_parameter("weight").copy_(weight)
    return other


def deploy(
    name: str,
    model: nn.Module,
    example: Tensor,
    numbers: Mapping[str, LayerNumbers],
    folder: Path,
    precision: str = "fp32",
) -> Deployed:
    runtime = runtime_of(name)
    context = Context(model, (example,), lambda: iter(()), lambda: [((example,), None)], None)
    plan = CompressionPlan(Target(name, precision))
    artifact = Artifact(model, plan, "original", {}, numbers, {})
    place = folder / f"{len(list(folder.iterdir()))}"
    return runtime.deploy(artifact, context, place, folder / "cache")


def off_by(deployed: Deployed, model: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        return error(deployed.run(inputs.numpy()), model(inputs).numpy())


def of_all(model: nn.Module, example: Tensor, bits: int) -> tuple[dict[str, LayerNumbers], nn.Module]:
    """Every layer with a codebook, layers with one weight alike; and the model that computes the same."""
    numbers: dict[str, LayerNumbers] = {}
    weights: dict[str, Tensor] = {}
    for seed, (owner, members) in enumerate(weight_groups(read_layers(model, (example,))).items()):
        given, weights[owner] = clustered(model.get_submodule(owner).get_parameter("weight").detach(), bits, seed)
        numbers.update(dict.fromkeys(members, given))
    return numbers, replaced(model, weights)


# -- Bytes


@given(st.sampled_from(WIDTHS), st.integers(0, 50), st.integers(0, 999))
def test_codes_come_back_and_take_no_more_than_their_bits(bits: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, count).astype(np.uint8)
    data = pack(codes, bits)
    np.testing.assert_array_equal(unpack(data, bits, count), codes)
    size, held = word(bits)
    assert data.size == -(-count // held) * size
    assert size * 8 == held * bits


def test_the_first_code_is_in_the_lowest_bits() -> None:
    assert pack(np.array([1, 2, 3], np.uint8), 4).tolist() == [0x21, 0x03]
    assert pack(np.array([1, 0, 0, 0, 0, 0, 0, 7], np.uint8), 3).tolist() == [1, 0, 0xE0]
    assert pack(np.array([5, 200], np.uint8), 8).tolist() == [5, 200]


def test_integers_and_indices_become_the_same_kind_of_thing() -> None:
    whole = packed("a", LayerNumbers(3, torch.tensor([[-4, 3]], dtype=torch.int8), torch.tensor([[0.5]]), 2))
    assert whole.table[whole.codes].tolist() == [-4, 3]
    assert whole.scales is not None
    assert whole.scales.tolist() == [[0.5]]
    table = packed("a", LayerNumbers(8, torch.tensor([[255, 0]], dtype=torch.uint8), codebook=torch.arange(256.0)))
    assert table.table[table.codes].tolist() == [255, 0]
    assert table.scales is None
    folded = packed(
        "a", LayerNumbers(1, torch.tensor([[0], [1]]), codebook=torch.ones(2)), np.array([2, 3], np.float32)
    )
    assert folded.scales is not None
    assert folded.scales.tolist() == [[2], [3]]


# -- Graphs


def some(bits: int, count: int, groups: int | None = None) -> tuple[Packed, NDArray[np.float32]]:
    """A weight `(2, count)` and what it stands for."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, 2 * count).astype(np.uint8)
    table = rng.normal(size=2**bits).astype(np.float32)
    scales = None if groups is None else rng.normal(size=(2, groups)).astype(np.float32)
    weight = table[codes].reshape(2, groups or 1, -1)
    weight = (weight if scales is None else weight * scales[..., None]).reshape(2, count)
    return Packed("a", bits, codes, table, scales, (2, count)), weight


@every_width
@pytest.mark.parametrize(("count", "groups"), [(24, None), (24, 3), (29, None), (1, 1)])
def test_onnx_operators_unpack_what_was_packed(bits: int, count: int, groups: int | None) -> None:
    stored, weight = some(bits, count, groups)
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], "multiply")
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xy")
    nodes, tensors = with_packed(onnx.helper.make_graph([node], "g", [x], [y]), {"multiply": stored})
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", [x], [y], tensors), opset_imports=[onnx.helper.make_opsetid("", 17)]
    )
    model.ir_version = 8
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": np.eye(count, dtype=np.float32)})
    np.testing.assert_array_equal(got, weight.T)


@every_width
@pytest.mark.parametrize(("count", "groups"), [(24, None), (24, 3), (29, None), (1, 1)])
def test_openvino_operations_unpack_what_was_packed(bits: int, count: int, groups: int | None, tmp_path: Path) -> None:
    stored, weight = some(bits, count, groups)
    x = openvino.opset13.parameter([-1, count], np.float32)
    made = openvino.Model([openvino.opset13.matmul(x, unpacked(stored), False, True)], [x])
    openvino.save_model(made, tmp_path / "model.xml", compress_to_fp16=False)
    compiled = openvino.Core().compile_model(tmp_path / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_array_equal(compiled([np.eye(count, dtype=np.float32)])[0], weight.T)


# -- Deployed files


@every_runtime
@pytest.mark.parametrize("net", NETS)
def test_every_layer_of_every_net_can_be_stored_by_indices(name: str, net: str, tmp_path: Path) -> None:
    model = build(net)
    numbers, same = of_all(model, images(), 4)
    for precision in runtime_of(name).precisions():
        deployed = deploy(name, model, images(), numbers, tmp_path, precision)
        assert off_by(deployed, same, images(8, 9)) < FLOAT_TOLERANCE[precision]


@every_runtime
@pytest.mark.parametrize("bits", range(1, 8))
def test_every_width_computes_with_the_values_given(name: str, bits: int, tmp_path: Path) -> None:
    model = made(Wide)
    layers = read_layers(model, (images(),))
    chosen = [x for x in layers if runtime_of(name).support(x.kind, bits) is Support.STORAGE]
    given = {x.name: integers(model.get_submodule(x.name).get_parameter("weight"), bits) for x in chosen}
    given["second"] = integers(model.get_parameter("second.weight"), bits, groups=36)
    same = replaced(model, {layer: weight for layer, (_, weight) in given.items()})
    deployed = deploy(name, model, images(), {layer: numbers for layer, (numbers, _) in given.items()}, tmp_path)
    assert off_by(deployed, same, images(4, 9)) < FLOAT_TOLERANCE["fp32"]


@every_runtime
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_the_file_shrinks_as_the_bits_do(name: str, bits: int, tmp_path: Path) -> None:
    """Beyond bits and codebooks, 3 kB a layer describe how they are unpacked."""
    model = made(Wide)
    numbers, same = of_all(model, images(), bits)
    plain = deploy(name, model, images(), {}, tmp_path)
    small = deploy(name, model, images(), numbers, tmp_path)
    weights = sum(model.get_submodule(layer).get_parameter("weight").numel() for layer in numbers)
    saved = weights * (32 - bits) // 8 - len(numbers) * 4 * 2**bits
    assert plain.bytes - small.bytes > saved - 3000 * len(numbers)
    assert small.bytes < plain.bytes * bits / 32 + len(numbers) * (4 * 2**bits + 4 * 128 + 3000) + 30_000
    assert off_by(small, same, images(4, 9)) < FLOAT_TOLERANCE["fp32"]


@every_runtime
def test_a_file_has_no_more_weights_than_clusters(name: str, tmp_path: Path) -> None:
    model = made(Wide)
    numbers, weight = clustered(model.get_parameter("head.weight").detach(), 3)
    deployed = deploy(name, model, images(), {"head": numbers}, tmp_path)
    sizes = float_sizes(deployed)
    assert weight.numel() not in sizes
    assert 8 in sizes
    assert model.get_parameter("second.weight").numel() in sizes


def float_sizes(deployed: Deployed) -> list[int]:
    """How many entries every float constant of a deployed file has."""
    if deployed.runtime.name == "onnxruntime":
        graph = onnx.load(deployed.folder / "model.onnx").graph
        return [t.size for t in map(numpy_helper.to_array, graph.initializer) if t.dtype == np.float32]
    model = openvino.Core().read_model(deployed.folder / "model.xml")
    constants = [op for op in model.get_ops() if op.get_type_name() == "Constant"]
    return [op.data.size for op in constants if op.get_element_type() == openvino.Type.f32]


@every_runtime
def test_the_runtime_has_plain_weights_once_it_has_loaded_the_file(name: str, tmp_path: Path) -> None:
    """That is what storage means: neither faster nor slower."""
    model = made(Wide)
    deployed = deploy(name, model, images(), of_all(model, images(), 3)[0], tmp_path)
    unpacking = {"Gather", "BitShift", "Mod", "Convert", "Cast", "Mul", "Multiply"}
    assert not unpacking & set(operators_in_memory(deployed, tmp_path))
    kernels = deploy(name, model, images(), {}, tmp_path)
    assert deployed.runtime.kernels(deployed) == kernels.runtime.kernels(kernels)


def operators_in_memory(deployed: Deployed, folder: Path) -> list[str]:
    if deployed.runtime.name == "onnxruntime":
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(folder / "optimized.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(deployed.folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]
    compiled = openvino.Core().compile_model(deployed.folder / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [op.get_rt_info()["layerType"].value for op in compiled.get_runtime_model().get_ops()]


@every_runtime
def test_stored_layers_stand_beside_8_bit_ones(name: str, tmp_path: Path) -> None:
    model = made(Wide)
    given, weight = clustered(model.get_parameter("second.weight").detach(), 8)
    same = replaced(model, {"second": weight})
    int8 = {layer: LayerNumbers(8) for layer in ("first", "depth", "head")}
    deployed = deploy(name, model, images(), {**int8, "second": given}, tmp_path)
    assert off_by(deployed, same, images(8, 9)) < 0.1
    assert int8_kernels(deployed) == 3
    everything = deploy(name, model, images(), {**int8, "second": LayerNumbers(8)}, tmp_path)
    assert int8_kernels(everything) == 4


@every_runtime
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_embeddings_are_stored_row_by_row(name: str, bits: int, tmp_path: Path) -> None:
    model = made(Language)
    numbers, weight = integers(model.get_parameter("embed.weight").detach(), bits)
    deployed = deploy(name, model, tokens(), {"embed": numbers, "head": numbers}, tmp_path)
    same = replaced(model, {"embed": weight})
    assert off_by(deployed, same, tokens(5, 9)) < FLOAT_TOLERANCE["fp32"]
    # The table once for both layers, with a scale for each row; 24 kB are the other layer and the graph.
    assert deployed.bytes < weight.numel() * bits / 8 + 4 * VOCABULARY + 24_000
    apart = copy.deepcopy(numbers)
    assert deploy(name, model, tokens(), {"embed": numbers, "head": apart}, tmp_path).sha256 == deployed.sha256


@every_runtime
def test_a_stored_table_stands_beside_an_8_bit_layer(name: str, tmp_path: Path) -> None:
    model = made(Language)
    numbers, weight = integers(model.get_parameter("embed.weight").detach(), 4)
    mixed = {"embed": numbers, "head": numbers, "body": LayerNumbers(8)}
    deployed = deploy(name, model, tokens(), mixed, tmp_path)
    assert off_by(deployed, replaced(model, {"embed": weight}), tokens(5, 9)) < 0.1
    assert int8_kernels(deployed) == 1


@every_runtime
def test_layers_that_share_a_weight_store_it_once(name: str, tmp_path: Path) -> None:
    model = build("tied")
    given, weight = clustered(model.get_parameter("first.weight").detach(), 8)
    both = deploy(name, model, images(), {"first": given, "second": given}, tmp_path)
    assert off_by(both, replaced(model, {"first": weight}), images(8, 9)) < FLOAT_TOLERANCE["fp32"]
    assert float_sizes(both).count(256) == 1
    assert weight.numel() not in float_sizes(both)


@every_runtime
def test_the_same_weights_give_the_same_file(name: str, tmp_path: Path) -> None:
    model = made(Wide)
    numbers, _ = of_all(model, images(), 3)
    first = deploy(name, model, images(), numbers, tmp_path)
    assert deploy(name, model, images(), numbers, tmp_path).sha256 == first.sha256


@every_runtime
@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ({"second": LayerNumbers(3)}, "second: 3 bits without values"),
        ({"second": LayerNumbers(9, torch.zeros(1), codebook=torch.zeros(1))}, "second: .* has no 9-bit codebook"),
        ({"head": LayerNumbers(16)}, "head: .* has no 16-bit linear"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(
    name: str, numbers: dict[str, LayerNumbers], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(Infeasible, match=f"^{reason}"):
        deploy(name, made(Wide), images(), numbers, tmp_path)


@every_runtime
def test_storage_is_declared_as_such(name: str) -> None:
    support = runtime_of(name).support
    for kind in ("conv", "linear", "embedding", CODEBOOK):
        assert {support(kind, bits) for bits in (2, 3, 6)} == {Support.STORAGE}
        assert support(kind, 16) is Support.REFUSED
    assert support("conv", 4) is support("embedding", 4) is support("embedding", 8) is Support.STORAGE
    assert support(CODEBOOK, 8) is Support.STORAGE
    assert support("linear", 4) is support("conv", 8) is Support.KERNEL
