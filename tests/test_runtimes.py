"""The runtime contract, run for every conf/runtime/*.yaml on every small net."""

import copy
import inspect
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import openvino as ov
import pytest
import torch
from hydra.utils import instantiate
from numpy.typing import NDArray
from omegaconf import OmegaConf
from torch import nn

import conf
from compressors.errors import Infeasible
from compressors.layers import read_layers
from compressors.pipeline import Artifact, Batch, Context, LayerNumbers
from compressors.plan import CompressionPlan, LayerSpec, Target
from evaluators.export import Recipe, calibration_arrays, layer_nodes
from evaluators.onnxruntime import float_nodes
from evaluators.onnxruntime_int8 import quantize
from evaluators.runtime import Deployed, Runtime, Support
from tests.zoo import NETS, build, images

RUNTIMES = sorted(path.stem for path in (Path(conf.__path__[0]) / "runtime").glob("*.yaml"))
# Largest error relative to the largest output. ONNX Runtime rounds activations to 8 bits inside its 4-bit kernel.
FLOAT_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
# Both round activations to 8 bits inside their 4-bit kernels.
INT4_TOLERANCE = 3e-2


@cache
def runtime_of(name: str) -> Runtime:
    return cast(Runtime, instantiate(OmegaConf.load(Path(conf.__path__[0]) / "runtime" / f"{name}.yaml")))


def calibration() -> Iterator[Batch]:
    return (((images(16, seed),), None) for seed in range(4))


class Bench:
    """One net on one runtime; all deployments share a cache, as those of one study do."""

    def __init__(self, runtime: str, net: str, folder: Path) -> None:
        self.runtime, self.folder = runtime_of(runtime), folder
        self.model: nn.Module = build(net)
        self.layers: tuple[LayerSpec, ...] = read_layers(self.model, (images(),))
        self.context = Context(self.model, (images(),), lambda: iter(()), calibration, None)
        self.count = 0

    def deploy(
        self, numbers: dict[str, LayerNumbers], precision: str = "fp32", cache: str = "cache", prefix: str = "original"
    ) -> Deployed:
        self.count += 1
        plan = CompressionPlan(Target(self.runtime.name, precision))
        artifact = Artifact(self.model, plan, prefix, {}, numbers, {})
        return self.runtime.deploy(artifact, self.context, self.folder / str(self.count), self.folder / cache)

    def some_layers(self) -> tuple[LayerSpec, ...]:
        """The first, the last and two between: enough to meet every kind of neighbour."""
        count = len(self.layers)
        return tuple(self.layers[i] for i in sorted({0, count // 3, 2 * count // 3, count - 1}))

    def int8(self, leave_out: str | None = None) -> dict[str, LayerNumbers]:
        """8 bits for every layer that has a kernel for it."""
        able = (layer for layer in self.layers if self.runtime.support(layer.kind, 8) is Support.KERNEL)
        return {layer.name: LayerNumbers(8) for layer in able if layer.name != leave_out}


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Bench]:
    return {
        (runtime, net): Bench(runtime, net, tmp_path_factory.mktemp(f"{runtime}-{net}"))
        for runtime in RUNTIMES
        for net in NETS
    }


@pytest.fixture(params=[(runtime, net) for runtime in RUNTIMES for net in NETS], ids="-".join)
def bench(request: pytest.FixtureRequest, benches: dict[tuple[str, str], Bench]) -> Bench:
    return benches[request.param]


@pytest.fixture(params=RUNTIMES)
def plain(request: pytest.FixtureRequest, benches: dict[tuple[str, str], Bench]) -> Bench:
    return benches[request.param, "plain"]


@pytest.fixture(params=RUNTIMES)
def tied(request: pytest.FixtureRequest, benches: dict[tuple[str, str], Bench]) -> Bench:
    return benches[request.param, "tied"]


def torch_output(model: nn.Module, count: int = 8) -> NDArray[np.float32]:
    with torch.no_grad():
        return cast(NDArray[np.float32], model(images(count, 9)).numpy())


def output(deployed: Deployed, count: int = 8) -> NDArray[np.float32]:
    return deployed.run(images(count, 9).numpy())


def error(got: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def cosine(got: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float((got * expected).sum() / np.linalg.norm(got) / np.linalg.norm(expected))


def needs(bench: Bench, *bits: int) -> None:
    """A runtime need not have every width: what it refuses is tested as a refusal."""
    for width in bits:
        if bench.runtime.support("linear", width) is Support.REFUSED:
            pytest.skip(f"{bench.runtime.name} has no {width}-bit kernel")


def int8_kernels(deployed: Deployed) -> int:
    kernels = deployed.runtime.kernels(deployed).values()
    return sum(bool(re.search(r"_[iI]8$|^QLinear|^QGemm|Integer", kernel)) for kernel in kernels)


def round_to_int4(weight: torch.Tensor, group_size: int) -> tuple[LayerNumbers, torch.Tensor]:
    """Symmetric 4-bit numbers of a weight `(out, in)`, and the weight that they stand for."""
    groups = weight.detach().reshape(len(weight), -1, group_size)
    scales = groups.abs().amax(2) / 7
    values = (groups / scales[..., None]).round().clamp(-8, 7)
    rounded = (values * scales[..., None]).reshape(weight.shape)
    return LayerNumbers(4, values.reshape(weight.shape).to(torch.int8), scales, group_size), rounded


def int4(bench: Bench, group_size: int | None = None) -> tuple[dict[str, LayerNumbers], nn.Module]:
    """All linear layers at 4 bits, and the torch model that computes the same."""
    rounded, numbers = copy.deepcopy(bench.model), {}
    for layer in bench.layers:
        if layer.kind == "linear":
            weight = bench.model.get_submodule(layer.name).get_parameter("weight")
            numbers[layer.name], value = round_to_int4(weight, group_size or layer.weight_shape[1])
            rounded.get_submodule(layer.name).get_parameter("weight").data.copy_(value)
    return numbers, rounded


def test_float_agrees_with_torch_in_every_precision(bench: Bench) -> None:
    for precision in bench.runtime.precisions():
        deployed = bench.deploy({}, precision)
        assert error(output(deployed), torch_output(bench.model)) < FLOAT_TOLERANCE[precision]


def test_8_bits_everywhere_run_in_8_bits_and_stay_close(bench: Bench) -> None:
    needs(bench, 8)
    deployed = bench.deploy(bench.int8())
    assert cosine(output(deployed), torch_output(bench.model)) > 0.98
    assert int8_kernels(deployed) >= len(bench.layers)


def test_any_one_layer_can_go_back_to_float(bench: Bench) -> None:
    needs(bench, 8)
    everything = int8_kernels(bench.deploy(bench.int8()))
    for layer in bench.some_layers():
        deployed = bench.deploy(bench.int8(leave_out=layer.name))
        assert cosine(output(deployed), torch_output(bench.model)) > 0.98
        assert int8_kernels(deployed) < everything


def test_any_one_layer_can_be_the_only_one_in_8_bits(bench: Bench) -> None:
    needs(bench, 8)
    for layer in bench.some_layers():
        deployed = bench.deploy({layer.name: LayerNumbers(8)})
        assert cosine(output(deployed), torch_output(bench.model)) > 0.98
        assert int8_kernels(deployed) == (2 if layer.name == "twice.0" else 1)


def test_all_layers_back_in_float_is_the_float_file(bench: Bench) -> None:
    floats = {layer.name: LayerNumbers(32) for layer in bench.layers}
    assert bench.deploy(floats).sha256 == bench.deploy({}).sha256


def test_4_bit_linear_layers_compute_with_the_values_given(bench: Bench) -> None:
    needs(bench, 4)
    numbers, rounded = int4(bench)
    deployed = bench.deploy(numbers)
    assert error(output(deployed), torch_output(rounded)) < INT4_TOLERANCE


def test_4_and_8_bits_share_a_file(bench: Bench) -> None:
    needs(bench, 4, 8)
    numbers, rounded = int4(bench)
    deployed = bench.deploy({**bench.int8(), **numbers})
    assert cosine(output(deployed), torch_output(rounded)) > 0.98


@pytest.mark.parametrize("group_size", [16, 48])
def test_4_bit_groups_have_their_own_scales(tied: Bench, group_size: int) -> None:
    needs(tied, 4)
    numbers, rounded = int4(tied, 16)
    numbers["flat"], value = round_to_int4(tied.model.get_parameter("flat.weight"), group_size)
    rounded.get_parameter("flat.weight").data.copy_(value)
    assert error(output(tied.deploy(numbers)), torch_output(rounded)) < INT4_TOLERANCE


@pytest.mark.parametrize("group_size", [16, None])
def test_4_bit_groups_have_their_own_offsets(bench: Bench, group_size: int | None) -> None:
    needs(bench, 4)
    if group_size and any(layer.weight_shape[1] % group_size for layer in bench.layers if layer.kind == "linear"):
        pytest.skip("has rows that such groups do not divide")
    numbers, rounded = int4(bench, group_size)
    shifted: dict[int, LayerNumbers] = {}
    for name, given in numbers.items():
        weight = rounded.get_submodule(name).get_parameter("weight").data
        if weight.data_ptr() not in shifted and given.scales is not None:
            offsets = torch.linspace(-1, 1, given.scales.numel()).reshape(given.scales.shape) * weight.std()
            weight.add_(offsets.repeat_interleave(weight.shape[1] // offsets.shape[1], 1))
            shifted[weight.data_ptr()] = replace(given, offsets=offsets)
        numbers[name] = shifted[weight.data_ptr()]
    deployed = bench.deploy(numbers)
    assert error(output(deployed), torch_output(rounded)) < INT4_TOLERANCE


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_offsets_leave_the_kernels_for_4_bits_in_place(runtime: str, benches: dict[tuple[str, str], Bench]) -> None:
    bench = benches[runtime, "attention"]
    needs(bench, 4)
    numbers = int4(bench)[0]
    shifted = {name: replace(given, offsets=given.scales) for name, given in numbers.items()}
    plain, with_offsets = (Counter(bench.runtime.kernels(bench.deploy(some)).values()) for some in (numbers, shifted))
    assert plain <= with_offsets


def test_fewer_bits_make_a_smaller_file(tied: Bench) -> None:
    needs(tied, 4, 8)
    sizes = [tied.deploy(numbers).bytes for numbers in ({}, tied.int8(), int4(tied)[0])]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[1] < 0.6 * sizes[0]


def test_the_same_plan_gives_the_same_file_also_without_the_cache(plain: Bench) -> None:
    needs(plain, 4, 8)
    numbers = {**plain.int8(), **int4(plain)[0]}
    first, second, anew = plain.deploy(numbers), plain.deploy(numbers), plain.deploy(numbers, cache="another")
    assert first.sha256 == second.sha256 == anew.sha256


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_files_do_not_depend_on_what_was_deployed_before(runtime: str, tmp_path: Path) -> None:
    bench = Bench(runtime, "plain", tmp_path)
    before = bench.deploy({}).sha256
    bench.deploy(bench.int8())
    assert bench.deploy({}).sha256 == before


def test_the_files_do_not_depend_on_the_process(benches: dict[tuple[str, str], Bench], tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from tests.test_runtimes import RUNTIMES, Bench
for runtime in RUNTIMES:
    bench = Bench(runtime, "plain", Path(sys.argv[1]) / runtime)
    print(bench.deploy(bench.int8()).sha256)
"""
    root = Path(conf.__path__[0]).parent
    there = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=root, capture_output=True, text=True, check=True
    )
    here = [benches[runtime, "plain"] for runtime in RUNTIMES]
    assert there.stdout.split()[-len(here) :] == [bench.deploy(bench.int8()).sha256 for bench in here]


def test_the_loaders_source_is_all_a_fresh_process_needs(plain: Bench, tmp_path: Path) -> None:
    needs(plain, 4, 8)
    loader = plain.runtime.loader()
    deployed = plain.deploy({**plain.int8(), **int4(plain)[0]})
    (tmp_path / "load.py").write_text(
        f"import json, sys\n{inspect.getsource(loader)}\n"
        "import numpy as np\n"
        f"session = {loader.__name__}(sys.argv[1], 'fp32', None, 1)\n"
        "print(json.dumps(session(np.array(json.load(sys.stdin), np.float32)).tolist()))\n"
    )
    there = subprocess.run(
        [sys.executable, "-I", "load.py", str(deployed.folder)],
        input=json.dumps(images(3, 9).tolist()),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    np.testing.assert_allclose(json.loads(there.stdout), output(deployed, 3), rtol=1e-5, atol=1e-6)


def test_a_signal_is_no_crash_after_files_were_closed_in_the_order_of_loading(plain: Bench, tmp_path: Path) -> None:
    """OpenVINO left Python's handlers a stack that was gone."""
    loader, folder = plain.runtime.loader(), plain.deploy({}).folder
    (tmp_path / "load.py").write_text(
        f"import os, signal, sys\n{inspect.getsource(loader)}\n"
        f"first, second = ({loader.__name__}(sys.argv[1], 'fp32', None, 1) for _ in range(2))\n"
        "del first\n"
        "del second\n"
        "signal.signal(signal.SIGINT, lambda *_: print('heard'))\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
    )
    command = [sys.executable, "-I", "load.py", str(folder)]
    there = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert there.stdout == "heard\n"


def test_many_examples_give_what_each_gives_alone(plain: Bench) -> None:
    deployed = plain.deploy({})
    inputs = images(130, 9).numpy()
    alone = np.concatenate([deployed.run(inputs[i : i + 1]) for i in range(130)])
    np.testing.assert_allclose(deployed.run(inputs), alone, rtol=1e-4, atol=1e-5)


def test_an_answer_is_not_overwritten_by_the_next(plain: Bench) -> None:
    session = plain.deploy({}).session(batch=None, threads=1)
    first = session(images(2, 0).numpy())
    kept = first.copy()
    session(images(2, 1).numpy())
    np.testing.assert_array_equal(first, kept)


def test_what_is_timed_computes_what_is_judged(tmp_path: Path) -> None:
    """Told of the batch size, ONNX Runtime computed 8-bit products of a transformer in float, ten times as slowly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    context = Context(model, (images(),), lambda: iter(()), calibration, None)
    numbers = {"0": LayerNumbers(8), "2": LayerNumbers(8)}
    artifact = Artifact(model, CompressionPlan(Target("onnxruntime", "fp32")), "original", {}, numbers, {})
    deployed = runtime_of("onnxruntime").deploy(artifact, context, tmp_path / "made", tmp_path / "cache")
    timed, judged = (deployed.session(batch, threads=1)(images(1, 9).numpy()) for batch in (1, None))
    assert np.array_equal(timed, judged)


def test_openvino_multiplies_activations_with_each_other_in_float(benches: dict[tuple[str, str], Bench]) -> None:
    bench = benches["openvino", "attention"]
    model = ov.Core().read_model(bench.deploy(bench.int8()).folder / "model.xml")
    factors = {
        op.get_friendly_name(): [op.input_value(i).get_node().get_type_name() for i in (0, 1)]
        for op in model.get_ops()
        if op.get_type_name() == "MatMul"
    }
    assert factors["/query/MatMul"][0] == "FakeQuantize"
    assert "FakeQuantize" not in factors["/MatMul"] + factors["/MatMul_1"]


@pytest.mark.parametrize("batch", [1, 4])
def test_a_session_for_one_batch_size(plain: Bench, batch: int) -> None:
    needs(plain, 8)
    for precision in plain.runtime.precisions():
        for numbers in ({}, plain.int8()):
            session = plain.deploy(numbers, precision).session(batch=batch, threads=1)
            assert cosine(session(images(batch, 9).numpy()), torch_output(plain.model, batch)) > 0.98


@pytest.mark.parametrize(
    ("layer", "numbers"),
    [
        ("a.0", LayerNumbers(2)),
        ("a.0", LayerNumbers(3)),
        ("a.0", LayerNumbers(4)),
        ("head", LayerNumbers(2)),
        ("head", LayerNumbers(3)),
        ("head", LayerNumbers(4)),
        ("head", LayerNumbers(16)),
    ],
    ids=lambda x: x if isinstance(x, str) else str(x.bits),
)
def test_what_cannot_be_placed_is_refused_by_name(plain: Bench, layer: str, numbers: LayerNumbers) -> None:
    with pytest.raises(Infeasible, match=rf"^{layer}: .*{plain.runtime.name}"):
        plain.deploy({layer: numbers})


def test_an_unknown_precision_is_refused(plain: Bench) -> None:
    with pytest.raises(Infeasible, match="fp8"):
        plain.deploy({}, "fp8")


def test_every_kind_can_stay_as_it_is() -> None:
    for name in RUNTIMES:
        kinds = {kind: runtime_of(name).support(kind, 32) for kind in ("conv", "linear", "embedding")}
        assert set(kinds.values()) == {Support.KERNEL}


def test_a_model_that_answers_nan_is_refused(plain: Bench) -> None:
    broken = copy.copy(plain)
    broken.model = copy.deepcopy(plain.model)
    broken.model.get_parameter("head.bias").data.fill_(float("nan"))
    with pytest.raises(Infeasible, match="NaN"):
        broken.deploy({}, prefix="broken")


def test_the_signature_is_the_examples(plain: Bench) -> None:
    (spec,) = plain.deploy({}).inputs
    assert (spec.name, spec.shape, spec.dtype) == ("input_0", (2, 3, 12, 12), "float32")


def test_what_to_install_is_pinned(plain: Bench) -> None:
    assert all(re.fullmatch(r"[a-z]+==[\d.]+", line) for line in plain.runtime.requirements())


@pytest.mark.parametrize("net", ["residual", "depthwise", "concat", "attention"])
def test_an_edited_onnx_graph_is_what_its_quantizer_makes_without_these_nodes(net: str, tmp_path: Path) -> None:
    """Only the 8-bit form is cached; what is cut out of it must be what calibrating anew would give."""
    bench = Bench("onnxruntime", net, tmp_path)
    everything = [layer.name for layer in bench.layers]
    for kept in (everything[::2], everything[1::2], everything[:2], everything[2:]):
        edited = bench.deploy({name: LayerNumbers(8) for name in kept})
        base = tmp_path / "cache" / "original" / "onnxruntime-float" / "model.onnx"
        graph = onnx.load(base)
        found = layer_nodes(graph, bench.model)
        nodes = frozenset(node for name in kept for node in found[name])
        anew = Deployed(edited.runtime, tmp_path / "anew", "fp32", edited.inputs)
        anew.folder.mkdir(exist_ok=True)
        batches = calibration_arrays(bench.model, calibration, 256)
        quantize(base, anew.folder / "model.onnx", float_nodes(graph, nodes), batches, Recipe())
        # Not less: calibrated anew, the logits and what float nodes read of a float node are rounded too.
        assert error(output(edited), output(anew)) < 0.03
