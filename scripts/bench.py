"""The project's measurements of itself: checks a finished study's claims, and compares ways to search and rival tools.

    .venv/bin/python scripts/bench.py verify [option=value ...] > benchmarks/default/verify.json

reads the study that the options name (default: the default search's), loads every front member again, and reports:
how many front members differ beyond their bands, the champion's speed-up and test loss, how many members give the same
predictions and a latency ratio inside their band, and which share of a trial's time the framework itself took.

    .venv/bin/python scripts/bench.py compare digits --methods tpe,nsga2 --seeds 0-4 --budget 300 [option=value ...]
    .venv/bin/python scripts/bench.py compare digits --methods tpe,nsga2 --seeds 0-4 --retime
    .venv/bin/python scripts/bench.py table [FOLDER ...]
    .venv/bin/python scripts/bench.py families --minutes 5 [option=value ...]
    .venv/bin/python scripts/bench.py case resnet50 [option=value ...]

run methods and rival tools under one protocol (benchmarks/README.md), read the latencies of their fronts again on a
quiet machine, and write a table and a picture beside the results; search with each family of methods alone and with
all of them together; and compress a network that the literature names (resnet50, mobilenet_v3), with a table of what it
came to.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# A script's own folder is on its path, but this one's neighbours are imported by the names that tests use, too.
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import optuna
from omegaconf import DictConfig
from rich.console import Console

from evaluators.latency import Latency
from evaluators.machine import machine, versions
from evaluators.runtime import Deployed
from scripts import cases, compare, families
from scripts.contestant import Job, perform, train
from scripts.summary import summarise
from search import build
from search.__main__ import guarded
from search.conclude import TEST_FILE
from search.pareto import distinct
from search.select import front_of
from search.study import Search
from search.tracking import Tracker
from search.trial import Clock, TrialRecord

ROOT = Path(__file__).parents[1]


def main(arguments: Sequence[str]) -> None:
    """Dispatch; `predict`, `train` and `run` are what others start in processes of their own."""
    command, *rest = arguments or ["--help"]
    actions: dict[str, Callable[[], None]] = {
        "verify": lambda: verify(build.compose(rest)),
        "predict": lambda: print(json.dumps(predictions(build.compose(rest[1:]), int(rest[0])))),
        "compare": lambda: compare.main(rest),
        "families": lambda: families.main(rest),
        "case": lambda: cases.main(rest),
        "table": lambda: _tables([Path(word) for word in rest]),
        "train": lambda: train(Job(**json.loads(rest[0]))),
        "run": lambda: perform(Job(**json.loads(rest[0])), float(rest[1])),
    }
    sys.exit(guarded(actions.get(command, lambda: print(__doc__)), Console(stderr=True)))


def _tables(folders: Sequence[Path]) -> None:
    """Of these folders of results, or of all there are."""
    for folder in folders or sorted({path.parent for path in (ROOT / "benchmarks/compare").rglob("*-*.json")}):
        for path in summarise(folder):
            print(path)


def verify(config: DictConfig) -> None:
    """All figures of one study, as JSON on stdout."""
    search = build.build(config.copy(), lambda _progress: None)
    study = search.tracker.study(search.name)
    records = search.tracker.records(study)
    names = [metric.name for metric in search.objectives]
    front = front_of(records, names, search.bounds)
    reference = search.workbench.reference(search.reference, Clock())
    members = [_member(search, record, reference) for record in front]
    test = json.loads(search.tracker.read_study_file(study, TEST_FILE) or "{}")
    champion = search.tracker.champion(study)
    figures: dict[str, Any] = {
        "study": search.name,
        "machine": {**machine(), **versions()},
        "trials": len(records),
        "front": len(front),
        "front_points_beyond_their_bands": len(distinct([record.values(names) for record in front])),
        "champion": champion.number,
        "champion_speedup": 1 / champion.value("latency_ratio").value,
        "champion_speedup_band": sorted(1 / x for x in champion.value("latency_ratio").interval),
        "test": {name: [m["value"], *m["interval"]] for name, m in test["measured"].items()},
        "same_predictions": f"{sum(m['same_predictions'] for m in members)} of {len(members)}",
        "ratio_inside_band": f"{sum(m['inside'] for m in members)} of {len(members)}",
        "framework_share": _framework_share(search, records),
        "members": members,
    }
    print(json.dumps(figures, indent=1))


def _member(search: Search, record: TrialRecord, reference: Deployed) -> dict[str, Any]:
    """One front member, timed and run again in processes that have not seen it."""
    runtime = search.workbench.runtimes[record.plan.target.runtime]
    deployed = Deployed(runtime, search.tracker.model_folder(record), record.plan.target.precision, ())
    settings: Any = search.workbench.evaluators["latency"]
    timer = Latency(**{name: getattr(settings, name) for name in ("batch", "threads", "core", "sessions", "rounds")})
    ratio, _ = timer.measure(deployed, reference, search.workbench.examples("validation"))
    timer.close()
    recorded = record.value("latency_ratio")
    here = deployed.run(*search.workbench.examples("validation").inputs)
    command = [sys.executable, str(Path(__file__)), "predict", str(record.number), *sys.argv[2:]]
    there = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path.cwd()).stdout)
    targets = search.workbench.examples("validation").targets
    return {
        "trial": record.number,
        "recorded": [recorded.value, *recorded.interval],
        "again": ratio.value,
        "inside": bool(recorded.interval[0] <= ratio.value <= recorded.interval[1]),
        "same_predictions": here.argmax(1).tolist() == there
        and float(np.mean(here.argmax(1) == targets)) == record.value(search.quality).value,
    }


def predictions(config: DictConfig, number: int) -> list[int]:
    """The labels that a recorded trial's files give on the validation split, without any of the search's machinery."""
    tracker: Tracker = build.make("tracking", config.tracking)
    record = tracker.trial(tracker.study(str(config.study)), number)
    runtime = build.make("runtime", config.runtime[record.plan.target.runtime])
    deployed = Deployed(runtime, tracker.model_folder(record), record.plan.target.precision, ())
    split = build.make("data", {k: v for k, v in config.data.items() if k != "name"}).validation
    return [int(label) for label in deployed.run(*(x.numpy() for x in split.inputs)).argmax(1)]


def _framework_share(search: Search, records: Sequence[TrialRecord]) -> float:
    """Of all trials' wall time, the part that was neither compressing, deploying nor evaluating."""
    study = optuna.load_study(study_name=search.name, storage=search.storage)
    own = {record.number: sum(record.seconds.values()) for record in records}
    whole = {t.number: t.duration.total_seconds() for t in study.trials if t.duration is not None}
    return 1 - sum(own.values()) / sum(whole[number] for number in own)


if __name__ == "__main__":
    main(sys.argv[1:])
