"""One search per family of methods and one of all together under one budget, and a table of what they found."""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from compressors.errors import ConfigError
from evaluators.measurement import Measurement
from search import build
from search.conclude import TEST_FILE
from search.records import measurement_from
from search.select import front_of
from search.tracking import Tracker
from search.trial import TrialRecord
from search.view import describe, quality_text, scaled

ROOT = Path(__file__).parents[1]
JOINT = "joint"
FAMILIES = ("quantization", "clustering", "pruning", "lowrank", "separable", "distillation", JOINT)
OBJECTIVES = ("accuracy", "latency_ratio", "size_bytes")
HEADINGS = (
    *("family", "trials", "champion", "its accuracy on test", "its speed-up", "its size", "its parameters"),
    *("smallest that lost at most 1 point", "like the joint front"),
)
EVALUATORS = "evaluator=[accuracy,latency,size,parameters]"
LOST = 0.01
"""Of the accuracy on validation, what the smallest version shown may have lost."""


@dataclass(frozen=True)
class Found:
    """What the search of one family came to; the front is the validation split's, `test` the champion's accuracy."""

    family: str
    trials: int
    front: Sequence[TrialRecord]
    champion: TrialRecord
    uncompressed: TrialRecord
    test: Measurement

    @property
    def smallest(self) -> TrialRecord:
        """Of the front members that lost at most `LOST`; the uncompressed model always is a candidate."""
        least = self.uncompressed.value("accuracy").value - LOST
        good = [r for r in (*self.front, self.uncompressed) if r.value("accuracy").value >= least]
        return min(good, key=lambda r: r.value("size_bytes").value)

    def covered_by(self, other: "Found") -> int:
        """How many front members are clearly better in nothing than some one member of the other front."""
        return sum(any(_covers(theirs, mine) for theirs in other.front) for mine in self.front)


def _covers(one: TrialRecord, other: TrialRecord) -> bool:
    pairs = zip(other.values(OBJECTIVES), one.values(OBJECTIVES), strict=True)
    return not any(theirs.clearly_better(mine) for theirs, mine in pairs)


def main(arguments: Sequence[str]) -> None:
    """`families --minutes 4 [option=value ...]`: search, then write `summary.md`; studies that are done stay."""
    parser = argparse.ArgumentParser("scripts/bench.py families", description=__doc__)
    parser.add_argument("options", nargs="*", help="option=value of every search, such as data=fashion_mnist")
    parser.add_argument("--minutes", type=float, default=5.0, help="of every search")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/families")
    wanted = parser.parse_args(arguments)
    wanted.out.mkdir(parents=True, exist_ok=True)
    command = f"scripts/bench.py families --minutes {wanted.minutes:g} {' '.join(wanted.options)}".rstrip()
    found = []
    for family in FAMILIES:
        options = [f"experiment={family}", EVALUATORS, f"budget.minutes={wanted.minutes:g}", *wanted.options]
        with (wanted.out / f"{family}.log").open("w") as log:
            words = [sys.executable, "-m", "compareto", "search", *options]
            subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, check=True, cwd=ROOT)
        found.append(read(family, options))
    (wanted.out / "summary.md").write_text("\n".join(_lines(found, command)) + "\n")


def read(family: str, options: Sequence[str]) -> Found:
    """From the study's records."""
    config = build.compose(list(options))
    tracker: Tracker = build.make("tracking", config.tracking)
    study = tracker.study(str(config.study))
    records = tracker.records(study)
    uncompressed = next(r for r in records if not r.plan.steps and r.measured)
    told = tracker.read_study_file(study, TEST_FILE)
    if told is None:
        raise ConfigError("study", f"{config.study} has not ended: it was stopped", "give the same command again")
    test = measurement_from(json.loads(told)["measured"]["champion"])
    return Found(family, len(records), front_of(records, OBJECTIVES, ()), tracker.champion(study), uncompressed, test)


def _lines(found: Sequence[Found], command: str) -> Iterator[str]:
    joint = next(f for f in found if f.family == JOINT)
    yield f"# Each family of methods alone, and all together: `{command}`"
    yield ""
    yield f"| {' | '.join(HEADINGS)} |"
    yield "| " + " | ".join("---" for _ in HEADINGS) + " |"
    for one in found:
        yield f"| {one.family} | {one.trials} | " + " | ".join(_cells(one, joint)) + " |"
    yield ""
    yield (
        "The last column counts the members of a family's front that are clearly better in nothing (accuracy, latency, "
        "size) than some one member of the joint front."
    )


def _cells(one: Found, joint: Found) -> Iterator[str]:
    smallest = one.smallest
    low, high = (1 / x for x in one.champion.value("latency_ratio").interval[::-1])
    yield describe(one.champion)
    yield quality_text(one.test)
    yield f"{1 / one.champion.value('latency_ratio').value:.2f}x [{low:.2f}, {high:.2f}]"
    yield _kilobytes(one.champion)
    yield scaled(one.champion.value("parameters").value)
    yield f"{_kilobytes(smallest)}, {quality_text(smallest.value('accuracy'))}: {describe(smallest)}"
    yield "" if one is joint else f"{one.covered_by(joint)} of {len(one.front)}"


def _kilobytes(record: TrialRecord) -> str:
    return f"{record.value('size_bytes').value / 1e3:.0f} kB"
