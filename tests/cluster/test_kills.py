"""Workers killed at random, servers that go away, disks that are full, clocks that go backwards."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import optuna
import pytest
import sqlalchemy.exc

from search.storage import open_storage
from search.tracking import Tracker
from tests.cluster import kills
from tests.cluster.services import Service, servers, wait_until

ROOT = Path(__file__).parents[2]


def harness(folder: Path, *more: str) -> dict[str, int]:
    """In a process of its own, which may fork."""
    command = [sys.executable, "-m", "tests.cluster.kills", "--folder", str(folder), *more]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    log = folder / "workers.log"
    assert ended.returncode == 0, ended.stderr[-3000:] + (log.read_text()[-3000:] if log.exists() else "")
    print(ended.stdout)
    found: dict[str, int] = json.loads(ended.stdout.splitlines()[-1])
    return found


@pytest.mark.cluster
def test_two_hundred_kills_on_sqlite(tmp_path: Path) -> None:
    found = harness(tmp_path, "--kills", "200", "--trials", "300")
    assert (found["kills"], found["counted"]) == (200, 300)
    assert found["taken up again"] > 20


def test_a_few_kills(store: Path) -> None:
    """What every test run can afford."""
    found = harness(store, "--kills", "12", "--trials", "60", "--workers", "2", "--longest", "3")
    assert found["counted"] == 60
    # How many die in the midst of a trial depends on the machine; what must hold afterwards does not.
    assert found["kills"] > 0


Servers = tuple[Path, Service, str, Service, str]


@pytest.fixture(scope="module")
def running() -> Iterator[Servers]:
    with servers() as found:
        yield found


@pytest.mark.cluster
def test_two_hundred_kills_on_postgresql_and_a_server(running: Servers, tmp_path: Path) -> None:
    _, _, storage, _, uri = running
    options = ["--storage", storage, "--tracking", uri, "--longest", "4", "--trials", "200"]
    found = harness(tmp_path, "--kills", "200", *options)
    assert (found["kills"], found["counted"]) == (200, 200)


@pytest.mark.cluster
def test_servers_that_are_away_for_a_minute(running: Servers, tmp_path: Path) -> None:
    """First MLflow alone, then PostgreSQL, on which MLflow rests as well."""
    _, database, storage, mlflow, uri = running
    options = ["--storage", storage, "--tracking", uri, "--kills", "0", "--trials", "400", "--study", "outage"]
    options += ["--pause", "1"]
    command = [sys.executable, "-m", "tests.cluster.kills", "--folder", str(tmp_path), *options]
    with (tmp_path / "out").open("w") as out:
        search = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    ledger = tmp_path / kills.LEDGER
    told = {}
    for name, service in (("mlflow", mlflow), ("postgresql", database)):
        before = _lines(ledger)
        while _lines(ledger) < before + 10:
            assert search.poll() is None, (tmp_path / "out").read_text()
            time.sleep(0.5)
        service.stop()
        first = _lines(ledger)
        time.sleep(60)
        told[name] = _lines(ledger) - first
        service.start()
    assert search.wait(timeout=900) == 0, (tmp_path / "out").read_text()[-3000:]
    found = json.loads((tmp_path / "out").read_text().splitlines()[-1])
    print(found, told)
    assert found["complete"] == 400
    assert found["taken up again"] == 0
    assert told["mlflow"] > 50, "without MLflow the search goes on"
    assert not [path for path in tmp_path.glob("*/outbox/*") if path.is_dir()]


def _lines(path: Path) -> int:
    return len(path.read_text().split()) if path.exists() else 0


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system in memory that is soon full. Needs root."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


FILLED = """
import sys
from pathlib import Path
from rich.console import Console
from search.__main__ import guarded
from search.loop import run
from tests.studies import make_search, quiet
folder, filler = map(Path, sys.argv[1:])
def before(count):
    if not count:
        return
    filler.write_bytes(bytes(filler.stat().st_size if filler.exists() else 0))
    with filler.open("ab") as out:
        try:
            while True:
                out.write(bytes(65536)); out.flush()
        except OSError:
            pass
def search():
    print(run(make_search(folder, 40, before), quiet).ended)
sys.exit(guarded(search, Console()))
"""


@pytest.mark.cluster
@pytest.mark.parametrize("full", ["everything", "the tracker's files"])
def test_a_full_disk_corrupts_nothing_and_the_study_goes_on_with_room(full: str, tmp_path: Path) -> None:
    from search.loop import run
    from tests.studies import make_search, quiet

    with small_disk(tmp_path / "disk", 40) as disk:
        folder = disk if full == "everything" else tmp_path / "study"
        folder.mkdir(exist_ok=True)
        if full != "everything":
            (disk / "files").mkdir()
            (folder / "mlartifacts").symlink_to(disk / "files")
        Tracker(f"sqlite:///{folder}/mlflow.db").check()
        before = run(make_search(folder, 5), quiet)
        assert len(before.records) == 5
        code = [sys.executable, "-c", FILLED, str(folder), str(disk / "filler")]
        ended = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, check=False)
        said = ended.stdout + ended.stderr
        assert "No space left" in said or "disk is full" in said, said
        assert "Traceback" not in said, said
        (disk / "filler").unlink()
        after = run(make_search(folder, 60), quiet)
        assert [r.plan.digest for r in after.records][:5] == [r.plan.digest for r in before.records]
        assert make_search(folder, 60).tracker.open_trials(after.study) == []


SLOWLY = """
import sys
from pathlib import Path
from search.loop import run
from tests.studies import make_search, quiet
outcome = run(make_search(Path(sys.argv[1]), 40), quiet)
print(len({record.plan.digest for record in outcome.records}), outcome.ended)
"""


@pytest.mark.cluster
def test_a_clock_that_goes_backwards_changes_nothing(tmp_path: Path) -> None:
    """By a day, in the middle; libfaketime shows it to this one process, which then cannot sleep."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    if not found:
        pytest.skip("libfaketime is missing: scripts/cluster-test installs it (Debian package libfaketime)")
    shift = tmp_path / "shift"
    shift.write_text("+0")
    fake = {
        "LD_PRELOAD": str(found[0]),
        "FAKETIME_TIMESTAMP_FILE": str(shift),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    command = [sys.executable, "-c", SLOWLY, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **fake}, stdout=subprocess.PIPE, text=True)
    database = tmp_path / "optuna.db"
    wait_until(lambda: database.exists() and _count(database) > 10, 120, "ten trials")
    shift.write_text("-86400")
    said, _ = process.communicate(timeout=300)
    assert said == "40 budget spent: 40 of 40 trials\n"
    study = optuna.load_study(study_name="test", storage=f"sqlite:///{database}")
    began = [t.datetime_start for t in study.trials if t.datetime_start]
    assert min(began) < max(began) - timedelta(hours=12), "the clock was really put back"


def _count(database: Path) -> int:
    try:
        # Not by its address: whoever opens a new database without the lock collides with the one that makes it.
        return len(optuna.load_study(study_name="test", storage=open_storage(f"sqlite:///{database}")).trials)
    except (KeyError, sqlalchemy.exc.SQLAlchemyError):
        return 0
