"""The data sets that a search can run on, each as four splits in memory; knows no model."""

import gzip
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

from compressors.errors import ConfigError
from search.torchvision_compat import torchvision
from search.workload import SPLITS, Split, Splits

Rows = NDArray[np.intp]
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def digits(size: int = 32, shift: int = 2, seed: int = 0) -> Splits:
    """1,797 handwritten digits of 8x8 from scikit-learn, enlarged to `(n, 1, size, size)`: 950 train, 128, 359, 360."""
    raw = load_digits()
    images, targets = torch.from_numpy(raw.images / 16).float()[:, None], raw.target
    parts = stratified(targets, (360, 359, 128, 950), seed)
    scale = _Scale.of(images[parts[-1]], size)
    test, validation, calibration, train = (scale.split(images, targets, rows) for rows in parts)
    return Splits(
        train,
        calibration,
        validation,
        test,
        classes=tuple(map(str, range(10))),
        augment=partial(varied, shift=shift, flip=False),
    )


def fashion_mnist(
    folder: str | None = None,
    download: bool = False,
    root: str = "~/.cache/compareto/data",
    size: int = 28,
    train: int | None = None,
    calibration: int = 512,
    validation: int = 2000,
    test: int | None = None,
    shift: int = 1,
    seed: int = 0,
) -> Splits:
    """60,000 + 10,000 grey pictures of clothes (Xiao 2017, arXiv 1708.07747); the official test set is the test split.

    `folder` holds the four idx files, gzipped or not; without it the Debian package's place and torchvision's under
    `root` are tried. `train` and `test` cut those splits down to so many examples, all classes kept in proportion.
    """
    source = _fashion_folder(folder, Path(root).expanduser(), download)
    images, targets = _idx_pair(source, "train")
    others, other_targets = _idx_pair(source, "t10k")
    left = len(targets) - validation - calibration if train is None else train
    for_validation, for_calibration, for_train = stratified(targets, (validation, calibration, left), seed)
    (for_test,) = stratified(other_targets, (len(other_targets) if test is None else test,), seed)
    scale = _Scale.of(images[for_train], size)
    return Splits(
        scale.split(images, targets, for_train),
        scale.split(images, targets, for_calibration),
        scale.split(images, targets, for_validation),
        scale.split(others, other_targets, for_test),
        classes=FASHION_CLASSES,
        augment=partial(varied, shift=shift, flip=True),
    )


def image_folder(
    folder: str,
    size: int = 224,
    resize: int = 256,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    per_class: int | None = None,
    calibration: int = 256,
    memory_gb: float = 4.0,
    seed: int = 0,
) -> Splits:
    """A user's pictures, `(n, 3, size, size)`: the shorter side becomes `resize`, then the middle is cut out.

    `folder` holds either one folder per class, of which a fifth goes to validation and a fifth to test, or `train` and
    `test` (and perhaps `val`) with one folder per class in each. `per_class` keeps so many pictures of each class.
    Pictures that lie in no such folder have no labels, and then none has.
    """
    parts = _picture_parts(Path(folder).expanduser(), per_class, calibration, seed)
    check_memory(sum(len(part.paths) for part in parts.values()), size, memory_gb, "data.size or data.per_class")
    read = picture_reader(size, resize, mean, std)
    train, calibrating, validation, test = (_read(parts[name], read) for name in SPLITS)
    return Splits(
        train,
        calibrating,
        validation,
        test,
        classes=parts["train"].classes,
        augment=partial(varied, shift=size // 16, flip=True),
    )


def check_memory(count: int, size: int, limit_gb: float, lower: str) -> None:
    """Raises `ConfigError` where so many coloured pictures would need more; `lower` are the options that help."""
    need = count * 3 * size * size * 4 / 1e9
    if need > limit_gb:
        problem = f"the images at {size}x{size} need {need:.1f} GB, more than {limit_gb:g}"
        raise ConfigError("data.memory_gb", problem, f"raise it, or lower {lower}")


def picture_reader(size: int, resize: int, mean: Sequence[float], std: Sequence[float]) -> Callable[[Path], Tensor]:
    """Makes `(3, size, size)` of a file: the shorter side becomes `resize`, then the middle is cut out."""
    steps = torchvision().transforms
    transform = steps.Compose(
        [steps.Resize(resize), steps.CenterCrop(size), steps.ToTensor(), steps.Normalize(list(mean), list(std))]
    )

    def read(path: Path) -> Tensor:
        try:
            with Image.open(path) as image:
                made: Tensor = transform(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            problem = f"cannot be read as an image ({error})"
            raise ConfigError(str(path), problem, "repair or remove the file") from error
        return made

    return read


def varied(images: Tensor, shift: int, flip: bool) -> Tensor:
    """Each of `(n, c, h, w)` moved by up to `shift` pixels and, if wished, mirrored with even odds.

    What moves in is the darkest value of the batch: a background, not an edge smeared out.
    """
    count, _, height, width = images.shape
    if flip:
        mirrored = torch.rand(count) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    padded = F.pad(images, (shift,) * 4, value=float(images.amin()))
    down, right = torch.randint(0, 2 * shift + 1, (2, count, 1))
    rows = (down + torch.arange(height))[:, None, :, None]
    columns = (right + torch.arange(width))[:, None, None, :]
    return padded[torch.arange(count)[:, None, None, None], torch.arange(images.shape[1])[:, None, None], rows, columns]


def stratified(targets: NDArray[np.integer], sizes: Sequence[int], seed: int) -> list[Rows]:
    """Rows of parts that do not overlap, of these sizes, each with the classes in the proportion of the whole."""
    if min(sizes) < 1 or sum(sizes) > len(targets):
        problem = f"splits of {', '.join(map(str, sizes))} are wanted from {len(targets)} examples"
        raise ConfigError("data", problem, "every split needs at least one example and all must fit")
    shuffled = np.random.default_rng(seed).permutation(len(targets))
    place = np.empty(len(targets))
    for value in np.unique(targets):
        members = np.flatnonzero(targets[shuffled] == value)
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    order = shuffled[np.argsort(place, kind="stable")]  # any stretch of it holds every class in proportion
    return np.split(order[: sum(sizes)], np.cumsum(sizes)[:-1])


@dataclass(frozen=True)
class _Scale:
    """How raw images in 0..1 become inputs: enlarged to `size`, with the train split's mean and deviation taken out."""

    size: int
    mean: float
    std: float

    @classmethod
    def of(cls, train: Tensor, size: int) -> "_Scale":
        return cls(size, float(train.mean()), float(train.std()))

    def split(self, images: Tensor, targets: NDArray[np.integer], rows: Rows) -> Split:
        chosen = images[rows]
        if chosen.shape[-1] != self.size:
            chosen = F.interpolate(chosen, size=self.size, mode="bilinear", align_corners=False)
        return Split(((chosen - self.mean) / self.std,), torch.from_numpy(targets[rows].astype(np.int64)))


def _fashion_folder(folder: str | None, root: Path, download: bool) -> Path:
    raw = root / "FashionMNIST" / "raw"
    places = [Path(folder).expanduser()] if folder else [raw, DEBIAN_FASHION_MNIST]
    if download and not folder:
        _download(root)
    for place in places:
        if all(_idx_path(place, part, kind) for part in ("train", "t10k") for kind in ("images", "labels")):
            return place
    raise ConfigError(
        "data.folder" if folder else "data",
        f"Fashion-MNIST's four idx files are not in {' or '.join(map(str, places))}",
        "run `apt-get install dataset-fashion-mnist`, or download with data.download=true",
    )


def _download(root: Path) -> None:
    try:
        torchvision().datasets.FashionMNIST(root, download=True)
    except (OSError, RuntimeError) as error:
        problem = f"Fashion-MNIST could not be downloaded ({error})"
        raise ConfigError("data.download", problem, "run `apt-get install dataset-fashion-mnist` instead") from error


def _idx_path(folder: Path, part: str, kind: str) -> Path | None:
    stem = f"{part}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"
    return next((path for path in (folder / f"{stem}.gz", folder / stem) if path.is_file()), None)


def _idx_pair(folder: Path, part: str) -> tuple[Tensor, NDArray[np.uint8]]:
    """Images `(n, 1, h, w)` in 0..1 and their labels."""
    pixels, labels = (_idx(path) for kind in ("images", "labels") if (path := _idx_path(folder, part, kind)))
    return torch.from_numpy(pixels).float()[:, None] / 255, labels


def _idx(path: Path) -> NDArray[np.uint8]:
    """LeCun's idx format: two zeros, the type 8 (bytes), the number of axes, their lengths, then the values."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(str(path), f"cannot be read ({error})", "fetch the file again") from error
    axes = raw[3] if raw[:3] == b"\0\0\x08" else 0
    shape = np.frombuffer(raw[4 : 4 + 4 * axes], ">u4")
    if not axes or len(raw) != 4 + 4 * axes + math.prod(map(int, shape)):
        raise ConfigError(str(path), f"is no whole idx file of bytes ({len(raw)} bytes)", "fetch the file again")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()


@dataclass(frozen=True)
class _Pictures:
    """Image files with their class numbers, all 0 where there are no classes."""

    classes: tuple[str, ...]
    paths: tuple[Path, ...]
    targets: NDArray[np.int64]

    def pick(self, rows: Rows) -> "_Pictures":
        return _Pictures(self.classes, tuple(self.paths[row] for row in rows), self.targets[rows])


def _picture_parts(folder: Path, per_class: int | None, calibration: int, seed: int) -> dict[str, _Pictures]:
    if not folder.is_dir():
        raise ConfigError("data.folder", f"{folder} is no folder", "give the folder that holds your class folders")
    whole = _listed(folder / "train" if (folder / "train").is_dir() else folder, per_class, seed)
    given = {}
    if (folder / "train").is_dir():
        for name, alias in (("validation", "validation"), ("validation", "val"), ("test", "test")):
            if (folder / alias).is_dir():
                given[name] = _listed(folder / alias, per_class, seed, whole.classes)
    fifth = len(whole.paths) // 5
    sizes = {"calibration": min(calibration, fifth)} | {n: fifth for n in ("validation", "test") if n not in given}
    rows = stratified(whole.targets, (*sizes.values(), len(whole.paths) - sum(sizes.values())), seed)
    return dict(zip((*sizes, "train"), map(whole.pick, rows), strict=True)) | given


def _listed(folder: Path, per_class: int | None, seed: int, expected: tuple[str, ...] | None = None) -> _Pictures:
    classes = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."))
    if not classes:
        loose = _pictures_in(folder, per_class, seed)
        return _Pictures((), tuple(loose), np.zeros(len(loose), dtype=np.int64))
    if expected is not None and classes != expected:
        odd = ", ".join(sorted(set(classes) ^ set(expected))[:3])
        raise ConfigError("data.folder", f"{folder} has other classes than train ({odd})", "use the same class folders")
    paths: list[Path] = []
    targets: list[int] = []
    for number, name in enumerate(classes):
        chosen = _pictures_in(folder / name, per_class, seed)
        paths += chosen
        targets += [number] * len(chosen)
    return _Pictures(classes, tuple(paths), np.array(targets, dtype=np.int64))


def _pictures_in(folder: Path, limit: int | None, seed: int) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise ConfigError("data.folder", f"{folder} holds no images", f"add some ({', '.join(sorted(SUFFIXES))})")
    if limit is None or limit >= len(found):
        return found
    return [found[i] for i in sorted(np.random.default_rng(seed).permutation(len(found))[:limit])]


def _read(pictures: _Pictures, read: Callable[[Path], Tensor]) -> Split:
    inputs = torch.stack([read(path) for path in pictures.paths])
    return Split((inputs,), torch.from_numpy(pictures.targets) if pictures.classes else None)
