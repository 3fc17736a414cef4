"""Training that leaves channels with nothing to do: what it is worth to pruning, and what plans share of it."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compressors.channels import Group, removable, trace
from compressors.distill import Distill
from compressors.errors import Infeasible
from compressors.pipeline import Artifact, Compressor, Context, compress, prefix_digest
from compressors.plan import CompressionPlan, Scalar, Settings, Step, Target
from compressors.prune import Prune
from compressors.slim import Slim, spread, strengths
from search.cache import Cache
from search.trial import Clock
from tests.context import make_context
from tests.patterns import accuracy, patterns_context, taught
from tests.zoo import NETS, build, images

METHOD = Slim(weight_decay=0.0, warmup=0.1, clip_norm=1.0, epoch_examples=256)
GOOD: dict[str, Scalar] = {"epochs": 8, "penalty": 0.3, "learning_rate": 0.01}


def slim(model: nn.Module, context: Context, seed: int = 0, **changes: Scalar) -> Settings:
    return METHOD.apply(model, Step("slim", {}, GOOD | changes), context, seed).achieved[""]


def groups(model: nn.Module) -> list[Group]:
    return removable(trace(model, (images(),)), model, (images(),))


def strong(model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return [strengths(model, group) for group in groups(model)]


def halved(model: nn.Module, context: Context, **shared: Scalar) -> nn.Module:
    """A copy without half of all channels, those with the smallest scales."""
    cut = copy.deepcopy(model)
    owners = Prune().groups(model, context.example)
    step = Step("prune", {o: {"sparsity": 0.5} for o in owners}, {"align": 4, "criterion": "bn_scale", **shared})
    Prune().apply(cut, step, replace(context, prepared=model), 0)
    return cut


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return taught("plain")


@pytest.fixture(scope="module")
def slimmed(teacher: nn.Module) -> nn.Module:
    model = copy.deepcopy(teacher)
    slim(model, patterns_context(teacher), epochs=32, penalty=3.0)
    return model


def idle(model: nn.Module) -> float:
    """The share of channels below a tenth of the strongest one beside them."""
    return float(torch.cat([scale < 0.1 * scale.max() for scale in strong(model)]).float().mean())


def test_channels_with_nothing_to_do_are_told_from_the_others(teacher: nn.Module, slimmed: nn.Module) -> None:
    assert accuracy(slimmed) > accuracy(teacher) - 0.02
    assert idle(teacher) == 0
    assert idle(slimmed) > 0.4


def test_pruning_what_was_slimmed_loses_less(teacher: nn.Module, slimmed: nn.Module) -> None:
    """Half of all channels, without any recovery."""
    context = patterns_context(teacher)
    for allocation in ("per_group", "global"):
        fat, thin = (accuracy(halved(model, context, allocation=allocation)) for model in (teacher, slimmed))
        assert fat < 0.5
        assert thin > 0.9


def test_a_larger_penalty_leaves_the_work_to_fewer_channels() -> None:
    found = []
    for penalty in (1e-6, 0.3, 3.0):
        model = build("residual")
        slim(model, make_context(build("residual")), penalty=penalty)
        with torch.no_grad():
            found.append(float(spread(model, groups(model))))
    assert found == sorted(found, reverse=True)
    assert found[2] < 0.95 * found[0]


def test_the_spread_of_channels_tells_how_many_do_the_work() -> None:
    model = build("plain")
    with torch.no_grad():
        for name, width in (("a.1", 16), ("b.1", 32)):
            model.get_parameter(f"{name}.bias").zero_()
            model.get_parameter(f"{name}.weight").copy_(torch.full((width,), 0.3))
        assert float(spread(model, groups(model))) == pytest.approx(16**0.5 + 32**0.5)
        model.get_parameter("a.1.weight")[1:] = 0
        assert float(spread(model, groups(model))) == pytest.approx(1 + 32**0.5)


def test_every_norm_behind_a_group_counts() -> None:
    model = build("residual")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter))))

    def affine(*norms: str) -> Tensor:
        parts = [model.get_parameter(f"{norm}.{part}").abs() for norm in norms for part in ("weight", "bias")]
        return torch.stack(parts).sum(0)

    for group, strength in zip(groups(model), strong(model), strict=True):
        norms = {"stem.0": ("stem.1", "block.b.1"), "block.a.0": ("block.a.1",), "down.0": ("down.1",)}[group.owner]
        torch.testing.assert_close(strength, affine(*norms))


def test_without_norms_the_weights_that_make_a_channel_count_together() -> None:
    (strength,) = strong(build("attention"))
    torch.testing.assert_close(strength, build("attention").get_parameter("up.weight").norm(dim=1))
    bare = build("residual")
    bare.set_submodule("down.1", nn.Identity())
    found = {len(strength): strength for strength in strong(bare)}
    made = [bare.get_parameter(f"{name}.weight").flatten(1).square().sum(1) for name in ("down.0", "shortcut")]
    torch.testing.assert_close(found[32], torch.stack(made).sum(0).sqrt())


def test_a_norm_that_does_not_scale_is_none() -> None:
    model = build("plain")
    model.set_submodule("a.1", nn.BatchNorm2d(16, affine=False).eval())
    found = {len(strength): strength for strength in strong(model)}
    torch.testing.assert_close(found[16], model.get_parameter("a.0.weight").flatten(1).norm(dim=1))


def test_groups_without_norms_are_slimmed_too() -> None:
    smallest = []
    for penalty in (1e-6, 1.0):
        model = build("attention")
        slim(model, make_context(build("attention")), penalty=penalty)
        (strength,) = strong(model)
        smallest.append(float(strength.min() / strength.max()))
    assert smallest[1] < 0.8 * smallest[0]


def test_what_has_no_channels_to_remove_is_left_alone() -> None:
    model = build("tied")
    assert slim(model, make_context(build("tied"))) == {"epochs": 0, "channels": 0}
    assert all(torch.equal(p, build("tied").get_parameter(name)) for name, p in model.named_parameters())


@pytest.mark.parametrize("net", [net for net in NETS if net != "tied"])
def test_what_was_done_is_told(net: str) -> None:
    model = build(net)
    told = slim(model, make_context(build(net)), epochs=1)
    found = torch.cat(strong(model))
    assert told["epochs"] == 1
    assert told["channels"] == len(found)
    assert told["idle"] == pytest.approx(idle(model))


def test_the_seed_decides_the_order_of_the_data_and_labels_are_no_must() -> None:
    blind = replace(make_context(build("plain", seed=1)), loss=None)
    models = [build("plain") for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        slim(model, blind, seed=seed, epochs=1)
    first, again, other = ([*model.parameters()] for model in models)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_training_leaves_no_trace_but_the_weights() -> None:
    model = build("plain").requires_grad_(False)
    state = torch.get_rng_state()
    slim(model, make_context(build("plain")), epochs=1)
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("key", "value"), [("epochs", -1), ("penalty", 0), ("penalty", "much"), ("learning_rate", 0)])
def test_what_cannot_be_done_is_infeasible(key: str, value: Scalar) -> None:
    with pytest.raises(Infeasible, match=f"slim.{key} is {value}"):
        slim(build("plain"), make_context(build("plain")), 0, **{key: value})


SLIM = Step("slim", {}, {**GOOD, "epochs": 2, "penalty": 1.0})
RECOVER = Step("distill", {}, {"epochs": 2, "temperature": 4, "weight": 0.5, "learning_rate": 0.01})
METHODS: dict[str, Compressor] = {
    "slim": METHOD,
    "prune": Prune(),
    "distill": Distill(weight_decay=5e-4, warmup=0.1, clip_norm=1.0, epoch_examples=32, first_round=2),
}


def cut(net: nn.Module, share: float, **shared: Scalar) -> Step:
    owners = Prune().groups(net, (images(),))
    return Step("prune", {o: {"sparsity": share} for o in owners}, {"align": 1, "criterion": "bn_scale", **shared})


def made(net: nn.Module, *steps: Step, store: Cache | None = None, lines: list[str] | None = None) -> Artifact:
    context = replace(make_context(net), progress=(lines if lines is not None else []).append)
    return compress(net, CompressionPlan(Target("any", "fp32"), steps, 3), METHODS, context, store)


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_model_is_slimmed_once_for_all_that_prune_it(tmp_path: Path) -> None:
    net, lines = build("residual"), list[str]()
    for share in (0.25, 0.5):
        stored = made(net, SLIM, cut(net, share), RECOVER, store=Cache(tmp_path), lines=lines)
        assert same(stored.model, made(net, SLIM, cut(net, share), RECOVER).model)
    assert [line.split()[0] for line in lines] == ["slim"] * 2 + ["distill"] * 4
    assert same(made(net, SLIM, store=Cache(tmp_path), lines=lines).model, made(net, SLIM).model)
    assert len(lines) == 6


def test_what_others_were_made_of_is_kept_beyond_the_bound_of_the_cache(tmp_path: Path) -> None:
    net, lines, store = build("residual"), list[str](), Cache(tmp_path / ("0" * 16), limit_bytes=1)
    for share in (0.25, 0.5, 0.25):
        made(net, SLIM, cut(net, share), store=store, lines=lines)
        made(net, SLIM, cut(net, share), RECOVER, store=store)
        store.shrink()
    assert len(lines) == 2, "slimmed once"
    assert [entry.name for entry in store.folder.iterdir()] == [prefix_digest([SLIM], 3)]
    store.close()
    store.shrink()
    assert not [*store.folder.iterdir()]


def test_the_seconds_of_slimming_are_shared() -> None:
    net = build("residual")
    for steps, shared in (((SLIM, cut(net, 0.5)), True), ((cut(net, 0.5), RECOVER), False)):
        clock = Clock()
        context = replace(make_context(net), shared=clock.shared)
        compress(net, CompressionPlan(Target("any", "fp32"), steps, 3), METHODS, context)
        assert (clock.shared_s > 0) == shared


def test_what_is_pruned_is_the_slimmed_model() -> None:
    net = build("residual")
    slimmed, pruned = made(net, SLIM).model, made(net, SLIM, cut(net, 0.5)).model
    by_hand = copy.deepcopy(slimmed)
    Prune().apply(by_hand, cut(net, 0.5), make_context(net), 3)
    assert same(pruned, by_hand)
    assert not same(pruned, made(net, cut(net, 0.5)).model)


def widths(artifact: Artifact) -> dict[str, Scalar]:
    return {owner: done["channels"] for owner, done in artifact.achieved["prune"].items()}


def test_the_slimmed_model_decides_on_the_shape_of_a_global_cut(tmp_path: Path) -> None:
    """All plans with this slimming have it; recovery and stored weights do not change it."""
    net = build("residual")
    everywhere = cut(net, 0.5, allocation="global")
    slimmed = made(net, SLIM).model
    fat, thin = made(net, everywhere), made(net, SLIM, everywhere)
    alone = copy.deepcopy(slimmed)
    expected = Prune().apply(alone, everywhere, replace(make_context(net), prepared=slimmed), 3).achieved
    assert thin.achieved["prune"] == expected
    assert widths(thin) != widths(fat)
    made(net, SLIM, everywhere, RECOVER, store=Cache(tmp_path))
    again = made(net, SLIM, everywhere, RECOVER, store=Cache(tmp_path))
    assert widths(again) == widths(thin)


def test_an_assistant_is_made_of_the_slimmed_model_too() -> None:
    net = build("residual")
    assisted = replace(RECOVER, shared={**RECOVER.shared, "assistant": "half"})
    halfway = made(net, SLIM, cut(net, 0.25), RECOVER).model
    student = made(net, SLIM, cut(net, 0.5)).model
    METHODS["distill"].apply(student, RECOVER, replace(make_context(net), teacher=halfway), 3)
    assert same(made(net, SLIM, cut(net, 0.5), assisted).model, student)
