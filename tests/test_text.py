"""Sentences become token numbers with a mask, in four splits; what does not fit is refused in one line."""

from pathlib import Path

import pytest
import torch

from compressors.errors import ConfigError
from search.text import sentences, text
from search.workload import Splits, checked
from tests.words import CONTEXT, save_tokenizer, sentence

SIZES = {"calibration": 8, "validation": 10, "test": 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    save_tokenizer(folder)
    (folder / "plain.txt").write_text("".join(f"{sentence(i)}\n" for i in range(40)))
    (folder / "rated.txt").write_text("".join(f"{sentence(i)}\t{'good' if i % 4 else 'bad'}\n\n" for i in range(40)))
    return folder


def load(folder: Path, file: str = "plain.txt", tokens: int = 12, truncate: bool = False) -> Splits:
    return sentences(str(folder / file), str(folder), tokens, truncate, **SIZES)


def test_each_word_has_its_number_and_what_is_missing_is_masked(folder: Path) -> None:
    (folder / "one.txt").write_text("word0 word46 nonsense\n" * 31)
    splits = checked(load(folder, "one.txt", tokens=6), "data")
    words, mask = splits.train.inputs
    assert words[0].tolist() == [1, 3, 49, 2, 0, 0]
    assert mask[0].tolist() == [1, 1, 1, 1, 0, 0]
    assert splits.train.targets is None
    assert splits.classes == ()


def test_no_sentence_is_in_two_splits(folder: Path) -> None:
    parts = load(folder).named().values()
    assert [len(part) for part in parts] == [12, 8, 10, 10]
    rows = torch.cat([part.inputs[0] for part in parts])
    assert len({tuple(row) for row in rows.tolist()}) == 40


def test_labels_are_numbered_by_name_and_kept_in_proportion(folder: Path) -> None:
    splits = load(folder, "rated.txt")
    assert splits.classes == ("bad", "good")
    for name, split in splits.named().items():
        assert split.targets is not None
        assert abs(float(split.targets.float().mean()) - 0.75) <= 1 / len(split), name


def test_longer_sentences_are_cut_only_where_that_is_asked(folder: Path) -> None:
    assert load(folder, tokens=4, truncate=True).train.inputs[0].shape == (12, 4)
    with pytest.raises(ConfigError, match=r"is 4, and \d+ of 40 texts have up to 9.*; .*data\.truncate=true"):
        load(folder, tokens=4)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds no sentence"),
        ("one\tgood\nword1\n", r"line 2 of .* has 1 columns"),
        ("one\tgood\t3\n", r"line 1 of .* has 3 columns"),
        ("one\t\n", r"line 1 of .* has 2 columns"),
    ],
)
def test_a_file_that_is_no_list_of_sentences_is_refused(folder: Path, text: str, problem: str) -> None:
    (folder / "wrong.txt").write_text(text)
    with pytest.raises(ConfigError, match=rf"^data\.file: .*{problem}"):
        load(folder, "wrong.txt")


def test_a_missing_file_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.file: .* cannot be read \(No such file"):
        load(folder, "missing.txt")


def test_a_tokenizer_that_cannot_fill_up_is_refused(folder: Path, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, pad=None)
    with pytest.raises(
        ConfigError, match=r"^data\.tokenizer: .* has no token to fill sentences up with; set pad_token"
    ):
        sentences(str(folder / "plain.txt"), str(tmp_path), 12, False, **SIZES)


def test_what_is_no_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.tokenizer: .* holds none that can be read"):
        sentences(str(folder / "plain.txt"), str(tmp_path), 12, False, **SIZES)


def test_more_tokens_than_the_tokenizer_is_made_for_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.tokens: is {CONTEXT + 1}, .* up to {CONTEXT};"):
        load(folder, tokens=CONTEXT + 1)


def test_splits_that_do_not_fit_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"splits of 30, 10, 8, -8 are wanted from 40 examples"):
        sentences(str(folder / "plain.txt"), str(folder), 12, calibration=8, validation=10, test=30)


def prose(folder: Path, words: int = 103, **options: int) -> Splits:
    """Every word is another than the one before it, so that rows tell where they are from."""
    (folder / "prose.txt").write_text(" ".join(f"word{i % 40}" for i in range(words)))
    return text(
        str(folder / "prose.txt"), str(folder), **{"tokens": 5, "calibration": 2, "validation": 3, "test": 4} | options
    )


def test_a_text_is_cut_into_windows_whose_last_stretch_is_for_the_test(folder: Path) -> None:
    splits = checked(prose(folder), "data")
    rows = [part.inputs[0] for part in splits.named().values()]
    assert [len(part) for part in rows] == [11, 2, 3, 4]
    first = rows[0][0, 0]
    assert torch.cat(rows).flatten().tolist() == [int(first) + i % 40 for i in range(100)]
    assert all(part.targets is part.inputs[0] for part in splits.named().values())
    assert torch.equal(prose(folder, train=3).train.inputs[0], rows[0][-3:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": 40}, r"^data\.train: .*prose\.txt has 8 windows of 5 words, of which 9 are for other splits; "),
        ({"train": 12}, r"^data\.train: .* has 20 windows"),
        ({"test": 0}, r"^data\.test: is 0; give 1 or more"),
        ({"tokens": 1}, r"^data\.tokens: is 1; give at least 2"),
    ],
)
def test_a_text_that_is_too_short_is_refused(folder: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prose(folder, **options)
