"""A small CLIP of two layers a tower, and pictures whose captions say what they show."""

import torch
from torch import Tensor, nn

import search.torchvision_compat  # noqa: F401  transformers imports torchvision
from search.pretrained import clip
from search.workload import Split, Splits

TOKENS, END = 6, 1
LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
VISION = {**LAYERS, "image_size": 8, "patch_size": 4, "num_channels": 1}
TEXT = {
    **LAYERS,
    "vocab_size": 12,
    "max_position_embeddings": TOKENS,
    "bos_token_id": END,
    "eos_token_id": END,
    "pad_token_id": 0,
}
CONFIG = {"model_type": "clip", "projection_dim": 8, "vision_config": VISION, "text_config": TEXT}


def small_clip() -> nn.Module:
    """With random weights, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return clip(config=CONFIG).eval().requires_grad_(False)


def captioned(count: int, seed: int) -> Split:
    """One of four corners is bright, and the caption names it among other words."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(4, (count,), generator=generator)
    images = torch.randn(count, 1, 8, 8, generator=generator)
    corners = images.view(count, 1, 2, 4, 2, 4)
    corners[torch.arange(count), 0, targets // 2, :, targets % 2] += 3
    return Split((images, *_captions(targets, generator)), targets)


def splits(train: int = 512) -> Splits:
    """Of pictures that are all different."""
    return Splits(captioned(train, 0), captioned(64, 1), captioned(64, 2), captioned(64, 3))


def _captions(targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    words = torch.randint(6, 12, (len(targets), TOKENS), generator=generator)
    words[:, 1] = targets + 2
    words[:, 3:] = torch.tensor([END, 0, 0])
    return words, (words != 0).long()
