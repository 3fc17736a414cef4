"""A teacher that remembers gives the answers of the model, computes each once, and keeps to its limit."""

import torch
from torch import Tensor, nn

from compressors.teacher import Remembered


class Counted(nn.Module):
    """Counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        result: Tensor = self.linear(x)
        return result


def batch(seed: int, rows: int = 8) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


def test_equal_inputs_are_answered_once() -> None:
    model = Counted().eval()
    teacher = Remembered(model)
    first, again, other = teacher(batch(0)), teacher(batch(0).clone()), teacher(batch(1))
    assert model.calls == 2
    assert torch.equal(first, again)
    assert torch.equal(first, model(batch(0)))
    assert torch.equal(other, model(batch(1)))
    assert not first.requires_grad


def test_shape_and_precision_make_a_difference() -> None:
    model = Counted().eval()
    teacher = Remembered(model)
    teacher(batch(0))
    with torch.autocast("cpu", torch.bfloat16):
        half = teacher(batch(0))
    assert half.dtype == torch.bfloat16
    assert teacher(batch(0)).dtype == torch.float32
    assert model.calls == 2


def test_the_least_recently_used_answer_goes_first() -> None:
    model = Counted().eval()
    teacher = Remembered(model, limit=2 * 8 * 3 * 4)
    for seed in (0, 1, 0, 2):
        teacher(batch(seed))
    assert model.calls == 3
    teacher(batch(0))
    assert model.calls == 3, "used since, so it stayed"
    teacher(batch(1))
    assert model.calls == 4
