import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FixedTrial

from compressors.errors import ConfigError
from scripts import compare
from scripts.contestant import WORKLOADS, Job, Outcome, run_tool, searched, written
from scripts.rivals.environment import PACKAGES, script
from scripts.rivals.exchange import Exchange, handed_in
from scripts.summary import Scale, first_to_reach, save, summarise, with_hypervolumes
from search import build
from tests.studies import make_search, quiet


def job(folder: Path, **changes: Any) -> Job:
    fields: dict[str, Any] = {
        "workload": "digits",
        "batch": 1,
        "method": "tpe",
        "seed": 3,
        "budget_s": 300.0,
        "trials": None,
        "options": (),
        "results": str(folder / "results"),
        "work": str(folder / "work"),
    }
    return Job(**{**fields, **changes})


def trial(quality: float, ratio: float, elapsed_s: float = 1.0, reason: str | None = None) -> dict[str, Any]:
    row: dict[str, Any] = {"elapsed_s": elapsed_s, "reason": reason}
    return row if reason else row | {"quality": [quality] * 3, "latency_ratio": [ratio] * 3}


def member(
    quality: float, ratio: float, test: float, again: float | None = None, chosen: bool = True
) -> dict[str, Any]:
    latencies = {"latency_ratio": [ratio] * 3, "again": again and [again] * 3}
    return {"quality": [quality] * 3, **latencies, "test": [test] * 3, "chosen": chosen}


def result(method: str, seed: int, *trials: dict[str, Any], front: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    return with_hypervolumes(
        {
            "method": method,
            "seed": seed,
            "error": None,
            "network": "a",
            "budget_s": 300.0,
            "trials_wanted": None,
            "seconds": {"wall": 300.0, "cpu": 290.0},
            "scale": {"validation": [0.95, 1.0], "test": [0.95, 1.0]},
            "trials": list(trials),
            "front": list(front),
        }
    )


# -- What is written


def test_the_scale_goes_from_the_reference_point_to_the_ideal() -> None:
    scale = Scale(worthless=0.95, ideal=1.0)
    assert scale.hypervolume([(0.25, 0.99)]) == pytest.approx(0.75 * 0.8)
    assert scale.hypervolume([(0.25, 0.94), (1.1, 1.0)]) == 0
    assert Scale(worthless=0.95 * 0.92, ideal=0.92).hypervolume([(0.5, 0.92)]) == pytest.approx(0.5)


def test_hypervolume_grows_with_the_trials_that_count() -> None:
    rows = with_hypervolumes(
        result("tpe", 0, trial(1.0, 0.8), trial(0, 0, reason="refused"), trial(0.99, 0.5), trial(0.9, 0.1))
    )
    assert [t["hypervolume"] for t in rows["trials"]] == pytest.approx([0.2, 0.2, 0.2 + 0.3 * 0.8, 0.44])
    assert rows["validation_hypervolume"] == pytest.approx(0.44)


def test_on_test_the_choice_of_validation_counts_with_the_second_reading() -> None:
    front = (member(0.99, 0.5, test=0.98, again=0.6), member(0.99, 0.51, test=1.0, chosen=False))
    assert result("tpe", 0, front=front)["test_hypervolume"] == pytest.approx(0.4 * 0.6)


def test_first_to_reach_counts_trials_from_one() -> None:
    run = result("guided", 0, trial(1.0, 0.8), trial(1.0, 0.5), trial(1.0, 0.5))
    assert [first_to_reach(run, target) for target in (0.1, 0.3, 0.5, 0.51)] == [1, 2, 2, None]


def test_a_saved_result_is_read_back_and_keeps_numbers_on_one_line(tmp_path: Path) -> None:
    run = result("tpe", 0, trial(0.99, 0.5), trial(0, 0, reason="value [1, 2] is\n refused"))
    save(run, tmp_path / "tpe-0.json")
    assert json.loads((tmp_path / "tpe-0.json").read_text()) == run
    assert '"quality": [ 0.99, 0.99, 0.99 ]' in (tmp_path / "tpe-0.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["tpe-0.json"]


def test_the_summary_has_means_spreads_and_what_guided_reaches(tmp_path: Path) -> None:
    fast, slow = trial(1.0, 0.5, 10.0), trial(1.0, 0.8, 5.0)
    for seed, ratio in enumerate((0.4, 0.6)):
        front = (member(1.0, ratio, test=1.0, again=ratio),)
        save(result("guided", seed, slow, trial(1.0, ratio, 20.0), front=front), tmp_path / f"guided-{seed}.json")
        save(result("tpe", seed, slow, slow, fast, front=(member(1.0, 0.5, 1.0),)), tmp_path / f"tpe-{seed}.json")
    save({**result("nncf", 0), "error": "ERROR: no such package"}, tmp_path / "nncf-0.json")
    text, picture = summarise(tmp_path)
    lines = text.read_text().splitlines()
    assert "| guided | 0, 1 | 0.500 [0.400, 0.600] | 0.500 [0.400, 0.600] | 1.0 | 2 | 300 | 290 |" in lines
    assert "- tpe: latencies of 2 of 2 runs are as read during the runs." in lines
    assert "- nncf, seed 0: ERROR: no such package" in lines
    assert "- guided reaches the final validation hypervolume of tpe at trial (by seed): 2, never." in lines
    assert not any("guided: latencies" in line for line in lines)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_runs_of_one_seed_that_started_from_several_networks_are_not_compared(tmp_path: Path) -> None:
    save(result("tpe", 0), tmp_path / "tpe-0.json")
    save({**result("tpe", 1), "network": "b"}, tmp_path / "tpe-1.json")
    summarise(tmp_path)
    save({**result("nsga2", 1), "network": "c"}, tmp_path / "nsga2-1.json")
    with pytest.raises(ConfigError, match="seed 1 started from several networks"):
        summarise(tmp_path)


# -- What is run


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("method", ["tpe", "nsga2", "random", "uniform", "nncf"])
def test_the_seed_reaches_splits_training_and_search(workload: str, method: str, tmp_path: Path) -> None:
    config = build.compose(job(tmp_path, workload=workload, method=method, batch=32).overrides(tmp_path))
    assert config.seed == config.data.seed == config.model.training.seed == 3
    assert config.evaluator.latency.batch == 32
    assert (config.budget.minutes, config.budget.trials) == (5, None)
    assert config.cache == f"{tmp_path}/cache"


def test_the_command_tells_how_to_do_it_again_on_another_machine(tmp_path: Path) -> None:
    options = ("data.folder=/somewhere", "compressor=[quantize]")
    assert job(tmp_path, options=options, trials=30, budget_s=None).command == (
        "scripts/bench.py compare digits --methods tpe --seeds 3 --batch 1 --trials 30 compressor=[quantize]"
    )


def test_what_is_there_is_not_run_again_and_another_budget_is_refused(tmp_path: Path) -> None:
    words = ["digits", "--methods", "tpe", "--seeds", "0-1", "--out", str(tmp_path), "--work", str(tmp_path / "work")]
    (tmp_path / "digits-b1").mkdir()
    for seed in (0, 1):
        save(result("tpe", seed), tmp_path / f"digits-b1/tpe-{seed}.json")
    compare.main(words)
    assert not (tmp_path / "work").exists()
    with pytest.raises(ConfigError, match=r"300\.0 s and None trials"):
        compare.main([*words, "--budget", "60"])


def test_more_runs_at_once_than_cores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one for each core"):
        compare.run_all([job(tmp_path)], 10_000)


def test_a_search_becomes_trials_and_a_front_with_its_test_quality(store: Path, tmp_path: Path) -> None:
    one, search = job(tmp_path, trials=5), make_search(store, trials=5)
    told = written(one, search, searched(one, search, time.time(), quiet))
    assert len(told["trials"]) == 5
    assert [t["elapsed_s"] for t in told["trials"]] == sorted(t["elapsed_s"] for t in told["trials"])
    assert told["trials"][0]["what"] == "uncompressed, fake fp32"
    assert told["front"]
    for found in told["front"]:
        assert found["chosen"]
        assert found["test"] == found["quality"]  # of stand-ins that look at the file alone
        assert (one.models / str(found["number"]) / "model.json").exists()
    assert with_hypervolumes(told)["validation_hypervolume"] > 0
    assert told["scale"]["test"] == (0.95, 1.0)
    relative = written(job(tmp_path, workload="fashion_mnist"), search, Outcome([], {}, {}))
    assert relative["scale"]["test"] == pytest.approx((0.95 * 0.99, 0.99))  # 0.99 is the uncompressed stand-in's
    assert relative["front"] == relative["trials"] == []


def test_points_that_are_worth_nothing_are_not_counted_as_distinct() -> None:
    told = result("guided", 0, front=(member(0.99, 0.5, 0.99), member(0.98, 0.3, 0.98), member(0.60, 0.1, 0.6)))
    assert told["distinct"] == 2
    alike = result("guided", 0, front=(member(0.99, 0.5, 0.99), member(0.99, 0.5, 0.98)))
    assert alike["distinct"] == 1


def test_what_ends_after_the_budget_does_not_count(store: Path, tmp_path: Path) -> None:
    def late(count: int) -> None:
        if count > 0:
            time.sleep(max(0.0, began + 13 - time.time()))

    search, began = make_search(store, 8, late), time.time()
    outcome = searched(job(tmp_path, budget_s=10.0), search, began, quiet)
    assert [(f.number, f.counts) for f in outcome.finished] == [(0, True), (1, False)]
    assert outcome.finished[0].elapsed_s < 10.0 < outcome.finished[1].elapsed_s
    assert outcome.finished[1].reason == "ended after the budget"


def test_uniform_runs_every_uniform_plan_and_nothing_else(store: Path, tmp_path: Path) -> None:
    search = make_search(store, trials=99)
    outcome = searched(job(tmp_path, method="uniform", budget_s=None), search, time.time(), quiet)
    plans = [FixedTrial(answers) for answers in (*search.space.baselines(), *search.space.uniform())]
    assert {f.digest for f in outcome.finished} == {search.space.sample(plan).digest for plan in plans}


# -- Rival tools


def test_every_rival_has_an_environment_and_a_script() -> None:
    assert all(script(tool).exists() for tool in PACKAGES)


def test_what_is_handed_in_counts_in_every_runtime_that_was_named(tmp_path: Path) -> None:
    exchange = Exchange(tmp_path, tmp_path, 0.0)
    exchange.hand_in(exchange.place("a"), "first", ("openvino", "fp32"), ("openvino", "bf16"))
    exchange.hand_in(exchange.place("b"), "second", ("onnxruntime", "fp32"))
    found = [(e.folder, e.runtime, e.precision, e.what) for e in handed_in(tmp_path)]
    assert found[1:] == [("a", "openvino", "bf16", "first"), ("b", "onnxruntime", "fp32", "second")]
    assert len(found) == 3


def test_a_tool_is_cut_off_without_an_error(tmp_path: Path) -> None:
    began = time.time()
    late = f"import pathlib, time; time.sleep(30); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    assert run_tool([sys.executable, "-c", late], budget_s=0.5) is None
    assert time.time() - began < 20
    assert not (tmp_path / "late").exists()


def test_a_tool_that_fails_says_so(tmp_path: Path) -> None:
    assert "exit code 3" in str(run_tool([sys.executable, "-c", "raise SystemExit(3)"], budget_s=60))
    assert handed_in(tmp_path) == []


def test_the_same_name_cannot_be_handed_in_twice(tmp_path: Path) -> None:
    exchange = Exchange(tmp_path, tmp_path, 0.0)
    exchange.place("a")
    with pytest.raises(FileExistsError):
        exchange.place("a")
