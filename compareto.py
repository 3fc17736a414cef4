"""The public Python API and the console command, which its `USAGE` lists."""

import copy
import hashlib
import io
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, open_dict
from rich.console import Console
from torch import Tensor, nn

from compressors.errors import ConfigError, Infeasible
from evaluators.evaluation import Evaluator
from evaluators.runtime import Array
from evaluators.score import Score
from search import build
from search import reproduce as reproduction
from search import status as standing
from search.__main__ import guarded, terminal
from search.__main__ import main as search_main
from search.conclude import Conclusion, conclude, reselect, show
from search.doctor import report
from search.models import check_model
from search.progress import ProgressView
from search.reproduce import Reproduction
from search.reproduce import reproduce as rebuild
from search.status import Status
from search.study import Search
from search.tracking import CONFIG_FILE, Tracker
from search.trial import TrialRecord
from search.workers import run_together
from search.workload import Split, Splits, Task, Workload, checked

__all__ = [
    "Chosen",
    "ConfigError",
    "Infeasible",
    "Reproduction",
    "Result",
    "compress",
    "doctor",
    "main",
    "reproduce",
    "search",
    "select",
    "status",
    "stop",
    "ui",
]

USAGE = """usage: compareto COMMAND [option=value ...]

  search      search, and print the versions worth deploying
  worker      join a search as one of many; with measure=only, measure what workers on other machines trained
  select      choose the champion by another rule, without searching: compareto select rule=smallest
  reproduce   rebuild the champion (or trial=N) from its plan and compare
  status      workers, trials, pace, and what is left of the budget
  stop        have every worker of the study end after its running trial
  ui          MLflow's pages on 127.0.0.1 (port=5000)
  doctor      what this machine can run

Options are Hydra overrides of conf/config.yaml; compareto search --help lists them."""

CALIBRATION = 128

Loader = Iterable[Any]


@dataclass(frozen=True)
class Chosen:
    """The front, the champion, and where their deployed files are; as text, the table that a search prints."""

    conclusion: Conclusion
    tracker: Tracker

    @property
    def front(self) -> tuple[TrialRecord, ...]:
        """Every version that nothing beats on all objectives."""
        return self.conclusion.outcome.front

    @property
    def champion(self) -> TrialRecord:
        """The version that the rule chose."""
        return self.conclusion.choice.record

    def files(self, record: TrialRecord) -> Path:
        """The folder to ship."""
        return self.tracker.model_folder(record)

    def __str__(self) -> str:
        """Wide enough for a log."""
        console = Console(width=140, record=True, file=io.StringIO())
        show(self.conclusion, console)
        return console.export_text()


@dataclass(frozen=True)
class Result(Chosen):
    """What a search found, with all that is needed to do any of it again."""

    job: Search

    def reproduce(self, record: TrialRecord | None = None) -> Reproduction:
        """Rebuild the champion, or any other trial, from its plan alone, and compare; raises `Infeasible`."""
        return rebuild(self.job, record or self.champion, lambda _phase: None)


def search(*overrides: str) -> Result:
    """What `compareto search` does: a model and data of the configuration, with its options."""
    return _result(build.compose(overrides), None, {})


def compress(
    model: nn.Module,
    train: Loader,
    validation: Loader,
    *,
    study: str,
    calibration: Loader | None = None,
    test: Loader | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    metric: Callable[[Array, Array], float] | None = None,
    overrides: Sequence[str] = (),
) -> Result:
    """Search the versions of a trained model of your own that are worth deploying.

    Loaders yield `(input, target)` or just `input`, as batches of tensors; they are read once, into memory. With
    targets, accuracy is the quality, or `metric(outputs, targets)` on arrays, where more is better; without, it is
    agreement with the model's own answers. `loss(output, target)` joins the teacher's in recovery (cross entropy where
    accuracy is the quality). Without `calibration`, 128 training examples are set aside for it; without `test`, half of
    the validation examples. `overrides` are those of the command line, such as "budget.minutes=10". The same call with
    the same `study` takes an earlier search up again. Raises `ConfigError` before any work for what cannot be used.
    """
    model = copy.deepcopy(model).eval()
    splits = _splits(train, validation, calibration, test)
    labelled = splits.validation.targets is not None
    task = Task("user", loss or (nn.functional.cross_entropy if labelled and metric is None else None))
    quality = "score" if metric else "accuracy" if labelled else "fidelity"
    extra: dict[str, Evaluator] = {"score": Score(metric)} if metric else {}
    measured = [*([] if metric else [quality]), "latency", "size"]
    config = build.compose([f"study={study}", f"evaluator=[{','.join(measured)}]", f"quality={quality}", *overrides])
    if config.workers != 1:
        remedy = "start the script that calls compress several times: all join the same study"
        raise ConfigError("workers", f"is {config.workers}, and other processes do not have this model", remedy)
    _mark_as_users(config, study)
    workload = Workload(study, model, splits if quality != "accuracy" else _with_classes(splits, model), task)
    return _result(config, workload, extra)


def select(*overrides: str) -> Chosen:
    """Another champion of a finished study, `select("rule=smallest")`; nothing is run, only the alias moves."""
    selection = build.selection(overrides)
    return Chosen(reselect(selection), selection.tracker)


def reproduce(*overrides: str) -> Reproduction:
    """Rebuild the champion of a study of the command line, or `trial=N`, from its plan alone, and compare."""
    config = build.compose(overrides)
    tracker = build.open_tracker(config)
    study = tracker.study(str(config.study))
    record = tracker.champion(study) if config.trial is None else tracker.trial(study, config.trial)
    with ProgressView(terminal(), build.view(config)) as view:
        job = build.build(build.recorded(tracker.read_study_file(study, CONFIG_FILE) or "", config), view.training)
        tracker.recognise(study, job.fingerprint, ("model", "network", "answers"))
        try:
            return rebuild(job, record, view.phase)
        except Infeasible as infeasible:
            raise ConfigError("reproduce", infeasible.reason, "run it where the study was run") from infeasible


def status(*overrides: str) -> Status:
    """What the workers of a study are doing, `status("study=NAME")`; it can be asked from any host of the storage."""
    return standing.status(*build.storage_of(overrides))


def stop(*overrides: str) -> int:
    """Have every worker of a study end after the trial that it is at; how many are at one."""
    return standing.stop(*build.storage_of(overrides))


def ui(*overrides: str) -> None:
    """Serve MLflow's pages on 127.0.0.1 until Ctrl-C."""
    config = build.compose(overrides)
    command = build.make("tracking", config.tracking).ui_command(config.port)
    print(f"MLflow on http://127.0.0.1:{config.port}, Ctrl-C to end", flush=True)
    with suppress(KeyboardInterrupt):
        subprocess.run(command, check=False)


def doctor(*overrides: str) -> None:
    """Print what this machine can run."""
    nodes = build.compose(overrides).runtime.items()
    report({name: build.make(f"runtime.{name}", node) for name, node in nodes}, terminal())


def main() -> None:
    """Dispatch the console command; exits with 2 for what the user got wrong."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command == "worker" and not any(word.startswith(("worker=", "-")) for word in arguments):
        arguments = [*arguments, "worker=0"]
    if command in ("search", "worker"):
        sys.exit(search_main(arguments))
    actions: dict[str, Callable[..., None]] = {
        "select": lambda *words: terminal().print(str(select(*words)), highlight=False, markup=False, soft_wrap=True),
        "reproduce": lambda *words: reproduction.show(reproduce(*words), terminal()),
        "status": lambda *words: standing.show(status(*words), terminal()),
        "stop": lambda *words: print(f"{stop(*words)} workers end after the trial that they are at"),
        "ui": ui,
        "doctor": doctor,
    }
    if command not in actions or {"-h", "--help"} & set(arguments):
        print(USAGE)
        sys.exit(0 if command in (*actions, "-h", "--help", "help") else 2)
    sys.exit(guarded(lambda: actions[command](*arguments), Console(stderr=True)))


def _result(config: DictConfig, workload: Workload | None, extra: Mapping[str, Evaluator]) -> Result:
    with ProgressView(terminal(), build.view(config)) as view:
        job = build.build(config, view.training, workload, extra)
        conclusion = conclude(job, run_together(job, view, config.workers))
    return Result(conclusion, job.tracker, job)


def _mark_as_users(config: DictConfig, study: str) -> None:
    """What `model`, `data` and `task` say does not apply, and nobody should believe that it did."""
    with open_dict(config):
        config.model = {"name": study, "network": None}
        config.data = {"name": study}
        config.task = "user"


def _splits(train: Loader, validation: Loader, calibration: Loader | None, test: Loader | None) -> Splits:
    teach, judge = _read(train, "train"), _read(validation, "validation")
    calibrate = None if calibration is None else _read(calibration, "calibration")
    final = None if test is None else _read(test, "test")
    if calibrate is None:
        teach, calibrate = _divide(teach, len(teach) - min(CALIBRATION, len(teach) // 2))
    if final is None:
        judge, final = _divide(judge, (len(judge) + 1) // 2)
    return checked(Splits(teach, calibrate, judge, final), "compress")


def _with_classes(splits: Splits, model: nn.Module) -> Splits:
    """As many classes as the model has outputs: a split may lack the last ones. Targets beyond them are refused."""
    example = tuple(x[:2] for x in splits.calibration.inputs)
    check_model(model, example)
    with torch.no_grad():
        output = model(*example)
    classes = output.shape[-1] if output.ndim == 2 else 0
    return checked(replace(splits, classes=tuple(map(str, range(classes)))), "compress")


def _read(loader: Loader, name: str) -> Split:
    """All batches behind each other."""
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    for batch in loader:
        x, *rest = batch if isinstance(batch, tuple | list) else (batch,)
        if len(rest) > 1:
            raise ConfigError(name, f"yields {len(rest) + 1} things a batch", "give (input, target) or inputs alone")
        inputs.append(x)
        targets.extend(rest)
    if not inputs:
        raise ConfigError(name, "yields no batch", "give a loader of (input, target) or of inputs")
    return _sorted(torch.cat(inputs), torch.cat(targets) if targets else None)


def _sorted(inputs: Tensor, targets: Tensor | None) -> Split:
    """In an order that the loader's shuffling does not change, so that the same data is known again."""
    keys = [hashlib.sha256(x.contiguous().numpy().tobytes()).digest() for x in inputs]
    order = torch.tensor(sorted(range(len(keys)), key=keys.__getitem__))
    return Split((inputs[order],), None if targets is None else targets[order])


def _divide(split: Split, first: int) -> tuple[Split, Split]:
    """Two parts in a fixed random order, so that sorted data does not end up on one side."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    parts = []
    for rows in (order[:first], order[first:]):
        parts.append(
            Split(tuple(x[rows] for x in split.inputs), None if split.targets is None else split.targets[rows])
        )
    return parts[0], parts[1]


if __name__ == "__main__":
    main()
