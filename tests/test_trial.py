"""One trial from plan to record."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import optuna
import pytest
import torch

from compressors.distill import Distill
from compressors.errors import Infeasible
from compressors.plan import CompressionPlan, Step, Target
from evaluators.measurement import Measurement, Metric, exact
from evaluators.runtime import Deployed
from evaluators.size import Size
from search.answers import answer
from search.cache import Cache
from search.trial import Clock, Look, Midway, Stop, TrialRecord, Workbench
from tests.studies import ACCURACY, RATIO, Gradually, make_search, refuse

PLAIN = CompressionPlan(Target("fake", "fp32"))
INT8 = CompressionPlan(Target("fake", "fp32"), (Step("quantize", {"head": {"bits": 8}}),))


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def carried_out(bench: Workbench, plan: CompressionPlan, folder: Path) -> tuple[TrialRecord, Deployed | None, Clock]:
    clock = Clock()
    reference = bench.reference(PLAIN.target, Clock())
    record, deployed = bench.run(7, plan, reference, bench.examples("validation"), empty(folder / "out"), clock)
    return record, deployed, clock


def test_a_record_has_plan_measurements_seconds_and_what_was_achieved(tmp_path: Path) -> None:
    record, deployed, _ = carried_out(make_search(tmp_path, 1).workbench, INT8, tmp_path)
    assert (record.number, record.plan, record.infeasible) == (7, INT8, None)
    assert [m.name for m in record.measurements] == ["accuracy", "latency_ratio", "calibration_loss"]
    assert set(record.seconds) >= {"compress", "deploy", "counting"}
    assert record.achieved["quantize"]["head"]["bits"] == 8
    assert record.environment == {"cpu": "x"}
    assert deployed is not None
    assert [path.name for path in deployed.files] == ["model.json"]


def test_seconds_that_others_share_are_told_to_samplers(tmp_path: Path) -> None:
    bench, study = make_search(tmp_path, 1).workbench, optuna.create_study(directions=["maximize", "minimize"])
    reference, examples = bench.reference(PLAIN.target, Clock()), bench.examples("validation")
    for i, clock in enumerate([Clock(), Clock(shared_s=3.0)]):
        record, _ = bench.run(i, PLAIN, reference, examples, empty(tmp_path / f"out{i}"), clock)
        answer(study.ask(), record, ["accuracy", "latency_ratio"], ())
    assert [trial.user_attrs.get("shared_s") for trial in study.trials] == [None, 3.0]


def test_a_runtime_that_refuses_gives_a_record_with_the_reason(tmp_path: Path) -> None:
    bench = make_search(tmp_path, 1, refuse("not on Mondays", 1)).workbench
    record, deployed, clock = carried_out(bench, INT8, tmp_path)
    assert (record.infeasible, record.measurements, deployed) == ("not on Mondays", (), None)
    assert record.achieved == {}
    assert clock.phase == "deploy"


def test_an_evaluator_that_gives_up_leaves_the_files_but_no_measurement(tmp_path: Path) -> None:
    class Tired:
        def metrics(self) -> tuple[()]:
            return ()

        def measure(self, *_: object) -> tuple[()]:
            raise Infeasible("too busy")

        def close(self) -> None: ...

    bench = make_search(tmp_path, 1).workbench
    bench = replace(bench, evaluators={**bench.evaluators, "tired": Tired()})
    record, deployed, _ = carried_out(bench, INT8, tmp_path)
    assert (record.infeasible, record.measurements) == ("too busy", ())
    assert deployed is not None
    assert "quantize" in record.achieved


@dataclass
class Told:
    """A judge that writes down what it is shown and stops at one rung."""

    stop_at: str = ""
    wanted: frozenset[str] = frozenset({"accuracy", "size_bytes"})
    shares: Sequence[float] = (0.25, 0.5)
    seen: dict[str, tuple[set[str], set[str]]] = field(default_factory=dict)
    trainings: list[Midway] = field(default_factory=list)

    def midway(self, at: Midway) -> Stop | None:
        self.trainings.append(at)
        rung = f"training {at.done}"
        return Stop(rung, "accuracy", (0.0, 0.5), "enough") if rung == self.stop_at else None

    def verdict(self, look: Look) -> Stop | None:
        self.seen[look.rung] = set(look.final), set(look.previews)
        return Stop(look.rung, "accuracy", (0.0, 0.5), "enough") if look.rung == self.stop_at else None


def judged(bench: Workbench, judge: Told, folder: Path) -> TrialRecord:
    bench = replace(bench, evaluators={"counting": Gradually(), "size": Size(), "other": Other()})
    reference = bench.reference(PLAIN.target, Clock())
    record, _ = bench.run(7, INT8, reference, bench.examples("validation"), empty(folder / "out"), Clock(), judge)
    return record


@dataclass(frozen=True)
class Other:
    """Measures something that nobody decides by, and cannot do it in part."""

    def metrics(self) -> tuple[Metric, ...]:
        return (Metric("other", "things", "minimize"),)

    def measure(self, *_: object) -> tuple[Measurement, ...]:
        return (exact(self.metrics()[0], 3.0),)

    def close(self) -> None: ...


COUNTED = {"accuracy", "latency_ratio"}


def test_cheap_rungs_come_first_and_each_knows_more(tmp_path: Path) -> None:
    judge = Told()
    record = judged(make_search(tmp_path, 1).workbench, judge, tmp_path)
    proxy = {"size_bytes", "calibration_loss"}
    assert list(judge.seen.items()) == [
        ("exact", ({"size_bytes"}, set())),
        ("proxy", (proxy, set())),
        ("preview 25 %", (proxy, COUNTED)),
        ("preview 50 %", (proxy, COUNTED)),
        ("full", (proxy | COUNTED | {"other"}, set())),
    ]
    names = [m.name for m in record.measurements]
    assert names == ["accuracy", "latency_ratio", "size_bytes", "other", "calibration_loss"]
    assert record.measured


def test_a_stopped_trial_keeps_what_was_previewed_and_asks_for_no_kernels(tmp_path: Path) -> None:
    record = judged(make_search(tmp_path, 1).workbench, Told("preview 25 %"), tmp_path)
    assert record.stopped == Stop("preview 25 %", "accuracy", (0.0, 0.5), "enough")
    assert [m.name for m in record.measurements] == ["accuracy", "latency_ratio", "size_bytes", "calibration_loss"]
    assert record.value("accuracy").interval[0] < record.value("accuracy").value
    assert not record.measured
    assert "kernels" not in record.seconds


def trained(folder: Path, judge: Told) -> tuple[TrialRecord, Workbench]:
    """Six epochs, in rounds that end after one, two, four and six."""
    lesson = Distill(0.0, 0.1, 1.0, 8, 1, "fp32")
    bench = make_search(folder, 1).workbench
    bench = replace(bench, compressors={**bench.compressors, "distill": lesson}, store=Cache(folder / "prefixes", 1e9))
    shared = {"epochs": 6, "temperature": 2.0, "weight": 0.5, "learning_rate": 1e-3}
    plan = CompressionPlan(PLAIN.target, (Step("distill", {}, shared),))
    reference = bench.reference(PLAIN.target, Clock())
    out = folder / f"out-{judge.stop_at}"
    record, _ = bench.run(7, plan, reference, bench.examples("validation"), empty(out), Clock(), judge)
    return record, bench


def test_training_can_be_given_up_between_two_rounds_and_goes_on_from_there(tmp_path: Path) -> None:
    stopped, _ = trained(tmp_path, Told("training 2"))
    assert stopped.stopped == Stop("training 2", "accuracy", (0.0, 0.5), "enough")
    assert (stopped.measurements, stopped.achieved, stopped.measured) == ((), {}, False)
    judge = Told()
    whole, _ = trained(tmp_path, judge)
    assert [(at.method, at.key, at.done, at.wanted) for at in judge.trainings] == [
        ("distill", "epochs", 2, 6),
        ("distill", "epochs", 4, 6),
    ]
    reported = whole.achieved["distill"][""]
    assert [at.loss for at in judge.trainings] == [reported["loss_after_2"], reported["loss_after_4"]]
    assert reported["loss"] == reported["loss_after_6"]
    assert float(reported["loss_after_1"]) > float(reported["loss_after_6"])


def test_the_reference_lies_in_the_cache_and_is_made_anew(tmp_path: Path) -> None:
    counts: list[int] = []
    bench = make_search(tmp_path, 1, counts.append).workbench
    first, second = (bench.reference(PLAIN.target, Clock()) for _ in range(2))
    assert first.folder == second.folder
    assert first.folder.is_relative_to(tmp_path / "cache")
    assert first.sha256 == second.sha256
    assert counts == [0, 0]


def test_an_entry_cannot_vanish_while_its_trial_is_deployed_and_may_afterwards(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "0123456789abcdef"
    crowded = Cache(folder, limit_bytes=0.5)
    there: list[list[str]] = []

    def look(count: int) -> None:
        if count:
            Cache(folder, limit_bytes=0.5).shrink()
            there.append(sorted(entry.name for entry in folder.iterdir()))

    bench = replace(make_search(tmp_path, 1, look).workbench, cache=folder, store=crowded)
    for name in ("original", "other"):
        (folder / name).mkdir(parents=True)
        (folder / name / "float.onnx").write_bytes(b"x")
    record, _, _ = carried_out(bench, INT8, tmp_path)
    assert record.infeasible is None
    assert there == [["original", "reference"]]
    assert [entry.name for entry in folder.iterdir()] == ["reference"]
    bench.close()
    crowded.shrink()
    assert not list(folder.iterdir())


def test_examples_carry_what_the_uncompressed_model_says(tmp_path: Path) -> None:
    bench = replace(make_search(tmp_path, 1).workbench, batch=3)
    examples = bench.examples("test")
    with torch.no_grad():
        said = bench.workload.model(bench.workload.splits.test.inputs[0]).numpy()
    assert (examples.split, len(examples)) == ("test", 8)
    assert examples.original == pytest.approx(said, abs=1e-5)
    assert examples.targets is not None


def test_compressors_see_augmented_training_images_and_plain_calibration_ones(tmp_path: Path) -> None:
    bench = make_search(tmp_path, 1).workbench
    splits = replace(bench.workload.splits, augment=torch.zeros_like)
    bench = replace(bench, workload=replace(bench.workload, splits=splits), batch=4)
    context = bench._context(Clock(), None)
    assert all(not inputs[0].any() for inputs, _ in context.train())
    assert all(inputs[0].any() for inputs, _ in context.calibration())
    assert [len(inputs[0]) for inputs, _ in context.calibration()] == [4, 4]


def test_a_value_that_was_not_measured_is_an_error() -> None:
    record = TrialRecord(0, PLAIN, (exact(ACCURACY, 0.5), exact(RATIO, 2.0)), None, {}, {}, {})
    assert [m.value for m in record.values(["latency_ratio", "accuracy"])] == [2.0, 0.5]
    with pytest.raises(KeyError, match="size"):
        record.value("size")


def test_a_clock_adds_up_and_names_the_phase_that_broke() -> None:
    seen: list[str] = []
    clock = Clock(watch=seen.append)
    for _ in range(2):
        with clock.timed("a"):
            pass
    with pytest.raises(RuntimeError), clock.timed("b"):
        raise RuntimeError
    assert seen == ["a", "a", "b"]
    assert set(clock.seconds) == {"a", "b"}
    assert clock.phase == "b"
