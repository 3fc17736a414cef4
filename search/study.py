"""What one search is made of, and its study in Optuna: begun, or joined if it is the same; it runs no trial."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import optuna
from optuna.storages import RDBStorage

from compressors.errors import ConfigError
from compressors.plan import LayerSpec, Scalar, Target
from evaluators.machine import machine
from evaluators.measurement import Metric
from search.ladder import Ladder
from search.records import refuse_another
from search.runner import Limits
from search.select import Bound, Rule, front_of
from search.space import SearchSpace
from search.storage import JOINED, exclusively, open_storage, quiet
from search.tracking import StudyRun, Tracker
from search.trial import TrialRecord, Workbench


@dataclass(frozen=True, slots=True)
class Budget:
    """When to stop: so many finished trials, or so many minutes of trials; None is no limit."""

    trials: int | None = None
    minutes: float | None = None

    @property
    def counts_trials(self) -> bool:
        """Whether a trial costs the same however long it trains."""
        return self.minutes is None

    def __post_init__(self) -> None:
        """Refuses a search without an end."""
        if self.trials is None and self.minutes is None:
            raise ConfigError("budget", "has neither trials nor minutes", "set budget.trials=N or budget.minutes=M")
        for name, value in (("trials", self.trials), ("minutes", self.minutes)):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"budget.{name}", f"is {value}", "give a finite number above 0")


Measure = Literal["all", "never", "only"]
"""`never`: another machine, which leaves the rest of every trial to others; `only`: nothing but that rest."""


@dataclass(frozen=True)
class Search:
    """Everything one search needs, built from its configuration.

    `sparing` leaves all but a few of the uniform plans to a sampler that knows better. With `limits`, trials run in a
    process of their own. `measure` says what of the measuring that only counts on the study's machine is done here.
    """

    name: str
    workbench: Workbench
    layers: tuple[LayerSpec, ...]
    space: SearchSpace
    objectives: tuple[Metric, ...]
    bounds: tuple[Bound, ...]
    budget: Budget
    sampler: Callable[[int], optuna.samplers.BaseSampler]
    storage: str
    tracker: Tracker
    rule: Rule
    folder: Path
    fingerprint: Mapping[str, Scalar]
    config: str
    quality: str
    seed: int = 0
    sparing: bool = False
    ladder: Ladder | None = None
    limits: Limits | None = None
    measure: Measure = "all"

    @property
    def reference(self) -> Target:
        """The uncompressed model's place in the first runtime of the configuration: what latency is a ratio to."""
        runtime, precisions = next(iter(self.space.targets.items()))
        return Target(runtime, precisions[0])

    def begun_with(self, fingerprint: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """The part of a fingerprint that a study must have been begun with for this search to join it."""
        ignored = machine().keys() if self.measure == "never" else ()
        return {key: value for key, value in fingerprint.items() if key not in ignored}

    def front(self, records: Sequence[TrialRecord]) -> list[TrialRecord]:
        """The finished records within all bounds that nothing dominates."""
        return front_of(records, [metric.name for metric in self.objectives], self.bounds)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a running study stands; `phase` is what the current trial does."""

    done: int
    records: Sequence[TrialRecord]
    front: Sequence[TrialRecord]
    phase: str
    elapsed_s: float
    duplicates: int
    budget: Budget


Watcher = Callable[[Progress], None]
"""Told of every change, from the searching thread; draws or prints it, and must be quick."""


@dataclass(frozen=True)
class Outcome:
    """What a study has so far, read back from the tracker, and why it ended; `others` are still at so many trials."""

    study: StudyRun
    records: tuple[TrialRecord, ...]
    front: tuple[TrialRecord, ...]
    ended: str
    others: int = 0


def open_study(search: Search) -> optuna.Study:
    """The study, new or as it is; refuses a study that was begun with anything else than what is at hand now."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = open_storage(search.storage)
    with exclusively(search.storage, search.name):
        study = _begun(search, storage)
        known = study.user_attrs.get("fingerprint")
        if known is None and search.measure == "never":
            raise _not_begun(search.name)
        if known is None:
            study.set_user_attr("fingerprint", dict(search.fingerprint))
            with quiet():
                study.set_metric_names([metric.name for metric in search.objectives])
        else:
            refuse_another(search.name, search.begun_with(known), search.begun_with(search.fingerprint))
        # Two that draw by chance must not draw the same.
        joined = study.user_attrs.get(JOINED, 0)
        study.set_user_attr(JOINED, joined + 1)
    study.sampler = search.sampler(joined)
    return study


def _begun(search: Search, storage: RDBStorage) -> optuna.Study:
    try:
        if search.measure != "never":
            return optuna.create_study(
                storage=storage,
                study_name=search.name,
                directions=[metric.direction for metric in search.objectives],
                load_if_exists=True,
            )
        return optuna.load_study(study_name=search.name, storage=storage)
    except KeyError:
        raise _not_begun(search.name) from None


def _not_begun(name: str) -> ConfigError:
    problem = f"is never, and nobody has begun {name!r}"
    return ConfigError("measure", problem, "start a worker on the machine that measures first")
