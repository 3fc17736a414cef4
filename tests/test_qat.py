import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor, nn

import conf
from compressors.distill import Distill
from compressors.errors import ConfigError, Infeasible
from compressors.layers import read_layers
from compressors.pipeline import Artifact, Compressor, Context, LayerNumbers, compress
from compressors.plan import CompressionPlan, Scalar, Settings, Step, Target
from compressors.prune import Prune
from compressors.qat import PACE, Qat, Rounded, round_activation, round_weight
from compressors.quantize import ROUNDINGS, Quantize
from compressors.rounding import dequantize
from compressors.sparsify import Sparsify
from evaluators.runtime import Runtime
from search.cache import Cache
from tests.context import make_context
from tests.patterns import patterns, patterns_context, taught
from tests.zoo import NETS, build, images

METHOD = Qat(weight_decay=0.0, warmup=0.1, clip_norm=1.0, epoch_examples=256)
GOOD: dict[str, Scalar] = {"epochs": 1, "temperature": 4, "weight": 0.5, "learning_rate": 0.003}
RUNTIMES = ("onnxruntime", "openvino")
# Of the root mean square of the answers. Ranges come from calibration, and OpenVINO's quantizer averages over examples.
TOLERANCE = {"onnxruntime": 0.1, "openvino": 0.2}


def qat(model: nn.Module, context: Context, seed: int = 0, **changes: Scalar) -> Settings:
    return METHOD.apply(model, Step("qat", {}, GOOD | changes), context, seed).achieved[""]


def largest(weight: Tensor) -> Tensor:
    return weight.abs().amax(tuple(range(1, weight.dim())), keepdim=True)


def nearest(weight: Tensor) -> Tensor:
    """As the runtimes round a weight."""
    step = largest(weight).clamp_min(1e-12) / 127
    return (weight / step).round() * step


def coarse(net: nn.Module) -> nn.Module:
    """The same function, but a channel of `a` is up to 1000 times as large as another, and `b` makes up for it.

    One step for the whole activation, and one for a row of `b`, are then too coarse for most channels.
    """
    model = copy.deepcopy(net)
    factors = torch.logspace(0, 3, 16)
    with torch.no_grad():
        for name in ("a.1.weight", "a.1.bias"):
            model.get_parameter(name).mul_(factors)
        model.get_parameter("b.0.weight").div_(factors[None, :, None, None])
    return model


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return coarse(taught("plain"))


@pytest.fixture(scope="module")
def trained(teacher: nn.Module) -> nn.Module:
    student = copy.deepcopy(teacher)
    qat(student, patterns_context(teacher), epochs=8, learning_rate=0.0003)
    return student


def answers(model: nn.Module, runtime: str, folder: Path) -> Tensor:
    """Of the file with all layers in 8 bits, to 500 pictures."""
    runs = cast(Runtime, instantiate(OmegaConf.load(Path(conf.__path__[0]) / "runtime" / f"{runtime}.yaml")))
    model = copy.deepcopy(model).requires_grad_(False)
    numbers = {layer.name: LayerNumbers(8) for layer in read_layers(model, (images(),))}
    artifact = Artifact(model, CompressionPlan(Target(runtime, "fp32")), "prefix", {}, numbers, {})
    deployed = runs.deploy(artifact, patterns_context(model), folder / "files", folder / "cache")
    return torch.from_numpy(deployed.run(patterns(500, seed=2)[0].numpy()))


def right(given: Tensor) -> float:
    return float((given.argmax(1) == patterns(500, seed=2)[1]).float().mean())


def simulated(model: nn.Module) -> Tensor:
    rounded = Rounded(model, (images(),))
    with torch.no_grad(), rounded.inputs():
        return rounded(patterns(500, seed=2)[0])


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_it_regains_what_rounding_alone_loses(
    runtime: str, teacher: nn.Module, trained: nn.Module, tmp_path: Path
) -> None:
    whole = right(teacher(patterns(500, seed=2)[0]))
    without = right(answers(teacher, runtime, tmp_path / "without"))
    within = right(answers(trained, runtime, tmp_path / "with"))
    assert whole > 0.99
    assert without < 0.7
    assert within > 0.94


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_deployed_file_answers_as_the_simulation(runtime: str, trained: nn.Module, tmp_path: Path) -> None:
    deployed, expected = answers(trained, runtime, tmp_path), simulated(trained)
    assert abs(right(deployed) - right(expected)) <= 0.015
    assert (deployed - expected).square().mean().sqrt() < TOLERANCE[runtime] * expected.square().mean().sqrt()


def outliers(net: nn.Module) -> nn.Module:
    """A channel of `a` that is always 0 gets weights in `b` that make one step too coarse for all the others."""
    model = copy.deepcopy(net)
    with torch.no_grad():
        model.get_parameter("a.1.weight")[0] = 0
        model.get_parameter("a.1.bias")[0] = -1
        weight = model.get_parameter("b.0.weight")
        weight[:, 0, 1, 1] = 400 * weight.abs().amax((1, 2, 3))
    return model


@pytest.mark.parametrize(("pace", "least", "most"), [(0.0, 0.0, 0.3), (PACE, 0.5, 1.0)])
def test_steps_that_learn_get_over_outliers(
    pace: float, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressors.qat.PACE", pace)
    model = outliers(taught("plain"))
    context = patterns_context(copy.deepcopy(model))
    assert right(simulated(model)) < 0.3
    qat(model, context, epochs=8, learning_rate=0.01)
    assert least < right(simulated(model)) <= most


@pytest.mark.parametrize("net", NETS)
def test_what_is_left_lies_on_the_grid_that_a_runtime_finds(net: str) -> None:
    model = build(net)
    achieved = qat(model, make_context(build(net)), epochs=2)
    for layer in read_layers(model, (images(),)):
        weight = model.get_parameter(f"{layer.name}.weight").detach()
        torch.testing.assert_close(nearest(weight), weight, rtol=1e-5, atol=1e-7)
        assert changed(weight, build(net).get_parameter(f"{layer.name}.weight"))
    assert float(achieved["step_share"]) > 0


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_rounding_finds_that_grid(rounding: str) -> None:
    """Those that could do more for the output find no error to make good."""
    model = build("attention")
    context = make_context(build("attention"))
    qat(model, context, epochs=2)
    step = Step("quantize", {"up": {"bits": 8}}, {"rounding": rounding, "bias_correction": True})
    numbers = Quantize().apply(model, step, context, 0).numbers["up"]
    assert numbers.values is not None
    assert numbers.scales is not None
    weight = model.get_parameter("up.weight").detach()
    torch.testing.assert_close(dequantize(numbers.values, numbers.scales), weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("ramp", [0, 1000])
@pytest.mark.parametrize("criterion", ["magnitude", "fisher"])
def test_weights_that_are_held_at_zero_stay_there_and_the_others_come_to_the_grid(criterion: str, ramp: int) -> None:
    """The largest weights of all, on a channel that is always 0, are the first to go by their Fisher information."""
    teacher = outliers(build("plain"))
    before, student, context = copy.deepcopy(teacher), copy.deepcopy(teacher), make_context(teacher)
    half = Step(
        "sparsify", {"a.0": {"sparsity": 0.5}, "b.0": {"sparsity": 0.5}}, {"criterion": criterion, "ramp": ramp}
    )
    for model in (before, student):
        Sparsify().apply(model, half, context, 0)
    qat(student, context)
    for model in (before, student):
        Sparsify().release(model)
    for layer in ("a.0", "b.0"):
        held, weight = (m.get_parameter(f"{layer}.weight").detach() for m in (before, student))
        if ramp == 0 or criterion == "fisher":
            assert torch.equal(weight == 0, (weight == 0) | (held == 0))
        if criterion == "fisher":
            assert (weight == 0).float().mean() < 0.6, "the steps are not as coarse as those that went would have them"
        assert changed(held, weight)
        torch.testing.assert_close(weight, nearest(weight), rtol=1e-5, atol=1e-7)


def changed(a: Tensor, b: Tensor) -> bool:
    return not torch.equal(a, b)


def test_the_grid_survives_the_folding_of_batch_norms(trained: nn.Module) -> None:
    norm = trained.get_submodule("b.1")
    factor = norm.get_parameter("weight") / torch.sqrt(norm.get_buffer("running_var") + 1e-5)
    folded = (trained.get_parameter("b.0.weight") * factor[:, None, None, None]).detach()
    torch.testing.assert_close(nearest(folded), folded, rtol=1e-5, atol=1e-7)


def test_without_training_it_rounds_as_the_runtimes_do() -> None:
    model = build("plain")
    rounded = Rounded(model, (images(),))
    rounded.write()
    for name in ("a.0", "b.0", "head"):
        expected = nearest(build("plain").get_parameter(f"{name}.weight").detach())
        torch.testing.assert_close(model.get_parameter(f"{name}.weight").detach(), expected)


@settings(deadline=None)  # the first call of an operation is slow on a busy machine
@given(st.integers(0, 999), st.floats(0.05, 3.0))
def test_weights_are_clipped_and_their_steps_never_too_large(seed: int, share: float) -> None:
    weight = torch.randn(4, 30, generator=torch.Generator().manual_seed(seed))
    step = share * largest(weight) / 127
    given = round_weight(weight, step)
    used = torch.minimum(step, largest(weight) / 127)
    levels = given / used
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    torch.testing.assert_close(levels.abs().amax(1), torch.full((4,), 127.0))
    inside = weight.abs() <= 127 * used
    assert ((given - weight).abs() <= 0.5001 * used)[inside].all()


def test_the_gradient_of_a_step_is_that_of_the_paper() -> None:
    weight = torch.tensor([[0.26, -0.9, 1.27]])
    step = torch.tensor([[0.005]], requires_grad=True)
    (gradient,) = torch.autograd.grad(round_weight(weight, step).sum(), step)
    # 0.26 is 52 steps exactly; the others are clipped to -127 and 127.
    assert gradient.item() == pytest.approx(0, abs=1e-3)
    (gradient,) = torch.autograd.grad(round_weight(weight[:, :2], step).sum(), step)
    assert gradient.item() == pytest.approx(-127, abs=1e-3)


def test_gradients_pass_where_nothing_is_clipped() -> None:
    weight = torch.tensor([[0.26, -0.9, 1.27]], requires_grad=True)
    (gradient,) = torch.autograd.grad(round_weight(weight, torch.tensor([[0.005]])).sum(), weight)
    assert gradient.tolist() == [[1, 0, 0]]


@settings(deadline=None)  # the first call of an operation is slow on a busy machine
@given(st.integers(0, 999), st.floats(-5, 5))
def test_activations_keep_zero_and_lose_half_a_step_or_a_little_more(seed: int, shift: float) -> None:
    given = torch.randn(200, generator=torch.Generator().manual_seed(seed)) + shift
    given[0] = 0
    rounded = round_activation(given)
    step = (given.max().clamp_min(0) - given.min().clamp_max(0)) / 255
    assert rounded[0] == 0
    assert len(set(rounded.tolist())) <= 256
    # The ends may lose as much again, because 0 must be one of the values.
    assert ((rounded - given).abs() <= 1.001 * step).all()


def test_nothing_at_all_stays_nothing() -> None:
    assert torch.equal(round_activation(torch.zeros(3)), torch.zeros(3))
    assert torch.equal(round_weight(torch.zeros(2, 3), torch.full((2, 1), 1e-14)), torch.zeros(2, 3))


def test_it_leaves_no_trace_but_the_weights() -> None:
    model = build("residual").requires_grad_(False)
    names, norms = list(model.state_dict()), dict(build("residual").named_buffers())
    state = torch.get_rng_state()
    qat(model, make_context(build("residual")))
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_parameters()] == [n for n, _ in build("residual").named_parameters()]
    assert not any(module._forward_pre_hooks or module.training for module in model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert all(torch.equal(buffer, norms[name]) for name, buffer in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)


def test_tied_weights_stay_tied() -> None:
    model = build("tied")
    qat(model, make_context(build("tied")))
    assert model.get_parameter("first.weight") is model.get_submodule("second").weight


def test_an_embedding_keeps_its_weight() -> None:
    embedding, head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
    head.weight = embedding.weight
    model, rows = nn.Sequential(embedding, head).eval(), torch.arange(7)
    before = embedding.weight.detach().clone()
    with Rounded(model, (rows,)).inputs():
        assert torch.equal(model(rows), before @ before.T)
    Rounded(model, (rows,)).write()
    assert torch.equal(embedding.weight, before)


def test_same_seed_same_weights_and_another_one_others() -> None:
    models = [build("plain") for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        qat(model, make_context(build("plain")), seed=seed)
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_it_goes_on_from_what_distillation_stored(tmp_path: Path) -> None:
    """Stored by one process, taken up by another, against trained in one go."""
    model = build("residual")
    distill = Distill(weight_decay=5e-4, warmup=0.1, clip_norm=1.0, epoch_examples=32, first_round=2)
    methods: dict[str, Compressor] = {"prune": Prune(), "distill": distill, "qat": METHOD}
    cut = Step("prune", {o: {"sparsity": 0.5} for o in Prune().groups(model, (images(),))}, {"align": 4})
    steps = (cut, Step("distill", {}, GOOD | {"epochs": 2}), Step("qat", {}, GOOD))

    def made(steps: tuple[Step, ...], store: Cache | None) -> Artifact:
        return compress(model, CompressionPlan(Target("any", "fp32"), steps), methods, make_context(model), store)

    made(steps[:2], Cache(tmp_path))
    resumed, whole = made(steps, Cache(tmp_path)), made(steps, None)
    assert resumed.seconds.keys() == {"prune", "qat"}
    assert resumed.achieved.keys() == whole.achieved.keys() == {"prune", "distill", "qat"}
    assert all(torch.equal(v, whole.model.state_dict()[n]) for n, v in resumed.model.state_dict().items())


@pytest.mark.parametrize(
    ("key", "value"), [("epochs", -1), ("epochs", 1.5), ("temperature", 0), ("weight", 1.5), ("learning_rate", None)]
)
def test_what_cannot_be_done_is_infeasible(key: str, value: Scalar) -> None:
    with pytest.raises(Infeasible, match=f"^qat.{key} is {value}: expected [^\n]*$"):
        METHOD.apply(build("plain"), Step("qat", {}, GOOD | {key: value}), make_context(build("plain")), 0)


def test_divergence_is_infeasible_at_once() -> None:
    context = replace(make_context(build("plain")), loss=lambda output, _target: output.sum() * math.inf)
    model = build("plain")
    with pytest.raises(Infeasible, match=r"^qat diverged: the loss is (nan|-?inf) in epoch 1$"):
        qat(model, context, epochs=3)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_epochs_without_examples_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^compressor.qat.epoch_examples: is 0; give 1 or more$"):
        replace(METHOD, epoch_examples=0)
