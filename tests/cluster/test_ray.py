"""A sweep over three Ray nodes: one is killed in mid-run, and a new one is added."""

import signal

import pytest

from tests.cluster import sweeps
from tests.cluster.services import ray_head, servers

pytestmark = [pytest.mark.cluster, sweeps.LEAKS]
TRIALS = 60


def test_ray() -> None:
    with servers() as (folder, _, storage, _, server):
        env = sweeps.environment(folder, storage)
        sweeps.prepare(folder, server, env)
        # The nodes hand their environment on to the workers.
        with ray_head(folder, env) as (add_node, address):
            nodes = [add_node(), add_node()]
            options = ["hydra/launcher=ray_cluster", f"hydra.launcher.ray.init.address={address}", "worker=range(0,3)"]
            sweep = sweeps.start(folder, ["--multirun", *options, *sweeps.words(folder, TRIALS, server)], env)
            sweeps.wait_for_workers(storage, 3, 400)
            nodes[0].stop(signal.SIGKILL)
            add_node()
            sweeps.wait_for_exit(sweep, 900, folder / "search.log")
        found = sweeps.check(storage, server, TRIALS)
        print(found)
        assert found["workers"] >= 4, "three workers before the node was killed, and one that was started again"
