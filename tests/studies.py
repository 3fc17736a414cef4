"""A search over a zoo net with quick stand-ins for runtime and evaluators, but a real storage and tracker."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from compressors.errors import Infeasible
from compressors.layers import read_layers
from compressors.pipeline import Artifact, Compressor, Context
from compressors.quantize import Quantize
from evaluators.evaluation import Evaluator, Examples
from evaluators.measurement import Measurement, Metric, exact
from evaluators.runtime import Deployed, Loader, Session, Support, TensorSpec
from search.select import Fastest
from search.space import build_space
from search.study import Budget, Progress, Search
from search.tracking import Tracker
from search.trial import Workbench
from search.workload import Split, Splits, Workload, classification
from tests.zoo import CLASSES, build, images

ACCURACY = Metric("accuracy", "share", "maximize")
RATIO = Metric("latency_ratio", "of reference", "minimize")


def load_count(folder: str, precision: str, batch: int | None, threads: int) -> Session:
    """Answers the more firmly, the more layers are in 8 bits: so far it is from the uncompressed model."""
    import json
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    int8 = json.loads((Path(folder) / "model.json").read_text())["int8"]

    def run(x: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.tile(np.array([len(int8), 0, 0, 0, 0], np.float32), (len(x), 1))

    return run


@dataclass(frozen=True)
class CountingRuntime:
    """Its file says how many layers went to 8 bits."""

    name: str = "fake"
    before: Callable[[int], None] = lambda _count: None

    def precisions(self) -> tuple[str, ...]:
        return ("fp32",)

    def support(self, kind: str, bits: int) -> Support:
        return Support.KERNEL if bits in (8, 32) else Support.REFUSED

    def deploy(self, artifact: Artifact, context: Context, folder: Path, cache: Path) -> Deployed:
        self.before(len(artifact.numbers))
        (folder / "model.json").write_text(json.dumps({"int8": sorted(artifact.numbers)}))
        return Deployed(self, folder, "fp32", (TensorSpec("x", (1, 3, 12, 12), "float32"),))

    def loader(self) -> Loader:
        return load_count

    def requirements(self) -> tuple[str, ...]:
        return ()

    def kernels(self, deployed: Deployed) -> Mapping[str, str]:
        return {}


@dataclass(frozen=True)
class Counting:
    """The more layers in 8 bits, the faster and the less accurate; an odd layer out costs more."""

    def metrics(self) -> tuple[Metric, ...]:
        return (ACCURACY, RATIO)

    def measure(self, deployed: Deployed, reference: Deployed, examples: Examples) -> Sequence[Measurement]:
        int8 = json.loads((deployed.folder / "model.json").read_text())["int8"]
        harm = sum(0.001 * (1 + len(name)) for name in int8)
        return exact(ACCURACY, 0.99 - harm), exact(RATIO, 1 / (1 + len(int8)))

    def close(self) -> None: ...


@dataclass(frozen=True)
class Gradually(Counting):
    """The same, and from a share of the work already, give or take a little."""

    def preview(
        self, deployed: Deployed, reference: Deployed, examples: Examples, share: float
    ) -> Sequence[Measurement]:
        accuracy, ratio = self.measure(deployed, reference, examples)
        half = 0.001 / math.sqrt(share)
        return replace(accuracy, interval=(accuracy.value - half, accuracy.value + half)), ratio

    def close(self) -> None: ...


def splits() -> Splits:
    part = Split((images(8),), torch.arange(8) % CLASSES)
    return Splits(part, part, part, part, tuple("abcde"))


def make_search(
    folder: Path, trials: int, before: Callable[[int], None] = lambda _count: None, **changes: Any
) -> Search:
    """A search of so many trials; `before(n)` is called when a plan with n 8-bit layers is deployed."""
    model = build("residual")
    layers = read_layers(model, (images(),))
    compressors: dict[str, Compressor] = {"quantize": Quantize()}
    evaluators: dict[str, Evaluator] = {"counting": Counting()}
    runtime = CountingRuntime(before=before)
    groups = {"quantize": compressors["quantize"].groups(model, (images(),))}
    bits = {"choices": [8, 32], "granularity": "layer"}
    space = build_space({"quantize": {"bits": bits}}, compressors, groups, layers, {"fake": runtime})
    workload = Workload("residual-noise", model, splits(), classification())
    fields: dict[str, Any] = {
        "name": "test",
        "workbench": Workbench(workload, compressors, {"fake": runtime}, evaluators, {"cpu": "x"}, folder / "cache"),
        "layers": layers,
        "space": space,
        "objectives": (ACCURACY, RATIO),
        "bounds": (),
        "budget": Budget(trials=trials),
        "sampler": lambda seed: optuna.samplers.RandomSampler(seed=seed),
        "storage": f"sqlite:///{folder}/optuna.db",
        "tracker": Tracker(f"sqlite:///{folder}/mlflow.db", str(folder / "mlartifacts")),
        "rule": Fastest(drop=0.02),
        "folder": folder,
        "fingerprint": {"model": "a", "space": space.digest},
        "config": "study: test\n",
        "quality": "accuracy",
    }
    return Search(**{**fields, **changes})


def quiet(progress: Progress) -> None:
    """A watcher that looks away."""


def refuse(reason: str, count: int) -> Callable[[int], None]:
    def check(found: int) -> None:
        if found == count:
            raise Infeasible(reason)

    return check


def main(folder: str, marker: str) -> None:
    """For a process that is to be killed: says when it works on its third trial, and then takes for ever."""

    def hang(count: int) -> None:
        Path(marker).write_text(str(count))
        if count == 1:
            time.sleep(600)

    from search.loop import run

    run(make_search(Path(folder), 8, hang), quiet)


def run_slowly(folder: Path, trials: int) -> None:
    """One of several workers on the same study: slow enough for the other to take its share."""
    from search.loop import run

    run(make_search(folder, trials, lambda _count: time.sleep(0.3)), quiet)


def optuna_trials(folder: Path, *states: TrialState) -> list[FrozenTrial]:
    """Of the study that `make_search` makes."""
    study = optuna.load_study(study_name="test", storage=f"sqlite:///{folder}/optuna.db")
    return study.get_trials(states=states or None)


def digests(folder: Path) -> list[str]:
    """Of the plans that did work."""
    done = optuna_trials(folder, TrialState.COMPLETE, TrialState.PRUNED)
    return [t.user_attrs["digest"] for t in done if "duplicate_of" not in t.user_attrs]
