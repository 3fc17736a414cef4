"""Puts an attention of linear layers in the place of torch's packed one; what is done to them is for others."""

import copy
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

from compressors.channels import sharing

LOOKED_INSIDE = (AttributeError, TypeError, RuntimeError, ValueError, AssertionError, IndexError)
"""What a model raises that wants more of its attention than what it answers, such as the packed weight."""

UNHEARD = -1e4
"""Added to a score, it leaves a key without weight; minus infinity has no range that a quantizer could calibrate."""


class UnpackedAttention(nn.Module):
    """`nn.MultiheadAttention` (Vaswani 2017, arXiv 1706.03762) as four linear layers: the same call, the same answer.

    The number of heads is the layers' width over `head_dim`. `is_causal` is left to the mask beside it, of which it is
    no more than a hint. Nested tensors are not taken, and a query all of whose keys are masked hears them all.
    """

    # With a bias here, `nn.TransformerEncoderLayer` would hand packed weights to a fused kernel.
    in_proj_bias: ClassVar[None] = None

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        """With copies of the weights, which learn if those did."""
        super().__init__()
        self.head_dim, self.batch_first, self.dropout = packed.head_dim, packed.batch_first, packed.dropout
        together = packed.in_proj_weight
        apart = (packed.q_proj_weight, packed.k_proj_weight, packed.v_proj_weight)
        weights = apart if together is None else together.chunk(3)
        biases = (None,) * 3 if packed.in_proj_bias is None else packed.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = _linear(packed.out_proj.weight, packed.out_proj.bias)
        self.train(packed.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The answer, shaped as `query`, and the weights `(n, [heads,] queries, keys)` if they are wanted."""
        sequence_first = query.dim() == 3 and not self.batch_first
        projected = (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        q, k, v = (self._split(x.transpose(0, 1) if sequence_first else x) for x in projected)
        mask = _added(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            mixed = weights @ v
            weights = weights.mean(-3) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        mixed = mixed.transpose(-3, -2).flatten(-2)
        return self.out_proj(mixed.transpose(0, 1) if sequence_first else mixed), weights

    def extra_repr(self) -> str:
        """What tells it from one with other heads."""
        return f"head_dim={self.head_dim}, batch_first={self.batch_first}, dropout={self.dropout}"

    def _split(self, x: Tensor) -> Tensor:
        """`([n,] positions, width)` to `([n,] heads, positions, head_dim)`."""
        return x.reshape(*x.shape[:-1], -1, self.head_dim).transpose(-3, -2)


def unpacked(model: nn.Module, example: tuple[Tensor, ...]) -> nn.Module:
    """A copy with every `nn.MultiheadAttention` unpacked, if it answers the example as `model` does; else `model`.

    With biases or zeros added to its keys and values an attention stays as it is, and so does one that shares a
    parameter. Encoders of torch no longer turn padded batches into nested tensors.
    """
    shared = sharing(model)
    found = {
        name: m for name, m in model.named_modules(remove_duplicate=False) if _plain(m) and not _own(name) & shared
    }
    if not found:
        return model
    made = {module: UnpackedAttention(module) for module in found.values()}
    other = copy.deepcopy(model)
    for name, module in found.items():
        other.set_submodule(name, made[module])
    for encoder in other.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            encoder.use_nested_tensor = False
    return other if _alike(model, other, example) else model


def _plain(module: nn.Module) -> bool:
    return type(module) is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn


def _own(name: str) -> set[str]:
    """The modules that hold an attention's parameters."""
    return {name, f"{name}.out_proj"}


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            layer.register_parameter(name, nn.Parameter(tensor.detach().clone(), tensor.requires_grad))
    return layer


def _added(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """What is added to scores `([n,] heads, queries, keys)`; masks have the shapes that torch's attention takes."""
    if attn_mask is not None:
        attn_mask = _finite(attn_mask, q.dtype)
        if attn_mask.dim() == 3 and q.dim() == 4:
            attn_mask = attn_mask.reshape(q.shape[0], -1, *attn_mask.shape[1:])
    if key_padding_mask is not None:
        key_padding_mask = _finite(key_padding_mask, q.dtype)
        key_padding_mask = key_padding_mask[:, None, None] if q.dim() == 4 else key_padding_mask
    masks = [mask for mask in (attn_mask, key_padding_mask) if mask is not None]
    return sum(masks[1:], masks[0]) if masks else None


def _finite(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """True and minus infinity become `UNHEARD`; not by clamping, of which quantizers want the range of what goes in."""
    return mask.masked_fill(mask < UNHEARD, UNHEARD) if mask.is_floating_point() else UNHEARD * mask.to(dtype)


def _alike(model: nn.Module, other: nn.Module, example: tuple[Tensor, ...]) -> bool:
    with torch.no_grad():
        expected = model(*example)
        try:
            output = other(*example)
        except LOOKED_INSIDE:
            return False
    return torch.allclose(output, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
