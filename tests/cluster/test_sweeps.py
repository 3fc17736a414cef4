"""What the tests of sweeps count, which need no cluster themselves."""

import optuna
from optuna.trial import TrialState, create_trial

from tests.cluster import sweeps


def test_only_workers_that_finished_a_trial_of_the_sweep_count() -> None:
    study = optuna.create_study()
    rows = [
        *sweeps.PREPARED * [("prepares", TrialState.COMPLETE)],
        ("measures", TrialState.COMPLETE),
        ("stops", TrialState.PRUNED),
        ("breaks", TrialState.FAIL),
        ("is at it", TrialState.RUNNING),
        ("repeats", TrialState.COMPLETE),
    ]
    for owner, state in rows:
        told = {"owner": owner} | ({"duplicate_of": 0} if owner == "repeats" else {})
        told |= {"error": "deploy: no"} if owner == "breaks" else {}
        value = 1.0 if state is TrialState.COMPLETE else None
        study.add_trial(create_trial(state=state, value=value, user_attrs=told))
    assert sweeps.workers(study.trials) == {"measures", "stops"}
