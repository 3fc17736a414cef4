"""What a rival tool is given and how it hands its models in; numpy and the standard library only.

The input folder holds `model.onnx`, `weights.safetensors`, `about.json` and `train`, `calibration` and `validation`
as `.npz` files with `inputs` `(n, c, h, w)` and `targets` `(n,)`. The test split is not in it.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MODELS = "models.jsonl"


@dataclass(frozen=True)
class Entry:
    """A finished model: `folder` under the output folder holds `model.onnx` or `model.xml`; `at` is Unix time."""

    folder: str
    runtime: str
    precision: str
    what: str
    at: float


@dataclass(frozen=True)
class Exchange:
    """The two folders of one run, and the Unix time at which it is cut off."""

    inputs: Path
    output: Path
    deadline: float

    @classmethod
    def from_arguments(cls) -> "Exchange":
        """`SCRIPT INPUTS OUTPUT DEADLINE`."""
        inputs, output, deadline = sys.argv[1:]
        return cls(Path(inputs), Path(output), float(deadline))

    @property
    def model(self) -> Path:
        """The trained network as a float ONNX file; the first axis of `input_0` is free."""
        return self.inputs / "model.onnx"

    def about(self) -> dict[str, Any]:
        """How to build the network in torch, and how training images may be varied."""
        return dict(json.loads((self.inputs / "about.json").read_text()))

    def split(self, name: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Inputs and targets."""
        with np.load(self.inputs / f"{name}.npz", allow_pickle=False) as stored:
            return stored["inputs"], stored["targets"]

    def place(self, name: str) -> Path:
        """A new folder for one model's files."""
        folder = self.output / name
        folder.mkdir(parents=True)
        return folder

    def hand_in(self, folder: Path, what: str, *targets: tuple[str, str]) -> None:
        """Say that the model counts from now on, in each of these (runtime, precision)."""
        with (self.output / MODELS).open("a") as handle:
            for runtime, precision in targets:
                handle.write(json.dumps(asdict(Entry(folder.name, runtime, precision, what, time.time()))) + "\n")


def handed_in(output: Path) -> list[Entry]:
    """Everything that was handed in before the tool ended or was cut off."""
    path = output / MODELS
    return [Entry(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
