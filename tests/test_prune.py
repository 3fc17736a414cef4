from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

from compressors.errors import Infeasible
from compressors.pipeline import Context
from compressors.plan import Scalar, Settings, Step
from compressors.prune import Prune, kept_channels
from tests.context import make_context
from tests.zoo import CLASSES, NETS, build, images

GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "plain": {"a.0": ("a.0",), "b.0": ("b.0",)},
    "residual": {"stem.0": ("stem.0", "block.b.0"), "block.a.0": ("block.a.0",), "down.0": ("down.0", "shortcut")},
    "concat": {"a.0": ("a.0",), "b.0": ("b.0",), "c.0": ("c.0",)},
    "depthwise": {"stem.0": ("stem.0", "depth.0"), "point.0": ("point.0",)},
    "tied": {},
    "reused": {"stem.0": ("stem.0", "twice.0")},
    "attention": {"up": ("up",)},
    "heads": {"up": ("up",)},
}
every_net = pytest.mark.parametrize("net", NETS)


def prune(
    model: nn.Module,
    sparsity: float | Mapping[str, float],
    align: int = 1,
    seed: int = 0,
    context: Context | None = None,
    **shared: Scalar,
) -> Mapping[str, Settings]:
    owners = Prune().groups(model, (images(),))
    shares = sparsity if isinstance(sparsity, Mapping) else dict.fromkeys(owners, sparsity)
    step = Step("prune", {owner: {"sparsity": share} for owner, share in shares.items()}, {"align": align, **shared})
    return Prune().apply(model, step, context or make_context(model), seed).achieved


def silence(model: nn.Module, layer: str, channels: Tensor) -> None:
    """Make channels exactly zero where they are born; in the zoo the norm of `x.0` is `x.1`."""
    makers = [model.get_submodule(layer)]
    if layer.endswith(".0"):
        makers.append(model.get_submodule(layer.removesuffix("0") + "1"))
    with torch.no_grad():
        for parameter in (p for maker in makers for p in maker.parameters()):
            parameter[channels] = 0


@every_net
def test_groups_are_those_that_can_be_cut(net: str) -> None:
    groups = Prune().groups(build(net), (images(),))
    assert dict(groups) == GROUPS[net]
    assert list(groups) == list(GROUPS[net]), "owners come in model order"


@every_net
def test_cutting_silent_channels_changes_nothing(net: str) -> None:
    model = build(net)
    widths = {owner: len(model.get_parameter(f"{owner}.weight")) for owner in GROUPS[net]}
    for owner, members in GROUPS[net].items():
        silent = torch.randperm(widths[owner], generator=torch.Generator().manual_seed(1))[: widths[owner] // 4]
        for member in members:
            silence(model, member, silent)
    expected = model(images(4))
    prune(model, 0.25)
    torch.testing.assert_close(model(images(4)), expected, rtol=1e-4, atol=1e-5)
    for owner, width in widths.items():
        assert len(model.get_parameter(f"{owner}.weight")) == width * 3 // 4


@every_net
def test_parameters_never_grow_with_sparsity(net: str) -> None:
    sizes = []
    for sparsity in (0.0, 0.25, 0.5, 0.625, 0.75):
        model = build(net)
        prune(model, sparsity, align=2)
        sizes.append(sum(p.numel() for p in model.parameters()))
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == (5 if GROUPS[net] else 1)


@every_net
def test_no_sparsity_leaves_the_model_bit_equal(net: str) -> None:
    model = build(net)
    expected = model(images())
    prune(model, 0.0, align=16)
    assert torch.equal(model(images()), expected)


def test_layers_that_are_added_keep_one_width() -> None:
    model = build("residual")
    prune(model, {"stem.0": 0.5})
    for name in ("stem.0", "block.b.0"):
        assert len(model.get_parameter(f"{name}.weight")) == 8
    for name in ("block.a.0", "down.0", "shortcut"):
        assert model.get_parameter(f"{name}.weight").shape[1] == 8
    assert len(model.get_parameter("block.a.0.weight")) == 16


def test_a_depthwise_layer_follows_its_producer() -> None:
    model = build("depthwise")
    prune(model, {"stem.0": 0.5})
    depth = model.get_submodule("depth.0")
    assert isinstance(depth, nn.Conv2d)
    assert (depth.groups, depth.in_channels, depth.out_channels) == (8, 8, 8)


def test_a_reader_of_a_concatenation_loses_the_right_columns() -> None:
    model = build("concat")
    with torch.no_grad():
        for name, gone in (("a", range(4)), ("b", range(8, 16))):
            model.get_parameter(f"{name}.0.weight")[list(gone)] *= 1e-3
            model.get_parameter(f"{name}.1.weight")[list(gone)] *= 1e-3
    columns = model.get_parameter("c.0.weight")[:, [*range(4, 16), *range(16, 24)]]
    prune(model, {"a.0": 0.25, "b.0": 0.5})
    assert torch.equal(model.get_parameter("c.0.weight"), columns)


def test_ties_go_by_index() -> None:
    model = build("plain")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
        model.get_parameter("a.1.bias").copy_(torch.arange(16.0))
    prune(model, {"a.0": 0.25})
    assert model.get_parameter("a.1.bias").tolist() == list(range(4, 16))


def test_achieved_is_what_is_left_after_rounding() -> None:
    achieved = prune(build("plain"), {"a.0": 0.6, "b.0": 0.6}, align=8)
    assert achieved == {"a.0": {"sparsity": 0.5, "channels": 8}, "b.0": {"sparsity": 0.5, "channels": 16}}


def test_parameters_learn_only_if_they_did_before() -> None:
    model = build("plain").requires_grad_(False)
    model.get_parameter("head.bias").requires_grad_(True)
    prune(model, 0.5)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.bias"]


@pytest.mark.parametrize(
    ("width", "sparsity", "align", "kept"),
    [
        (64, 0.0, 16, 64),
        (20, 0.0, 16, 20),
        (64, 0.5, 16, 32),
        (64, 0.625, 16, 32),
        (64, 0.625, 8, 24),
        (16, 0.75, 8, 8),
        (16, 0.99, 1, 1),
        (12, 0.5, 16, 12),
        (20, 0.1, 16, 16),
    ],
)
def test_widths_are_rounded(width: int, sparsity: float, align: int, kept: int) -> None:
    assert kept_channels(width, sparsity, align) == kept


@settings(deadline=None)  # the first call of an operation is slow on a busy machine
@given(st.integers(1, 512), st.floats(0, 0.999), st.floats(0, 0.999), st.sampled_from([1, 4, 8, 16]))
def test_more_sparsity_never_keeps_more(width: int, a: float, b: float, align: int) -> None:
    mild, strong = (kept_channels(width, sparsity, align) for sparsity in sorted((a, b)))
    assert 1 <= strong <= mild <= width
    assert strong == width or strong % align == 0


@pytest.mark.parametrize(
    ("settings", "shared", "reason"),
    [
        ({"a.0": {"sparsity": 1.0}}, {"align": 4}, r"sparsity of a\.0 is 1\.0"),
        ({"a.0": {"sparsity": -0.1}}, {"align": 4}, r"sparsity of a\.0 is -0\.1"),
        ({"a.0": {"sparsity": "half"}}, {"align": 4}, r"sparsity of a\.0 is half"),
        ({"a.0": {"sparsity": float("nan")}}, {"align": 4}, r"sparsity of a\.0 is nan"),
        ({"a.0": {"sparsity": 0.5}}, {"align": 0}, r"align is 0"),
        ({"a.0": {"sparsity": 0.5}}, {"criterion": "L2"}, r"criterion is L2: expected one of l2, l1, bn_scale, taylor"),
        ({"a.0": {"sparsity": 0.5}}, {"allocation": 2}, r"allocation is 2: expected one of per_group, global"),
        ({"head": {"sparsity": 0.5}}, {"align": 4}, r"sparsity of head must be 0"),
        ({"other": {"sparsity": 0.5}}, {"align": 4}, r"no group other: possible are .*a\.0"),
    ],
)
def test_what_cannot_be_done_is_infeasible(settings: Mapping[str, Settings], shared: Settings, reason: str) -> None:
    model = build("plain")
    with pytest.raises(Infeasible, match=reason):
        Prune().apply(model, Step("prune", settings, shared), make_context(model), 0)


class Normed(nn.Module):
    """A norm over the channels mixes them all; so does a grouped convolution."""

    def __init__(self, norm: nn.Module, groups: int) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 16, 3, padding=1), norm
        self.b, self.head = nn.Conv2d(16, 16, 3, padding=1, groups=groups), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(self.norm(self.a(x))))).mean((2, 3)))  # type: ignore[no-any-return]


class Gated(nn.Module):
    """Half of the channels open and close the other half."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 32, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.glu(self.a(x), 1))).mean((2, 3)))  # type: ignore[no-any-return]


class Folded(nn.Module):
    """The width of one layer is written into the code; the model ends in a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 12), nn.Linear(16, 16), nn.Conv1d(4, CLASSES, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(F.relu(self.a(x)).flatten(1))
        return self.head(x.view(-1, 4, 4)).flatten(1)  # type: ignore[no-any-return]


class Excited(nn.Module):
    """A gate computed from all channels scales each of them (squeeze and excitation)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.down, self.up = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        gate = self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()
        return self.head((x * gate).mean((2, 3)))  # type: ignore[no-any-return]


class Shuffled(nn.Module):
    """Reshapes that the tracer cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x.view(len(x), 2, 8, *x.shape[2:]).transpose(1, 2).reshape(x.shape)
        return self.head(F.relu(self.b(x)).mean((2, 3)))  # type: ignore[no-any-return]


class Alias(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, CLASSES)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(F.relu(self.stem(x))))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "owners"),
    [
        (lambda: Normed(nn.GroupNorm(4, 16), 1), {"b"}),
        (lambda: Normed(nn.InstanceNorm2d(16), 4), set()),
        (lambda: Normed(nn.BatchNorm2d(16), 1), {"a", "b"}),
        (Gated, {"b"}),
        (Folded, {"a"}),
        (Excited, {"a", "down"}),
        (Alias, {"stem"}),
        (Shuffled, {"b"}),
    ],
)
def test_what_cannot_go_alone_stays_whole(make: Callable[[], nn.Module], owners: set[str]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    assert set(Prune().groups(model, (images(),))) == owners
    shape = model(images()).shape
    prune(model, 0.5)
    assert model(images()).shape == shape
