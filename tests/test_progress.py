"""What a running search shows: one line a trial in a log, one live line on a screen."""

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from compressors.plan import CompressionPlan, Target
from evaluators.measurement import Metric, exact
from search.progress import ProgressView
from search.study import Budget, Progress
from search.training import TrainingProgress
from search.trial import Stop, TrialRecord
from search.view import View
from tests.studies import ACCURACY, RATIO


@pytest.fixture(autouse=True)
def a_real_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever these tests are started from: a dumb one shows no bars."""
    monkeypatch.setenv("TERM", "xterm")


def record(number: int, accuracy: float = 0.9, ratio: float = 0.5, infeasible: str | None = None) -> TrialRecord:
    measurements = () if infeasible else (exact(ACCURACY, accuracy), exact(RATIO, ratio))
    return TrialRecord(number, CompressionPlan(Target("fake", "fp32")), measurements, infeasible, {}, {}, {})


def progress(*records: TrialRecord, **changes: Any) -> Progress:
    front = [r for r in records if r.measured]
    fields: dict[str, Any] = {"phase": "", "elapsed_s": 60.0, "duplicates": 0, "budget": Budget(10)}
    return Progress(**{"done": len(records), "records": records, "front": front, **fields, **changes})


def shown(*seen: Progress, terminal: bool = False, quality: str = "accuracy") -> list[str]:
    console = Console(width=200, file=io.StringIO(), force_terminal=terminal, color_system=None)
    with ProgressView(console, View(quality)) as view:
        for one in seen:
            view(one)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_log_has_one_line_for_each_trial_and_none_for_its_phases() -> None:
    first = record(0)
    seen = (progress(phase="compress"), progress(first), progress(first, phase="deploy"), progress(first, record(1)))
    assert len(shown(*seen)) == 2


def test_a_line_says_how_many_how_good_and_how_long() -> None:
    (line,) = shown(progress(record(0, 0.98, 1.0), record(3, 0.96, 0.25)))
    assert line == (
        "trials 2/10 | front 2 | best accuracy 98.0 %, fastest 4.00x | left 4:00 | trial 3: accuracy 96.0 %, 4.00x"
    )


def test_what_is_ruined_is_not_called_the_fastest() -> None:
    (line,) = shown(progress(record(0, 0.98, 1.0), record(1, 0.98, 0.5), record(3, 0.1, 0.25)))
    assert "front 3 | best accuracy 98.0 %, fastest 2.00x |" in line


def test_an_infeasible_trial_says_why() -> None:
    (line,) = shown(progress(record(0, infeasible="no kernel for [3] bits")))
    assert line.endswith("front 0 | left 9:00 | trial 0: infeasible, no kernel for [3] bits")


def test_a_stopped_trial_says_where_and_why() -> None:
    stop = Stop("preview 25 %", "accuracy", (0.5, 0.7), "trial 1 dominates its best case")
    (line,) = shown(progress(record(0), replace(record(3), stopped=stop)))
    assert line.endswith("trial 3: stopped at preview 25 %, trial 1 dominates its best case")


@pytest.mark.parametrize(
    ("budget", "left"),
    [(Budget(10), "9:00"), (Budget(minutes=3), "2:00"), (Budget(10, 3), "2:00"), (Budget(minutes=0.5), "0:00")],
)
def test_the_nearer_budget_says_what_is_left(budget: Budget, left: str) -> None:
    (line,) = shown(progress(record(0), budget=budget))
    assert f"left {left} " in line


def test_before_the_first_trial_nobody_knows_what_is_left() -> None:
    said = "\n".join(shown(progress(phase="compress"), terminal=True))
    assert "trials 0/10 | front 0 | left ? | compress" in said


def test_a_quality_that_is_no_share_is_shown_as_it_is() -> None:
    score = Metric("score", "user's", "maximize")
    plan = CompressionPlan(Target("fake", "fp32"))
    one = TrialRecord(0, plan, (exact(score, -1.25), exact(RATIO, 0.5)), None, {}, {}, {})
    (line,) = shown(progress(one), quality="score")
    assert "best score -1.25, fastest 2.00x" in line


@pytest.mark.parametrize("terminal", [False, True])
def test_training_is_a_bar_on_a_screen_and_ten_lines_in_a_log(terminal: bool) -> None:
    console = Console(width=120, file=io.StringIO(), force_terminal=terminal, color_system=None)
    with ProgressView(console, View("accuracy")) as view:
        for step in range(1, 201):
            view.training(TrainingProgress(step, 200, step // 20, 10, 0.5, 0.75 if step >= 20 else None))
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    if not terminal:
        assert len(said.splitlines()) == 10
        assert "[##..................] step 20/200, loss 0.500, calibration accuracy 75.0 %" in said
    assert "[####################] step 200/200" in said


def test_a_phase_is_shown_on_a_screen_only() -> None:
    for terminal in (False, True):
        console = Console(width=80, file=io.StringIO(), force_terminal=terminal, color_system=None)
        with ProgressView(console, View("accuracy")) as view:
            view.phase("deploy")
        assert isinstance(console.file, io.StringIO)
        assert ("deploy" in console.file.getvalue()) is terminal
