import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compressors.errors import ConfigError, Infeasible
from evaluators import latency as latency_module
from evaluators.evaluation import Examples
from evaluators.latency import Latency, band, early_band
from evaluators.memory import Memory
from evaluators.runtime import Array, Deployed
from evaluators.stopwatch import Reading, Stopwatch, Timing
from tests.fakes import FakeRuntime, deployed

X = np.zeros((4, 2), np.float32)
DATA = Examples("validation", (X,), None, X)
TIMING = Timing(batch=1, threads=1, sessions=2, rounds=3, warmup=1, calls=3, seconds=5)


def test_the_ratio_of_a_file_that_is_four_times_faster(tmp_path: Path) -> None:
    fast, slow = deployed(FakeRuntime(seconds=0.005), tmp_path), deployed(FakeRuntime(seconds=0.02), tmp_path)
    timer = Latency(sessions=2, rounds=3, warmup=1, calls=3, drift=0.5)
    try:
        ratio, milliseconds = timer.measure(fast, slow, DATA)
    finally:
        timer.close()
    # Sleeping takes its time however busy the machine is.
    assert ratio.value == pytest.approx(0.25, rel=0.15)
    assert milliseconds.value == pytest.approx(5.0, rel=0.2)
    assert ratio.interval[0] <= ratio.value <= ratio.interval[1]
    assert ratio.n == 6
    assert ratio.conditions["reference"] == "fake fp32"


def test_the_timing_process_starts_again_after_it_was_killed(tmp_path: Path) -> None:
    file = deployed(FakeRuntime(seconds=0.0005), tmp_path)
    watch = Stopwatch(core=-1)
    try:
        assert len(watch.read(file, file, ([X[:1]], [X[:1]]), TIMING).ratios) == 2
        assert watch._process is not None
        os.kill(watch._process.pid, signal.SIGKILL)
        watch._process.wait()
        with pytest.raises(Infeasible, match="died with exit code -9"):
            watch.read(file, file, ([X[:1]], [X[:1]]), TIMING)
        assert len(watch.read(file, file, ([X[:1]], [X[:1]]), TIMING).ratios) == 2
    finally:
        watch.close()


def test_a_file_that_cannot_be_loaded_is_infeasible_and_the_process_lives(tmp_path: Path) -> None:
    good, bad = deployed(FakeRuntime(), tmp_path), deployed(FakeRuntime(scale=2.0), tmp_path)
    (bad.folder / "model.json").write_text("{")
    watch = Stopwatch(core=-1)
    try:
        with pytest.raises(Infeasible, match="JSONDecodeError"):
            watch.read(bad, good, ([X[:1]], [X[:1]]), TIMING)
        assert watch.read(good, good, ([X[:1]], [X[:1]]), TIMING).candidate_ms > 0
    finally:
        watch.close()


class Scripted:
    """A stopwatch that reads prepared reference times."""

    def __init__(self, reference_ms: list[float]) -> None:
        self.left = reference_ms
        self.asked: list[int] = []

    def read(self, candidate: Deployed, reference: Deployed, inputs: Sequence[Array], timing: Timing) -> Reading:
        seconds = self.left.pop(0) / 1e3
        self.asked.append(timing.sessions)
        return Reading((((seconds, seconds / 2),) * 2,) * timing.sessions)


@pytest.fixture
def no_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _s: None)


def scripted(reference_ms: list[float]) -> Latency:
    timer = Latency(retries=4)
    timer._stopwatch = Scripted(reference_ms)  # type: ignore[assignment]
    return timer


def test_a_reading_with_a_drifting_reference_is_thrown_away(tmp_path: Path, no_sleep: None) -> None:
    file = deployed(FakeRuntime(), tmp_path)
    timer = scripted([1.0, 1.3, 1.02])
    timer.measure(file, file, DATA)
    ratio, _ = timer.measure(file, file, DATA)
    assert ratio.conditions["reference_ms"] == pytest.approx(1.02)


def test_a_machine_that_settled_at_a_new_speed_is_believed(tmp_path: Path, no_sleep: None) -> None:
    file = deployed(FakeRuntime(), tmp_path)
    timer = scripted([1.0, 1.30, 1.31, 1.29, 1.32])
    timer.measure(file, file, DATA)
    assert timer.measure(file, file, DATA)[0].conditions["reference_ms"] == pytest.approx(1.29)
    assert timer.measure(file, file, DATA)[0].conditions["reference_ms"] == pytest.approx(1.32)


def test_a_reference_that_was_calibrated_in_a_slow_moment_is_calibrated_again(tmp_path: Path, no_sleep: None) -> None:
    file = deployed(FakeRuntime(), tmp_path)
    timer = scripted([1.3, 1.0, 1.3, 1.02])
    timer.measure(file, file, DATA)
    assert timer.measure(file, file, DATA)[0].conditions["reference_ms"] == pytest.approx(1.0)
    # By the standard of before, this one would have been good.
    assert timer.measure(file, file, DATA)[0].conditions["reference_ms"] == pytest.approx(1.02)


def test_a_machine_that_never_settles_gives_no_number(tmp_path: Path, no_sleep: None) -> None:
    file = deployed(FakeRuntime(), tmp_path)
    timer = scripted([1.0, 1.3, 2.0, 1.5, 3.0])
    timer.measure(file, file, DATA)
    with pytest.raises(Infeasible, match="too busy"):
        timer.measure(file, file, DATA)


def test_the_band_covers_a_further_session_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        sessions = [
            [math.exp(shift + rng.normal(0, 0.01)) for _ in range(6)]
            for shift in (rng.normal(0, 0.02) for _ in range(4))
        ]
        shift = rng.normal(0, 0.02)
        further = statistics.median(math.exp(shift + rng.normal(0, 0.01)) for _ in range(6))
        low, _, high = band(sessions)
        covered += bool(low <= further <= high)
    assert 0.92 <= covered / 1000 <= 0.99


def test_a_full_measurement_times_only_what_its_previews_have_not(tmp_path: Path) -> None:
    file = deployed(FakeRuntime(), tmp_path)
    timer = scripted([1.0] * 4)
    widths = []
    for share in (0.25, 0.5):
        (ratio, milliseconds) = timer.preview(file, file, DATA, share)
        assert ratio.conditions["sessions"] == milliseconds.conditions["sessions"] == 4 * share
        widths.append(ratio.interval[1] - ratio.interval[0])
    ratio, _ = timer.measure(file, file, DATA)
    assert ratio.conditions["sessions"] == 4
    assert widths[0] > widths[1] > ratio.interval[1] - ratio.interval[0]
    assert isinstance(timer._stopwatch, Scripted)
    assert timer._stopwatch.asked == [1, 1, 2]
    # A second measurement of the same file is a new one.
    timer.measure(file, file, DATA)
    assert timer._stopwatch.asked == [1, 1, 2, 4]


def test_sessions_of_one_file_are_not_taken_for_those_of_another(tmp_path: Path) -> None:
    first, second = deployed(FakeRuntime(), tmp_path), deployed(FakeRuntime(2.0), tmp_path)
    timer = scripted([1.0] * 2)
    timer.preview(first, first, DATA, 0.25)
    timer.measure(second, first, DATA)
    assert isinstance(timer._stopwatch, Scripted)
    assert timer._stopwatch.asked == [1, 4]


@pytest.mark.parametrize("count", [1, 2])
def test_an_early_band_holds_what_all_sessions_will_say(count: int) -> None:
    """With sessions as far apart as the same files in other processes were seen to be: 3.4 % rms."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        sessions = [
            [math.exp(shift + rng.normal(0, 0.01)) for _ in range(6)]
            for shift in (rng.normal(0, 0.034) for _ in range(4))
        ]
        low, _, high = early_band(sessions[:count], 0.06)
        held += bool(low <= band(sessions)[1] <= high)
    assert held / 1000 >= 0.95


def test_sessions_that_disagree_widen_an_early_band() -> None:
    low, value, high = early_band([[1.0] * 6, [2.0] * 6], 0.06)
    assert (low, value, high) == pytest.approx((0.75, 1.5, 3.0))


def test_one_reading_at_a_time_on_a_host() -> None:
    order: list[str] = []

    def hold() -> None:
        with latency_module._host_lock():
            order.append("held")
            time.sleep(0.2)
            order.append("released")

    thread = threading.Thread(target=hold)
    thread.start()
    time.sleep(0.05)
    with latency_module._host_lock():
        order.append("mine")
    thread.join()
    assert order == ["held", "released", "mine"]


def test_memory_is_measured_in_processes_of_their_own(tmp_path: Path) -> None:
    file = deployed(FakeRuntime(), tmp_path)
    (found,) = Memory(processes=2).measure(file, file, DATA)
    assert found.n == 2
    assert 0 <= found.interval[0] <= found.value <= found.interval[1] < 500e6


def test_memory_of_a_broken_file_is_infeasible(tmp_path: Path) -> None:
    file = deployed(FakeRuntime(), tmp_path)
    (file.folder / "model.json").write_text("{")
    with pytest.raises(Infeasible, match="exit code 1: json"):
        Memory(processes=1).measure(file, file, DATA)


@pytest.mark.parametrize("wrong", [{"sessions": 1}, {"rounds": 0}, {"calls": 0}, {"batch": 0}, {"warmup": -1}])
def test_counts_that_would_time_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"evaluator\.latency\.{next(iter(wrong))}: is"):
        Latency(**wrong)


def test_a_second_latency_has_names_of_its_own() -> None:
    assert [metric.name for metric in Latency(name="batched").metrics()] == ["batched_ratio", "batched_ms"]
    with pytest.raises(ConfigError, match=r"evaluator\.batched\.batch: is 0"):
        Latency(name="batched", batch=0)
