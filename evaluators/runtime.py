"""What a runtime must offer, and what it hands to the evaluators: deployed files, and how to run them."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from compressors.pipeline import Artifact, Context

Array = NDArray[np.generic]
Session = Callable[..., NDArray[np.float32]]
"""Takes the model's inputs as arrays, gives its first output; a past that is left out is empty."""
Loader = Callable[[str, str, int | None, int], Session]


CODEBOOK = "codebook"
"""What `support` is asked instead of a layer kind when any layer's weights are indices into a table."""


class Support(Enum):
    """What a runtime makes of a layer kind at a bit-width."""

    KERNEL = "a kernel of its own"
    STORAGE = "a smaller file, computed at the rest precision"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input of the deployed file; the first entry of `shape` is the batch and may vary.

    An entry 0 says that a call may leave this input out: it is a past of so many words, and begins with none.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str


class Runtime(Protocol):
    """One way to deploy and run; an implementation is a frozen dataclass that can be sent to another process."""

    @property
    def name(self) -> str:
        """How plans, knobs and tables refer to it."""

    def precisions(self) -> tuple[str, ...]:
        """The precisions in which this machine really computes what is not quantized, `fp32` first."""

    def support(self, kind: str, bits: int) -> Support:
        """What becomes of a layer kind, or a `CODEBOOK`, at `bits`; 32 always means: not quantized."""

    def deploy(self, artifact: Artifact, context: Context, folder: Path, cache: Path) -> "Deployed":
        """Write the artifact as this runtime's own files into the empty `folder`.

        What depends only on `artifact.prefix` (the float graph and its fully quantized form) is kept in `cache` and
        edited per candidate. Raises `Infeasible` for what the runtime refuses, and when the float graph it made
        disagrees with the artifact's torch model.
        """

    def loader(self) -> Loader:
        """The function that loads a deployed folder.

        It stands at module level, takes `(folder, precision, batch, threads)` and uses nothing from this repository:
        its source travels with a registered model. `batch` None accepts any batch size, `threads` 0 is the runtime's
        own choice.
        """

    def requirements(self) -> tuple[str, ...]:
        """What pip must install, with versions, for the loader to work."""

    def kernels(self, deployed: "Deployed") -> Mapping[str, str]:
        """Operation -> the kernel that the runtime says it chose; empty where it does not tell."""


@dataclass(frozen=True)
class Deployed:
    """A model as files that a runtime loads: the only thing that evaluators see.

    `parameters` are those of the torch model that it was made from, None where only the files are known.
    """

    runtime: Runtime
    folder: Path
    precision: str
    inputs: tuple[TensorSpec, ...]
    parameters: int | None = None

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """Every file the runtime needs, in a fixed order."""
        return tuple(sorted(path for path in self.folder.rglob("*") if path.is_file()))

    @cached_property
    def bytes(self) -> int:
        """What must be shipped, in bytes on disk."""
        return sum(path.stat().st_size for path in self.files)

    @cached_property
    def sha256(self) -> str:
        """The digest of all files, names included."""
        total = hashlib.sha256()
        for path in self.files:
            total.update(path.relative_to(self.folder).as_posix().encode())
            total.update(path.read_bytes())
        return total.hexdigest()

    def session(self, batch: int | None, threads: int) -> Session:
        """Load the files anew for one batch size (None: any) and number of threads (0: the runtime's choice)."""
        return self.runtime.loader()(str(self.folder), self.precision, batch, threads)

    @cached_property
    def _any_batch(self) -> Session:
        return self.session(batch=None, threads=0)

    def run(self, *inputs: Array) -> NDArray[np.float32]:
        """The first output for any number of examples, computed in chunks of `CHUNK`."""
        starts = range(0, len(inputs[0]), CHUNK)
        return np.concatenate([self._any_batch(*(x[i : i + CHUNK] for x in inputs)) for i in starts])


CHUNK = 64
