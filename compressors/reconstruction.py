"""Lets the inputs that a layer keeps stand in for those it is about to lose; it neither chooses nor removes any."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from compressors.inputs import layer_inputs
from compressors.pipeline import Context

DAMPING = 0.03
"""Added to the diagonal of the second moments of what stays, as a share of its mean."""
WIDEST = 4096
"""Channels up to which a layer is reconstructed: the time that takes grows with their cube."""


@torch.no_grad()
def reconstruct(model: nn.Module, lost: Mapping[str, Collection[int]], context: Context, seed: int) -> None:
    """Give linear layers and convolutions weights with which little is missed once `lost` input channels are gone.

    Each lost channel is foreseen from those that stay, by least squares on calibration data (as in He 2017, arXiv
    1707.06168, there for the weights of every tap by itself); its weights then go to them. Where the layer has a bias,
    it takes what is always there. What goes changes nothing any more, and should be removed next.
    """
    narrow = {layer: (layer,) for layer, channels in lost.items() if channels and _width(model, layer) <= WIDEST}
    for layer, rows in layer_inputs(model, narrow, context.calibration, seed):
        module = model.get_submodule(layer)
        weight, bias = module.get_parameter("weight"), module._parameters.get("bias")
        taps = weight[0, 0].numel()
        seen = rows.reshape(len(rows), -1, taps).transpose(1, 2).flatten(0, 1)
        gone = torch.zeros(weight.shape[1], dtype=torch.bool)
        gone[list(lost[layer])] = True
        weights = _weights(rows.flatten(1) @ weight.flatten(1).T).repeat_interleave(taps) / taps
        mean = weights @ seen if bias is not None else torch.zeros(len(gone))
        share = _foreseen((seen - mean) * weights.sqrt()[:, None], gone).to(weight.dtype)
        if bias is not None:
            bias.data += weight[:, gone].reshape(len(weight), -1, taps).sum(2) @ (mean[gone] - share.T @ mean[~gone])
        weight[:, ~gone] += torch.einsum("og...,kg->ok...", weight[:, gone], share)
        weight[:, gone] = 0


def _width(model: nn.Module, layer: str) -> int:
    return model.get_submodule(layer).get_parameter("weight").shape[1]


def _weights(outputs: Tensor) -> Tensor:
    """What each row counts for, together 1, given what the layer makes of them `(n, out)`: its error is relative to it.

    In transformers a few words have enormous values. Foreseeing those a little better would cost all other words much.
    """
    energy = outputs.square().sum(1)
    weights = 1 / (energy + energy.median()).clamp_min(torch.finfo(torch.float32).tiny)
    return weights / weights.sum()


def _foreseen(seen: Tensor, gone: Tensor) -> Tensor:
    """How much of each kept channel there is in each lost one, `(kept, lost)`, given rows `(n, channels)`."""
    moments = (seen.T @ seen).double()
    inner = moments[~gone][:, ~gone]
    damping = DAMPING * inner.diagonal().mean()
    # Where nothing was ever said, nothing is foreseen.
    inner += torch.where(damping > 0, damping, 1.0) * torch.eye(len(inner), dtype=torch.float64)
    found: Tensor = torch.linalg.solve(inner, moments[~gone][:, gone])
    return found
