"""Pictures with captions as four splits in memory; knows no model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compressors.errors import ConfigError
from search.data import fashion_mnist
from search.workload import Split, Splits

TEMPLATES = (
    "{}",
    "a {}",
    "a picture of a {}",
    "a grey picture of one {}",
    "a small picture which shows a {}",
    "this is a {}",
    "here you see a {} on black ground",
    "one {} from a shop for clothes",
)
NOUNS = (  # for the classes of Fashion-MNIST, in their order
    ("t-shirt", "top", "short sleeved shirt"),
    ("trouser", "pair of trousers", "pair of long pants"),
    ("pullover", "sweater", "jumper"),
    ("dress", "gown", "long dress for women"),
    ("coat", "warm coat", "jacket with buttons"),
    ("sandal", "open shoe", "shoe for the beach"),
    ("shirt", "shirt with a collar", "blouse"),
    ("sneaker", "sports shoe", "flat shoe with laces"),
    ("bag", "handbag", "bag with a handle"),
    ("boot", "ankle boot", "high shoe"),
)
PAD, END = 0, 1
"""Words are numbered from 2; every caption ends with `END`."""


def fashion_captions(tokens: int = 12, seed: int = 0, **fashion: Any) -> Splits:
    """Fashion-MNIST with a drawn caption for each picture: `(n, 1, size, size)`, and words and mask `(n, tokens)`.

    There are 24 captions for a class, which is the target. Words are whole, numbered in the order of the alphabet.
    """
    pictures = fashion_mnist(seed=seed, **fashion)
    table = [template.format(noun).split() for nouns in NOUNS for noun in nouns for template in TEMPLATES]
    words = _encoded(table, tokens).view(len(NOUNS), -1, tokens)
    generator = torch.Generator().manual_seed(seed)

    def captioned(split: Split) -> Split:
        assert split.targets is not None  # noqa: S101  Fashion-MNIST is labelled
        drawn = words[split.targets, torch.randint(words.shape[1], split.targets.shape, generator=generator)]
        return Split((*split.inputs, drawn, (drawn != PAD).long()), split.targets)

    train, calibration, validation, test = map(captioned, pictures.named().values())
    # Without classes, because outputs are not numbered by them.
    return Splits(train, calibration, validation, test, augment=pictures.augment)


def _encoded(captions: Sequence[Sequence[str]], tokens: int) -> Tensor:
    longest = max(map(len, captions)) + 1
    if tokens < longest:
        raise ConfigError("data.tokens", f"is {tokens}, and captions have up to {longest}", "raise it to that")
    vocabulary = sorted({word for caption in captions for word in caption})
    numbers = {word: number for number, word in enumerate(vocabulary, END + 1)}
    rows = torch.full((len(captions), tokens), PAD)
    for row, caption in zip(rows, captions, strict=True):
        row[: len(caption) + 1] = torch.tensor([*(numbers[word] for word in caption), END])
    return rows
