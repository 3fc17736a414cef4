"""A small language model that counts on, and texts in which every word follows from the two before it."""

from typing import Any

import torch
from torch import Tensor, nn

import search.torchvision_compat  # noqa: F401  transformers imports torchvision
from search.language import CausalLM
from search.pretrained import causal_lm
from search.workload import Split, Splits

VOCABULARY, TOKENS = 32, 12
GPT: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": VOCABULARY,
    "n_positions": 32,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "tie_word_embeddings": True,
}
FAMILIES = {"gpt2": GPT, "llama": LLAMA}


def small_lm(family: str = "gpt2", **options: Any) -> CausalLM:
    """With random weights, always the same, and large enough to tell words apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = causal_lm(config=FAMILIES[family], **options).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
        return model  # type: ignore[no-any-return]


def texts(count: int, seed: int) -> Tensor:
    """Words `(count, TOKENS)`: each is the sum of the two before it."""
    words = torch.randint(VOCABULARY, (count, TOKENS), generator=torch.Generator().manual_seed(seed))
    for place in range(2, TOKENS):
        words[:, place] = (words[:, place - 1] + words[:, place - 2]) % VOCABULARY
    return words


def split(count: int, seed: int) -> Split:
    """The words are their own targets."""
    words = texts(count, seed)
    return Split((words,), words)


def splits(train: int = 512) -> Splits:
    """Of texts that are all different."""
    return Splits(split(train, 0), split(64, 1), split(64, 2), split(64, 3))
