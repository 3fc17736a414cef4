"""What candidates have in common, on disk and within a bound; runtimes put files beside it and it never opens them."""

import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from compressors.pipeline import Achieved, Applied, FloatModel, LayerNumbers
from evaluators.export import once
from search.locks import locked

T = TypeVar("T")

USED = "used"
"""A file in every entry: who uses the entry holds a shared lock on it, and its time is when that last ended."""

STUDIES = "[0-9a-f]" * 16
IN_MEMORY = 2


@dataclass(frozen=True)
class Cache:
    """One study's `folder` below the cache root, which holds an entry, a folder, for each prefix.

    Any number of processes may share the root. A lock ends with its process, so nothing that dies leaves an entry that
    can never be removed, and writing is atomic, so nothing that dies leaves half a file under a name that is read.
    """

    folder: Path
    limit_bytes: float = math.inf
    _models: dict[str, FloatModel] = field(default_factory=dict, repr=False, compare=False)
    _sizes: dict[Path, tuple[float, int]] = field(default_factory=dict, repr=False, compare=False)
    _kept: ExitStack = field(default_factory=ExitStack, repr=False, compare=False)
    _held_back: set[str] = field(default_factory=set, repr=False, compare=False)

    @contextmanager
    def in_use(self, entry: str) -> Iterator[None]:
        """Nobody removes the entry inside; afterwards the whole cache is brought back within its bound."""
        with _held(self.folder / entry):
            yield
        self.shrink()

    def keep(self, entry: str) -> None:
        """Nobody removes the entry until `close`, or until this process ends."""
        if entry not in self._held_back:
            self._kept.enter_context(_held(self.folder / entry))
            self._held_back.add(entry)

    def close(self) -> None:
        """Let go of what `keep` kept."""
        self._kept.close()
        self._held_back.clear()

    def shrink(self) -> None:
        """Remove entries of any study that nobody uses, the longest unused first, until all are within the bound."""
        root = self.folder.parent
        root.mkdir(parents=True, exist_ok=True)
        with (root / "shrinking").open("a+") as turn:
            if not _alone(turn):
                return  # another process is at it
            shutil.rmtree(root / "removed", ignore_errors=True)  # of one that died here
            sizes = {entry: self._size(entry, when) for when, entry in sorted(_entries(root))}
            excess = sum(sizes.values()) - self.limit_bytes
            for entry, size in sizes.items():
                if excess > 0 and _removed(entry, root / "removed"):
                    excess -= size

    def recall(self, prefix: str) -> FloatModel | None:
        """One of the last few float models."""
        return self._models.get(prefix)

    def remember(self, prefix: str, made: FloatModel) -> None:
        """Keep it in place of the one that came first."""
        self._models[prefix] = made
        if len(self._models) > IN_MEMORY:
            self._models.pop(next(iter(self._models)))

    def load(self, prefix: str, model: nn.Module) -> Mapping[str, Achieved] | None:
        """Put the stored weights into `model`; None when there are none, or they cannot be read."""
        return self._read(prefix, "weights", lambda path: _read_weights(path, model))

    def save(self, prefix: str, model: nn.Module, achieved: Mapping[str, Achieved]) -> None:
        """Keep the weights; tied tensors are stored once and found again through the model's own ties."""
        notes = {"achieved": json.dumps(achieved)}
        self._write(prefix, "weights", lambda path: save_model(model, str(path), notes))

    def load_numbers(self, prefix: str, key: str) -> Applied | None:
        """What was made of one owner; None when it is not stored, or cannot be read."""
        return self._read(prefix, f"numbers/{key}", _read_numbers)

    def save_numbers(self, prefix: str, key: str, applied: Applied) -> None:
        """Keep what was made of one owner, one file each."""
        self._write(prefix, f"numbers/{key}", lambda path: _write_numbers(path, applied))

    def _read(self, prefix: str, name: str, read: Callable[[Path], T]) -> T | None:
        path = self._path(prefix, name)
        if not path.exists():
            return None
        with _held(self.folder / prefix):
            try:
                return read(path)
            except (SafetensorError, OSError, _Unfit):
                # Half a file of a crashed machine, gone since we looked, or made on top of what has been made
                # differently since: it is simply made again.
                path.unlink(missing_ok=True)
                return None

    def _write(self, prefix: str, name: str, write: Callable[[Path], None]) -> None:
        with _held(self.folder / prefix):
            once(self._path(prefix, name), write)

    def _path(self, prefix: str, name: str) -> Path:
        return self.folder / prefix / f"{name}.safetensors"

    def _size(self, entry: Path, last_use: float) -> int:
        """Bytes; read anew only after another use, because the root may hold thousands of entries."""
        if self._sizes.get(entry, (0.0, 0))[0] != last_use:
            self._sizes[entry] = (last_use, _bytes(entry))
        return self._sizes[entry][1]


class _Unfit(Exception):
    """What is stored has other shapes than the model that it is for."""


def _read_weights(path: Path, model: nn.Module) -> Mapping[str, Achieved]:
    with safe_open(path, framework="pt") as stored:
        achieved = json.loads(stored.metadata()["achieved"])
        stored_shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118  no dict
    # Before any is loaded: half of them would be worse than none.
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if not stored_shapes.items() <= shapes.items():
        raise _Unfit
    load_model(model, path)
    return cast(Mapping[str, Achieved], achieved)


def _read_numbers(path: Path) -> Applied:
    with safe_open(path, framework="pt") as stored:
        notes = json.loads(stored.metadata()["applied"])
    fields: dict[str, dict[str, Any]] = notes["numbers"]
    for name, tensor in load_file(path).items():
        layer, _, field_name = name.rpartition("/")
        fields[layer][field_name] = tensor
    return Applied(notes["achieved"], {layer: LayerNumbers(**given) for layer, given in fields.items()})


def _write_numbers(path: Path, applied: Applied) -> None:
    plain: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for layer, numbers in applied.numbers.items():
        plain[layer] = {name: value for name, value in vars(numbers).items() if name not in numbers.tensors()}
        # Copies, because layers with one weight share their tensors, which safetensors refuses.
        tensors.update({f"{layer}/{name}": value.clone() for name, value in numbers.tensors().items()})
    save_file(tensors, path, {"applied": json.dumps({"achieved": applied.achieved, "numbers": plain})})


@contextmanager
def _held(entry: Path) -> Iterator[None]:
    """The entry is there inside, empty if it is new; used at the beginning and at the end."""
    with locked(entry / USED, fcntl.LOCK_SH) as handle:
        os.utime(handle.fileno())
        try:
            yield
        finally:
            os.utime(handle.fileno())


def _alone(handle: IO[str]) -> bool:
    """Whether nobody else holds a lock on the file; then we do."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _entries(root: Path) -> Iterator[tuple[float, Path]]:
    """Every entry of every study, after the time of its last use: when it was made, if it was never held."""
    for entry in root.glob(f"{STUDIES}/*/"):
        with suppress(FileNotFoundError):
            used = entry / USED
            yield (used if used.exists() else entry).stat().st_mtime, entry


def _removed(entry: Path, grave: Path) -> bool:
    """Remove the entry unless somebody uses it; it goes in one piece first, so that nobody can find half of it."""
    grave.mkdir(exist_ok=True)
    try:
        with (entry / USED).open("a+") as handle:
            if not _alone(handle):
                return False
            entry.rename(grave / entry.name)
        shutil.rmtree(grave)
    except OSError:
        return not entry.exists()  # if it is, it is another user's
    return True


def _bytes(entry: Path) -> int:
    """Files and folders that vanish meanwhile count nothing."""
    total = 0
    for folder, _, files in os.walk(entry):
        for name in files:
            with suppress(FileNotFoundError):
                total += Path(folder, name).stat().st_size
    return total
