"""Captions fit their pictures' classes, become words and masks, and are the same for the same seed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from compressors.errors import ConfigError
from search.captions import END, NOUNS, PAD, TEMPLATES, captions, fashion_captions
from search.data import FASHION_CLASSES, fashion_mnist
from search.workload import Splits, checked
from tests.test_data import write_fashion
from tests.words import save_tokenizer


def of_fashion(folder: Path, tokens: int = 12, seed: int = 0) -> Splits:
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
    splits, pictures = of_fashion(tmp_path), fashion_mnist(str(tmp_path), calibration=20, validation=30)
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
    first, again, other = (of_fashion(tmp_path, seed=seed).train.inputs[1] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_captions_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    assert of_fashion(tmp_path, tokens=12).train.inputs[1].shape[1] == 12
    with pytest.raises(ConfigError, match=r"^data\.tokens: is 11, and captions have up to 12; raise it to that"):
        of_fashion(tmp_path, tokens=11)


def test_words_beside_pictures_are_not_augmented(tmp_path: Path) -> None:
    splits = of_fashion(write_fashion(tmp_path))
    images, words, mask = splits.train.inputs
    varied = splits.varied((images, words, mask))
    assert not torch.equal(varied[0], images)
    assert torch.equal(varied[1], words)
    assert torch.equal(varied[2], mask)


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty pictures, each of one colour that its caption names; two say the same."""
    folder = tmp_path_factory.mktemp("album")
    save_tokenizer(folder)
    lines = []
    for i in range(30):
        Image.new("RGB", (12, 9), (8 * i, 0, 0)).save(folder / f"{i}.png")
        lines.append(f"{i}.png\tword{max(i, 1)}\tkind\n")
    (folder / "captions.tsv").write_text("".join(lines))
    return folder


def of_album(folder: Path, **options: Any) -> Splits:
    sizes = {"calibration": 4, "validation": 5, "test": 6, "size": 8, "resize": 8, "tokens": 4}
    return checked(captions(str(folder), str(folder), **{**sizes, **options}, mean=[0, 0, 0], std=[1, 1, 1]), "data")


def test_each_picture_keeps_its_own_caption(album: Path) -> None:
    parts = of_album(album).named().values()
    assert [len(part) for part in parts] == [15, 4, 5, 6]
    seen = []
    for part in parts:
        pictures, words, mask = part.inputs
        assert (pictures.shape[1:], words.shape[1:]) == ((3, 8, 8), (4,))
        assert part.targets is not None
        for picture, row, kept, target in zip(pictures, words, mask, part.targets, strict=True):
            number = round(float(picture[0].mean()) * 255 / 8)
            assert row.tolist()[1] == max(number, 1) + 3
            assert kept.tolist() == [1, 1, 0, 0]
            seen.append((number, int(target)))
    assert len({number for number, _ in seen}) == 30
    assert dict(seen)[0] == dict(seen)[1]
    assert len({target for _, target in seen}) == 29


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (None, r"^data\.folder: .*captions\.tsv cannot be read \(No such file"),
        ("\n", r"^data\.folder: .*captions\.tsv names no picture; give every line"),
        ("0.png\tword1\n1.png\n", r"^data\.folder: line 2 of .*captions\.tsv has no caption; give every line"),
        ("0.png\tword1\n\nnone.png\tword2\n", r"^data\.folder: line 3 of .*captions\.tsv names no file there; "),
        ("0.png\t" + "word1 " * 9 + "\n", r"^data\.tokens: is 4, and 1 of 1 texts have up to 10; "),
        ("0.png\tword1\n", r"^data: splits of 6, 5, 4, -14 are wanted from 1 examples; "),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(album: Path, tmp_path: Path, table: str | None, message: str) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "0.png").write_bytes((album / "0.png").read_bytes())
    (tmp_path / "1.png").write_bytes((album / "1.png").read_bytes())
    if table is not None:
        (tmp_path / "captions.tsv").write_text(table)
    with pytest.raises(ConfigError, match=message):
        of_album(tmp_path)


def test_what_does_not_fit_into_memory_or_is_no_picture_is_refused(album: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^data\.memory_gb: the images at 8x8 need 0\.0 GB, more than 1e-09; .* data\.size"
    ):
        of_album(album, memory_gb=1e-9)
    save_tokenizer(tmp_path)
    (tmp_path / "no.png").write_text("words")
    (tmp_path / "captions.tsv").write_text("no.png\tword1\n" * 20)
    with pytest.raises(ConfigError, match=r"no\.png: cannot be read as an image"):
        of_album(tmp_path)


def test_longer_captions_are_cut_where_that_is_asked(album: Path, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "0.png").write_bytes((album / "0.png").read_bytes())
    (tmp_path / "captions.tsv").write_text("0.png\tword1 word2 word3 word4 word5\n" * 20)
    assert of_album(tmp_path, truncate=True).train.inputs[2].sum(1).tolist() == [4] * 5
