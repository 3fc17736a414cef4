"""The plans that a study begins with, the uncompressed model and the uniform ones; the sampler comes after them."""

from collections.abc import Collection, Sequence

from optuna.trial import FixedTrial, FrozenTrial

from compressors.pipeline import trained_structure
from compressors.plan import Scalar
from search.database import DIGEST
from search.storage import running
from search.study import Search

Answers = dict[str, Scalar]


class Opening:
    """Each worker sees to these before it asks the sampler."""

    def __init__(self, search: Search) -> None:
        # By a plan's digest: its answers, and the structure that it would train.
        self._first: dict[str, tuple[Answers, str | None]] = {}
        for answers in (*search.space.baselines(), *search.space.uniform(search.sparing, search.budget.counts_trials)):
            plan = search.space.sample(FixedTrial(answers))
            self._first[plan.digest] = (answers, trained_structure(plan, search.workbench.compressors))

    def next(self, done: Collection[str], trials: Sequence[FrozenTrial]) -> Answers | None:
        """The answers of the first plan that is not `done`; None if there is none for now.

        What another worker is training right now is not trained beside it: afterwards it only needs to be deployed.
        """
        at_work = [self._first.get(str(t.user_attrs.get(DIGEST))) for t in running(trials)]
        training = {found[1] for found in at_work if found} - {None}
        missing = (found for digest, found in self._first.items() if digest not in done)
        return next((answers for answers, structure in missing if structure not in training), None)
