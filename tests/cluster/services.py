"""PostgreSQL, an MLflow server, Slurm and Ray on the loopback interface, each stopped by its process id."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

Process = "subprocess.Popen[bytes]"


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Raises AssertionError when it does not come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.2)


def listens(port: int) -> bool:
    """Whether somebody answers there."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Service:
    """A process that can be stopped and started again."""

    def __init__(self, command: Sequence[str], log: Path, ready: Callable[[], bool], **more: Any) -> None:
        self.command, self.log, self.ready, self.more = list(command), log, ready, more
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, seconds: float = 120) -> None:
        """Comes back when it is ready."""
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self.command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, **self.more
            )
        wait_until(self._is_ready, seconds, f"{self.command[0]} (see {self.log})")

    def stop(self, how: int = signal.SIGTERM) -> None:
        """With all that it started."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, how)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=30)
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"{self.command[0]} ended, see {self.log}: {self.log.read_text()[-2000:]}"
        return self.ready()


@contextmanager
def running(service: Service, how: int = signal.SIGTERM) -> Iterator[Service]:
    """Started, and stopped in the end."""
    try:
        service.start()
        yield service
    finally:
        service.stop(how)


@contextmanager
def public_folder() -> Iterator[Path]:
    """A temporary folder that servers running as another user can reach."""
    with tempfile.TemporaryDirectory(prefix="compareto-cluster-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def program(name: str, package: str) -> str:
    """Its path, also where Debian puts what users do not start; the test is skipped where it is missing."""
    places = [*os.environ["PATH"].split(":"), "/usr/sbin", *map(str, Path("/usr/lib/postgresql").glob("*/bin"))]
    found = shutil.which(name, path=":".join(places))
    if found is None:
        pytest.skip(f"{name} is missing: scripts/cluster-test installs it (Debian package {package})")
    return found


@contextmanager
def postgresql(folder: Path) -> Iterator[tuple[Service, str]]:
    """An empty server, and the address of its database for SQLAlchemy. As root it runs as the user postgres."""
    as_user: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
    data, port = folder / "data", free_port()
    data.mkdir()
    if as_user:
        shutil.chown(data, "postgres", "postgres")
    made = [program("initdb", "postgresql"), "-D", str(data), "-A", "trust", "-U", "compareto", "--no-sync"]
    subprocess.run(made, check=True, stdout=subprocess.DEVNULL, cwd=folder, **as_user)
    options = {"listen_addresses": "127.0.0.1", "unix_socket_directories": str(data), "max_connections": "300"}
    command = [program("postgres", "postgresql"), "-D", str(data), "-p", str(port)]
    command += [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
    # SIGINT is PostgreSQL's fast shutdown: it does not wait until everybody has gone.
    with running(
        Service(command, folder / "postgresql.log", lambda: listens(port), cwd=folder, **as_user), signal.SIGINT
    ) as service:
        wait_until(lambda: _does(port, "SELECT 1"), 30, "postgresql")
        assert _does(port, "CREATE DATABASE mlflow")
        yield service, f"postgresql+psycopg://compareto@127.0.0.1:{port}/postgres"


def _does(port: int, statement: str) -> bool:
    import psycopg

    try:
        with psycopg.connect(f"host=127.0.0.1 port={port} user=compareto dbname=postgres", autocommit=True) as made:
            made.execute(statement)
    except psycopg.OperationalError:
        return False
    return True


@contextmanager
def mlflow_server(folder: Path, database: str) -> Iterator[tuple[Service, str]]:
    """A server that keeps files itself, and its address; the same command as in docs/clusters.md."""
    port = free_port()
    options = {
        "--backend-store-uri": database,
        "--artifacts-destination": str(folder / "artifacts"),
        "--host": "127.0.0.1",
        "--port": str(port),
        "--allowed-hosts": "127.0.0.1:*,localhost:*",
        "--workers": "1",
    }
    command = [sys.executable, "-m", "mlflow", "server", *(word for pair in options.items() for word in pair)]
    with running(Service(command, folder / "mlflow.log", lambda: _is_healthy(port), cwd=folder)) as service:
        yield service, f"http://127.0.0.1:{port}"


@contextmanager
def servers() -> Iterator[tuple[Path, Service, str, Service, str]]:
    """A new folder; PostgreSQL and its address; an MLflow server on another database there, and its address."""
    with (
        public_folder() as folder,
        postgresql(folder) as (database, storage),
        mlflow_server(folder, storage.replace("/postgres", "/mlflow")) as (mlflow, uri),
    ):
        yield folder, database, storage, mlflow, uri


def _is_healthy(port: int) -> bool:
    import requests

    try:
        return requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok
    except requests.RequestException:
        return False


SLURM = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=2
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd}
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_min_interval=0,bf_interval=1
ReturnToService=2
SlurmctldPort={ctld}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
SlurmdTimeout=10
KillWait=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=2 RealMemory=8000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE OverSubscribe=FORCE:2 State=UP
"""
SLURMDBD = """
AuthType=auth/munge
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd}
SlurmUser=root
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql}
StorageUser=slurm
StorageLoc=slurm_acct
"""


@contextmanager
def slurm(folder: Path) -> Iterator[Mapping[str, str]]:
    """Two nodes on this machine, with accounting; the environment in which its commands work. Needs root."""
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons need root here")
    names = {name: str(free_port()) for name in ("dbd", "ctld", "n1", "n2", "sql")}
    fields = {"folder": str(folder), "host": socket.gethostname(), **names}
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    programs = {name: program(name, "slurm-wlm") for name in ("slurmctld", "slurmd", "sacctmgr", "sinfo", "munged")}
    programs["slurmdbd"] = program("slurmdbd", "slurmdbd")
    (folder / "slurm.conf").write_text(SLURM.format(**fields))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    dbd = folder / "slurmdbd.conf"
    dbd.write_text(SLURMDBD.format(**fields))
    dbd.chmod(0o600)
    (folder / "state").mkdir()
    started: list[Service] = []

    def begin(name: str, *words: str, ready: Callable[[], bool], command: str | None = None, **more: Any) -> None:
        log = folder / f"{name}.out"
        service = Service([command or programs[name], *words], log, ready, env=environment, **more)
        started.append(service)
        service.start()

    def succeeds(*command: str) -> bool:
        return subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False).returncode == 0

    try:
        Path("/run/munge").mkdir(exist_ok=True)
        shutil.chown("/run/munge", "munge", "munge")
        if not succeeds("sh", "-c", "munge -n | unmunge"):
            begin("munged", "-F", ready=lambda: succeeds("sh", "-c", "munge -n | unmunge"), user="munge", group="munge")
        _begin_mariadb(folder, int(names["sql"]), begin)
        begin("slurmdbd", "-D", ready=lambda: listens(int(names["dbd"])))
        wait_until(lambda: succeeds(programs["sacctmgr"], "-i", "list", "cluster"), 60, "slurmdbd")
        subprocess.run([programs["sacctmgr"], "-i", "add", "cluster", "test"], env=environment, check=False)
        begin("slurmctld", "-D", "-i", "-f", environment["SLURM_CONF"], ready=lambda: listens(int(names["ctld"])))
        for node in ("n1", "n2"):
            (folder / f"spool-{node}").mkdir()
            begin("slurmd", "-D", "-N", node, "-f", environment["SLURM_CONF"], ready=partial(listens, int(names[node])))

        def idle() -> bool:
            said = subprocess.run(
                [programs["sinfo"], "-h", "-o", "%D %t"], env=environment, capture_output=True, text=True, check=False
            )
            return said.stdout.split() == ["2", "idle"]

        wait_until(idle, 60, "two idle nodes")
        yield environment
    finally:
        # What a test that failed has left running would outlive the daemons.
        succeeds("scancel", "--user=root", "--signal=KILL", "--full")
        for service in reversed(started):
            service.stop()


def _begin_mariadb(folder: Path, port: int, begin: Callable[..., None]) -> None:
    data = folder / "mariadb"
    data.mkdir()
    shutil.chown(data, "mysql", "mysql")
    install = [program("mariadb-install-db", "mariadb-server"), "--user=mysql", f"--datadir={data}", "--skip-test-db"]
    subprocess.run([*install, "--auth-root-authentication-method=normal"], check=True, stdout=subprocess.DEVNULL)
    init = data / "init.sql"
    user = "'slurm'@'127.0.0.1'"
    init.write_text(f"CREATE USER {user};\nGRANT ALL ON slurm_acct.* TO {user};\n")  # one statement a line
    shutil.chown(init, "mysql", "mysql")
    words = [f"--datadir={data}", f"--port={port}", "--bind-address=127.0.0.1", f"--socket={data}/socket"]
    words += [f"--init-file={init}", "--innodb-log-file-size=16M", "--skip-name-resolve", "--user=mysql"]
    server = program("mariadbd", "mariadb-server")
    begin("mariadbd", "--no-defaults", *words, ready=lambda: listens(port), command=server)


@contextmanager
def ray_head(folder: Path, env: Mapping[str, str]) -> Iterator[tuple[Callable[[], Service], str]]:
    """A head node; a function that adds another node, and the cluster's address. Workers get the environment."""
    ray = Path(sys.executable).with_name("ray")
    if not ray.exists():
        pytest.skip("ray is missing: scripts/cluster-test installs it")
    port = 26379
    environment = {
        **env,
        "RAY_agent_register_timeout_ms": "120000",
        "RAY_raylet_start_wait_time_s": "120",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    common = ["--node-ip-address=127.0.0.1", "--num-cpus=1", "--object-store-memory=100000000", "--block"]
    started: list[Service] = []

    def begin(*words: str) -> Service:
        log = folder / f"ray-{len(started)}.log"
        marker = "--block" if words else ""
        service = Service(
            [str(ray), "start", *words, *common], log, lambda: marker in log.read_text(), env=environment, cwd=folder
        )
        started.append(service)
        service.start()
        return service

    try:
        begin("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}/r")
        yield lambda: begin(f"--address=127.0.0.1:{port}"), f"127.0.0.1:{port}"
    finally:
        for service in reversed(started):
            service.stop()
