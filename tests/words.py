"""A BERT of two layers with a tokenizer of fifty words, as folders that a user of transformers would have."""

from pathlib import Path
from typing import Any

import torch

import search.torchvision_compat  # noqa: F401  transformers imports torchvision

WORDS = tuple(f"word{i}" for i in range(47))
SPECIAL = ("[PAD]", "[CLS]", "[UNK]")
CONTEXT = 16
CONFIG = {
    "model_type": "bert",
    "vocab_size": len(WORDS) + len(SPECIAL),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": CONTEXT,
    # So large that without training one sentence differs from another.
    "initializer_range": 0.3,
}


def save_tokenizer(folder: Path, pad: str | None = SPECIAL[0]) -> None:
    """Words apart from each other, behind a token that every sentence begins with."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    numbers = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))  # noqa: S106  no password
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", 1)])
    options: dict[str, Any] = {"pad_token": pad} if pad else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT, **options).save_pretrained(folder)


def save_bert(folder: Path, kind: str = "BertModel", **settings: Any) -> None:
    """The network's weights as safetensors, with its tokenizer beside them."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.BertConfig(**{**CONFIG, **settings})
        getattr(transformers, kind)(config).save_pretrained(folder)
    save_tokenizer(folder)


def sentence(number: int) -> str:
    """Of two to eight words, another one for each number."""
    generator = torch.Generator().manual_seed(number)
    count = int(torch.randint(2, 9, (1,), generator=generator))
    return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (count,), generator=generator).tolist())
