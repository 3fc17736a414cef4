"""What every compressor in conf/compressor must keep on every small net; a new one is tested without an edit here."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

import conf
from compressors.errors import Infeasible
from compressors.layers import inside, read_layers
from compressors.pipeline import Artifact, Compressor, Growing, Removing, Stage, compress, loss_after
from compressors.plan import CompressionPlan, Scalar, Step, Target
from search.space import NONE
from tests.context import make_context
from tests.zoo import NETS, build, images

FILES = sorted((Path(conf.__file__).parent / "compressor").glob("*.yaml"))
STRENGTHS = ("weakest", "strongest")


@dataclass(frozen=True)
class Method:
    """One yaml: the compressor it makes and the knobs it offers."""

    compressor: Compressor
    knobs: Mapping[str, Mapping[str, Any]]

    def values(self, key: str, kind: str) -> Sequence[Scalar]:
        """What one knob offers a layer kind, from the mildest setting to the strongest; "off" is left out."""
        knob = self.knobs[key]
        choices = knob.get("choices") or [knob["low"], knob["high"]]
        offered: list[Any] = choices.get(kind, []) if isinstance(choices, Mapping) else choices
        deciding, off = self.compressor.off
        if key != deciding:
            return offered
        return sorted((v for v in offered if v != off), key=lambda value: abs(value - off))

    def keys(self, per_layer: bool) -> list[str]:
        return [key for key, knob in self.knobs.items() if ("granularity" in knob) == per_layer]

    def off_step(self, model: nn.Module) -> Step:
        key, off = self.compressor.off
        owners = self.compressor.groups(model, (images(),))
        per_layer = {owner: {key: off} for owner in owners} if key in self.keys(per_layer=True) else {}
        shared = {k: off if k == key else value for k, value in self.shared("strongest").items()}
        return Step(self.compressor.method, per_layer, shared)

    def shared(self, strength: str) -> dict[str, Scalar]:
        """Of every key without layers a value, as plans have it: those that are left out are not there."""
        picked = {key: _pick(self.values(key, ""), strength) for key in self.keys(per_layer=False)}
        return {key: value for key, value in picked.items() if value != NONE}


@cache
def method(name: str) -> Method:
    raw = OmegaConf.to_container(OmegaConf.load(Path(conf.__file__).parent / "compressor" / f"{name}.yaml"))
    assert isinstance(raw, dict)
    space = raw.pop("space")
    return Method(instantiate(raw), {key: knob for key, knob in space.items() if key != "when"})


@cache
def step(name: str, net: str, strength: str) -> Step:
    """Every layer at its weakest or strongest setting that can be realised on it."""
    offers, model = method(name), build(net)
    kinds = {layer.name: layer.kind for layer in read_layers(model, (images(),))}
    shared = offers.shared(strength)
    per_layer: dict[str, dict[str, Scalar]] = {}
    for owner in offers.compressor.groups(model, (images(),)):
        for key in offers.keys(per_layer=True):
            values = [
                v for v in offers.values(key, kinds.get(owner, "")) if _works(offers, model, owner, key, v, shared)
            ]
            per_layer[owner] = {key: _pick(values, strength)}
    return Step(name, per_layer, shared)


def _pick(values: Sequence[Scalar], strength: str) -> Scalar:
    return values[0 if strength == "weakest" else -1]


def _works(offers: Method, model: nn.Module, owner: str, key: str, value: Scalar, shared: Mapping[str, Scalar]) -> bool:
    one = Step(offers.compressor.method, {owner: {key: value}}, shared)
    try:
        offers.compressor.apply(copy.deepcopy(model), one, make_context(model), 0)
    except Infeasible:
        return False
    return True


def run(model: nn.Module, *steps: Step) -> Artifact:
    compressors = {file.stem: method(file.stem).compressor for file in FILES}
    plan = CompressionPlan(Target("any", "fp32"), steps, seed=3)
    return compress(model, plan, compressors, make_context(model))


@cache
def outcome(name: str, net: str, strength: str) -> tuple[nn.Module, Artifact]:
    """A net and what one method made of it."""
    model = build(net)
    return model, run(model, step(name, net, strength))


def same_state(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


every_method = pytest.mark.parametrize("name", [file.stem for file in FILES])
every_net = pytest.mark.parametrize("net", NETS)
every_strength = pytest.mark.parametrize("strength", STRENGTHS)


@every_method
def test_the_file_is_named_as_its_method(name: str) -> None:
    assert method(name).compressor.method == name
    assert method(name).compressor.off[0] in method(name).knobs


@every_method
@every_net
def test_off_leaves_the_outputs_bit_equal(name: str, net: str) -> None:
    model = build(net)
    artifact = run(model, method(name).off_step(model))
    assert torch.equal(artifact.model(images()), model(images()))
    assert not artifact.numbers


@every_method
@every_net
@every_strength
def test_the_uncompressed_model_is_untouched(name: str, net: str, strength: str) -> None:
    model, _ = outcome(name, net, strength)
    assert same_state(model, build(net))
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())


@every_method
@every_net
@every_strength
def test_same_plan_same_seed_same_weights(name: str, net: str, strength: str) -> None:
    first, second = outcome(name, net, strength)[1], run(build(net), step(name, net, strength))
    assert same_state(first.model, second.model)
    assert first.achieved == second.achieved
    assert _plain(first) == _plain(second)


def _plain(artifact: Artifact) -> dict[str, tuple[object, ...]]:
    """The numbers in a form that can be compared."""
    return {
        layer: tuple(field.tolist() if isinstance(field, torch.Tensor) else field for field in vars(n).values())
        for layer, n in artifact.numbers.items()
    }


@every_method
@every_net
@every_strength
def test_shape_and_dtype_of_the_output_stay(name: str, net: str, strength: str) -> None:
    model, artifact = outcome(name, net, strength)
    output = artifact.model(images(3))
    assert output.shape == model(images(3)).shape
    assert output.dtype == torch.float32
    assert output.isfinite().all()


@every_method
@every_net
@every_strength
def test_achieved_names_every_requested_layer(name: str, net: str, strength: str) -> None:
    asked = step(name, net, strength)
    achieved = outcome(name, net, strength)[1].achieved[name]
    assert achieved.keys() == (asked.per_layer.keys() if method(name).keys(per_layer=True) else {""})


numeric = pytest.mark.parametrize(
    "name", [file.stem for file in FILES if method(file.stem).compressor.stage is Stage.NUMERIC]
)
growing = pytest.mark.parametrize(
    "name", [file.stem for file in FILES if isinstance(method(file.stem).compressor, Growing)]
)


@numeric
@every_net
@every_strength
def test_numbers_of_a_layer_depend_on_its_own_settings_only(name: str, net: str, strength: str) -> None:
    """The pipeline stores them one by one."""
    model, asked = build(net), step(name, net, strength)
    together = outcome(name, net, strength)[1]
    numbers: dict[str, tuple[object, ...]] = {}
    for owner, settings in asked.per_layer.items():
        alone = run(model, Step(name, {owner: settings}, asked.shared))
        assert alone.achieved[name] == {owner: together.achieved[name][owner]}
        assert alone.numbers.keys() <= set(method(name).compressor.groups(model, (images(),))[owner])
        numbers.update(_plain(alone))
    assert numbers == _plain(together)


@numeric
@every_net
@every_strength
def test_numbers_leave_the_model_alone(name: str, net: str, strength: str) -> None:
    model = build(net)
    method(name).compressor.apply(model, step(name, net, strength), make_context(build(net)), 0)
    assert same_state(model, build(net))


@growing
@every_net
def test_more_recovery_goes_on_from_less(name: str, net: str) -> None:
    compressor, whole = method(name).compressor, build(net)
    assert isinstance(compressor, Growing)
    asked, context = step(name, net, "strongest"), make_context(build(net))
    *_, last = compressor.rounds(asked)
    assert last == asked
    compressor.apply(whole, asked, context, 3)
    since: Step | None = None
    made = build(net)
    for end in compressor.rounds(asked):
        # What another process would find: the state, and nothing else.
        taken_up = build(net, seed=1)
        taken_up.load_state_dict(made.state_dict())
        reported = compressor.advance(taken_up, end, since, context, 3).achieved[""]
        key = compressor.off[0]
        assert reported[key] == end.shared[key]
        assert math.isfinite(float(reported[loss_after(reported[key])]))
        made, since = taken_up, end
    assert same_state(made, whole)


@growing
def test_rounds_of_a_round_are_those_before_it(name: str) -> None:
    compressor = method(name).compressor
    assert isinstance(compressor, Growing)
    rounds = compressor.rounds(step(name, "plain", "strongest"))
    for passed, end in enumerate(rounds, start=1):
        assert compressor.rounds(end) == rounds[:passed]


def _impossible() -> list[tuple[str, str]]:
    return [(file.stem, key) for file in FILES for key in method(file.stem).knobs]


def _net_for(name: str) -> str:
    """A net on which the method finds something to do."""
    if not method(name).keys(per_layer=True):
        return "residual"
    return next(net for net in ("residual", *NETS) if method(name).compressor.groups(build(net), (images(),)))


@pytest.mark.parametrize(("name", "key"), _impossible())
def test_an_impossible_value_is_infeasible(name: str, key: str) -> None:
    net = _net_for(name)
    good = step(name, net, "strongest")
    per_layer = {owner: {k: -1 if k == key else v for k, v in s.items()} for owner, s in good.per_layer.items()}
    shared = {**good.shared, **({key: -1} if key in method(name).keys(per_layer=False) else {})}
    bad = Step(name, per_layer, shared)
    with pytest.raises(Infeasible, match=key):
        run(build(net), bad)


@pytest.mark.parametrize("name", [file.stem for file in FILES if method(file.stem).keys(per_layer=True)])
def test_an_unknown_layer_is_infeasible(name: str) -> None:
    net = _net_for(name)
    good = step(name, net, "strongest")
    settings = next(iter(good.per_layer.values()))
    with pytest.raises(Infeasible, match="nowhere"):
        run(build(net), Step(name, {"nowhere": settings}, good.shared))


def _pairs() -> list[tuple[str, str]]:
    stages = {file.stem: method(file.stem).compressor.stage for file in FILES}
    return [(a, b) for a in stages for b in stages if stages[a] < stages[b]]


@pytest.mark.parametrize(("earlier", "later"), _pairs())
@every_net
def test_it_works_after_every_earlier_stage(earlier: str, later: str, net: str) -> None:
    """Of what an earlier one took out nothing is asked."""
    model, first, second = build(net), step(earlier, net, "strongest"), step(later, net, "strongest")
    remover = method(earlier).compressor
    gone = tuple(f"{name}." for name in remover.removed(first)) if isinstance(remover, Removing) else ()
    left = {owner: settings for owner, settings in second.per_layer.items() if not owner.startswith(gone or ("//",))}
    artifact = run(model, first, replace(second, per_layer=left))
    assert artifact.model(images()).shape == model(images()).shape
    assert artifact.achieved.keys() == {earlier, later}


def _pairs_of_one_stage() -> list[tuple[str, str]]:
    """Of the methods that the joint experiment has in one space, in its order."""
    joint = OmegaConf.load(Path(conf.__file__).parent / "experiment" / "joint.yaml")
    names = next(entry["override /compressor"] for entry in joint.defaults if "override /compressor" in entry)
    return [(a, b) for a, b in combinations(names, 2) if method(a).compressor.stage == method(b).compressor.stage]


@pytest.mark.parametrize(("first", "second"), _pairs_of_one_stage())
def test_two_of_one_stage_go_together(first: str, second: str) -> None:
    """On the first net where, once every other layer was given to the one, something is left to the other."""
    for model, one, two in ((build(net), *_shared_out(first, second, net)) for net in NETS):
        if all(asked.per_layer or not method(asked.method).keys(per_layer=True) for asked in (one, two)):
            artifact = run(model, one, two)
            assert artifact.model(images()).shape == model(images()).shape
            assert artifact.achieved[first].keys() >= one.per_layer.keys()
            assert artifact.achieved[second].keys() >= two.per_layer.keys()
            return
    pytest.skip(f"no small net has something for both {first} and {second}")


def _shared_out(first: str, second: str, net: str) -> tuple[Step, Step]:
    one, two = step(first, net, "strongest"), step(second, net, "strongest")
    one = replace(one, per_layer=dict(list(one.per_layer.items())[::2]))
    remover = method(first).compressor
    out = [*one.per_layer, *(remover.removed(one) if isinstance(remover, Removing) else ())]
    left = {o: settings for o, settings in two.per_layer.items() if not any(inside(o, block) for block in out)}
    return one, replace(two, per_layer=left)
