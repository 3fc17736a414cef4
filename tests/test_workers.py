"""Cores are dealt out, all processes come to an end together, and what went wrong in one is said."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from omegaconf import OmegaConf

import compareto
from compressors.errors import ConfigError
from search import workers
from search.build import compose, for_worker, from_yaml
from search.loop import INTERRUPTED
from search.study import Outcome, Search
from tests.studies import make_search, quiet

WAIT = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
print("ready", flush=True)
time.sleep(60)
"""
pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")


Begun = list[tuple[Sequence[int], "subprocess.Popen[bytes]"]]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Begun]]:
    """Runs some code in the place of every further search; gives their cores and processes."""
    begun: Begun = []

    def instead(code: str) -> Begun:
        def start(_search: Search, _number: int, cores: Sequence[int]) -> "subprocess.Popen[bytes]":
            begun.append((cores, subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)))
            return begun[-1][1]

        monkeypatch.setattr(workers, "_start", start)
        return begun

    yield instead
    for _, process in begun:
        process.kill()
        process.communicate()


def test_cores_are_dealt_out_and_given_back(store: Path, stand_in: Callable[[str], Begun]) -> None:
    begun = stand_in("")
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    seen: list[tuple[set[int], int]] = []

    def watch(_progress: object) -> None:
        seen.append((os.sched_getaffinity(0), torch.get_num_threads()))

    outcome = workers.run_together(make_search(store, 2), watch, 2)
    assert len(outcome.records) == 2
    (cores, _) = begun[0]
    own, own_threads = seen[0]
    assert own | set(cores) == before
    assert not own & set(cores)
    assert own_threads == len(own)
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == (before, threads)


def test_one_worker_starts_nobody(store: Path, stand_in: Callable[[str], Begun]) -> None:
    begun = stand_in("")
    assert len(workers.run_together(make_search(store, 2), quiet, 1).records) == 2
    assert begun == []


def test_a_worker_that_breaks_is_said_with_its_log_and_costs_nothing_else(
    store: Path, stand_in: Callable[[str], Begun]
) -> None:
    stand_in("raise SystemExit(3)")
    outcome = workers.run_together(make_search(store, 2), quiet, 2)
    assert len(outcome.records) == 2
    assert re.search(r"budget spent.*; worker 2 ended with code 3, see .*worker-2\.log", outcome.ended)


def test_a_worker_starts_no_others_and_may_have_fewer_cores_than_there_are_workers() -> None:
    text = OmegaConf.to_yaml(compose(["workers=2", "budget.minutes=1"]))
    assert from_yaml(for_worker(text)).workers == 1
    assert from_yaml(for_worker(text)).budget == from_yaml(text).budget


def test_ctrl_c_ends_all_of_them(
    store: Path, monkeypatch: pytest.MonkeyPatch, stand_in: Callable[[str], Begun]
) -> None:
    begun = stand_in(WAIT)

    def interrupted(search: Search, _watch: object) -> Outcome:
        out = begun[0][1].stdout
        assert out is not None
        assert out.readline() == b"ready\n"
        optuna.create_study(study_name=search.name, storage=search.storage, load_if_exists=True)
        study = search.tracker.open_study(search.name, "w", search.config, search.fingerprint)
        return Outcome(study, (), (), INTERRUPTED)

    monkeypatch.setattr(workers, "run", interrupted)
    assert workers.run_together(make_search(store, 2), quiet, 2).ended == INTERRUPTED
    assert begun[0][1].poll() == 130


def test_a_break_here_ends_the_others(
    store: Path, monkeypatch: pytest.MonkeyPatch, stand_in: Callable[[str], Begun]
) -> None:
    begun = stand_in(WAIT.replace("sys.exit(130)", "sys.exit(0)"))

    def broken(*_: object) -> Outcome:
        out = begun[0][1].stdout
        assert out is not None
        out.readline()
        raise OSError("disk full")

    monkeypatch.setattr(workers, "run", broken)
    with pytest.raises(OSError, match="disk full"):
        workers.run_together(make_search(store, 2), quiet, 2)
    assert begun[0][1].poll() == 0


def test_other_processes_do_not_have_a_model_from_python() -> None:
    loader: list[Any] = [torch.zeros(2, 3)]
    with pytest.raises(ConfigError, match="workers: is 2, and other processes do not have this model"):
        compareto.compress(torch.nn.Linear(3, 2), loader, loader, study="x", overrides=["workers=2"])


def test_a_worker_without_a_usable_configuration_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = compose([f"folder={tmp_path}", f"cache={tmp_path}/cache", "budget.minutes=null"])
    (tmp_path / "worker.yaml").write_text(OmegaConf.to_yaml(config))
    assert workers.main(str(tmp_path / "worker.yaml")) == 2
    assert "has neither trials nor minutes" in capsys.readouterr().out
