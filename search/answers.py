"""What Optuna is told of a trial: values, constraints, and what a sampler may learn beside them."""

from collections.abc import Sequence

from optuna.trial import FrozenTrial, Trial, TrialState

from evaluators.divergence import LOSS
from search.records import record_to_json
from search.sampler import MEASURED_LOSS, PREVIEW, SHARED
from search.select import Bound
from search.storage import RECORD
from search.trial import TrialRecord

# User attributes that hold for the plan, whichever trial it was measured in.
TOLD = {MEASURED_LOSS, PREVIEW, "infeasible", "stopped"}


def answer(trial: Trial, record: TrialRecord, objectives: Sequence[str], bounds: Sequence[Bound]) -> None:
    """Raises `UpdateFinishedTrialError` where another worker took this one for dead."""
    trial.set_user_attr(RECORD, record_to_json(record))
    for name, told in _told(record, objectives).items():
        trial.set_user_attr(name, told)
    measured = {m.name for m in record.measurements}
    for bound in bounds:
        if bound.metric in measured:
            trial.set_constraint(bound.metric, bound.violation(record))
    values = [record.value(name).value for name in objectives] if record.measured else None
    state = TrialState.COMPLETE if record.measured else TrialState.PRUNED
    trial.study.tell(trial, values, state, skip_if_finished=True)


def answer_as(trial: Trial, twin: FrozenTrial) -> None:
    """The same plan gets the same answer; raises as `answer` does."""
    trial.set_user_attr("duplicate_of", twin.number)
    for name in TOLD & set(twin.user_attrs):
        trial.set_user_attr(name, twin.user_attrs[name])
    for name, violation in twin.constraints.items():
        trial.set_constraint(name, violation)
    if twin.state is TrialState.COMPLETE:
        trial.study.tell(trial, twin.values, skip_if_finished=True)
    else:
        # Infeasible, failed, or still being measured by another worker, who will tell.
        state = TrialState.PRUNED if twin.state is TrialState.PRUNED else TrialState.FAIL
        trial.study.tell(trial, state=state, skip_if_finished=True)


def _told(record: TrialRecord, objectives: Sequence[str]) -> dict[str, object]:
    """What a sampler may learn beside values: the proxy's loss, and how far a trial without values came."""
    known = {m.name: m.value for m in record.measurements}
    told: dict[str, object] = {}
    if LOSS.name in known:
        told[MEASURED_LOSS] = known[LOSS.name]
    if record.shared_s > 0:
        told[SHARED] = record.shared_s
    if record.infeasible is not None:
        told["infeasible"] = record.infeasible
    if record.stopped is not None:
        told["stopped"] = {"rung": record.stopped.rung, "reason": record.stopped.reason}
        # Of what was not measured, at least what the stop rests on.
        known.setdefault(record.stopped.metric, sum(record.stopped.interval) / 2)
        told[PREVIEW] = {name: known[name] for name in objectives if name in known}
    return told
