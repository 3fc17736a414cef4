"""From a configuration to a search: what belongs to a study, and what a study may share."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from optuna.trial import FixedTrial

from compressors.errors import ConfigError
from evaluators.measurement import Metric
from evaluators.score import Score
from search import build
from search.ladder import Ladder
from search.sampler import GuidedSampler
from search.select import Bound
from search.space import RUNTIME_KNOB
from search.study import Search
from search.workload import Workload, classification
from tests.studies import splits
from tests.test_unpacked import Encoder
from tests.zoo import build as net


def built(store: Path, *words: str, name: str = "residual", **changes: Any) -> Search:
    workload = Workload("residual-noise", net(name), splits(), classification())
    config = build.compose([f"folder={store}", f"cache={store}/cache", *words])
    return build.build(config, lambda _progress: None, workload, **changes)


def test_everything_of_the_configuration_arrives(store: Path) -> None:
    search = built(store, "budget.trials=7", "bounds.size_bytes=5000", "seed=3", "study=mine", "quality=accuracy")
    assert (search.name, search.seed, search.quality) == ("mine", 3, "accuracy")
    assert (search.budget.trials, search.budget.minutes) == (7, 3)
    assert [(b.metric, b.limit) for b in search.bounds] == [("size_bytes", 5000.0)]
    assert [m.name for m in search.objectives] == ["accuracy", "latency_ratio", "size_bytes"]
    assert list(search.workbench.runtimes) == ["onnxruntime", "openvino"]
    assert search.reference.runtime == "onnxruntime"
    assert search.reference.precision == "fp32"
    assert [m.name for m in search.space.methods] == ["depth", "prune", "distill", "quantize"]
    assert search.storage == f"sqlite:///{store}/optuna.db"
    assert OmegaConf.create(search.config).study == "mine"


def test_parameters_can_be_bound_and_searched_for(store: Path) -> None:
    wanted = ("evaluator=[accuracy,latency,parameters]", "objectives=[accuracy,parameters]", "bounds.parameters=9000")
    search = built(store, *wanted)
    assert [m.name for m in search.objectives] == ["accuracy", "parameters"]
    assert search.bounds == (Bound("parameters", 9000.0),)


def test_the_ladder_knows_what_decides_and_can_be_off(store: Path) -> None:
    found = built(store, "bounds.size_bytes=5000", "ladder.error=0.1", "ladder.shares=[0.5]").ladder
    objectives = ("accuracy", "latency_ratio", "size_bytes")
    assert found == Ladder(objectives, "accuracy", "latency_ratio", (Bound("size_bytes", 5000.0),), (0.5,), 0.1)
    assert built(store, "ladder.enabled=false").ladder is None


def test_the_first_runtime_is_what_latency_is_a_ratio_to(store: Path) -> None:
    search = built(store, "runtime=[openvino]")
    assert search.reference.runtime == "openvino"
    assert RUNTIME_KNOB not in {name for answers in search.space.baselines() for name in answers}


def test_labels_alone_can_be_asked_for(store: Path) -> None:
    space = built(store, "compressor.distill.space.weight.choices=[0.0]").space
    plans = [space.sample(FixedTrial(answers)) for answers in space.uniform(sparing=True)]
    weights = {step.shared["weight"] for plan in plans for step in plan.steps if step.method == "distill"}
    assert weights == {0.0}


def test_what_prepares_comes_first_wherever_it_was_named(store: Path) -> None:
    assert [m.name for m in built(store, "compressor=[prune,distill,slim]").space.methods] == [
        "slim",
        "prune",
        "distill",
    ]


FINGERPRINTS = {
    "seed=1": {"seed", "space"},
    "runtime=[onnxruntime]": {"runtime", "space"},
    "bounds.size_bytes=1": {"bounds"},
    "recovery_batch=8": {"recovery_batch"},
    "evaluator.latency.batch=2": {"evaluator"},
    "compressor.quantize.space.bits.choices.conv=[32]": {"compressor", "space"},
    "task=fidelity": {"task"},
    "budget.trials=9": set(),
    "rule=knee": set(),
    "sampler=tpe": set(),
    "study=other": set(),
    "ladder.enabled=false": set(),
}


def test_fingerprints_tell_what_would_make_numbers_incomparable(store: Path) -> None:
    before = built(store).fingerprint
    for word, expected in FINGERPRINTS.items():
        after = built(store, word).fingerprint
        assert {k for k in before if before[k] != after[k]} == expected, word


def test_another_network_is_another_study(store: Path) -> None:
    before, after = built(store).fingerprint, built(store, name="plain").fingerprint
    assert {k for k in before if before[k] != after[k]} == {"model", "network", "answers", "space"}
    assert {"model", "data.train", "data.test", "cpu", "python", "onnxruntime"} <= set(before)


def test_packed_attention_is_searched_as_linear_layers(store: Path) -> None:
    model = Encoder().eval()
    workload = Workload("encoder-noise", model, splits(), classification())
    words = [f"folder={store}", f"cache={store}/cache", "compressor=[heads,quantize]", "sampler=random"]
    one, again = (build.build(build.compose(words), lambda _progress: None, workload) for _ in range(2))
    attention = "encoder.layers.0.self_attn"
    assert {f"{attention}.{x}_proj" for x in ("q", "k", "v", "out")} <= {layer.name for layer in one.layers}
    asked = {name for answers in one.space.uniform() for name in answers}
    assert any(name.startswith("heads.sparsity@encoder.layers.0.self_attn") for name in asked)
    assert one.fingerprint == again.fingerprint


def test_only_what_is_alike_shares_a_cache(store: Path) -> None:
    folders = {built(store, word).workbench.cache for word in ("budget.trials=9", "study=other", "rule=knee")}
    assert len(folders) == 1
    assert built(store, "seed=1").workbench.cache not in folders


def test_the_sampler_is_seeded_by_the_search(store: Path) -> None:
    make = built(store, "sampler=random").sampler
    first, second = make(1), make(1)
    assert first is not second
    assert type(first).__name__ == "RandomSampler"


OBJECTIVES = "objectives=[latency_ratio,accuracy,size_bytes,peak_memory_bytes]"


def test_the_default_sampler_knows_the_space_and_what_each_objective_is(store: Path) -> None:
    search = built(store, "evaluator=[accuracy,latency,size,memory]", OBJECTIVES)
    sampler, later = search.sampler(0), search.sampler(9)
    assert isinstance(sampler, GuidedSampler)
    assert isinstance(later, GuidedSampler)
    assert sampler.roles == ("latency", "quality", "size", "latency")
    assert sampler.seed == later.seed, "the same trials, the same proposal"
    assert sampler.guide is not None
    assert search.sparing


def test_without_quality_among_the_objectives_there_is_no_guide(store: Path) -> None:
    search = built(store, "objectives=[latency_ratio,size_bytes]")
    sampler = search.sampler(0)
    assert isinstance(sampler, GuidedSampler)
    assert sampler.guide is None
    assert not search.sparing


def test_two_sizes_of_batch_are_objectives_of_their_own(store: Path) -> None:
    batches = ("evaluator=[accuracy,latency,batched]", "objectives=[accuracy,latency_ratio,batched_ratio]")
    search = built(store, *batches)
    assert [metric.name for metric in search.objectives] == ["accuracy", "latency_ratio", "batched_ratio"]
    with pytest.raises(ConfigError, match=r"evaluator\.batched: measures latency_ratio, as evaluator\.latency does"):
        built(store, *batches, "evaluator.batched.name=latency")


def test_evaluators_given_from_python_come_first(store: Path) -> None:
    search = built(store, "quality=score", "evaluator=[latency,size]", extra={"score": Score(lambda _o, _t: 1.0)})
    assert list(search.workbench.evaluators) == ["score", "latency", "size"]
    assert search.objectives[0] == Metric("score", "user's", "maximize")


def test_a_model_given_from_python_cannot_be_built_from_a_configuration(store: Path) -> None:
    config = build.compose([f"folder={store}"])
    config.model.network = None
    with pytest.raises(ConfigError, match=r"reproduce\(\) on its result"):
        build.build_workload(config, store, lambda _progress: None)


def test_a_recorded_study_is_read_with_the_folders_at_hand(store: Path) -> None:
    search = built(store, "seed=5")
    again = build.recorded(search.config, build.compose([f"folder={store}/elsewhere"]))
    assert again.seed == 5
    assert again.folder == f"{store}/elsewhere"
    assert again.tracking.uri == f"sqlite:///{store}/elsewhere/mlflow.db"


def test_what_is_kept_names_the_variable_and_not_the_password(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKING", f"sqlite:///{store}/mlflow.db")
    search = built(store, "tracking.uri=${oc.env:TRACKING}")
    assert "uri: ${oc.env:TRACKING}" in search.config
    assert search.tracker.uri == f"sqlite:///{store}/mlflow.db"
    assert OmegaConf.create(search.config).storage.url == f"sqlite:///{store}/optuna.db"


@pytest.mark.parametrize("path", ["storage.url", "tracking.uri"])
def test_a_password_that_was_written_down_is_refused(store: Path, path: str) -> None:
    with pytest.raises(ConfigError, match=rf"{path}: has a password") as refused:
        built(store, f"{path}=postgresql+psycopg://me:hunter2@127.0.0.1/x")
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model.network.name=x"], r"did you mean model\.name|model\.network"),
        (["runtime=[openvino,nothing]"], "use onnxruntime, openvino"),
        (["seed=1", "sede=1"], r"sede=1: .*did you mean seed\?"),
        (["zzzzzz=1"], r"all options: conf/config\.yaml"),
    ],
)
def test_what_fits_nothing_is_named_with_what_would(words: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        build.compose(words)


def test_the_cache_has_a_bound(store: Path) -> None:
    kept = built(store, "cache_gb=1.5").workbench.store
    assert kept is not None
    assert kept.limit_bytes == 1.5e9
    assert kept.folder == built(store, "cache_gb=3").workbench.cache


def test_what_is_made_of_plans_is_kept_for_other_searches_of_the_model(store: Path) -> None:
    def place(*words: str) -> Path:
        return built(store, *words).workbench.cache

    usual = place()
    assert place("objectives=[accuracy,size_bytes]", "bounds.accuracy=0.5", "evaluator.latency.sessions=3") == usual
    assert place("compressor.prune.space.sparsity.choices=[0.0,0.5]") == usual
    assert place("compressor.distill.clip_norm=2.0") != usual
    assert place("recovery_batch=32") != usual
    assert place("seed=1") != usual


@pytest.mark.parametrize("value", ["0", "-1", ".nan", "null", "much"])
def test_a_cache_without_room_is_refused(value: str, store: Path) -> None:
    with pytest.raises(ConfigError, match="cache_gb"):
        built(store, f"cache_gb={value}")


def test_choices_without_the_one_that_does_nothing_are_refused(store: Path) -> None:
    with pytest.raises(ConfigError, match=r"compressor\.prune\.space\.sparsity\.choices: has no 0\.0"):
        built(store, "compressor.prune.space.sparsity.choices=[0.25,0.5]", "compressor=[prune,quantize]")


def test_a_configuration_from_a_store_calls_nothing_but_what_is_ours(store: Path) -> None:
    evil = "model: {name: x, network: {_target_: os.system, command: 'touch owned'}}"
    with pytest.raises(ConfigError, match=r"begun with 'os\.system', which is none of compareto's"):
        build.recorded(evil, build.compose([f"folder={store}"]))
    hidden = "sampler: {deep: [{_target_: subprocess.run}]}"
    with pytest.raises(ConfigError, match=r"subprocess\.run"):
        build.recorded(hidden, build.compose([]))


@pytest.mark.parametrize(
    "through", ["search.tracking.mlflow.pyfunc.load_model", "search.models.torch.load", "search.no"]
)
def test_what_one_of_our_modules_imports_is_not_ours(through: str) -> None:
    with pytest.raises(ConfigError, match="none of compareto's"):
        build.recorded(f"rule: {{_target_: {through}, x: y}}", build.compose([]))


def test_a_password_beside_something_from_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBHOST", "db.example")
    with pytest.raises(ConfigError, match="has a password in it"):
        build._without_secrets(build.compose(["tracking.uri='http://me:pw@${oc.env:DBHOST}/x'"]))
    monkeypatch.setenv("DBPASSWORD", "pw")
    kept = build._without_secrets(build.compose(["tracking.uri='http://me:${oc.env:DBPASSWORD}@db.example/x'"]))
    assert "http://me:${oc.env:DBPASSWORD}@db.example/x" in OmegaConf.to_yaml(kept)


def test_several_workers_share_the_memory(store: Path) -> None:
    one = build.from_yaml(build.for_worker(OmegaConf.to_yaml(build.compose(["workers=1"]))))
    two = build.from_yaml(build.for_worker(OmegaConf.to_yaml(build.compose(["workers=2"]))))
    assert two.limits.memory_gb == pytest.approx(one.limits.memory_gb / 2)


def test_what_is_named_on_the_command_line_too_is_trusted() -> None:
    stored = "sampler: {_target_: mine.Sampler}"
    again = build.recorded(stored, build.compose(["sampler._target_=mine.Sampler"]))
    assert again.sampler._target_ == "mine.Sampler"
