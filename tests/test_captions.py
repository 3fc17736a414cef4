"""Captions fit their pictures' classes, become words and masks, and are the same for the same seed."""

from pathlib import Path

import pytest
import torch

from compressors.errors import ConfigError
from search.captions import END, NOUNS, PAD, TEMPLATES, fashion_captions
from search.data import FASHION_CLASSES, fashion_mnist
from search.workload import Splits, checked
from tests.test_data import write_fashion


def captions(folder: Path, tokens: int = 12, seed: int = 0) -> Splits:
    made = fashion_captions(tokens, seed, folder=str(folder), calibration=20, validation=30)
    return checked(made, "data")


def test_there_are_different_captions_for_every_class() -> None:
    assert len(NOUNS) == len(FASHION_CLASSES)
    assert all(name in nouns[0] for name, nouns in zip(FASHION_CLASSES, NOUNS, strict=True))
    written = {template.format(noun) for nouns in NOUNS for noun in nouns for template in TEMPLATES}
    assert len(written) == 24 * len(NOUNS)


def test_a_caption_says_what_its_picture_shows(tmp_path: Path) -> None:
    """No caption belongs to two classes, pictures stay as they were, and the end is marked."""
    write_fashion(tmp_path)
    splits, pictures = captions(tmp_path), fashion_mnist(str(tmp_path), calibration=20, validation=30)
    assert splits.classes == ()
    said: dict[tuple[int, ...], int] = {}
    for name, split in splits.named().items():
        images, words, mask = split.inputs
        assert torch.equal(images, pictures.named()[name].inputs[0])
        assert split.targets is not None
        for row, kept, target in zip(words.tolist(), mask.tolist(), split.targets.tolist(), strict=True):
            assert row[sum(kept) - 1 :] == [END, *[PAD] * (12 - sum(kept))]
            assert said.setdefault(tuple(row), target) == target
    assert len(said) > 2 * len(NOUNS)


def test_the_seed_decides(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    first, again, other = (captions(tmp_path, seed=seed).train.inputs[1] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_captions_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    assert captions(tmp_path, tokens=12).train.inputs[1].shape[1] == 12
    with pytest.raises(ConfigError, match=r"^data\.tokens: is 11, and captions have up to 12; raise it to that"):
        captions(tmp_path, tokens=11)


def test_words_beside_pictures_are_not_augmented(tmp_path: Path) -> None:
    splits = captions(write_fashion(tmp_path))
    images, words, mask = splits.train.inputs
    varied = splits.varied((images, words, mask))
    assert not torch.equal(varied[0], images)
    assert torch.equal(varied[1], words)
    assert torch.equal(varied[2], mask)
