"""A sweep of two workers on this machine, through each launcher that needs no scheduler."""

import pytest

from tests.cluster import sweeps
from tests.cluster.services import servers

pytestmark = [pytest.mark.cluster, sweeps.LEAKS]
TRIALS = 20


@pytest.mark.parametrize("launcher", ["many_processes", "background"])
def test_two_workers(launcher: str) -> None:
    with servers() as (folder, _, storage, _, server):
        env = sweeps.environment(folder, storage)
        sweeps.prepare(folder, server, env)
        options = [f"hydra/launcher={launcher}", "worker=range(0,2)"]
        sweep = sweeps.start(folder, ["--multirun", *options, *sweeps.words(folder, TRIALS, server)], env)
        sweeps.wait_for_exit(sweep, 400, folder / "search.log")
        found = sweeps.check(storage, server, TRIALS)
        print(found)
        assert found["workers"] == 2
