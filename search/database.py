"""Optuna's database for many workers: waited for while it is away, written to in one go, read no more than needed."""

import copy
import functools
import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ParamSpec, TypeVar, cast

import optuna
import sqlalchemy
from optuna.distributions import (
    BaseDistribution,
    check_distribution_compatibility,
    distribution_to_json,
    json_to_distribution,
)
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb.models import (
    TrialHeartbeatModel,
    TrialIntermediateValueModel,
    TrialModel,
    TrialParamModel,
    TrialSystemAttributeModel,
    TrialUserAttributeModel,
    TrialValueModel,
)
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

PATIENCE_S, PAUSE_S = 900.0, 2.0
"""How long a database may be away in mid-run, and how often it is tried again."""
DIGEST = "digest"
"""User attribute of a trial: that of its plan, written together with its parameters."""
# What Optuna keeps of a trial in tables of their own, by the names that its trials give them.
PARTS = {
    "params": TrialParamModel,
    "values": TrialValueModel,
    "user_attributes": TrialUserAttributeModel,
    "system_attributes": TrialSystemAttributeModel,
    "intermediate_values": TrialIntermediateValueModel,
}

P = ParamSpec("P")
R = TypeVar("R")
log = logging.getLogger(__name__)


def patient(action: Callable[P, R]) -> Callable[P, R]:
    """The same, but it waits `PATIENCE_S` at most for a database that is away."""

    @functools.wraps(action)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        began = time.monotonic()
        while True:
            try:
                return action(*args, **kwargs)
            except (SQLAlchemyError, StorageInternalError) as error:
                if not _is_away(error) or time.monotonic() - began > PATIENCE_S:
                    raise
                log.warning("the storage is away, trying again")
                time.sleep(PAUSE_S)

    return call


def _is_away(error: BaseException | None) -> bool:
    """Whether a connection could not be made or broke; a full disk or a broken file is another matter."""
    while error is not None:
        if isinstance(error, DBAPIError):
            return "sqlite3" not in str(type(error.orig)) and (
                error.connection_invalidated or isinstance(error, OperationalError)
            )
        error = error.__cause__ or error.__context__
    return False


_distribution = functools.cache(json_to_distribution)


def _of(study_id: int, among: Collection[int], after: int) -> Any:
    """The condition that a trial is of the study, and `among` these or `after` that one."""
    return (TrialModel.study_id == study_id) & (TrialModel.trial_id.in_(among) | (TrialModel.trial_id > after))


def _rows(session: Any, model: Any, which: Any) -> dict[int, list[Any]]:
    """By trial, the rows of a table that belong to such trials, in the order in which they were written."""
    table = model.__table__
    rows = sqlalchemy.select(table).join(TrialModel, TrialModel.trial_id == table.c.trial_id).where(which)
    found = defaultdict[int, list[Any]](list)
    for row in session.execute(rows.order_by(*table.primary_key)):
        found[row.trial_id].append(row)
    return found


@dataclass
class _Kept:
    """What is yet to be written: the parameters of new trials, all in one statement, and whatever else, in order."""

    parameters: list[dict[str, Any]] = field(default_factory=list)
    others: list[tuple[Callable[..., None], tuple[Any, ...]]] = field(default_factory=list)


class PatientStorage(RDBStorage):
    """A database that may go away for a while. A call whose answer got lost on the way is made once more.

    While what is written is kept back, to go all at once, it stands still for its reader (see `together`).
    """

    kept_back: _Kept | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # By id, the running trials as they were read last.
        self.signed: dict[int, FrozenTrial] = {}

    @patient
    def write(self, kept: _Kept) -> None:
        """In one transaction; where it is made once more as its answer got lost, what is there already stays."""
        with _create_scoped_session(self.scoped_session, ignore_integrity_error=True) as session:
            if kept.parameters:
                session.execute(sqlalchemy.insert(TrialParamModel), kept.parameters)
            for put, given in kept.others:
                put(session, *given)

    def _put(self, put: Callable[..., None], *given: Any) -> None:
        if self.kept_back is None:
            self.write(_Kept(others=[(put, given)]))
        else:
            self.kept_back.others.append((put, given))

    def _set_trial_param(
        self, trial_id: int, name: str, value: float, space: BaseDistribution, known: BaseDistribution | None
    ) -> None:
        if self.kept_back is None or known is None:
            self._put(self._set_trial_param_without_commit, trial_id, name, value, space, known)
            return
        check_distribution_compatibility(known, space)
        text = distribution_to_json(space)
        row = {"trial_id": trial_id, "param_name": name, "param_value": value, "distribution_json": text}
        self.kept_back.parameters.append(row)

    def record_heartbeat(self, trial_id: int) -> None:
        """As Optuna's."""
        if self.kept_back is None:
            self._beat(trial_id)
        else:
            # The first one of a new trial.
            self._put(lambda session: session.add(TrialHeartbeatModel(trial_id=trial_id)))

    @patient
    def _beat(self, trial_id: int) -> None:
        super().record_heartbeat(trial_id)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """As Optuna's."""
        self._put(self._set_trial_attr_without_commit, TrialUserAttributeModel, trial_id, key, value)

    def _get_trials(
        self, study_id: int, states: Any, included_trial_ids: set[int], trial_id_greater_than: int
    ) -> list[FrozenTrial]:
        """Those that run and were read before are not read in full again: with many workers these take long."""
        if self.kept_back is not None:
            return []
        if states is not None or trial_id_greater_than < 0:
            return self._read(study_id, states, included_trial_ids, trial_id_greater_than)
        now, told = self._standing(study_id, included_trial_ids, trial_id_greater_than)
        same = {n: t for n, t in self.signed.items() if now.get(n) is TrialState.RUNNING}
        others = now.keys() - same.keys()
        read = self._read(study_id, None, others, max(now)) if others else []
        for trial_id, trial in same.items():
            if told[trial_id] != trial.user_attrs:
                # A new one: who holds the old one may be looking at it.
                self.signed[trial_id] = again = copy.copy(trial)
                again.user_attrs = told[trial_id]
                read.append(again)
        return read

    @patient
    def _read(self, study_id: int, states: Any, among: Collection[int], after: int) -> list[FrozenTrial]:
        """In full: those of the study `among` these and `after` that one.

        Row by row, and each distribution once: Optuna makes an object of every row, which takes five times as long.
        """
        which = _of(study_id, among, after) & (sqlalchemy.true() if states is None else TrialModel.state.in_(states))
        with _create_scoped_session(self.scoped_session) as session:
            found = session.query(TrialModel).where(which).order_by(TrialModel.trial_id).all()
            parts = {name: _rows(session, model, which) for name, model in PARTS.items()}
            read = [
                self._made(trial, {name: rows[int(trial.trial_id)] for name, rows in parts.items()}) for trial in found
            ]
        for trial in read:
            # Its parameters came with the digest, in one go: they stay as they are.
            if trial.state is TrialState.RUNNING and DIGEST in trial.user_attrs:
                self.signed[trial._trial_id] = trial
            else:
                self.signed.pop(trial._trial_id, None)
        return read

    def _made(self, trial: TrialModel, parts: dict[str, list[Any]]) -> FrozenTrial:
        own = {
            name: getattr(trial, name)
            for name in ("number", "state", "datetime_start", "datetime_complete", "trial_id")
        }
        params = {
            row.param_name: (_distribution(row.distribution_json), row.param_value) for row in parts.pop("params")
        }
        made = self._build_frozen_trial_from_trial_model(cast(TrialModel, SimpleNamespace(**own, **parts, params=[])))
        made.distributions = {name: space for name, (space, _) in params.items()}
        made.params = {name: space.to_external_repr(value) for name, (space, value) in params.items()}
        return made

    @patient
    def _standing(
        self, study_id: int, among: Collection[int], after: int
    ) -> tuple[dict[int, TrialState], dict[int, dict[str, Any]]]:
        """The states of these trials, and the user attributes of those that were signed."""
        told: dict[int, dict[str, Any]] = {trial_id: {} for trial_id in self.signed}
        with _create_scoped_session(self.scoped_session) as session:
            now = dict(
                session.execute(
                    sqlalchemy.select(TrialModel.trial_id, TrialModel.state).where(_of(study_id, among, after))
                ).all()
            )
            own = sqlalchemy.select(
                TrialUserAttributeModel.trial_id, TrialUserAttributeModel.key, TrialUserAttributeModel.value_json
            ).where(TrialUserAttributeModel.trial_id.in_(told))
            for trial_id, key, text in session.execute(own):
                told[trial_id][key] = json.loads(text)
        return now, told


# What others call, Optuna's cache in front of it included, which has its own ways in.
_CALLED = {
    *BaseStorage.__abstractmethods__,
    *("_get_stale_trial_ids", "get_trial_id_from_study_id_trial_number"),
    *("_create_new_trial", "_check_and_set_param_distribution"),
}
for _name in sorted(_CALLED & set(dir(RDBStorage)) - set(vars(PatientStorage))):
    setattr(PatientStorage, _name, patient(getattr(RDBStorage, _name)))


@contextmanager
def together(study: optuna.Study) -> Iterator[None]:
    """For asking, while all other workers wait: read nothing that was read before, and write all there is in one go.

    A sampler may look at all trials for every knob, which reads those that run anew, and every parameter and user
    attribute of a trial is a commit: with a hundred knobs and 64 workers, seconds.
    """
    storage = cast(Any, study._storage)._backend
    storage.kept_back = _Kept()
    try:
        yield
        storage.write(storage.kept_back)
    finally:
        storage.kept_back = None
