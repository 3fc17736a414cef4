"""The house rules that a layer check cannot see: who may import which library, and which neighbour."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("compressors", "evaluators", "search") for path in (ROOT / folder).glob("*.py"))

# Each foreign library has its place; everything else reaches it through that.
HOMES = {
    "hydra": {"search/__main__.py", "search/build.py"},
    "omegaconf": {"search/__main__.py", "search/build.py"},
    "optuna": {
        f"search/{name}.py"
        for name in (
            "space",
            "study",
            "loop",
            "answers",
            "opening",
            "sampler",
            "storage",
            "database",
            "status",
            "succession",
        )
    },
    "mlflow": {"search/pyfunc.py", "search/remote.py", "search/tracking.py"},
    "onnxruntime": {"evaluators/onnxruntime.py", "evaluators/onnxruntime_int8.py"},
    "openvino": {f"evaluators/{name}.py" for name in ("openvino", "openvino_int8", "packed_openvino")},
    "nncf": {"evaluators/openvino_int8.py"},
    "onnx": {f"evaluators/{name}.py" for name in ("export", "onnxruntime", "onnxruntime_int8", "packed_onnx")},
    "torch_pruning": {"compressors/channels.py"},
    "sklearn": {"search/data.py"},
    "transformers": {"search/pretrained.py", "search/text.py"},
    "matplotlib": {"search/picture.py", "search/page.py", "search/heatmap.py"},
}


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def methods() -> set[str]:
    """The modules of compressors that a yaml of conf/compressor makes."""
    targets = (OmegaConf.load(path)._target_ for path in (ROOT / "conf/compressor").glob("*.yaml"))
    return {target.rpartition(".")[0] for target in targets}


@pytest.mark.parametrize("library", HOMES)
def test_a_foreign_library_stays_in_its_place(library: str) -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if any(name.split(".")[0] == library for name in imported(path))
    }
    assert users <= HOMES[library]
    assert users


def test_torchvision_is_imported_by_its_own_module_only() -> None:
    assert not [path.name for path in SOURCES if "torchvision" in set(imported(path))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_file_of_the_house_knows_a_compressor_by_name(path: Path) -> None:
    assert not methods() & set(imported(path))


def test_evaluators_see_plans_and_artifacts_only() -> None:
    allowed = {"compressors.errors", "compressors.layers", "compressors.pipeline", "compressors.plan"}
    for path in (ROOT / "evaluators").glob("*.py"):
        assert {name for name in imported(path) if name.startswith("compressors")} <= allowed, path.name


@pytest.mark.parametrize("module", ["compressors/plan.py", "compressors/errors.py", "evaluators/measurement.py"])
def test_plain_data_needs_the_standard_library_only(module: str) -> None:
    foreign = {"torch", "numpy", "optuna", "mlflow", "hydra", "omegaconf"}
    assert not foreign & {name.split(".")[0] for name in imported(ROOT / module)}
