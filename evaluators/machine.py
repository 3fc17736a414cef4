"""What this machine is, as far as it can change a measurement; standard library only."""

import os
import platform
from importlib import metadata
from pathlib import Path

from compressors.plan import Scalar

# Instruction sets that decide which kernels run, by the names Linux gives them.
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve", "i8mm")
PACKAGES = ("torch", "torchvision", "onnx", "onnxruntime", "openvino", "nncf", "torch-pruning", "optuna", "mlflow")


def machine() -> dict[str, Scalar]:
    """Processor, instruction sets, cores and operating system: what must be equal for latencies to be comparable."""
    info = _cpuinfo()
    flags = set(info.get("flags", info.get("Features", "")).split())
    return {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "cpu_features": " ".join(f for f in FEATURES if f in flags),
        "cores": os.cpu_count() or 1,
        "system": platform.system(),
        "architecture": platform.machine(),
    }


def versions() -> dict[str, Scalar]:
    """Python and the packages that make or run the deployed files."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    pairs = (line.partition(":") for line in path.read_text().split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
