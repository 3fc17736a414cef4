"""Masks that hold single weights at zero while a model trains; which weights of which layers, others decide."""

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Mask(nn.Module):
    """Passes a weight with zeros where it is not `kept`, a tensor of truths in the weight's shape.

    While it has not `passed` all of its `ramp` steps, it chooses anew on every call in training mode: by the `scores`,
    or by the weight's magnitude of the moment where there are none.
    """

    kept: Tensor
    passed: Tensor
    scores: Tensor | None

    def __init__(self, kept: Tensor, sparsity: float, group: int, ramp: int, scores: Tensor | None) -> None:
        super().__init__()
        self.sparsity, self.group, self.ramp = sparsity, group, ramp
        self.register_buffer("kept", torch.ones_like(kept) if ramp else kept)
        self.register_buffer("passed", torch.zeros((), dtype=torch.long))
        self.register_buffer("scores", scores if ramp else None)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as the layer uses it; its gradient is zero where the weight is."""
        if self.training and self.passed < self.ramp:
            self.passed += 1
            left = 1 - int(self.passed) / self.ramp
            self._choose(weight, self.sparsity * (1 - left**3))
        return torch.where(self.kept, weight, 0.0)

    def finish(self, weight: Tensor) -> None:
        """Go the rest of the way at once."""
        if self.passed < self.ramp:
            self.passed.fill_(self.ramp)
            self._choose(weight, self.sparsity)

    def _choose(self, weight: Tensor, sparsity: float) -> None:
        scores = weight.detach().abs() if self.scores is None else self.scores
        # Another tensor: a layer that was called before in this step still needs the last one.
        self.kept = strongest(scores, sparsity, self.group)


def strongest(scores: Tensor, sparsity: float, group: int) -> Tensor:
    """True where a weight stays: of the whole layer all but `sparsity`, or so much of every `group` inputs in a row.

    `scores` is `(out, in, ...)`, and so is what comes of it. Counts are rounded, but at least one weight stays; inputs
    that are left over when the width is no multiple of `group` stay too. Of equal scores the first go.
    """
    if group == 0:
        return _strongest(scores.reshape(-1), sparsity).reshape(scores.shape)
    inputs_last = scores.movedim(1, -1)
    count = inputs_last.shape[-1] // group
    kept = torch.ones_like(inputs_last, dtype=torch.bool)
    groups = inputs_last[..., : count * group].reshape(*inputs_last.shape[:-1], count, group)
    kept[..., : count * group] = _strongest(groups, sparsity).flatten(-2)
    return kept.movedim(-1, 1).contiguous()


def _strongest(rows: Tensor, sparsity: float) -> Tensor:
    """Along the last axis."""
    going = min(round(sparsity * rows.shape[-1]), rows.shape[-1] - 1)
    order = rows.argsort(dim=-1, stable=True)
    return torch.ones_like(rows, dtype=torch.bool).scatter(-1, order[..., :going], value=False)


def hold(model: nn.Module, layers: Iterable[str], mask: Mask) -> None:
    """Put the mask on the one weight that these layers hold."""
    for layer in layers:
        parametrize.register_parametrization(model.get_submodule(layer), "weight", mask)


def held(model: nn.Module, layer: str, weight: Tensor) -> Tensor:
    """The layer's weight with zeros where masks hold it now, without a step of any ramp."""
    for _, _, mask in _masks(model.get_submodule(layer)):
        weight = torch.where(mask.kept, weight, 0.0)
    return weight


def finish(model: nn.Module) -> None:
    """All masks go the rest of their way at once, before something is fitted to the weights that stay."""
    for _, weight, mask in _masks(model):
        mask.finish(weight.original)


def release(model: nn.Module) -> None:
    """What is held becomes zero for good."""
    finish(model)
    for module in dict.fromkeys(module for module, _, _ in _masks(model)):
        parametrize.remove_parametrizations(module, "weight")


def _masks(model: nn.Module) -> Iterator[tuple[nn.Module, parametrize.ParametrizationList, Mask]]:
    for module in [module for module in model.modules() if parametrize.is_parametrized(module, "weight")]:
        weight = cast(parametrize.ParametrizationList, module.get_submodule("parametrizations.weight"))
        yield from ((module, weight, mask) for mask in weight if isinstance(mask, Mask))
