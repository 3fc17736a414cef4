"""Makes torchvision importable where its compiled operators do not load beside this torch, and imports it late."""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
# What it declares lives as long as this object.
_DECLARED = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]


def _operators_load() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # then the import itself says what is wrong
    libraries = sorted(Path(spec.origin).parent.glob("_C*"))
    try:
        for library in libraries:
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError:
        return False
    return bool(libraries)


# A registry's torchvision is built for CUDA; beside a CPU torch its operators are missing, and `import torchvision`
# then stops at the shapes of these two. Declaring them is enough for all models and transforms used here.
if not _operators_load():
    for _name in ("nms", "qnms"):
        _DECLARED.define(_name + _SCHEMA)  # type: ignore[no-untyped-call]


def torchvision() -> ModuleType:
    """The library; importing it takes longer than importing torch, and most processes do without."""
    return importlib.import_module("torchvision")
