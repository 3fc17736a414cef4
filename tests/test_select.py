from dataclasses import replace
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from compressors.errors import ConfigError
from compressors.plan import CompressionPlan, Step, Target
from evaluators.measurement import Measurement, Metric, exact
from search.select import Bound, Fastest, Knee, MostAccurate, Rule, Smallest, baselines, choose, front_of, useful
from search.trial import Stop, TrialRecord

ACCURACY = Metric("accuracy", "share", "maximize")
RATIO = Metric("latency_ratio", "ratio", "minimize")
SIZE = Metric("size_bytes", "bytes", "minimize")
NAMES = ("accuracy", "latency_ratio", "size_bytes")
RULES = sorted(Path("conf/rule").glob("*.yaml"))


def trial(
    number: int,
    accuracy: float,
    ratio: float,
    size: int = 1000,
    runtime: str = "openvino",
    precision: str = "fp32",
    compressed: bool = True,
) -> TrialRecord:
    steps = (Step("quantize", {"a": {"bits": 8}}),) if compressed else ()
    band = 0.02 * ratio
    measurements = (
        Measurement(ACCURACY, accuracy, (accuracy - 0.002, accuracy + 0.002), 1000),
        Measurement(RATIO, ratio, (ratio - band, ratio + band), 20),
        exact(SIZE, size),
    )
    plan = CompressionPlan(Target(runtime, precision), steps, number)
    return TrialRecord(number, plan, measurements, None, {}, {}, {})


FP32 = trial(0, 0.98, 1.0, 1000, compressed=False)
BF16 = trial(1, 0.979, 0.4, 1000, precision="bf16", compressed=False)
INT8 = trial(2, 0.975, 0.2, 260)
TINY = trial(3, 0.95, 0.1, 60)
SMALL_BUT_SLOW = trial(4, 0.98, 0.6, 250)
STUDY = [FP32, BF16, INT8, TINY, SMALL_BUT_SLOW]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Fastest(), INT8),
        (Fastest(drop=0.03), TINY),
        (Fastest(drop=0.0), FP32),
        (Smallest(drop=0.0), FP32),  # the one that is smaller is slower than bf16, which it could be
        (Smallest(), INT8),
        (MostAccurate(bound=0.5), BF16),
        (MostAccurate(bound=0.15), TINY),
        (Knee(), INT8),
    ],
)
def test_each_rule_picks_what_it_says(rule: Rule, expected: TrialRecord) -> None:
    choice = choose(STUDY, rule, NAMES)
    assert choice.record == expected
    assert choice.met


def test_of_use_is_what_is_not_clearly_slower_than_its_own_input() -> None:
    assert useful(STUDY, "latency_ratio") == [FP32, BF16, INT8, TINY]
    assert useful([SMALL_BUT_SLOW], "latency_ratio") == [SMALL_BUT_SLOW]


def test_a_stopped_trial_is_on_no_front_no_baseline_and_no_champion() -> None:
    stop = Stop("preview 25 %", "accuracy", (0.9, 0.99), "")
    best = replace(trial(5, 0.99, 0.05, 10), stopped=stop)
    assert best not in front_of([*STUDY, best], NAMES)
    assert choose([*STUDY, best], Fastest(), NAMES).record == INT8
    assert baselines([replace(FP32, stopped=stop), BF16]) == [BF16]


def test_the_reason_names_rule_and_finding() -> None:
    assert choose(STUDY, Fastest(), NAMES).reason == (
        "fastest with at most 0.01 of accuracy lost: latency_ratio 0.2, 0.005 lost"
    )


def test_when_nothing_meets_the_bar_the_nearest_is_handed_back() -> None:
    choice = choose(STUDY, MostAccurate(bound=0.05), NAMES)
    assert (choice.record, choice.met) == (TINY, False)
    assert choice.reason.endswith("the nearest, trial 3, has 0.1, 0.05 too much")


def test_a_drop_that_nothing_within_the_bounds_keeps_is_not_met() -> None:
    choice = choose(STUDY, Fastest(drop=0.01), NAMES, [Bound("size_bytes", 100)])
    assert (choice.record, choice.met) == (TINY, False)
    assert "trial 3, loses 0.03, 0.02 too much" in choice.reason


def test_a_drop_of_exactly_the_bar_meets_it() -> None:
    assert choose([FP32, trial(2, 0.97, 0.2)], Fastest(drop=0.01), NAMES).record.number == 2


def test_nothing_slower_than_its_input_even_if_it_is_alone_on_the_front() -> None:
    # Smaller than its input, and far slower: on the front, and still not worth deploying.
    slow = trial(2, 0.99, 2.0, 10)
    assert choose([FP32, slow], Smallest(), NAMES).record == FP32


def test_each_runtime_is_compared_with_its_own_input() -> None:
    elsewhere = trial(5, 0.98, 0.9, compressed=False, runtime="onnxruntime")
    compressed = trial(6, 0.98, 0.7, 100, runtime="onnxruntime")
    assert choose([*STUDY, elsewhere, compressed], Smallest(drop=0.0), NAMES).record == compressed


def test_a_slightly_slower_reading_within_the_bands_is_not_slower() -> None:
    close = trial(2, 0.981, 1.01, 500)
    assert choose([FP32, close], Smallest(), NAMES).record == close


def test_the_drop_is_measured_from_the_first_fp32_baseline() -> None:
    worse = trial(7, 0.90, 1.2, compressed=False, runtime="onnxruntime")
    assert baselines([worse, BF16, FP32, INT8]) == [FP32, BF16, worse]
    assert choose([worse, *STUDY], Fastest(), NAMES).record == INT8


def test_bounds_narrow_the_front() -> None:
    bound = Bound("size_bytes", 100)
    assert front_of(STUDY, NAMES, [bound]) == [TINY]
    assert choose(STUDY, Fastest(drop=0.05), NAMES, [bound]).record == TINY
    assert [bound.violation(INT8), Bound("accuracy", 0.98).violation(INT8)] == pytest.approx([160, 0.005])


def test_bounds_that_nothing_keeps_are_reported() -> None:
    choice = choose(STUDY, Fastest(), NAMES, [Bound("size_bytes", 50)])
    assert (choice.record, choice.met) == (INT8, False)
    assert choice.reason.startswith("nothing is within the bounds (size_bytes 50); without them, fastest")


def test_the_front_of_nothing_is_empty() -> None:
    assert front_of([], NAMES) == []


@pytest.mark.parametrize("records", [[], [TrialRecord(0, FP32.plan, (), "refused", {}, {}, {})]])
def test_nothing_measured_is_refused(records: list[TrialRecord]) -> None:
    with pytest.raises(ConfigError, match="no measured trial"):
        choose(records, Fastest(), NAMES)


def test_a_metric_that_was_not_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"fidelity.*was not measured.*accuracy"):
        choose(STUDY, Fastest(quality="fidelity"), NAMES)


def test_a_study_without_an_uncompressed_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="uncompressed"):
        choose([INT8], Fastest(), NAMES)


@pytest.mark.parametrize("make", [lambda: Fastest(drop=-1), lambda: Smallest(drop=-1), lambda: MostAccurate(bound=0)])
def test_a_bar_that_makes_no_sense_is_refused(make: type) -> None:
    with pytest.raises(ConfigError, match="rule"):
        make()


@pytest.mark.parametrize("path", RULES, ids=[path.stem for path in RULES])
def test_every_rule_of_the_configuration_chooses(path: Path) -> None:
    config = OmegaConf.merge({"quality": "accuracy"}, {"rule": OmegaConf.load(path)})
    rule = instantiate(config.rule)
    assert choose(STUDY, rule, NAMES).record in STUDY


def test_no_quality_is_given_away_for_a_speed_within_the_bands() -> None:
    a_hair_faster = trial(5, 0.971, 0.199, 255)
    assert choose([*STUDY, a_hair_faster], Fastest(), NAMES).record == INT8


def test_the_wide_band_of_the_fastest_does_not_excuse_what_another_one_clearly_beats() -> None:
    uncertain, steady, slow = trial(5, 0.975, 0.19), trial(6, 0.976, 0.2), trial(7, 0.979, 0.25)
    wide = Measurement(RATIO, 0.19, (0.12, 0.3), 20)
    uncertain = replace(uncertain, measurements=(uncertain.measurements[0], wide, uncertain.measurements[2]))
    assert choose([FP32, uncertain, steady, slow], Fastest(), NAMES).record is steady


def test_a_wide_band_of_its_own_does_not_excuse_what_reads_much_slower() -> None:
    fast, uncertain = trial(5, 0.975, 0.2), trial(6, 0.979, 0.3)
    wide = Measurement(RATIO, 0.3, (0.203, 0.44), 20)
    uncertain = replace(uncertain, measurements=(uncertain.measurements[0], wide, uncertain.measurements[2]))
    assert not fast.value("latency_ratio").clearly_better(wide)
    assert choose([FP32, fast, uncertain], Fastest(), NAMES).record is fast


def test_within_the_bands_nothing_that_reads_slower_than_the_uncompressed_model() -> None:
    slower = trial(1, 0.981, 1.03, 1000, precision="bf16", compressed=False)
    assert not FP32.value("latency_ratio").clearly_better(slower.value("latency_ratio"))
    assert choose([FP32, slower], Fastest(), NAMES).record == FP32
