"""Gives a student another one to learn with; only the first of the two is kept, and nothing here trains them."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compressors.layers import hooked
from compressors.pipeline import Batch
from compressors.plan import digest
from compressors.recovery import Goal, training

NOISE = 0.1
"""How far a peer's weights are moved away, as a share of their root mean square; more costs more than it tells."""


def peer_of(student: nn.Module, seed: int) -> nn.Module:
    """A copy with noise on every weight matrix and filter: it knows about as much, and errs elsewhere.

    Vectors stay: norms and biases have too few numbers to average noise out. Nothing else is drawn by chance, so that
    the peer is a function of the student and the seed.
    """
    peer = copy.deepcopy(student)
    generator = torch.Generator().manual_seed(int(digest([seed, "peer"]), 16))
    with torch.no_grad():
        for weight in (p for p in peer.parameters() if p.dim() > 1):
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(noise, alpha=NOISE * float(weight.square().mean().sqrt()))
    return peer


@contextmanager
def learning_together(student: nn.Module, peer: nn.Module, goal: Goal) -> Iterator[Callable[[Batch], Tensor]]:
    """Deep mutual learning (Zhang 2017, arXiv 1706.00384): both learn for `goal`, and each from the other's answers.

    Gives what is minimised beside the student's own loss, once that was computed for the same batch: the peer's loss,
    and the divergence of each from the other, at the goal's temperature, where the paper has 1.
    """
    with training(peer), _answers(student) as ours, _answers(peer) as theirs:

        def pull(batch: Batch) -> Tensor:
            own = goal.loss(peer, batch)
            mine, other = ours[-1].float(), theirs[-1].float()
            learned = goal.imitation(mine, other.detach(), goal.temperature)
            taught = goal.imitation(other, mine.detach(), goal.temperature)
            return own + learned + taught

        yield pull


@contextmanager
def _answers(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list with what the latest call of the model gave."""
    latest: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        latest[:] = [output]

    with hooked([model.register_forward_hook(keep)]):
        yield latest
