"""A text file, sentence by sentence or in one piece, as four splits of token numbers in memory; knows no model."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import search.torchvision_compat  # noqa: F401  transformers imports torchvision
from compressors.errors import ConfigError, at_least
from search.data import Rows, stratified
from search.workload import Split, Splits


def sentences(
    file: str,
    tokenizer: str,
    tokens: int = 64,
    truncate: bool = False,
    train: int | None = None,
    calibration: int = 256,
    validation: int = 1000,
    test: int = 1000,
    seed: int = 0,
) -> Splits:
    """One sentence a line, perhaps a tab and a label behind it; as `(n, tokens)` numbers and a mask of the same shape.

    `tokenizer` is a folder or a name on the hub. Shorter sentences are filled up with the token for it, which the mask
    leaves out; longer ones are refused unless `truncate` cuts them. `train` None takes all that the other splits leave.
    """
    texts, labels = _read(Path(file).expanduser())
    words, mask = encoded(load_tokenizer(tokenizer, tokens), texts, tokens, truncate)
    classes = tuple(sorted(set(labels)))
    targets = np.array([classes.index(label) for label in labels] if classes else [0] * len(texts))
    left = len(texts) - calibration - validation - test if train is None else train
    parts = stratified(targets, (test, validation, calibration, left), seed)

    def split(rows: Rows) -> Split:
        return Split((words[rows], mask[rows]), torch.from_numpy(targets[rows]) if classes else None)

    for_test, for_validation, for_calibration, for_train = map(split, parts)
    return Splits(for_train, for_calibration, for_validation, for_test, classes=classes)


def text(
    file: str,
    tokenizer: str,
    tokens: int = 64,
    train: int | None = None,
    calibration: int = 64,
    validation: int = 200,
    test: int = 200,
) -> Splits:
    """A text cut into windows, one behind the other: words `(n, tokens)`, which are the targets too.

    Splits are stretches of the text, with the test split at its end, so that none has seen the other's sentences.
    `tokenizer` is a folder or a name on the hub. `train` None takes all windows before the other splits.
    """
    path = Path(file).expanduser()
    words = load_tokenizer(tokenizer, tokens, fills=False)(
        _content(path), add_special_tokens=False, verbose=False
    ).input_ids
    if tokens < 2:
        raise ConfigError(
            "data.tokens", f"is {tokens}", "give at least 2, as each word is foreseen from those before it"
        )
    windows = torch.tensor(words[: len(words) // tokens * tokens]).reshape(-1, tokens)
    others = (calibration, validation, test)
    left = len(windows) - sum(others) if train is None else train
    at_least(1, **{f"data.{name}": n for name, n in zip(("calibration", "validation", "test"), others, strict=True)})
    if left < 1 or left + sum(others) > len(windows):
        problem = f"{path} has {len(windows)} windows of {tokens} words, of which {sum(others)} are for other splits"
        raise ConfigError("data.train", problem, "give a longer text, or make windows or splits smaller")
    # The test split is the same whatever the others are.
    parts = torch.split(windows[len(windows) - left - sum(others) :], [left, *others])
    for_train, for_calibration, for_validation, for_test = (Split((part,), part) for part in parts)
    return Splits(for_train, for_calibration, for_validation, for_test)


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = f"{path} cannot be read ({error.strerror if isinstance(error, OSError) else 'it is no UTF-8'})"
        raise ConfigError("data.file", problem, "give a text file in UTF-8") from error


def _read(path: Path) -> tuple[list[str], list[str]]:
    """The sentences, and as many labels or none; empty lines are passed over."""
    # Not `splitlines`, which takes some characters inside of sentences for ends as well.
    lines = _content(path).split("\n")
    pairs = [(number, line.split("\t")) for number, line in enumerate(lines, 1) if line.strip()]
    if not pairs:
        raise ConfigError("data.file", f"{path} holds no sentence", "give a text file with one sentence a line")
    columns = Counter(len(parts) for _, parts in pairs).most_common(1)[0][0]
    for number, parts in pairs:
        if len(parts) != columns or columns > 2 or not all(part.strip() for part in parts):
            problem = f"line {number} of {path} has {len(parts)} columns"
            raise ConfigError(
                "data.file", problem, "give every line a sentence, or every line a sentence, tab and label"
            )
    return [parts[0] for _, parts in pairs], [parts[1].strip() for _, parts in pairs if columns == 2]


def load_tokenizer(source: str, tokens: int, fills: bool = True) -> Any:
    """Of a folder or a name on the hub, for texts of so many words; `fills` where shorter ones are to be filled up."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(Path(source).expanduser()), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        problem = f"{source} holds none that can be read ({' '.join(str(error).split()).partition('. ')[0][:160]})"
        raise ConfigError("data.tokenizer", problem, "give a folder with tokenizer.json and its config") from error
    if fills and tokenizer.pad_token_id is None:
        problem = f"{source} has no token to fill sentences up with"
        raise ConfigError("data.tokenizer", problem, "set pad_token in its tokenizer_config.json")
    if not 1 <= tokens <= tokenizer.model_max_length:
        problem = f"is {tokens}, and {source} is made for up to {tokenizer.model_max_length}"
        raise ConfigError("data.tokens", problem, "give a number from 1 to that")
    return tokenizer


def encoded(tokenizer: Any, texts: Sequence[str], tokens: int, truncate: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers and mask `(n, tokens)`; longer texts are refused unless `truncate` cuts them."""
    if not truncate:
        lengths = [len(words) for words in tokenizer(list(texts), verbose=False).input_ids]
        longest = max(lengths)
        if longest > tokens:
            problem = f"is {tokens}, and {sum(n > tokens for n in lengths)} of {len(texts)} texts have up to {longest}"
            raise ConfigError("data.tokens", problem, "raise it, or cut them with data.truncate=true")
    encoded = tokenizer(list(texts), padding="max_length", truncation=True, max_length=tokens, return_tensors="pt")
    return encoded.input_ids, encoded.attention_mask
