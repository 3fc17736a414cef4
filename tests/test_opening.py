"""What a study begins with, when several workers begin it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FixedTrial, FrozenTrial

from compressors.distill import Distill
from compressors.layers import read_layers
from compressors.pipeline import Compressor
from compressors.prune import Prune
from search.opening import Answers, Opening
from search.space import build_space
from search.study import Search
from tests.studies import CountingRuntime, make_search
from tests.zoo import build, images

DISTILL = Distill(weight_decay=5e-4, warmup=0.1, clip_norm=1.0, epoch_examples=32, first_round=2)
SPACES: dict[str, dict[str, Any]] = {
    "prune": {"sparsity": {"choices": [0.0, 0.5], "granularity": "model"}},
    "distill": {"when": "structure", "epochs": {"choices": [0, 2]}, "temperature": {"choices": [4]}},
}


def pruning(folder: Path) -> Search:
    """Two places to deploy what is pruned and recovered."""
    model = build("residual")
    layers = read_layers(model, (images(),))
    compressors: dict[str, Compressor] = {"prune": Prune(), "distill": DISTILL}
    groups = {name: method.groups(model, (images(),)) for name, method in compressors.items()}
    runtimes = {name: CountingRuntime(name) for name in ("one", "two")}
    space = build_space(SPACES, compressors, groups, layers, runtimes)
    return make_search(
        folder, 8, space=space, workbench=replace(make_search(folder, 8).workbench, compressors=compressors)
    )


def digest(search: Search, answers: Answers | None) -> str:
    assert answers is not None
    return str(search.space.sample(FixedTrial(answers)).digest)


def running(*digests: str) -> Sequence[FrozenTrial]:
    study = optuna.create_study()
    for found in digests:
        study.ask().set_user_attr("digest", found)
    return study.trials


def test_what_another_worker_trains_is_not_trained_beside_it(tmp_path: Path) -> None:
    search = pruning(tmp_path)
    opening = Opening(search)
    done: list[str] = []
    while search.space.sample(FixedTrial(opening.next(done, []) or {})).steps == ():
        done.append(digest(search, opening.next(done, [])))
    first = digest(search, opening.next(done, []))
    assert len(done) == 2
    # The second one is the same network in the other place.
    assert opening.next(done, running(first)) is None
    assert opening.next([*done, first], []) is not None
    assert opening.next([*done, first], running(first)) is None
