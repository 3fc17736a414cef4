"""Which layers can be replaced, what stands for them afterwards, and what is known of their inputs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from compressors.replace import (
    InPlaceOf,
    directions,
    input_moments,
    layer_like,
    one_thread,
    put,
    sites,
    stands_for,
    svd,
)
from tests.zoo import build, images


class Alias(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 5)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.stem(x))).mean((2, 3)))  # type: ignore[no-any-return]


class Curious(nn.Module):
    """Looks at the weight of one of its layers, calls another one by keyword, and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.named, self.idle = nn.Linear(432, 16), nn.Linear(16, 5), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.seen(x.flatten(1).to(self.seen.weight.dtype))
        return self.named(input=x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: build("residual"), ["stem.0", "block.a.0", "block.b.0", "down.0", "shortcut", "head"]),
        (lambda: build("depthwise"), ["stem.0", "point.0", "head"]),
        (lambda: build("tied"), ["flat", "head"]),
        (lambda: build("reused"), ["stem.0", "twice.0", "head"]),
        (Alias, ["stem", "head"]),
        (Curious, ["named"]),
        (lambda: nn.Sequential(nn.Flatten(), nn.Embedding(3, 4)), []),
    ],
)
def test_what_can_be_replaced(make: Callable[[], nn.Module], expected: list[str]) -> None:
    model = make().eval()
    given = torch.zeros(2, 3).long() if isinstance(model, nn.Sequential) else images()
    assert list(sites(model, (given,))) == expected
    assert not any(module._forward_hooks for module in model.modules())


def test_the_whole_model_has_no_place_to_put_something() -> None:
    assert not sites(nn.Linear(4, 3), (torch.zeros(2, 4),))


def test_positions_are_counted_where_a_layer_reads_and_where_it_writes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Flatten(2), nn.Linear(25, 4))
    found = sites(model, (images(2),))
    assert (found["0"].read, found["0"].written) == (2 * 144, 2 * 25)
    assert (found["2"].read, found["2"].written) == (2 * 8, 2 * 8)
    assert sites(build("reused"), (images(2),))["twice.0"].read == 2 * 2 * 144


def test_what_was_put_in_a_place_stands_for_the_layer() -> None:
    model = build("residual").requires_grad_(False)
    conv = model.get_submodule("block.a.0")
    expected = model(images())
    put(model, "block.a.0", [conv, nn.Sequential(nn.Identity())])
    assert torch.equal(model(images()), expected)
    assert isinstance(model.get_submodule("block.a.0"), InPlaceOf)
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    for name in ("block.a.0", "block.a.0.0", "block.a.0.1.0"):
        assert stands_for(model, name) == "block.a.0"
    assert stands_for(model, "block.b.0") == "block.b.0"
    assert "block.a.0.0" not in sites(model, (images(),)), "a layer is replaced once"


@pytest.mark.parametrize(
    "old",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, padding_mode="reflect"),
        nn.Conv2d(4, 6, (1, 5), padding="same", bias=False),
        nn.Conv1d(4, 6, 3, stride=2),
        nn.Linear(4, 6),
    ],
)
def test_a_layer_is_made_like_another_one(old: nn.Module) -> None:
    weight = old.get_parameter("weight").detach()
    made = layer_like(old, weight.reshape(6, 4, -1).double(), old._parameters["bias"], spatial=True)
    x = torch.randn({2: (3, 4), 3: (3, 4, 9), 4: (3, 4, 9, 9)}[weight.dim()])
    torch.testing.assert_close(made(x), old(x))
    point = layer_like(old, torch.ones(2, 4, 1))
    assert point(x).shape[2:] == x.shape[2:] if weight.dim() > 2 else point(x).shape == (3, 2)


def test_vectors_have_one_sign_only() -> None:
    matrix = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    left, values, right = svd(matrix)
    torch.testing.assert_close((left * values[:, None]) @ right, matrix.double())
    largest = left.gather(1, left.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
    for got, again in zip(svd(-matrix), (left, values, -right), strict=True):
        torch.testing.assert_close(got, again)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_directions_are_the_left_singular_vectors(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(directions(matrix), svd(matrix)[0], rtol=0, atol=1e-6)


def test_moments_are_those_of_all_positions_that_a_layer_reads() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(2), nn.Linear(144, 2))
    first, second = images(4, 1), images(2, 2)
    found = input_moments(model, ["0", "2"], [(first,), (second,)])
    pixels = torch.cat([first, second]).movedim(1, -1).reshape(-1, 3).double()
    torch.testing.assert_close(found["0"], pixels.T @ pixels / len(pixels))
    tokens = model[0](torch.cat([first, second])).flatten(2)
    rows = tokens.reshape(-1, 144).detach().double()
    torch.testing.assert_close(found["2"], rows.T @ rows / len(rows))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_inside_there_is_one_thread_and_afterwards_as_many_as_before() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
