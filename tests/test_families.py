from dataclasses import replace

from compressors.plan import CompressionPlan, Step, Target
from evaluators.measurement import Measurement, Metric, exact
from evaluators.parameters import Parameters
from scripts.families import FAMILIES, JOINT, Found, _lines
from search import build
from search.trial import TrialRecord

METRICS = (Metric("accuracy", "share", "maximize"), Metric("latency_ratio", "of reference", "minimize"))
SIZE, (PARAMETERS,) = Metric("size_bytes", "bytes", "minimize"), Parameters().metrics()


def trial(number: int, accuracy: float, ratio: float, size: float, *steps: Step) -> TrialRecord:
    near = [Measurement(m, x, (x - 0.01, x + 0.01), 100, {}) for m, x in zip(METRICS, (accuracy, ratio), strict=True)]
    plan = CompressionPlan(Target("openvino", "fp32"), steps)
    return TrialRecord(number, plan, (*near, exact(SIZE, size), exact(PARAMETERS, size / 4)), None, {}, {}, {})


BASE = trial(0, 0.95, 1.0, 1e6)
SMALL = trial(1, 0.945, 0.9, 2e5, Step("cluster", {"a": {"clusters": 16}}))
FAST = trial(2, 0.93, 0.2, 5e5, Step("quantize", {"a": {"bits": 8}}))


def found(family: str, *front: TrialRecord) -> Found:
    return Found(family, 9, front, front[0], BASE, front[0].value("accuracy"))


def test_the_smallest_has_lost_little_or_nothing() -> None:
    assert found(JOINT, SMALL, FAST).smallest is SMALL
    assert found(JOINT, FAST).smallest is BASE


def test_a_member_counts_as_covered_by_one_that_is_nowhere_clearly_worse() -> None:
    joint = found(JOINT, trial(3, 0.94, 0.205, 5e5), trial(4, 0.94, 0.9, 3e5))
    assert found("quantization", FAST).covered_by(joint) == 1, "within the bands of accuracy and latency"
    assert found("clustering", SMALL).covered_by(joint) == 0, "it is smaller, and bytes are exact"
    assert found("clustering", SMALL, FAST).covered_by(replace(joint, front=[*joint.front, SMALL])) == 2


def test_the_table_has_a_row_for_each_family() -> None:
    lines = list(_lines([found("quantization", FAST), found(JOINT, SMALL, FAST)], "the command"))
    rows = [line.split(" | ") for line in lines if line.startswith(("| quantization", "| joint"))]
    assert [row[5:7] for row in rows] == [["500 kB", "125.0 k"], ["200 kB", "50.0 k"]]
    assert rows[0][4] == "5.00x [4.76, 5.26]"
    assert rows[0][-1].rstrip(" |") == "1 of 1"


def test_every_family_is_an_experiment_with_a_study_of_its_own() -> None:
    studies = {str(build.compose([f"experiment={family}"]).study) for family in FAMILIES}
    assert len(studies) == len(FAMILIES)
