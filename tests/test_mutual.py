"""Two students that teach each other, alone and as a choice of distillation."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

from compressors.distill import Distill
from compressors.errors import ConfigError, Infeasible
from compressors.mutual import learning_together, peer_of
from compressors.pipeline import Compressor, Context, compress
from compressors.plan import CompressionPlan, Scalar, Settings, Step, Target
from compressors.prune import Prune
from compressors.recovery import Goal, distillation_loss
from compressors.sparsify import Sparsify
from search.cache import Cache
from tests.context import make_context
from tests.zoo import NETS, build, images

METHOD = Distill(weight_decay=5e-4, warmup=0.1, clip_norm=1.0, epoch_examples=32, first_round=2)
GOOD: dict[str, Scalar] = {"epochs": 2, "temperature": 4, "weight": 0.5, "learning_rate": 0.01}
MUTUAL: dict[str, Scalar] = {**GOOD, "peer": "mutual"}


def distill(model: nn.Module, context: Context, seed: int = 0, **changes: Scalar) -> Settings:
    return METHOD.apply(model, Step("distill", {}, GOOD | changes), context, seed).achieved[""]


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("net", NETS)
def test_a_peer_has_the_structure_but_not_the_weights(net: str) -> None:
    student = build(net)
    peer, again, other = peer_of(student, 1), peer_of(student, 1), peer_of(student, 2)
    assert same(student, build(net)), "the student stays"
    assert same(peer, again)
    assert peer.state_dict().keys() == student.state_dict().keys()
    for name, weight in student.named_parameters():
        kept = [torch.equal(weight, model.get_parameter(name)) for model in (peer, other)]
        assert kept == [weight.dim() == 1] * 2, name
        assert weight.dim() == 1 or not torch.equal(peer.get_parameter(name), other.get_parameter(name))
    assert not torch.equal(peer(images()), student(images()))


def test_what_is_held_at_zero_is_so_in_the_peer_too() -> None:
    student = build("plain")
    Sparsify().apply(student, Step("sparsify", {"b.0": {"sparsity": 0.5}}), make_context(student), 0)
    weights = [model.get_submodule("b.0").weight for model in (student, peer_of(student, 0))]
    zeros = [weight == 0 for weight in weights if isinstance(weight, Tensor)]
    assert torch.equal(*zeros)
    assert zeros[0].float().mean() == pytest.approx(0.5)


def goal_of(context: Context) -> Goal:
    return Goal.read("distill", GOOD, context, half=False)


def pulled(student: nn.Module, peer: nn.Module, context: Context) -> tuple[Tensor, Tensor]:
    """The student's own loss, and what is minimised beside it."""
    goal, batch = goal_of(context), next(iter(context.calibration()))
    with learning_together(student, peer, goal) as pull:
        own = goal.loss(student, batch)
        return own, pull(batch)


def test_two_that_agree_have_nothing_to_tell_each_other() -> None:
    # Batch norms in training mode, as the peer's are.
    student, context = build("attention"), make_context(build("residual"))
    own, beside = pulled(student, copy.deepcopy(student), context)
    torch.testing.assert_close(beside, own)


def test_each_is_drawn_to_the_other_and_to_the_goal() -> None:
    student, context = build("attention"), make_context(build("residual"))
    peer = peer_of(student, 0)
    _, beside = pulled(student, peer, context)
    beside.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    inputs, _ = batch = next(iter(context.calibration()))
    one, two = copy.deepcopy(student), copy.deepcopy(peer)
    for model in (one, two):
        model.zero_grad()
    mine, other = one(*inputs), two(*inputs)
    distillation_loss(mine, other.detach(), 4).backward()  # type: ignore[no-untyped-call]
    (distillation_loss(other, mine.detach(), 4) + goal_of(context).loss(two, batch)).backward()  # type: ignore[no-untyped-call]
    for made, expected in ((student, one), (peer, two)):
        for name, parameter in made.named_parameters():
            torch.testing.assert_close(parameter.grad, expected.get_parameter(name).grad)


def test_a_student_with_a_peer_learns_something_else_and_says_so() -> None:
    context = make_context(build("residual", seed=1))
    alone, paired, again = (build("residual") for _ in range(3))
    told = distill(alone, context)
    assert distill(paired, context, peer="mutual") == distill(again, context, peer="mutual")
    assert not same(alone, paired)
    assert same(paired, again)
    assert distill(build("residual"), context, peer="mutual")["peer"] == "mutual"
    assert "peer" not in told


def test_no_peer_is_as_if_it_were_not_asked_for() -> None:
    context = make_context(build("residual"))
    absent, none = build("plain"), build("plain")
    assert distill(absent, context) == distill(none, context, peer="none")
    assert same(absent, none)


def test_a_peer_leaves_no_trace_but_the_weights() -> None:
    model, context = build("residual").requires_grad_(False), make_context(build("residual", seed=1))
    state = torch.get_rng_state()
    distill(model, context, peer="mutual", match="hint", match_weight=1.0)
    assert list(model.state_dict()) == list(build("residual").state_dict())
    assert not any(m._forward_hooks for net in (model, context.teacher) for m in net.modules())
    assert not any(p.requires_grad for p in model.parameters())
    assert same(context.teacher, build("residual", seed=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_peer_that_is_far_off_does_not_shorten_the_students_steps() -> None:
    ours, theirs = (nn.Parameter(torch.zeros(4)) for _ in range(2))
    METHOD.train(
        [ours],
        lambda _batch: 0.1 * ours.sum(),
        peak=0.01,
        epochs=range(1),
        context=make_context(build("plain")),
        pulls=[lambda _batch: 1000 * theirs.sum()],
        others=[theirs],
    )
    torch.testing.assert_close(ours.grad, torch.full((4,), 0.1))
    torch.testing.assert_close(theirs.grad, torch.full((4,), 0.5))


def test_two_students_take_twice_the_training() -> None:
    calls: list[int] = []

    def counted(output: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        return F.cross_entropy(output, target)

    context = make_context(build("plain"))
    counting = replace(context, loss=counted)
    distill(build("plain"), counting)
    alone = len(calls)
    distill(build("plain"), counting, peer="mutual")
    assert len(calls) == 3 * alone


def structure(net: nn.Module) -> tuple[Step, ...]:
    owners = Prune().groups(net, (images(),))
    return (
        Step("prune", {owner: {"sparsity": 0.5} for owner in owners}, {"align": 4}),
        Step("sparsify", {"head": {"sparsity": 0.5}}, {"ramp": 3}),
    )


@pytest.mark.parametrize("more", [{}, {"match": "relation", "match_weight": 1.0}, {"assistant": "half"}], ids=str)
@pytest.mark.parametrize("net", ["residual", "attention"])
def test_rounds_with_a_peer_go_on_to_the_last_bit(net: str, more: dict[str, Scalar], tmp_path: Path) -> None:
    model = build(net)
    methods: dict[str, Compressor] = {"prune": Prune(), "sparsify": Sparsify(), "distill": METHOD}

    def recovered(epochs: int, store: Cache | None, lines: Callable[[str], None]) -> nn.Module:
        context = replace(make_context(model), progress=lines)
        steps = (*structure(model), Step("distill", {}, {**MUTUAL, **more, "epochs": epochs}))
        return compress(model, CompressionPlan(Target("any", "fp32"), steps, 5), methods, context, store).model

    lines: list[str] = []
    recovered(2, Cache(tmp_path), lambda _line: None)
    resumed = recovered(4, Cache(tmp_path), lines.append)
    assert len(lines) == (2 if "assistant" not in more else 4)
    whole = recovered(4, None, lambda _line: None)
    assert same(resumed, whole)
    assert (whole.get_parameter("head.weight") == 0).float().mean() == pytest.approx(0.5, abs=0.01)


def test_an_unknown_peer_is_refused() -> None:
    with pytest.raises(Infeasible, match=r"^distill.peer is twin: expected one of none, mutual$"):
        distill(build("plain"), make_context(build("plain")), peer="twin")
    with pytest.raises(ConfigError, match=r"compressor.distill.parent: distill.peer is twin"):
        Distill(0.0, 0.1, 1.0, 8, 2, parent={**GOOD, "peer": "twin"})
