"""After the search: one champion, the test split opened once, and everything safe to repeat."""

import io
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from rich.console import Console

import compareto
from evaluators.evaluation import Examples
from evaluators.measurement import Measurement
from evaluators.runtime import Deployed
from search.conclude import Conclusion, Selection, conclude, reselect, show, surrogate_errors
from search.loop import run
from search.select import Fastest, MostAccurate, Rule
from search.study import Outcome, Search
from tests.studies import Counting, make_search, quiet


@dataclass(frozen=True)
class Spy(Counting):
    """Remembers which split it was asked to measure on."""

    splits: list[str] = field(default_factory=list)

    def measure(self, deployed: Deployed, reference: Deployed, examples: Examples) -> Sequence[Measurement]:
        self.splits.append(examples.split)
        return super().measure(deployed, reference, examples)


@dataclass(frozen=True)
class Finished:
    """A study that was searched to its end and concluded once."""

    search: Search
    outcome: Outcome
    conclusion: Conclusion
    spy: Spy
    opened: tuple[str, ...]

    def again(self, rule: Rule) -> Conclusion:
        """The pictures are drawn already."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("search.conclude.draw", lambda *_: [])
            return conclude(replace(self.search, rule=rule), self.outcome)

    def select(self, rule: Rule) -> Conclusion:
        search = self.search
        runtimes = search.workbench.runtimes
        names = [metric.name for metric in search.objectives]
        return reselect(Selection(search.name, search.tracker, rule, names, (), runtimes, search.quality))

    def versions(self) -> int:
        return len(self.search.tracker._client.search_model_versions(f"name = '{self.search.name}'"))


@pytest.fixture(scope="module")
def finished(mlflow_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("concluded")
    shutil.copy(mlflow_template, folder / "mlflow.db")
    search, spy = make_search(folder, 4), Spy()
    search = replace(search, workbench=replace(search.workbench, evaluators={"counting": spy}))
    outcome = run(search, quiet)
    conclusion = conclude(search, outcome)
    return Finished(search, outcome, conclusion, spy, tuple(spy.splits))


def text_of(conclusion: Conclusion) -> str:
    console = Console(width=140, file=io.StringIO())
    show(conclusion, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


LENIENT, BOLD = MostAccurate(bound=1.0), Fastest(drop=0.5)


def test_the_test_split_is_opened_once_for_the_champion_and_the_original(finished: Finished) -> None:
    assert finished.opened.count("test") == 2
    assert finished.opened[-2:] == ("test", "test")
    finished.again(BOLD)
    finished.again(finished.search.rule)
    assert finished.spy.splits.count("test") == 2


def test_only_the_champion_that_it_was_opened_for_has_a_test_result(finished: Finished) -> None:
    champion = finished.conclusion.choice.record
    assert set(finished.conclusion.test) == {"champion", "uncompressed"}
    assert finished.conclusion.test["champion"] == champion.value("accuracy")
    other = finished.again(BOLD)
    assert other.choice.record.number != champion.number
    assert set(other.test) == {f"trial {champion.number}, an earlier champion", "uncompressed"}
    assert finished.again(finished.search.rule).test == finished.conclusion.test


def test_the_champion_carries_the_alias_and_the_whole_front_is_registered(finished: Finished) -> None:
    again = finished.again(finished.search.rule)
    assert finished.search.tracker.champion(finished.outcome.study).number == again.choice.record.number
    assert finished.versions() == len({r.number for r in (*finished.outcome.front, again.choice.record)})


def test_the_surrogates_errors_are_those_of_what_was_predicted(finished: Finished) -> None:
    first, second, third = (replace(finished.outcome.front[0], number=number) for number in range(3))
    ratio = first.value("latency_ratio").value
    told = [
        replace(first, expected={"latency_ratio": 1.1 * ratio, "accuracy": 0.0}),
        replace(second, expected={"latency_ratio": 0.7 * ratio}),
        third,
    ]
    (line,) = surrogate_errors(told, "accuracy")
    assert line.startswith("latency_ratio as predicted before it was measured: 20.0 % off (median), 30.0 % at most")
    assert line.endswith("for 2 of 3 front members")
    assert surrogate_errors([third], "accuracy") == []


def test_pictures_and_tables_lie_in_the_folder_and_in_the_tracker(finished: Finished) -> None:
    names = [path.name for path in finished.conclusion.files]
    assert names == ["pareto.png", "pareto.html", "layers.png", "report.json"]
    assert all(path.stat().st_size for path in finished.conclusion.files)
    study = finished.outcome.study
    assert finished.search.tracker.read_study_file(study, "report.json") == finished.conclusion.files[3].read_text()


@pytest.mark.parametrize("rule", [LENIENT, BOLD])
def test_selecting_again_moves_the_alias_and_nothing_else(rule: Rule, finished: Finished) -> None:
    before, seen = finished.versions(), len(finished.spy.splits)
    selected = finished.select(rule)
    assert finished.search.tracker.champion(finished.outcome.study).number == selected.choice.record.number
    assert (finished.versions(), len(finished.spy.splits)) == (before, seen)
    assert selected.outcome.front == finished.outcome.front
    assert selected.files == ()


def test_what_is_shown_says_who_why_and_where(finished: Finished) -> None:
    said = text_of(finished.conclusion)
    champion = finished.conclusion.choice.record
    assert f"★ {champion.number}" in said
    assert f"champion: trial {champion.number}, fastest with at most 0.02 of accuracy lost" in said
    assert "on the test split, champion: accuracy " in said
    assert f"picture: {finished.search.folder}/test/pareto.png" in said
    assert "budget spent: 4 of 4 trials" in said
    assert finished.conclusion.link in said


def test_when_nothing_meets_the_rule_the_nearest_is_shown_as_that(finished: Finished) -> None:
    said = text_of(finished.select(MostAccurate(bound=1e-6)))
    assert "no candidate has latency_ratio at most 1e-06: the nearest" in said
    assert "nothing meets the rule: this is the nearest" in said
    assert "an earlier champion: accuracy" in said
    assert "nothing was run" in said


def test_select_and_reproduce_on_the_command_line_read_the_same_store(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = [f"folder={finished.search.folder}", "study=test", "model.name=residual", "data.name=noise"]

    def command(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["compareto", words[0], *where, *words[1:]])
        with pytest.raises(SystemExit) as ended:
            compareto.main()
        return int(str(ended.value.code))

    assert command("select", "rule=most_accurate", "rule.bound=1.0", "objectives=[accuracy,latency_ratio]") == 0
    assert "champion: trial 0, most accurate" in capsys.readouterr().out
    assert command("reproduce", "trial=999") == 2
    assert "trial: 999 is no finished trial of 'test'; take a number" in capsys.readouterr().err
    assert command("select", "objectives=[accuracy,latency_ratio,size_bytes]") == 2
    assert "metric size_bytes: was not measured in trial" in capsys.readouterr().err
