"""Peak memory that loading and running the deployed file adds to a process."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from compressors.errors import Infeasible, at_least
from evaluators.evaluation import Examples
from evaluators.measurement import Measurement, Metric
from evaluators.runtime import Deployed

# Run with `python -c`: the interpreter and the runtime's library are in place before the first look at the counter.
_PROBE = """
import importlib, json, sys
import numpy as np
def high_water():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
module, function, folder, precision, batch, threads, *paths = json.loads(sys.argv[1])
load = getattr(importlib.import_module(module), function)
inputs = [np.load(path, allow_pickle=False) for path in paths]
before = high_water()
session = load(folder, precision, batch, threads)
for _ in range(3):
    session(*inputs)
print(high_water() - before)
"""


@dataclass(frozen=True)
class Memory:
    """Each of `processes` fresh processes loads the file and runs it three times at `batch`; Linux only."""

    batch: int = 1
    threads: int = 1
    processes: int = 3
    of_machine: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuses counts that would measure nothing."""
        at_least(1, **{"evaluator.memory.batch": self.batch, "evaluator.memory.processes": self.processes})

    def metrics(self) -> tuple[Metric, ...]:
        """One: `peak_memory_bytes`."""
        return (Metric("peak_memory_bytes", "bytes", "minimize"),)

    def measure(self, deployed: Deployed, reference: Deployed, examples: Examples) -> Sequence[Measurement]:
        """The median over the processes; the band is their whole range."""
        with tempfile.TemporaryDirectory() as folder:
            paths = [str(Path(folder) / f"{i}.npy") for i in range(len(examples.inputs))]
            for path, x in zip(paths, examples.inputs, strict=True):
                np.save(path, np.resize(x[: self.batch], (self.batch, *x.shape[1:])), allow_pickle=False)
            grown = [self._probe(deployed, paths) for _ in range(self.processes)]
        conditions = {"batch": self.batch, "threads": self.threads}
        value = float(statistics.median(grown))
        return (Measurement(self.metrics()[0], value, (min(grown), max(grown)), len(grown), conditions),)

    def close(self) -> None:
        """Holds nothing."""

    def _probe(self, deployed: Deployed, paths: Sequence[str]) -> float:
        loader: Any = deployed.runtime.loader()
        folder, precision = str(deployed.folder), deployed.precision
        question = [loader.__module__, loader.__name__, folder, precision, self.batch, self.threads, *paths]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(
            [sys.executable, "-c", _PROBE, json.dumps(question)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise Infeasible(f"measuring memory: the process ended with exit code {done.returncode}: {last}")
        return float(done.stdout.split()[-1])
