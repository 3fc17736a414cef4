"""Pictures with captions as four splits in memory; knows no model."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressors.errors import ConfigError
from search.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Rows,
    check_memory,
    fashion_mnist,
    picture_reader,
    stratified,
    varied,
)
from search.text import encoded, load_tokenizer
from search.workload import Split, Splits

TABLE = "captions.tsv"

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


def captions(
    folder: str,
    tokenizer: str,
    tokens: int = 32,
    truncate: bool = False,
    size: int = 160,
    resize: int = 184,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    train: int | None = None,
    calibration: int = 32,
    validation: int = 80,
    test: int = 100,
    memory_gb: float = 4.0,
    seed: int = 0,
) -> Splits:
    """A user's pictures `(n, 3, size, size)` with what is said of them, words and mask `(n, tokens)`.

    `captions.tsv` in the folder has a line for each: the picture's file, a tab, its caption, and whatever else behind
    another tab. Equal captions are one target. `tokenizer` is a folder or a name on the hub; longer captions are
    refused unless `truncate` cuts them. `train` None takes all that the other splits leave.
    """
    files, texts = _table(Path(folder).expanduser())
    check_memory(len(files), size, memory_gb, "data.size")
    words, mask = encoded(load_tokenizer(tokenizer, tokens), texts, tokens, truncate)
    left = len(files) - calibration - validation - test if train is None else train
    parts = stratified(np.zeros(len(files), dtype=np.int64), (test, validation, calibration, left), seed)
    different = {text: number for number, text in enumerate(sorted(set(texts)))}
    targets = torch.tensor([different[text] for text in texts])
    read = picture_reader(size, resize, mean, std)

    def split(rows: Rows) -> Split:
        return Split((torch.stack([read(files[row]) for row in rows]), words[rows], mask[rows]), targets[rows])

    for_test, for_validation, for_calibration, for_train = map(split, parts)
    moved = partial(varied, shift=size // 16, flip=True)
    return Splits(for_train, for_calibration, for_validation, for_test, augment=moved)


def _table(folder: Path) -> tuple[list[Path], list[str]]:
    remedy = "give every line a picture's file in this folder, a tab and a caption"
    try:
        lines = (folder / TABLE).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise ConfigError("data.folder", f"{folder / TABLE} cannot be read ({reason})", remedy) from error
    rows = [(number, line.split("\t")) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ConfigError("data.folder", f"{folder / TABLE} names no picture", remedy)
    for number, columns in rows:
        if len(columns) < 2 or not all(part.strip() for part in columns[:2]):
            raise ConfigError("data.folder", f"line {number} of {folder / TABLE} has no caption", remedy)
        if not (folder / columns[0]).is_file():
            raise ConfigError("data.folder", f"line {number} of {folder / TABLE} names no file there", remedy)
    return [folder / columns[0] for _, columns in rows], [columns[1].strip() for _, columns in rows]


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
