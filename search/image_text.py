"""Networks with a tower for pictures and a tower for captions, and what such pairs are taught; reads no data."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

from compressors.recovery import distillation_loss, embedding_loss
from search.workload import Task

TEMPERATURE = 0.07
"""What cosines are divided by before they pass for logits (Radford 2021, arXiv 2103.00020, where learning begins)."""


class TwoTowers(nn.Module):
    """What a picture shows and what a caption says as directions of one space; each tower can be deployed for both.

    The layers of the towers are named `vision.*` and `text.*`, and no layer belongs to both.
    """

    def __init__(self, vision: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.vision, self.text = vision, text

    def forward(self, images: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """`(n, channels, height, width)` and twice `(n, tokens)` to `(n, 2, width)`: picture, caption, of length 1."""
        pairs = torch.stack((self.vision(images), self.text(words, mask)), dim=1)
        return F.normalize(pairs, dim=-1)


class PooledTower(nn.Module):
    """One half of CLIP: an encoder's pooled state, projected into the common space."""

    def __init__(self, body: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.body, self.projection = body, projection

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pictures, or token numbers with a mask, to `(n, width)`."""
        pooled = self.body(inputs) if mask is None else self.body(inputs, attention_mask=mask)
        return self.projection(pooled.pooler_output)  # type: ignore[no-any-return]


class ProjectedText(nn.Module):
    """A sentence encoder and a linear layer into the common space."""

    def __init__(self, encoder: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.encoder, self.projection = encoder, projection

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        """Twice `(n, tokens)` to `(n, width)`."""
        return self.projection(self.encoder(words, mask))  # type: ignore[no-any-return]


def image_text() -> Task:
    """Outputs are pairs as `TwoTowers` gives them; equal targets mean the same, so that each caption fits each picture.

    Where losses are predicted they pass for logits, as `embedding` says. Both losses compare an example with all others
    of its batch, and larger batches make them harder.
    """
    return Task("image_text", contrastive_loss, relation_loss)


def contrastive_loss(pairs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of finding the caption for the picture, and the other way round, among those of the batch.

    Where several are right they share the odds (Yang 2022, arXiv 2204.03610); else it is CLIP's loss (Radford 2021).
    """
    logits = _logits(pairs)
    right = (targets[:, None] == targets).to(logits.dtype)
    odds = right / right.sum(1, keepdim=True)
    return (F.cross_entropy(logits, odds) + F.cross_entropy(logits.T, odds)) / 2


def relation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """How far the batch's similarities, row by row both ways, and the embeddings are from the teacher's.

    The former is TinyCLIP's affinity mimicking (Wu 2023, arXiv 2309.12314); alone it would leave both towers free to
    turn together, and what embeddings were stored before could no longer be searched.
    """
    wanted, got = _logits(teacher), _logits(student)
    relations = distillation_loss(got, wanted, temperature) + distillation_loss(got.T, wanted.T, temperature)
    return relations / 2 + embedding_loss(student, teacher, temperature)


def _logits(pairs: Tensor) -> Tensor:
    pictures, captions = pairs.unbind(1)
    return pictures @ captions.T / TEMPERATURE
