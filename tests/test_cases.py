from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from compressors.errors import ConfigError
from compressors.plan import CompressionPlan, Step, Target
from evaluators.measurement import Measurement, Metric, exact
from scripts.cases import CASES, CHAMPION, HEADINGS, SMALLEST, UNCOMPRESSED, UNIFORM, Version, faster, read, table
from search.__main__ import search
from search.build import compose
from search.trial import TrialRecord

ACCURACY, SIZE = Metric("accuracy", "share", "maximize"), Metric("size_bytes", "bytes", "minimize")
RATIO = Metric("latency_ratio", "of reference", "minimize")


def latency(value: float, factor: float = 1.1) -> Measurement:
    return Measurement(RATIO, value, (value / factor, value * factor), 24, {})


def version(target: Target, ratio: float, *roles: str, steps: Sequence[Step] = ()) -> Version:
    measured = (exact(ACCURACY, 0.9), latency(ratio), exact(SIZE, 2e6))
    record = TrialRecord(0, CompressionPlan(target, tuple(steps)), measured, None, {}, {}, {})
    return Version(roles, record, replace(exact(ACCURACY, 0.8), interval=(0.7, 0.9)), 1_500_000)


def cells(versions: Sequence[Version]) -> list[list[str]]:
    rows = [line.strip("| ").split(" | ") for line in table("the command", versions) if line.startswith("| ")]
    assert [len(row) for row in rows] == [len(HEADINGS)] * len(rows)
    return rows[2:]


def test_a_version_is_compared_with_torch_and_with_the_fastest_uncompressed_of_its_runtime() -> None:
    torch, fp32, bf16, other, int8 = cells(
        [
            version(Target("torch", "fp32"), 2.0, UNCOMPRESSED),
            version(Target("openvino", "fp32"), 0.8, UNCOMPRESSED),
            version(Target("openvino", "bf16"), 0.4, UNCOMPRESSED),
            version(Target("onnxruntime", "fp32"), 1.0, UNCOMPRESSED),
            version(Target("openvino", "bf16"), 0.1, CHAMPION, SMALLEST, steps=[Step("quantize")]),
        ]
    )
    assert torch[0] == "uncompressed, torch fp32"
    assert torch[4] == torch[5] == "1x"
    assert fp32[5].startswith("0.50x")
    assert bf16[0] == "uncompressed, openvino bf16 (the fastest uncompressed)"
    assert bf16[4].startswith("5.00x")
    assert other[5] == "1x"
    assert int8[0] == "champion, smallest within 1 point: quantize, openvino bf16"
    assert [cell.split()[0] for cell in int8[3:]] == ["0.100", "20.00x", "4.00x", "2.00", "1.50"]
    assert int8[2] == "80.0 % [70.0, 90.0]"


def test_two_bands_add_up_as_those_of_independent_readings_do() -> None:
    assert faster(latency(0.5, 1.0), latency(1.0, 1.1)) == "2.00x [1.82, 2.20]"
    assert faster(latency(0.5), latency(1.0)) == "2.00x [1.75, 2.29]", "1.1 to the power of the root of two"


def options(store: Path, *more: str) -> list[str]:
    timing = [f"evaluator.latency.{name}={n}" for name, n in (("sessions", 2), ("rounds", 1), ("drift", 9))]
    training = ["data.size=8", "model.training.epochs=1", "compressor=[quantize]", "study=case"]
    return [f"folder={store}", f"cache={store.parent}/cache", "limits=null", *training, *timing, *more]


def test_the_table_of_a_search(store: Path) -> None:
    words = options(store, "budget.trials=3", "budget.minutes=null", "runtime=[onnxruntime]")
    search(compose(words), Console(quiet=True))
    versions = read(words)
    roles = {role: version for version in versions for role in version.roles}
    assert roles.keys() == {UNCOMPRESSED, UNIFORM, CHAMPION, SMALLEST}
    assert [v.runtime for v in versions if UNCOMPRESSED in v.roles] == ["torch", "onnxruntime"]
    torch, onnxruntime = (v for v in versions if UNCOMPRESSED in v.roles)
    assert torch.record.value("accuracy") == onnxruntime.record.value("accuracy")
    assert torch.test == onnxruntime.test
    assert torch.test.n == 360
    assert torch.parameters == 272_186
    assert torch.record.value("size_bytes").value > 4 * torch.parameters
    sizes = {role: version.record.value("size_bytes").value for role, version in roles.items()}
    assert sizes[SMALLEST] <= sizes[CHAMPION]
    assert sizes[UNIFORM] < sizes[UNCOMPRESSED]
    assert len(cells(versions)) == len(versions)


def test_a_search_that_was_stopped_has_no_table(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = options(store, "budget.trials=1", "budget.minutes=null", "runtime=[onnxruntime]")
    search(compose(words), Console(quiet=True))
    monkeypatch.setattr("search.tracking.Tracker.read_study_file", lambda *_: None)
    with pytest.raises(ConfigError, match="case has not ended"):
        read(words)


@pytest.mark.parametrize("case", CASES[:2])
def test_a_case_trains_its_network_and_searches_what_the_default_search_does(case: str) -> None:
    config = compose([f"experiment={case}"])
    OmegaConf.resolve(config)
    assert config.model.network.name.startswith(case)
    assert config.study == f"{case}-fashion_mnist"
    assert config.model.training.precision == "auto"
    assert list(config.compressor) == ["depth", "prune", "distill", "quantize"]
    assert (config.data.size, config.data.train, config.budget.minutes) == (64, 20_000, 20)
