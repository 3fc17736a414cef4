"""Weights of structural prefixes on disk, so that plans that differ only in numbers never train twice."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from compressors.pipeline import Achieved


@dataclass(frozen=True)
class WeightStore:
    """One safetensors file per prefix under `folder`; writing is atomic, so several processes may share it."""

    folder: Path

    def load(self, prefix: str, model: nn.Module) -> Mapping[str, Achieved] | None:
        """Put the stored weights into `model`; None when there are none, or they cannot be read."""
        path = self._path(prefix)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as stored:
                achieved = json.loads(stored.metadata()["achieved"])
            load_model(model, path)
            return cast(Mapping[str, Achieved], achieved)
        except (SafetensorError, OSError):
            # A half-written file of a crashed machine: the training is simply done again.
            path.unlink(missing_ok=True)
            return None

    def save(self, prefix: str, model: nn.Module, achieved: Mapping[str, Achieved]) -> None:
        """Keep the weights; tied tensors are stored once and found again through the model's own ties."""
        path = self._path(prefix)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(handle)
        save_model(model, temporary, metadata={"achieved": json.dumps(achieved)})
        Path(temporary).replace(path)

    def _path(self, prefix: str) -> Path:
        return self.folder / prefix / "weights.safetensors"
