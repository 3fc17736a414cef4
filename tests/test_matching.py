import copy

import pytest
import torch
from torch import Tensor, nn

from compressors.errors import Infeasible
from compressors.layers import read_layers
from compressors.matching import FORMS, Match
from compressors.pipeline import Context
from compressors.plan import Step
from compressors.prune import Prune
from compressors.replace import put
from compressors.sparsify import Sparsify
from tests.context import make_context
from tests.zoo import NETS, build, images

INSIDE = ("hint", "attention", "relation")


def pruned(net: str, sparsity: float = 0.5) -> nn.Module:
    model = build(net)
    owners = Prune().groups(model, (images(),))
    Prune().apply(model, Step("prune", {o: {"sparsity": sparsity} for o in owners}, {"align": 4}), context(net), 0)
    return model


def context(net: str) -> Context:
    return make_context(build(net))


def distance(match: Match, student: nn.Module, teacher: nn.Module, inputs: Tensor) -> Tensor:
    with match.watching(student, teacher) as latest:
        teacher(inputs)
        student(inputs)
        return latest()


def hooks(*models: nn.Module) -> int:
    return sum(len(module._forward_hooks) for model in models for module in model.modules())


@pytest.mark.parametrize(
    ("net", "places"),
    [
        ("plain", ("a", "b")),
        # `block` has no layer of its own, its parts do; the head comes last and gives the output.
        ("residual", ("stem", "block.a", "block.b", "down", "shortcut")),
        ("tied", ("flat", "first", "second")),
        # What is called twice has two answers.
        ("reused", ("stem",)),
    ],
)
def test_blocks_have_a_layer_of_their_own_and_are_called_once(net: str, places: tuple[str, ...]) -> None:
    assert FORMS["hint"](pruned(net), build(net), (images(),)).places == places


# Of the tied net no block has positions to attend to.
@pytest.mark.parametrize(("form", "net"), [(f, n) for f in FORMS for n in NETS if (f, n) != ("attention", "tied")])
def test_a_copy_is_no_distance_away_and_another_net_is(form: str, net: str) -> None:
    teacher, inputs = build(net), images(48, seed=4)
    near, far = (
        distance(FORMS[form](student, teacher, (inputs,)), student, teacher, inputs).item()
        for student in (copy.deepcopy(teacher), build(net, seed=1))
    )
    # A projection is fitted with a ridge.
    assert near < (1e-2 if form == "hint" else 1e-5)
    assert far > 10 * near


@pytest.mark.parametrize("form", FORMS)
def test_the_distance_has_a_gradient_and_leaves_no_hook(form: str) -> None:
    student, teacher = pruned("residual"), build("residual")
    match = FORMS[form](student, teacher, (images(8),))
    assert hooks(student, teacher) == 0
    learning = [*student.parameters(), *match.parameters]
    gradients = torch.autograd.grad(distance(match, student, teacher, images(8)), learning, allow_unused=True)
    assert hooks(student, teacher) == 0
    assert any(g is not None and g.abs().max() > 0 for g in gradients)
    assert all(g is not None and g.abs().max() > 0 for g in gradients[len(learning) - len(match.parameters) :])


def test_projections_lead_from_the_student_s_width_to_the_teacher_s() -> None:
    student, teacher = pruned("plain"), build("plain")
    match = FORMS["hint"](student, teacher, (images(8),))
    assert [tuple(p.shape) for p in match.parameters] == [(16, 8), (16,), (32, 16), (32,)]
    assert not {id(p) for p in match.parameters} & {id(p) for p in (*student.parameters(), *teacher.parameters())}


def test_projections_of_sequences_act_on_each_position() -> None:
    student, teacher = pruned("attention"), build("attention")
    match = FORMS["hint"](student, teacher, (images(8),))
    shapes = dict(zip(match.places, match.parameters[::2], strict=True))
    assert shapes["up"].shape == (64, student.get_parameter("up.weight").shape[0])
    assert student.get_parameter("up.weight").shape[0] < 64


def test_projections_begin_at_the_least_squares_fit() -> None:
    student, teacher = pruned("plain"), build("plain")
    inputs = images(32, seed=5)
    match = FORMS["hint"](student, teacher, (inputs,))
    fitted = distance(match, student, teacher, inputs).item()
    for parameter in match.parameters:
        moved = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        assert distance(match, student, teacher, inputs).item() > fitted
        with torch.no_grad():
            parameter.copy_(moved)


def test_attention_compares_where_and_not_how_much() -> None:
    student, teacher = build("plain"), build("plain")
    with torch.no_grad():
        for name in ("a.1", "b.1"):
            for parameter in student.get_submodule(name).parameters():
                parameter.mul_(2.0)
        # The second block's own norm takes the first one's scale away again.
        student.get_buffer("b.1.running_mean").mul_(2.0)
        student.get_buffer("b.1.running_var").mul_(4.0)
    match = FORMS["attention"](student, teacher, (images(),))
    assert distance(match, student, teacher, images(8)).item() < 1e-5


def test_relation_does_not_mind_the_order_of_channels() -> None:
    student, teacher = build("plain"), build("plain")
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name in ("b.0.weight", "b.1.weight", "b.1.bias"):
            student.get_parameter(name).copy_(student.get_parameter(name)[order].clone())
        for name in ("b.1.running_mean", "b.1.running_var"):
            student.get_buffer(name).copy_(student.get_buffer(name)[order].clone())
    match = FORMS["relation"](student, teacher, (images(),))
    assert match.places == ("b",)
    assert distance(match, student, teacher, images(8)).item() < 1e-5


def test_what_is_held_or_replaced_is_compared_as_well() -> None:
    teacher, held, replaced = build("residual"), build("residual"), build("residual")
    layers = [layer.name for layer in read_layers(teacher, (images(),)) if layer.kind in ("conv", "linear")]
    Sparsify().apply(held, Step("sparsify", {n: {"sparsity": 0.5} for n in layers}), context("residual"), 0)
    for name in layers:
        put(replaced, name, [replaced.get_submodule(name)])
    expected = FORMS["relation"](copy.deepcopy(teacher), teacher, (images(),)).places
    assert expected
    for student in (held, replaced):
        assert FORMS["relation"](student, teacher, (images(),)).places == expected


def test_what_was_taken_out_is_not_compared() -> None:
    student, teacher = build("residual"), build("residual")
    student.set_submodule("block", nn.Identity())
    assert FORMS["hint"](student, teacher, (images(),)).places == ("stem", "down", "shortcut")


@pytest.mark.parametrize("form", INSIDE)
def test_without_a_common_block_it_is_infeasible(form: str) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 5)).eval()
    with pytest.raises(Infeasible, match=r"^match: no block is left"):
        FORMS[form](net, copy.deepcopy(net), (images(),))


def test_attention_without_positions_is_infeasible() -> None:
    with pytest.raises(Infeasible, match=r"^match=attention: no block that is left has positions"):
        FORMS["attention"](build("tied"), build("tied"), (images(),))


def test_hints_of_another_shape_are_infeasible() -> None:
    student, teacher = build("plain"), build("plain")
    for name in ("a.0", "b.0"):
        layer = student.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        layer.stride = (2, 2)
    with pytest.raises(Infeasible, match=r"^match=hint: no block that is left differs"):
        FORMS["hint"](student, teacher, (images(),))
