"""The guided sampler for Optuna: a solver proposes what it knows the price of, TPE samples the rest."""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from compressors.errors import ConfigError
from search.facts import Aim, Fact, Role
from search.proposals import Proposer
from search.solver import Answers, Guide

MEASURED_LOSS = "loss"
"""User attribute of a trial: the measured rise of the loss, in the currency of the guide."""
PREVIEW = "preview"
"""User attribute of a trial that was stopped: metric name -> value, as far as it was measured."""
SHARED = "shared_s"
"""User attribute of a trial: how many of its seconds went into what other trials will find done."""
WAITED = "waited_s"
"""User attribute of a trial: how many of its seconds it lay in the queue of those who measure."""
REMAINING = "remaining_s"
"""User attribute of a study: seconds left, and proposals that take longer stand back; None where trials are counted."""
EXPECTED = "expected"
"""User attribute of a trial: what was expected of its values when it was proposed, in the order of the objectives."""

# `optimize(n_jobs=2)` shares a sampler among threads. Not the sampler's own, which must be picklable.
_ONE_AT_A_TIME = threading.RLock()
# TPE's own work grows with what it looks at.
TPE_MEMORY = 64
TPE_STARTUP = 4


class GuidedSampler(BaseSampler):
    """For the knobs of `guide`, proposes the unseen plan with the largest expected hypervolume gain per second.

    Where a study's `REMAINING` says that trials are counted and not seconds, it is the largest gain of a trial, and
    what was not trained before is trained as far as it can be.

    `roles` says what each objective is: `quality` (one of them) follows the predicted loss, `latency` and `size` are
    learnt from what trials measured; by default the first is the quality and the others latencies. `tolerance` is
    the share of the uncompressed quality that may go before nothing is of interest; None takes all that was seen.
    Beliefs are derived anew from the study's stored trials, so any number of workers agree and a restart changes
    nothing: the same trials, seed and time left give the same proposal. Without a guide it is TPE.
    """

    def __init__(
        self,
        guide: Guide | None = None,
        roles: Sequence[Role] = (),
        tolerance: float | None = 0.05,
        seed: int | None = None,
    ) -> None:
        """Refuses a tolerance that leaves nothing, and roles without exactly one quality."""
        if tolerance is not None and not tolerance > 0:
            raise ConfigError("sampler.tolerance", f"is {tolerance}", "give a number above 0, or null")
        if roles and list(roles).count("quality") != 1:
            raise ConfigError("sampler.roles", f"are {list(roles)}", "call exactly one of them quality")
        self.guide, self.roles, self.tolerance = guide, tuple(roles), tolerance
        self.seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
        self._tpe = TPESampler(seed=seed)
        self._reading: _Reading | None = None

    def guided_by(self, guide: Guide, roles: Sequence[Role]) -> "GuidedSampler":
        """The same with a guide."""
        return GuidedSampler(guide, roles, self.tolerance, self.seed)

    def __getstate__(self) -> dict[str, Any]:
        """What was read can be read again, and storages do not travel."""
        return {**self.__dict__, "_reading": None}

    def reseed_rng(self) -> None:
        """For workers that were forked: each goes its own way."""
        self.seed = int(np.random.SeedSequence().generate_state(1)[0])
        self._tpe.reseed_rng()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Nothing: which knobs a plan asks depends on its answers."""
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Nothing: answers are given one by one, all of them from one proposal."""
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The proposal's answer; without one, TPE on how much better trials went than was to be expected."""
        if self.guide is None:
            return self._tpe.sample_independent(study, trial, param_name, param_distribution)
        with _ONE_AT_A_TIME:
            return self._answer(self.guide, study, trial, param_name, param_distribution)

    def _answer(
        self, guide: Guide, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        reading = self._read(study, guide)
        answers = reading.proposed.get(trial.number, {})
        # An answer that came from elsewhere, such as a fixed one, was not foreseen: the rest follows it.
        if trial.number not in reading.proposed or any(answers.get(n, v) != v for n, v in trial.params.items()):
            answers = reading.proposed[trial.number] = self._propose(study, trial, reading)
        if param_name in answers and _holds(param_distribution, answers[param_name]):
            # In the distribution's own type: of a range of floats, a float.
            return param_distribution.to_external_repr(param_distribution.to_internal_repr(answers[param_name]))
        seed = np.random.SeedSequence([self.seed, trial.number, *param_name.encode()]).generate_state(1)[0]
        tpe = TPESampler(seed=int(seed), n_startup_trials=TPE_STARTUP)
        return tpe.sample_independent(self._surprises(study, trial, reading), trial, param_name, param_distribution)

    def _read(self, study: Study, guide: Guide) -> "_Reading":
        """What was read of one study says nothing of another one."""
        if self._reading is None or not self._reading.is_of(study):
            self._reading = _Reading(study._study_id, study._storage, Proposer(guide, self._aim(len(study.directions))))
        return self._reading

    def _aim(self, objectives: int) -> Aim:
        latencies: list[Role] = ["latency"] * (objectives - 1)
        roles = self.roles or ("quality", *latencies)
        if len(roles) != objectives:
            raise ConfigError("sampler.roles", f"are {list(roles)}", f"give one for each of {objectives} objectives")
        return Aim(roles, self.tolerance)

    def _propose(self, study: Study, trial: FrozenTrial, reading: "_Reading") -> Answers:
        """What was enqueued or already answered stays as it is."""
        fixed = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        left = study.user_attrs.get(REMAINING, math.inf)
        rng = np.random.default_rng([self.seed, trial.number])
        others = study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING))
        # Of those that are asked in other threads, not all answers are stored yet.
        taken = [
            {**reading.proposed.get(t.number, {}), **t.system_attrs.get("fixed_params", {}), **t.params}
            for t in others
            if t.number != trial.number
        ]
        proposal = reading.proposer.propose(reading.told(study), fixed, rng, taken, left)
        if proposal is None:
            return {}
        if proposal.expected is not None:
            signed = [s * v for s, v in zip(_signs(study), proposal.expected, strict=True)]
            study._storage.set_trial_user_attr(trial._trial_id, EXPECTED, signed)
        return proposal.answers

    def _surprises(self, study: Study, trial: FrozenTrial, reading: "_Reading") -> Study:
        """A study in memory whose one objective is how much worse a trial went than expected; made once a trial.

        It has the knobs that the guide does not answer, as Optuna checks and copies every one of every trial.
        """
        if trial.number not in reading.surprises:
            standing = reading.proposer.standing(reading.told(study))
            counted = study.user_attrs.get(REMAINING, math.inf) is None
            surprises = standing.surprises if counted else standing.tolled
            trials, answered = {t.number: t for t in _finished(study)}, reading.proposer.reader.own
            memory = optuna.create_study(sampler=self._tpe)
            for number, value in list(surprises.items())[-TPE_MEMORY:]:
                distributions = {n: d for n, d in trials[number].distributions.items() if n not in answered}
                params = {name: trials[number].params[name] for name in distributions}
                memory.add_trial(create_trial(params=params, distributions=distributions, value=value))
            reading.surprises[trial.number] = memory
        return reading.surprises[trial.number]

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Hands on to TPE, where there is no guide."""
        if self.guide is None:
            self._tpe.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Forgets the proposal; hands on to TPE, where there is no guide."""
        with _ONE_AT_A_TIME:
            if self._reading is not None:
                self._reading.forget(trial.number)
        if self.guide is None:
            self._tpe.after_trial(study, trial, state, values)


@dataclass
class _Reading:
    """What was read of one study, and what is under way for its running trials."""

    study_id: int
    storage: BaseStorage
    proposer: Proposer
    facts: dict[int, Fact] = field(default_factory=dict)
    proposed: dict[int, Answers] = field(default_factory=dict)
    surprises: dict[int, Study] = field(default_factory=dict)

    def is_of(self, study: Study) -> bool:
        """Whether it speaks of this study; its storage is kept, as another one could get the place of one that went."""
        return self.study_id == study._study_id and self.storage is study._storage

    def told(self, study: Study) -> list[Fact]:
        """What the finished trials say; each is read once."""
        signs, finished = _signs(study), _finished(study)
        names = study.metric_names or [""] * len(signs)
        for trial in finished:
            if trial.number not in self.facts:
                self.facts[trial.number] = _fact(trial, signs, names)
        # What failed for a reason of the moment may be tried again.
        return [self.facts[t.number] for t in finished if not {"duplicate_of", "missed"} & set(t.user_attrs)]

    def forget(self, number: int) -> None:
        """The trial has ended."""
        self.proposed.pop(number, None)
        self.surprises.pop(number, None)


def _holds(distribution: BaseDistribution, value: Any) -> bool:
    try:
        return bool(distribution._contains(distribution.to_internal_repr(value)))
    except ValueError:
        return False


def _finished(study: Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL))


def _signs(study: Study) -> list[float]:
    return [-1.0 if direction is StudyDirection.MAXIMIZE else 1.0 for direction in study.directions]


def _fact(trial: FrozenTrial, signs: Sequence[float], names: Sequence[str]) -> Fact:
    """A stopped trial tells what was known of it by then."""
    complete = trial.state is TrialState.COMPLETE
    preview = trial.user_attrs.get(PREVIEW, {})
    values = trial.values if complete else [preview.get(name, math.nan) for name in names]
    return Fact(
        number=trial.number,
        answers=trial.params,
        values=tuple(s * v for s, v in zip(signs, values, strict=True)),
        complete=complete,
        loss=trial.user_attrs.get(MEASURED_LOSS),
        violation=max(trial.constraints.values(), default=0.0),
        seconds=_own_s(trial),
    )


def _own_s(trial: FrozenTrial) -> float:
    """What comes first must not pay for what later ones share, nor for a queue."""
    took = trial.duration.total_seconds() if trial.duration else 0.0
    return max(took - sum(float(trial.user_attrs.get(name, 0.0)) for name in (SHARED, WAITED)), 0.0)
