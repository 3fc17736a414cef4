import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compressors.recovery import LEAST_MOMENTUM, distillation_loss, schedule, training
from tests.zoo import CLASSES


def logits(seed: int, rows: int = 6) -> Tensor:
    return torch.randn(rows, CLASSES, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)  # the first call of an operation is slow on a busy machine
@given(st.integers(0, 99), st.floats(0.5, 16))
def test_equal_logits_cost_nothing_and_others_something(seed: int, temperature: float) -> None:
    assert distillation_loss(logits(seed), logits(seed), temperature).item() == pytest.approx(0, abs=1e-5)
    assert distillation_loss(logits(seed), logits(seed + 1), temperature) > 0


@settings(deadline=None)  # the first call of an operation is slow on a busy machine
@given(st.integers(0, 99), st.floats(-50, 50), st.floats(1, 16))
def test_a_constant_added_to_all_classes_does_not_count(seed: int, shift: float, temperature: float) -> None:
    moved = distillation_loss(logits(seed) + shift, logits(seed + 1), temperature)
    torch.testing.assert_close(
        moved, distillation_loss(logits(seed), logits(seed + 1), temperature), rtol=1e-3, atol=1e-4
    )


@settings(deadline=None)  # the first call of an operation is slow on a busy machine
@given(st.integers(0, 99), st.floats(1, 16))
def test_scaling_logits_and_temperature_scales_by_the_square(seed: int, temperature: float) -> None:
    scaled = distillation_loss(temperature * logits(seed), temperature * logits(seed + 1), temperature)
    torch.testing.assert_close(scaled, temperature**2 * distillation_loss(logits(seed), logits(seed + 1), 1.0))


@settings(deadline=None)  # the first call of an operation is slow on a busy machine
@given(st.integers(0, 99), st.floats(1, 16))
def test_the_gradient_is_the_difference_of_the_softened_answers(seed: int, temperature: float) -> None:
    student, teacher = logits(seed).requires_grad_(True), logits(seed + 1)
    (gradient,) = torch.autograd.grad(distillation_loss(student, teacher, temperature), student)
    soft = torch.softmax(student / temperature, -1) - torch.softmax(teacher / temperature, -1)
    torch.testing.assert_close(gradient, temperature * soft / len(student))


def test_sequences_are_averaged_over_every_position() -> None:
    student, teacher = logits(0), logits(1)
    split = distillation_loss(student.reshape(2, 3, -1), teacher.reshape(2, 3, -1), 2.0)
    torch.testing.assert_close(split, distillation_loss(student, teacher, 2.0))


@pytest.mark.parametrize(("done", "share"), [(0.05, 0.5), (0.1, 1.0), (0.55, 0.5), (1.0, 0.0)])
def test_the_rate_rises_and_falls(done: float, share: float) -> None:
    assert schedule(done, 0.1) == pytest.approx(share)


def test_no_warmup_starts_at_the_peak() -> None:
    assert schedule(0.0, 0.0) == 1.0


def test_batch_norms_that_are_slow_to_follow_are_faster_while_they_learn() -> None:
    momenta = [0.01, 0.0, 0.3, None]
    norms = [nn.BatchNorm2d(3, momentum=momentum) for momentum in momenta]
    with training(nn.Sequential(*norms)):
        assert [norm.momentum for norm in norms] == [LEAST_MOMENTUM, 0.0, 0.3, None]
    assert [norm.momentum for norm in norms] == momenta


def test_a_few_steps_are_enough_for_the_statistics_of_a_slow_norm() -> None:
    norm = nn.BatchNorm1d(2, momentum=0.01)
    with training(norm):
        for _ in range(40):
            norm(torch.tensor([[4.0, 9.0], [6.0, 11.0]]))
    torch.testing.assert_close(norm.running_mean, torch.tensor([5.0, 10.0]), rtol=0.05, atol=0)
