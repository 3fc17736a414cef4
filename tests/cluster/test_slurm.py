"""A sweep of four workers over two Slurm nodes: one is killed, one hits its time limit and is queued again."""

import subprocess

import pytest

from tests.cluster import sweeps
from tests.cluster.services import servers, slurm, wait_until

pytestmark = [pytest.mark.cluster, sweeps.LEAKS]
TRIALS = 120


def test_slurm() -> None:
    with servers() as (folder, _, storage, _, server), slurm(folder) as slurm_environment:
        env = sweeps.environment(folder, storage, slurm_environment)
        sweeps.prepare(folder, server, env)
        options = [
            "hydra/launcher=slurm",
            "hydra.launcher.partition=main",
            "hydra.launcher.mem_gb=null",
            "hydra.launcher.cpus_per_task=1",
            # Slurm's clock ticks in minutes, and four workers on two cores take most of the first one to begin.
            "hydra.launcher.timeout_min=3",
            "hydra.launcher.signal_delay_s=30",
            "worker=range(0,4)",
        ]
        sweep = sweeps.start(folder, ["--multirun", *options, *sweeps.words(folder, TRIALS, server)], env)
        sweeps.wait_for_workers(storage, 4, 300)
        nodes = _squeue(env, "%N")
        assert {"n1", "n2"} <= set(nodes), f"workers are on {nodes}"
        victim = _squeue(env, "%A")[0]
        subprocess.run(["scancel", "--signal=KILL", "--full", victim], env=env, check=True)
        wait_until(lambda: _requeued(env), 300, "a job that hit its time limit is queued again")
        # Hydra's command ends with the first job that fails; the others go on.
        wait_until(lambda: not _squeue(env, "%A", every=True), 900, "all jobs have ended")
        sweep.wait(timeout=60)
        found = sweeps.check(storage, server, TRIALS)
        print(found)
        assert found["workers"] >= 5, "four workers before the first was killed, and one that was started again"
        assert found["taken up again"] >= 1


def _squeue(env: dict[str, str], form: str, every: bool = False) -> list[str]:
    command = ["squeue", "-h", "-r", "-o", form, *([] if every else ["-t", "RUNNING"])]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split()


def _requeued(env: dict[str, str]) -> bool:
    said = subprocess.run(["scontrol", "show", "job"], env=env, capture_output=True, text=True, check=True).stdout
    return any(f"Restarts={n}" in said for n in range(1, 5))
