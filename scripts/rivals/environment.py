"""Makes each rival tool a virtual environment of its own; knows nothing of what is done in it."""

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent
CONSTRAINTS = HERE.parents[1] / "constraints.txt"

# What pip is asked for. Where this project uses the same package, `constraints.txt` says which version of it; Olive
# 0.13.0 does not run with the pydantic of that file.
PACKAGES: dict[str, tuple[str, ...]] = {
    "nncf": ("nncf", "openvino", "numpy", "-c", str(CONSTRAINTS)),
    "ort": ("onnxruntime", "onnx", "numpy", "sympy", "-c", str(CONSTRAINTS)),
    "torch_pruning": (
        *("torch", "torchvision", "torch-pruning", "scikit-learn", "safetensors", "onnx", "openvino", "nncf"),
        *("-c", str(CONSTRAINTS)),
    ),
    "olive": (
        *("olive-ai==0.13.0", "pydantic==2.11.9", "torch==2.13.0", "onnx==1.23.2", "onnxruntime==1.31.1"),
        # Olive imports requests without asking for it.
        *("optuna==5.0.0", "numpy==2.4.6", "requests"),
    ),
}


@dataclass(frozen=True)
class Environment:
    """Where a tool's Python is, how long the installation took, and the error if there was one."""

    python: str
    seconds: float
    error: str | None
    versions: tuple[str, ...]


def environment(tool: str, folder: Path) -> Environment:
    """The environment of a tool under `folder`, made if it is not there; a failed one is not tried again."""
    known = folder / tool / "installed.json"
    if not known.exists():
        made = _install(tool, folder / tool)
        known.write_text(json.dumps(asdict(made), indent=1))
    stored = json.loads(known.read_text())
    return Environment(**{**stored, "versions": tuple(stored["versions"])})


def script(tool: str) -> Path:
    """What is run with the environment's Python: `SCRIPT INPUTS OUTPUT`."""
    return HERE / f"run_{tool}.py"


def _install(tool: str, folder: Path) -> Environment:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    python = str(folder / "bin/python")
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES[tool]]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    errors = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")]
    error = None if ended.returncode == 0 else " ".join(errors) or f"pip ended with {ended.returncode}"
    return Environment(python, time.perf_counter() - began, error, _versions(tool, python))


def _versions(tool: str, python: str) -> tuple[str, ...]:
    """Of what was asked for by name, as installed."""
    wanted = {name.partition("==")[0] for name in PACKAGES[tool]}
    command = [python, "-m", "pip", "freeze", "--disable-pip-version-check"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return tuple(line for line in lines if line.partition("==")[0] in wanted)
