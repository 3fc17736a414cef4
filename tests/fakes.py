"""Stand-ins for runtimes that are quick, exact and without any foreign library."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compressors.pipeline import Artifact, Context
from evaluators.runtime import Deployed, Loader, Session, Support, TensorSpec


def load_fake(folder: str, precision: str, batch: int | None, threads: int) -> Session:
    import json
    import time
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    settings = json.loads((Path(folder) / "model.json").read_text())

    def run(x: NDArray[np.float32]) -> NDArray[np.float32]:
        time.sleep(settings["seconds"])
        return np.asarray(x * settings["scale"], np.float32)

    return run


@dataclass(frozen=True)
class FakeRuntime:
    """Gives its input times `scale` back, after `seconds`."""

    scale: float = 1.0
    seconds: float = 0.0
    name: str = "fake"

    def precisions(self) -> tuple[str, ...]:
        return ("fp32",)

    def support(self, kind: str, bits: int) -> Support:
        return Support.KERNEL if bits in (8, 32) else Support.REFUSED

    def deploy(self, artifact: Artifact, context: Context, folder: Path, cache: Path) -> Deployed:
        return deployed(self, folder)

    def loader(self) -> Loader:
        return load_fake

    def requirements(self) -> tuple[str, ...]:
        return ("numpy",)

    def kernels(self, deployed: Deployed) -> Mapping[str, str]:
        return {}


def deployed(runtime: FakeRuntime, parent: object) -> Deployed:
    """A folder with one small file."""
    folder = Path(str(parent)) / f"{runtime.scale}-{runtime.seconds}"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"scale": runtime.scale, "seconds": runtime.seconds}
    (folder / "model.json").write_text(json.dumps(settings))
    return Deployed(runtime, folder, "fp32", (TensorSpec("x", (1, 2), str(np.dtype(np.float32))),))
