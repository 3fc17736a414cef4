"""Factored layers: what they compute, what they cost, what is refused, and that both factors run in 8 bits."""

import copy
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

import conf
from compressors.distill import Distill
from compressors.errors import Infeasible
from compressors.fisher import diagonal_fisher
from compressors.layers import read_layers
from compressors.lowrank import Bases, LowRank, Ranks, product
from compressors.pipeline import Artifact, Compressor, Context, compress
from compressors.plan import CompressionPlan, Scalar, Settings, Step, Target
from compressors.prune import Prune
from compressors.quantize import Quantize
from compressors.replace import InPlaceOf
from tests.context import make_context
from tests.test_fisher import batches, divergence, rank_correlation, trained
from tests.test_pipeline import Disk
from tests.test_runtimes import RUNTIMES, int8_kernels, runtime_of
from tests.zoo import NETS, build, images

SHARED: Settings = {"align": 1, "form": "tucker", "whiten": False}
every_net = pytest.mark.parametrize("net", NETS)


def factor(model: nn.Module, ranks: Mapping[str, Scalar], **shared: Scalar) -> Mapping[str, Settings]:
    step = Step("lowrank", {name: {"rank": rank} for name, rank in ranks.items()}, {**SHARED, **shared})
    return LowRank().apply(model, step, make_context(model), 0).achieved


def weight(out: int = 6, inputs: int = 5, taps: int = 9) -> Tensor:
    return torch.randn(out, inputs, taps, generator=torch.Generator().manual_seed(0)).double()


def moment(width: int, seed: int = 1) -> Tensor:
    """Of inputs of which some directions are much stronger than others."""
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(seed)).double()
    mix *= torch.logspace(0, -2, width, dtype=torch.float64)
    return mix @ mix.T


@pytest.mark.parametrize("ranks", [Ranks(None, 6), Ranks(5, 6)])
@pytest.mark.parametrize("whiten", [False, True])
def test_the_full_rank_is_the_same_weight(ranks: Ranks, whiten: bool) -> None:
    factors = Bases(weight(), moment(5) if whiten else None).factors(ranks)
    torch.testing.assert_close(product(factors), weight(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("rank", range(1, 6))
@pytest.mark.parametrize("taps", [1, 9])
def test_what_is_lost_is_the_tail_of_the_spectrum(rank: int, taps: int) -> None:
    whole = weight(taps=taps)
    lost = product(Bases(whole).factors(Ranks(None, rank))) - whole
    tail = torch.linalg.svdvals(whole.flatten(1))[rank:]
    assert lost.norm().item() == pytest.approx(tail.norm().item(), rel=1e-9)


def test_tucker_loses_no_more_than_the_tails_of_both_its_modes_together() -> None:
    whole = weight(12, 10)
    for inputs, outputs in ((3, 4), (8, 2), (5, 12)):
        lost = (product(Bases(whole).factors(Ranks(inputs, outputs))) - whole).square().sum()
        out = torch.linalg.svdvals(whole.flatten(1))[outputs:].square().sum()
        into = torch.linalg.svdvals(whole.transpose(0, 1).flatten(1))[inputs:].square().sum()
        assert max(out, into) <= lost * (1 + 1e-9)
        assert lost <= (out + into) * (1 + 1e-9)


@pytest.mark.parametrize("rank", range(1, 16))
def test_whitened_truncation_loses_less_on_the_inputs_it_was_made_for(rank: int) -> None:
    whole, known = weight(16, 24, 1), moment(24)

    def lost(bases: Bases) -> float:
        change = (product(bases.factors(Ranks(None, rank))) - whole)[..., 0]
        return float((change @ known @ change.T).trace())

    assert lost(Bases(whole, known)) < lost(Bases(whole))


def test_whitening_goes_by_what_the_calibration_split_shows() -> None:
    """Linear and 1x1 layers exactly, kxk ones with an approximation that holds here as well."""
    model, pictures = trained()
    context = Context(model, (pictures[:2],), list, lambda: batches(pictures), None)
    better = []
    for name, site in (("2.0", 0.25), ("3.0", 0.25), ("3.0", 0.5), ("6", 0.3)):
        errors = []
        for whiten in (False, True):
            moved = copy.deepcopy(model)
            LowRank().apply(moved, Step("lowrank", {name: {"rank": site}}, {**SHARED, "whiten": whiten}), context, 0)
            errors.append(float((output_of(moved, name, pictures) - output_of(model, name, pictures)).norm()))
        better.append(errors[1] < errors[0])
    assert all(better)


def output_of(model: nn.Module, name: str, pictures: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _layer, _given, made: seen.append(made))
    with torch.no_grad():
        model(pictures)
    handle.remove()
    return seen[0]


def test_inputs_that_are_all_zero_do_no_harm() -> None:
    whole = weight(taps=1)
    made = product(Bases(whole, torch.zeros(5, 5, dtype=torch.float64)).factors(Ranks(None, 3)))
    torch.testing.assert_close(made, product(Bases(whole).factors(Ranks(None, 3))))


class Forms(nn.Module):
    """A convolution with everything that one can have, in one dimension and in two; and one of 1x1."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 16, 3, stride=2, padding=2, dilation=2, padding_mode="circular")
        self.point, self.line = nn.Conv2d(16, 12, 1, stride=2, bias=False), nn.Conv1d(12, 8, 3, padding="same")
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(F.relu(self.wide(x))).flatten(2)
        return self.head(F.relu(self.line(x)).mean(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", ["tucker", "output"])
@pytest.mark.parametrize("whiten", [False, True])
def test_layers_of_little_rank_compute_the_same_with_fewer_weights(form: str, whiten: bool) -> None:
    torch.manual_seed(0)
    model = Forms().eval()
    with torch.no_grad():
        for name in ("wide", "point", "line"):
            layer = model.get_parameter(f"{name}.weight")
            ranks = Ranks(2, 3) if name != "point" else Ranks(None, 3)
            layer.copy_(product(Bases(layer.flatten(2)).factors(ranks)).reshape(layer.shape))
    expected, before = model(images(4)), sum(p.numel() for p in model.parameters())
    # 2 of 3, 3 of 16, 12 and 8 are the least shares that hold the rank.
    achieved = factor(model, {"wide": 0.6, "point": 0.3, "line": 0.4}, form=form, whiten=whiten)
    torch.testing.assert_close(model(images(4)), expected, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) < before
    count = {name: len(list(model.get_submodule(name).children())) for name in achieved}
    assert count == {"wide": 3 if form == "tucker" else 2, "point": 2, "line": 3 if form == "tucker" else 2}


@every_net
@pytest.mark.parametrize("form", ["tucker", "output"])
def test_achieved_and_effects_say_what_is_left(net: str, form: str) -> None:
    model, example = build(net), (images(),)
    owners = LowRank().groups(model, example)
    whole = {name: model.get_parameter(f"{name}.weight").numel() for name in owners}
    fisher = diagonal_fisher(model, [(example, None)], examples=2)
    settings = {"rank": 0.25, **SHARED, "form": form, "align": 4}
    effects = LowRank().effects(model, example, [(name, settings) for name in owners], fisher)
    achieved = factor(model, dict.fromkeys(owners, 0.25), form=form, align=4)
    for (name, told), effect in zip(achieved.items(), effects, strict=True):
        layers = model.get_submodule(name)
        assert isinstance(layers, InPlaceOf)
        left = sum(layer.get_parameter("weight").numel() for layer in layers.children()) / whole[name]
        assert left < 1
        assert told["weights"] == left == effect.inputs[name]
        assert len(layers[-2].get_parameter("weight")) == told["outputs"]
        assert effect.loss > 0
    made = {layer.name: layer for layer in read_layers(model, example)}
    assert sum(layer.macs for layer in made.values()) < sum(layer.macs for layer in read_layers(build(net), example))


@pytest.mark.parametrize(
    ("width", "share", "align", "kept"),
    [
        (64, 0.25, 8, 16),
        (64, 0.3, 8, 16),
        (64, 0.32, 8, 24),
        (64, 0.02, 8, 8),
        (64, 0.45, 16, 16),  # 32 would save nothing
        (20, 0.3, 16, 6),  # nor would 16
        (64, 0.02, 1, 1),
    ],
)
def test_ranks_are_rounded_where_that_saves(width: int, share: float, align: int, kept: int) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(432, width), nn.Linear(width, width)).eval()
    assert factor(model, {"2": share}, align=align)["2"]["outputs"] == kept


def test_an_input_side_that_keeps_everything_has_no_factor() -> None:
    model = build("plain")
    assert "inputs" not in factor(model, {"a.0": 0.5}, align=8)["a.0"]
    assert len(list(model.get_submodule("a.0").children())) == 2


@pytest.mark.parametrize(
    ("net", "ranks", "shared", "reason"),
    [
        ("plain", {"a.0": 0.0}, {}, r"rank of a\.0 is 0\.0: expected a share"),
        ("plain", {"a.0": 1.5}, {}, r"rank of a\.0 is 1\.5"),
        ("plain", {"a.0": float("nan")}, {}, r"rank of a\.0 is nan"),
        ("plain", {"a.0": "half"}, {}, r"rank of a\.0 is half"),
        ("plain", {"a.0": 0.5}, {"align": 0}, r"align is 0"),
        ("plain", {"a.0": 0.5}, {"form": "cp"}, r"form is cp: expected tucker or output"),
        ("plain", {"a.0": 0.5}, {"whiten": 1}, r"whiten is 1: expected true or false"),
        ("plain", {"a.1": 0.5}, {}, r"no layer a\.1: possible are a\.0, b\.0, head"),
        ("tied", {"first": 0.25}, {}, r"no layer first: possible are flat, head"),
        ("depthwise", {"depth.0": 0.25}, {}, r"no layer depth\.0"),
        ("attention", {"query": 0.5}, {}, r"rank of query is 0\.5: that takes 1\.00 times its weights and 1\.00 times"),
        ("plain", {"b.0": 0.95}, {}, r"rank of b\.0 is 0\.95: that takes 1\.\d\d times"),
    ],
)
def test_what_cannot_be_done_is_infeasible(
    net: str, ranks: Mapping[str, Scalar], shared: Mapping[str, Scalar], reason: str
) -> None:
    with pytest.raises(Infeasible, match=reason) as caught:
        factor(build(net), ranks, **shared)
    assert "\n" not in caught.value.reason


def test_what_saves_weights_but_no_multiplications_is_refused() -> None:
    """The first of three factors works on all pixels, where the layer itself works on one."""
    model = nn.Sequential(nn.Conv2d(3, 64, 2, stride=12), nn.Flatten(), nn.Linear(64, 5)).eval()
    with pytest.raises(Infeasible, match=r"0\.\d\d times its weights and 1\.\d\d times its multiplications"):
        factor(model, {"0": 0.7})
    assert float(factor(model, {"0": 0.7}, form="output")["0"]["weights"]) < 1


def test_a_layer_with_nothing_to_save_is_not_offered() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(432, 1), nn.Linear(1, 5)).eval()
    assert not LowRank().groups(model, (images(),))


def test_without_calibration_inputs_there_is_no_whitening() -> None:
    model = build("plain")
    context = Context(model, (images(),), lambda: iter(()), lambda: iter(()), None)
    step = Step("lowrank", {"b.0": {"rank": 0.25}}, {**SHARED, "whiten": True})
    with pytest.raises(Infeasible, match="whiten is true: expected calibration inputs"):
        LowRank().apply(model, step, context, 0)


@pytest.mark.parametrize("whiten", [False, True])
def test_the_number_of_threads_does_not_show(whiten: bool) -> None:
    states = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            model = build("attention")
            factor(model, dict.fromkeys(LowRank().groups(model, (images(),)), 0.25), whiten=whiten)
            states.append(model.state_dict())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def plan(*steps: Step, runtime: str = "any") -> CompressionPlan:
    return CompressionPlan(Target(runtime, "fp32"), steps)


def make(net: str, *steps: Step, runtime: str = "any") -> Artifact:
    model = build(net)
    methods: dict[str, Compressor] = {"prune": Prune(), "lowrank": LowRank(), "quantize": Quantize()}
    return compress(model, plan(*steps, runtime=runtime), methods, make_context(model))


def test_a_rank_is_a_share_of_what_pruning_left() -> None:
    cut = Step("prune", {"a.0": {"sparsity": 0.5}, "b.0": {"sparsity": 0.5}}, {"align": 1})
    low = Step("lowrank", {"b.0": {"rank": 0.25}}, SHARED)
    artifact = make("plain", low, cut)
    assert artifact.achieved["lowrank"]["b.0"]["outputs"] == 4
    assert artifact.achieved["lowrank"]["b.0"]["inputs"] == 2


def test_bits_are_meant_for_all_that_stands_in_a_layers_place() -> None:
    low = Step("lowrank", {"up": {"rank": 0.25}, "head": {"rank": 0.4}}, SHARED)
    bits = Step("quantize", {"up": {"bits": 4}, "down": {"bits": 4}, "head": {"bits": 4}}, {"group_size": 32})
    artifact = make("attention", low, bits)
    given = {name: numbers.bits for name, numbers in artifact.numbers.items()}
    # Two and eight inputs have no groups of 4 bits.
    assert given == {"up.0": 4, "up.1": 8, "down": 4, "head.0": 4, "head.1": 8}
    achieved = artifact.achieved["quantize"]
    assert list(achieved) == ["up", "down", "head"]
    assert [settings["bits"] for settings in achieved.values()] == [8, 4, 8]
    assert 0 < float(achieved["up"]["relative_error"]) < 0.15


def test_another_process_finds_what_was_trained_and_rounded() -> None:
    """The structure is made again, the weights and the 4-bit values are those that were stored."""
    low = Step("lowrank", {"up": {"rank": 0.25}, "query": {"rank": 0.25}}, {**SHARED, "whiten": True})
    bits = Step("quantize", {"up": {"bits": 4}, "down": {"bits": 4}}, {"group_size": 32})
    model, disk = build("attention"), Disk()
    distill = Distill(weight_decay=0.0, warmup=0.1, clip_norm=1.0, epoch_examples=32, first_round=1)
    train = Step("distill", {}, {"epochs": 1, "temperature": 2, "weight": 1.0, "learning_rate": 0.01})
    methods: dict[str, Compressor] = {"lowrank": LowRank(), "distill": distill, "quantize": Quantize()}
    first, again = (compress(model, plan(bits, train, low), methods, make_context(model), disk) for _ in range(2))
    assert len(disk.kept) == 1
    assert len(disk.numbers) == 2
    assert "distill" not in again.seconds
    assert "quantize" not in again.seconds
    assert again.model.state_dict().keys() == first.model.state_dict().keys()
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in first.model.state_dict().items())
    assert again.numbers.keys() == first.numbers.keys() == {"up.0", "up.1", "down"}
    assert again.achieved == first.achieved


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(("net", "form"), [("residual", "tucker"), ("residual", "output"), ("reused", "tucker")])
def test_every_factor_is_computed_in_8_bits(runtime: str, net: str, form: str, tmp_path: Path) -> None:
    owners = list(LowRank().groups(build(net), (images(),)))
    low = Step("lowrank", {name: {"rank": 0.25} for name in owners}, {**SHARED, "align": 8, "form": form})
    bits = Step("quantize", {name: {"bits": 8} for name in owners}, {"group_size": 32})
    artifact = make(net, low, bits, runtime=runtime)
    context = make_context(artifact.model)
    deployed = runtime_of(runtime).deploy(artifact, context, tmp_path / "made", tmp_path / "cache")
    layers = read_layers(artifact.model, (images(),))
    assert len(layers) > len(owners) * 1.5
    calls = len(layers) + sum(layer.name.startswith("twice.") for layer in layers)
    assert int8_kernels(deployed) == calls
    got = deployed.run(images(8, 9).numpy())
    with torch.no_grad():
        expected = artifact.model(images(8, 9)).numpy()
    assert (got * expected).sum() / np.linalg.norm(got) / np.linalg.norm(expected) > 0.98
    one = make(net, low, Step("quantize", {owners[1]: {"bits": 8}}, {"group_size": 32}), runtime=runtime)
    alone = runtime_of(runtime).deploy(one, context, tmp_path / "one", tmp_path / "cache")
    assert int8_kernels(alone) == len(one.numbers) * (2 if owners[1] == "twice.0" else 1)


@pytest.mark.parametrize("form", ["tucker", "output"])
def test_predictions_rank_layers_as_measurements_do(form: str) -> None:
    model, pictures = trained()
    fisher = diagonal_fisher(model, batches(pictures), examples=64)
    example = (pictures[:2],)
    context = Context(model, example, list, lambda: batches(pictures), None)
    shared: Settings = {**SHARED, "form": form}
    asked = [(name, share) for name in LowRank().groups(model, example) for share in (0.5, 0.375, 0.25, 0.125)]
    effects = LowRank().effects(model, example, [(n, {"rank": s, **shared}) for n, s in asked], fisher)
    predicted, measured = [], []
    for (name, share), effect in zip(asked, effects, strict=True):
        if np.isfinite(effect.loss):
            moved = copy.deepcopy(model)
            LowRank().apply(moved, Step("lowrank", {name: {"rank": share}}, shared), context, 0)
            predicted.append(effect.loss)
            measured.append(divergence(model, moved, pictures))
    assert len(predicted) > 12
    assert rank_correlation(predicted, measured) > 0.8


def test_what_is_refused_is_predicted_to_be_impossible() -> None:
    model, example = build("attention"), (images(),)
    fisher = diagonal_fisher(model, [(example, None)], examples=2)
    whole, refused = LowRank().effects(
        model, example, [("query", {"rank": 1.0, **SHARED}), ("query", {"rank": 0.5, **SHARED})], fisher
    )
    assert whole.loss == 0
    assert not whole.inputs
    assert refused.loss == float("inf")


def test_the_choices_that_are_offered_save_something_on_every_resnet_layer() -> None:
    fields = OmegaConf.to_container(OmegaConf.load(Path(conf.__file__).parent / "compressor" / "lowrank.yaml"))
    assert isinstance(fields, dict)
    space = fields.pop("space")
    method, model = instantiate(fields), build("residual")
    kinds = {layer.name: layer.kind for layer in read_layers(model, (images(),))}
    for align in space["align"]["choices"]:
        for name in method.groups(model, (images(),)):
            for share in space["rank"]["choices"][kinds[name]]:
                factor(build("residual"), {name: share}, align=align)
