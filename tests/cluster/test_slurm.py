"""A sweep of four workers over two Slurm nodes: one is killed, one hits its time limit and is queued again."""

import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster import sweeps
from tests.cluster.services import mlflow_database, mlflow_server, postgresql, public_folder, slurm, wait_until

pytestmark = pytest.mark.cluster
TRIALS = 40


def test_slurm() -> None:
    with (
        public_folder() as folder,
        postgresql(folder) as (_, storage),
        mlflow_server(folder, mlflow_database(storage)) as (_, server),
        slurm(folder) as slurm_environment,
    ):
        env = sweeps.environment(folder, storage, slurm_environment)
        sweeps.prepare(folder, 4, server, env)
        options = [
            "hydra/launcher=slurm",
            "hydra.launcher.partition=main",
            "hydra.launcher.mem_gb=null",
            "hydra.launcher.cpus_per_task=1",
            # Slurm's clock ticks in minutes: the shortest limit there is.
            "hydra.launcher.timeout_min=1",
            "hydra.launcher.signal_delay_s=20",
            "worker=range(0,4)",
        ]
        sweep = sweeps.start(folder, ["--multirun", *options, *sweeps.words(folder, TRIALS, server)], env)
        sweeps.wait_for_trials(storage, 6, 300)
        nodes = _squeue(env, "%N")
        assert {"n1", "n2"} <= set(nodes), f"workers are on {nodes}"
        victim = _squeue(env, "%A")[0]
        subprocess.run(["scancel", "--signal=KILL", "--full", victim], env=env, check=True)
        wait_until(lambda: _requeued(env), 180, "a job that hit its time limit is queued again")
        sweep_ended(sweep, folder)
        found = sweeps.check(storage, server, TRIALS)
        print(found)
        assert found["workers"] >= 5, "four workers, and one that was started again"
        assert found["taken up again"] >= 1


def sweep_ended(sweep: "subprocess.Popen[bytes]", folder: Path) -> None:
    """The killed job makes Hydra's command fail in the end; the study is what counts."""
    end = time.monotonic() + 900
    while sweep.poll() is None:
        assert time.monotonic() < end, (folder / "search.log").read_text()[-3000:]
        time.sleep(1)


def _squeue(env: dict[str, str], form: str) -> list[str]:
    command = ["squeue", "-h", "-r", "-t", "RUNNING", "-o", form]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split()


def _requeued(env: dict[str, str]) -> bool:
    said = subprocess.run(["scontrol", "show", "job"], env=env, capture_output=True, text=True, check=True).stdout
    return any(f"Restarts={n}" in said for n in range(1, 5))
