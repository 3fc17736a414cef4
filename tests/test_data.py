import gzip
import struct
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from compressors.errors import ConfigError
from search import data
from search.torchvision_compat import torchvision
from search.workload import Split, Splits, checked


def rows(split: Split) -> set[bytes]:
    return {x.numpy().tobytes() for x in split.inputs[0]}


def shapes(splits: Splits) -> dict[str, tuple[int, ...]]:
    return {name: tuple(split.inputs[0].shape) for name, split in splits.named().items()}


def test_digits_come_in_four_splits() -> None:
    splits = checked(data.digits(), "data")
    assert [shape[0] for shape in shapes(splits).values()] == [950, 128, 359, 360]
    assert {shape[1:] for shape in shapes(splits).values()} == {(1, 32, 32)}
    assert abs(splits.train.inputs[0].mean()) < 0.05
    assert splits.classes == tuple("0123456789")


def test_no_digit_is_in_two_splits() -> None:
    splits = data.digits(size=8)
    assert sum(len(rows(split)) for split in splits.named().values()) == 1797
    assert len(set().union(*map(rows, splits.named().values()))) == 1797


def test_the_seed_decides_the_splits() -> None:
    first, same, other = (rows(data.digits(size=8, seed=seed).test) for seed in (0, 0, 1))
    assert first == same
    assert first != other


@given(st.lists(st.integers(0, 3), min_size=8, max_size=60), st.data())
def test_parts_do_not_overlap_and_keep_the_proportions(labels: list[int], more: st.DataObject) -> None:
    first = more.draw(st.integers(1, len(labels) - 1))
    sizes = (first, more.draw(st.integers(1, len(labels) - first)))
    parts = data.stratified(np.array(labels), sizes, more.draw(st.integers(0, 9)))
    assert tuple(map(len, parts)) == sizes
    assert len({*parts[0].tolist(), *parts[1].tolist()}) == sum(sizes)
    for label, count in Counter(labels).items():
        expected = sizes[0] * count / len(labels)
        assert abs(sum(labels[row] == label for row in parts[0]) - expected) <= len(set(labels))


@pytest.mark.parametrize("sizes", [(0, 5), (6, 6)])
def test_parts_that_cannot_be_had_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="from 10 examples"):
        data.stratified(np.zeros(10, dtype=np.int64), sizes, 0)


def test_varied_images_show_the_same_moved_by_a_little() -> None:
    torch.manual_seed(0)
    dot = torch.zeros(50, 1, 9, 9)
    dot[:, :, 4, 4] = 1
    moved = data.varied(dot, shift=2, flip=False)
    assert moved.shape == dot.shape
    assert torch.equal(moved.sum((1, 2, 3)), torch.ones(50))
    assert {int(x) - 4 for x in moved.nonzero()[:, 2]} == {-2, -1, 0, 1, 2}
    assert torch.equal(data.varied(dot, shift=0, flip=False), dot)


def test_mirrored_images_keep_their_rows() -> None:
    torch.manual_seed(0)
    image = torch.arange(6.0).view(1, 1, 2, 3).repeat(40, 1, 1, 1)
    seen = {tuple(x.flatten().tolist()) for x in data.varied(image, shift=0, flip=True)}
    assert seen == {(0, 1, 2, 3, 4, 5), (2, 1, 0, 5, 4, 3)}


def idx(array: NDArray[np.uint8]) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_fashion(folder: Path, zipped: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    made = np.random.default_rng(0)
    for part, count in (("train", 100), ("t10k", 40)):
        pixels = made.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in ((f"{part}-images-idx3-ubyte", pixels), (f"{part}-labels-idx1-ubyte", labels)):
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array), compresslevel=1))
            else:
                (folder / name).write_bytes(idx(array))
    return folder


def fashion(folder: Path, train: int | None = None, test: int | None = None, size: int = 28) -> Splits:
    made = data.fashion_mnist(str(folder), calibration=20, validation=30, train=train, test=test, size=size)
    return checked(made, "data")


@pytest.mark.parametrize("zipped", [True, False])
def test_fashion_mnist_is_read_from_a_folder(tmp_path: Path, zipped: bool) -> None:
    splits = fashion(write_fashion(tmp_path, zipped))
    assert [shape[0] for shape in shapes(splits).values()] == [50, 20, 30, 40]
    assert {shape[1:] for shape in shapes(splits).values()} == {(1, 28, 28)}
    assert len(set().union(*map(rows, splits.named().values()))) == 140
    assert abs(float(splits.train.inputs[0].mean())) < 1e-4
    assert abs(float(splits.train.inputs[0].std()) - 1) < 1e-3


def test_fashion_mnist_can_be_cut_down_and_enlarged(tmp_path: Path) -> None:
    splits = fashion(write_fashion(tmp_path), train=10, test=20, size=32)
    assert (shapes(splits)["train"], shapes(splits)["test"]) == ((10, 1, 32, 32), (20, 1, 32, 32))
    assert splits.test.targets is not None
    assert Counter(splits.test.targets.tolist()) == dict.fromkeys(range(10), 2)


def test_an_earlier_download_and_the_debian_package_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    write_fashion(tmp_path / "debian")
    root = str(tmp_path / "root")
    assert len(data.fashion_mnist(root=root, calibration=20, validation=30).test) == 40
    write_fashion(tmp_path / "root" / "FashionMNIST" / "raw", zipped=False)
    (tmp_path / "debian" / "t10k-labels-idx1-ubyte.gz").unlink()
    assert len(data.fashion_mnist(root=root, calibration=20, validation=30).test) == 40


def test_missing_files_come_with_both_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    with pytest.raises(ConfigError, match=r"apt-get install dataset-fashion-mnist.*data\.download=true"):
        data.fashion_mnist(root=str(tmp_path))
    with pytest.raises(ConfigError, match=r"data\.folder"):
        data.fashion_mnist(str(tmp_path))


def test_a_download_that_fails_names_the_other_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(root: Path, download: bool) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(torchvision().datasets, "FashionMNIST", offline)
    with pytest.raises(ConfigError, match=r"could not be downloaded.*apt-get"):
        data.fashion_mnist(root=str(tmp_path), download=True)


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"])
@pytest.mark.parametrize(
    "content", [b"", b"no gzip", gzip.compress(b"no idx"), gzip.compress(idx(np.zeros(9, np.uint8))[:-1])]
)
def test_a_torn_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (write_fashion(tmp_path) / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name) as error:
        fashion(tmp_path)
    assert "\n" not in str(error.value)


def write_pictures(folder: Path, classes: Iterable[str], count: int, size: tuple[int, int] = (20, 16)) -> Path:
    made = np.random.default_rng(len(str(folder)))
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = made.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def pictures(folder: Path, per_class: int | None = None, memory_gb: float = 4.0) -> Splits:
    return data.image_folder(str(folder), size=8, resize=12, per_class=per_class, memory_gb=memory_gb)


def test_class_folders_are_split_in_proportion(tmp_path: Path) -> None:
    splits = checked(pictures(write_pictures(tmp_path, ["cat", "dog"], 10)), "data")
    assert shapes(splits) == {
        "train": (8, 3, 8, 8),
        "calibration": (4, 3, 8, 8),
        "validation": (4, 3, 8, 8),
        "test": (4, 3, 8, 8),
    }
    assert splits.classes == ("cat", "dog")
    assert splits.test.targets is not None
    assert Counter(splits.test.targets.tolist()) == {0: 2, 1: 2}


@pytest.mark.parametrize("validation", ["val", "validation"])
def test_train_val_and_test_folders_are_kept_apart(tmp_path: Path, validation: str) -> None:
    for part, count in (("train", 10), (validation, 3), ("test", 2)):
        write_pictures(tmp_path / part, ["cat", "dog"], count)
    assert [shape[0] for shape in shapes(pictures(tmp_path)).values()] == [16, 4, 6, 4]


def test_per_class_keeps_so_many(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["cat", "dog"], 9)
    assert sum(len(split) for split in pictures(tmp_path, per_class=5).named().values()) == 10


def test_pictures_that_do_not_fit_are_refused_before_reading(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["cat", "dog"], 5)
    (tmp_path / "cat" / "0.png").write_bytes(b"would fail if it were read")
    with pytest.raises(ConfigError, match=r"data\.per_class"):
        pictures(tmp_path, memory_gb=1e-6)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n torn"])
def test_an_unreadable_picture_is_named(tmp_path: Path, content: bytes) -> None:
    write_pictures(tmp_path, ["cat", "dog"], 5)
    (tmp_path / "dog" / "3.png").write_bytes(content)
    with pytest.raises(ConfigError, match=r"dog/3\.png: cannot be read"):
        pictures(tmp_path)


def test_folders_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        pictures(tmp_path / "gone")
    with pytest.raises(ConfigError, match="holds no images"):
        pictures(tmp_path)
    write_pictures(tmp_path, ["cat"], 5)
    (tmp_path / "dog").mkdir()
    with pytest.raises(ConfigError, match="dog holds no images"):
        pictures(tmp_path)


def test_splits_with_other_classes_are_refused(tmp_path: Path) -> None:
    write_pictures(tmp_path / "train", ["cat", "dog"], 5)
    write_pictures(tmp_path / "test", ["cat", "cow"], 5)
    with pytest.raises(ConfigError, match=r"other classes than train \(cow, dog\)"):
        pictures(tmp_path)


def test_pictures_without_class_folders_have_no_labels(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["any"], 20)
    splits = pictures(tmp_path / "any")
    assert splits.classes == ()
    assert all(split.targets is None for split in splits.named().values())
    assert sum(map(len, splits.named().values())) == 20
