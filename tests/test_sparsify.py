"""Zeros where they were asked for: in the masks, through recovery and storage, and in the deployed files."""

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import openvino as ov
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses
from torch.nn.utils import parametrize

from compressors.distill import Distill
from compressors.errors import Infeasible
from compressors.fisher import Question, diagonal_fisher
from compressors.masks import Mask, strongest
from compressors.pipeline import Artifact, Compressor, compress
from compressors.plan import CompressionPlan, Scalar, Settings, Step, Target
from compressors.quantize import Quantize
from compressors.sparsify import CRITERIA, Sparsify
from evaluators.onnxruntime import OnnxRuntime
from evaluators.openvino import OpenVINO
from evaluators.runtime import Runtime
from search.cache import Cache
from tests.context import make_context
from tests.zoo import NETS, build, images

METHODS: dict[str, Compressor] = {
    "sparsify": Sparsify(),
    "distill": Distill(weight_decay=5e-4, warmup=0.1, clip_norm=1.0, epoch_examples=32, first_round=2),
    "quantize": Quantize(),
}
every_net = pytest.mark.parametrize("net", NETS)


def step(model: nn.Module, sparsity: float | Mapping[str, float], **shared: Scalar) -> Step:
    owners = Sparsify().groups(model, (images(),))
    shares = sparsity if isinstance(sparsity, Mapping) else dict.fromkeys(owners, sparsity)
    return Step("sparsify", {owner: {"sparsity": share} for owner, share in shares.items()}, shared)


def held(model: nn.Module, sparsity: float | Mapping[str, float], **shared: Scalar) -> Mapping[str, Settings]:
    """What was achieved; the masks are still on."""
    return Sparsify().apply(model, step(model, sparsity, **shared), make_context(model), 0).achieved


def recovery(epochs: int) -> Step:
    return Step("distill", {}, {"epochs": epochs, "temperature": 4, "weight": 0.5, "learning_rate": 0.01})


def run(net: str, *steps: Step, store: Cache | None = None) -> Artifact:
    model = build(net)
    plan = CompressionPlan(Target("onnxruntime", "fp32"), steps, seed=3)
    return compress(model, plan, METHODS, make_context(model), store)


def zeros(model: nn.Module, layer: str) -> float:
    return float((model.get_parameter(f"{layer}.weight") == 0).float().mean())


def weighted(model: nn.Module) -> list[str]:
    return [layer for members in Sparsify().groups(model, (images(),)).values() for layer in members]


@settings(deadline=None)  # the first call of an operation is slow on a busy machine
@given(st.integers(2, 8), st.integers(1, 9), st.floats(0, 0.999), st.integers(0, 99))
def test_of_a_whole_layer_the_least_go_and_one_stays(rows: int, width: int, sparsity: float, seed: int) -> None:
    scores = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    kept = strongest(scores, sparsity, group=0)
    assert int((~kept).sum()) == min(round(sparsity * rows * width), rows * width - 1)
    if not kept.all():
        assert scores[~kept].max() < scores[kept].min()


@pytest.mark.parametrize(
    ("sparsity", "group", "left"), [(0.5, 4, 2), (0.5, 8, 4), (0.75, 4, 1), (0.9, 4, 1), (0.25, 4, 3), (0.1, 4, 4)]
)
@pytest.mark.parametrize("shape", [(6, 16), (6, 19), (5, 16, 3, 3), (4, 9, 5)])
def test_n_of_every_m_inputs_stay(shape: tuple[int, ...], sparsity: float, group: int, left: int) -> None:
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    kept = strongest(scores, sparsity, group)
    assert kept.shape == shape
    whole = shape[1] // group * group
    assert kept[:, whole:].all(), "inputs that fill no group stay"
    for start in range(0, whole, group):
        inside = slice(start, start + group)
        assert (kept[:, inside].sum(1) == left).all()
        weakest = scores[:, inside].masked_fill(~kept[:, inside], math.inf).amin(1)
        assert (scores[:, inside].masked_fill(kept[:, inside], -math.inf).amax(1) < weakest).all()


def test_layers_with_one_weight_are_one_group() -> None:
    groups = Sparsify().groups(build("tied"), (images(),))
    assert dict(groups) == {"flat": ("flat",), "first": ("first", "second"), "head": ("head",)}


@every_net
def test_what_is_achieved_is_the_share_of_zeros(net: str) -> None:
    for shared in ({"group": 0}, {"group": 4}, {"group": 8, "ramp": 5}):
        artifact = run(net, step(build(net), 0.75, **shared))
        assert set(artifact.achieved["sparsify"]) == set(Sparsify().groups(build(net), (images(),)))
        for layer, done in artifact.achieved["sparsify"].items():
            assert zeros(artifact.model, layer) == pytest.approx(done["sparsity"])
            if shared == {"group": 0}:
                count = artifact.model.get_parameter(f"{layer}.weight").numel()
                assert done["sparsity"] == pytest.approx(round(0.75 * count) / count)


@every_net
def test_a_released_model_is_made_of_plain_parameters(net: str) -> None:
    """Exporters, quantizers and readers of layers look for them by name and type."""
    artifact, plain = run(net, step(build(net), 0.5)), build(net)
    assert artifact.model.state_dict().keys() == plain.state_dict().keys()
    for (name, module), other in zip(artifact.model.named_modules(), plain.modules(), strict=True):
        assert type(module) is type(other), name
    assert not any(p.requires_grad for p in artifact.model.parameters())


def test_tied_layers_stay_tied() -> None:
    model = run("tied", step(build("tied"), 0.5), recovery(2)).model
    first, second = model.get_submodule("first"), model.get_submodule("second")
    assert first.weight is second.weight
    assert zeros(model, "second") == 0.5


@pytest.mark.parametrize("ramp", [0, 3, 100])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_zeros_survive_training_and_the_rest_is_trained(criterion: str, ramp: int) -> None:
    asked = step(build("residual"), {"block.a.0": 0.75, "head": 0.5}, criterion=criterion, ramp=ramp)
    artifact = run("residual", asked, recovery(2))
    assert zeros(artifact.model, "block.a.0") == 0.75
    assert zeros(artifact.model, "head") == 0.5
    assert zeros(artifact.model, "block.b.0") == 0
    untrained = run("residual", asked).model.get_parameter("block.a.0.weight")
    trained = artifact.model.get_parameter("block.a.0.weight")
    assert not torch.equal(untrained, trained)
    if ramp == 0:
        assert torch.equal(untrained == 0, trained == 0), "the same ones"


@pytest.mark.parametrize("shared", [{"group": 4}, {"ramp": 5}, {"ramp": 5, "criterion": "fisher"}])
@pytest.mark.parametrize("net", ["residual", "tied", "attention"])
def test_stored_and_taken_up_again_it_is_the_same_to_the_last_bit(
    net: str, shared: Mapping[str, Scalar], tmp_path: Path
) -> None:
    asked = step(build(net), 0.5, **shared)
    run(net, asked, recovery(2), store=Cache(tmp_path))
    again, resumed = (run(net, asked, recovery(epochs), store=Cache(tmp_path)).model for epochs in (2, 4))
    for made, epochs in ((again, 2), (resumed, 4)):
        alone = run(net, asked, recovery(epochs)).model.state_dict()
        assert all(torch.equal(value, alone[name]) for name, value in made.state_dict().items())


def test_until_it_is_released_everything_can_come_back() -> None:
    model, before = build("attention"), build("attention")
    held(model, 0.9)
    assert not torch.equal(model(images()), before(images()))
    for layer in weighted(before):
        parametrize.remove_parametrizations(model.get_submodule(layer), "weight", leave_parametrized=False)
    assert torch.equal(model(images()), before(images()))


def test_with_a_ramp_zeros_come_step_by_step() -> None:
    """Fast at first and slow at last, as the cube says; only training counts."""
    model = build("plain")
    held(model, {"b.0": 0.8}, ramp=4)
    layer = model.get_submodule("b.0")

    def share() -> float:
        return float((cast(Tensor, layer.weight) == 0).float().mean())

    model.eval()
    shares = [share()]
    for _ in range(6):
        model.train()
        model(images())
        model.eval()
        model(images())
        shares.append(share())
    expected = [0.8 * (1 - (1 - min(passed, 4) / 4) ** 3) for passed in range(7)]
    assert shares == pytest.approx(expected, abs=1e-3)


def test_weights_that_went_early_can_come_back_while_the_ramp_lasts() -> None:
    mask = Mask(torch.ones(1, 4, dtype=torch.bool), sparsity=0.5, group=0, ramp=2, scores=None).train()
    assert mask(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).tolist() == [[0.0, 0.0, 3.0, 4.0]]
    assert mask(torch.tensor([[9.0, 2.0, 1.0, 4.0]])).tolist() == [[9.0, 0.0, 0.0, 4.0]]
    assert mask(torch.tensor([[0.0, 5.0, 6.0, 4.0]])).tolist() == [[0.0, 0.0, 0.0, 4.0]], "settled"


def test_magnitude_fisher_and_movement_find_other_weights() -> None:
    model = build("plain")
    context = make_context(model)
    fisher = diagonal_fisher(model, context.calibration(), loss=F.cross_entropy)
    weight = model.get_parameter("head.weight").detach()
    orders = {
        "magnitude": weight.abs(),
        "fisher": fisher.squares["head.weight"] * weight**2,
        "movement": -weight * fisher.slopes["head.weight"],
    }
    for criterion, scores in orders.items():
        cut = run("plain", step(model, {"head": 0.5}, criterion=criterion)).model.get_parameter("head.weight")
        gone = scores.flatten().argsort(stable=True)[: weight.numel() // 2]
        assert set((cut.flatten() == 0).nonzero()[:, 0].tolist()) == set(gone.tolist())
        assert torch.equal(cut[cut != 0], weight[cut != 0])


def test_a_layer_that_several_have_replaced_passes_its_share_on() -> None:
    model = build("plain")
    model.set_submodule("head", nn.Sequential(nn.Linear(32, 3, bias=False), nn.Linear(3, 5)))
    achieved = held(model, {"head": 0.5})
    assert achieved["head"]["sparsity"] == pytest.approx((48 + round(7.5)) / (96 + 15))
    Sparsify().release(model)
    assert zeros(model, "head.0") == 0.5
    assert zeros(model, "head.1") == pytest.approx(8 / 15)
    assert zeros(model, "b.0") == 0


@pytest.mark.parametrize(
    ("sparsity", "shared", "reason"),
    [
        (1.0, {}, r"sparsity of head is 1\.0: expected a share from 0"),
        (-0.1, {}, r"sparsity of head is -0\.1"),
        ("2:4", {}, r"sparsity of head is 2:4"),
        (0.5, {"group": 1}, r"group is 1: expected a number of inputs, 2 or more, or 0"),
        (0.5, {"group": 2.0}, r"group is 2\.0"),
        (0.5, {"ramp": -1}, r"ramp is -1: expected a whole number of steps"),
        (0.5, {"criterion": "l2"}, r"criterion is l2: expected one of magnitude, fisher, movement"),
    ],
)
def test_what_cannot_be_done_is_infeasible_in_one_line(sparsity: Scalar, shared: Settings, reason: str) -> None:
    model = build("plain")
    with pytest.raises(Infeasible, match=reason) as caught:
        Sparsify().apply(model, Step("sparsify", {"head": {"sparsity": sparsity}}, shared), make_context(model), 0)
    assert "\n" not in caught.value.reason


def test_an_unknown_layer_and_movement_without_labels_are_infeasible() -> None:
    model = build("plain")
    with pytest.raises(Infeasible, match=r"no layer a: possible|no layer norm: possible are a\.0, b\.0, head"):
        held(model, {"norm": 0.5})
    blind = replace(make_context(model), loss=None)
    asked = step(model, 0.5, criterion="movement")
    with pytest.raises(Infeasible, match=r"criterion is movement: expected magnitude or fisher, which need no labels"):
        Sparsify().apply(model, asked, blind, 0)


def test_effects_are_those_of_the_weights_that_go() -> None:
    model = build("attention")
    context = make_context(model)
    fisher = diagonal_fisher(model, context.calibration(), loss=context.loss)
    shared: dict[str, Scalar] = {"group": 4, "criterion": "fisher", "ramp": 0}
    shares = (0.0, 0.1, 0.25, 0.5, 0.75)
    questions: list[Question] = [("up", {"sparsity": share, **shared}) for share in shares]
    found = Sparsify().effects(model, context.example, questions, fisher)
    for share, effect in zip(shares, found, strict=True):
        cut = copy.deepcopy(model)
        held(cut, {"up": share}, **shared)
        Sparsify().release(cut)
        change = (cut.get_parameter("up.weight") - model.get_parameter("up.weight")).detach()
        assert effect.loss == pytest.approx(fisher.rounding("up.weight", change))
    assert found[0] == found[1], "of four weights a tenth is none"
    losses = [effect.loss for effect in found[1:]]
    assert losses == sorted(losses)
    blind = diagonal_fisher(model, context.calibration())
    moved: list[Question] = [("up", {"sparsity": share, "criterion": "movement"}) for share in (0.0, 0.5)]
    assert [effect.loss for effect in Sparsify().effects(model, context.example, moved, blind)] == [0.0, math.inf]


def largest_onnx(folder: Path) -> NDArray[np.float32]:
    graph = onnx.load(folder / "model.onnx").graph
    return max((numpy_helper.to_array(tensor) for tensor in graph.initializer), key=np.size)


def largest_openvino(folder: Path) -> NDArray[np.float32]:
    constants = [op for op in ov.Core().read_model(folder / "model.xml").get_ops() if op.get_type_name() == "Constant"]
    return max((np.array(op.data, dtype=np.float32) for op in constants), key=np.size)


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize(
    ("runtime", "largest"),
    [(OnnxRuntime(16), largest_onnx), (OpenVINO(16), largest_openvino)],
    ids=["onnx", "openvino"],
)
def test_deployed_weights_hold_the_zeros(runtime: Runtime, largest: object, bits: int, tmp_path: Path) -> None:
    model = build("tied")
    steps = [step(model, {"flat": 0.75}, group=4), recovery(2)]
    if bits < 32:
        steps.append(Step("quantize", {"flat": {"bits": bits}}, {"group_size": 16}))
    plan = CompressionPlan(Target(runtime.name, "fp32"), tuple(steps), seed=3)
    artifact = compress(model, plan, METHODS, make_context(model))
    folder = runtime.deploy(artifact, make_context(model), tmp_path / "made", tmp_path / "cache").folder
    assert artifact.achieved["sparsify"]["flat"]["sparsity"] == 0.75
    if bits == 4:
        values = artifact.numbers["flat"].values
        assert values is not None
        weight: NDArray[np.float32] = values.numpy()
    else:
        weight = (largest_onnx if runtime.name == "onnxruntime" else largest_openvino)(folder)
    assert weight.size == 32 * 3 * 12 * 12
    held_at_zero = artifact.model.get_parameter("flat.weight").numpy() == 0
    weight = weight if weight.shape == held_at_zero.shape else weight.T
    assert not weight[held_at_zero].any()
    assert (weight == 0).mean() >= 0.75
