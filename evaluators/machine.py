"""What this machine is, as far as it can change a measurement; standard library only."""

import os
import platform
from collections.abc import Iterator
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


def memory_bytes() -> int:
    """What this process may use: the machine's memory, or less where a container or a job has a limit."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *_limits_of_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def _limits_of_groups(membership: Path, root: Path) -> Iterator[int]:
    """Of the group and all above it, by both versions of the kernel's interface (cgroups(7))."""
    lines = membership.read_text().splitlines() if membership.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers not in ("", "memory"):
            continue
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        group = root / controllers / path.lstrip("/")
        for folder in (group, *group.parents):
            if (folder / name).exists():
                limit = (folder / name).read_text().strip()
                if limit.isdigit():
                    yield int(limit)
            if folder == root / controllers:
                break


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    pairs = (line.partition(":") for line in path.read_text().split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
