"""Which process works on a trial, and whether it is still there."""

import subprocess
import sys
import time
from pathlib import Path

from search.liveness import is_gone, this_process


def test_this_process_is_here_and_always_called_the_same() -> None:
    assert this_process() == this_process()
    assert not is_gone(this_process())


def test_a_process_that_ended_is_gone() -> None:
    code = "from search.liveness import this_process; print(this_process())"
    name = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert is_gone(name)
    assert name != this_process()


def test_a_number_that_was_given_out_again_is_another_process() -> None:
    host, pid, started = this_process().rsplit(":", 2)
    assert is_gone(f"{host}:{pid}:{int(started) + 1}")


def test_a_process_of_another_host_counts_as_alive() -> None:
    assert not is_gone("elsewhere:1:1")


def test_a_host_may_have_colons_in_its_name() -> None:
    assert not is_gone("fe80::1:1:1")


def test_a_process_that_ended_unheard_is_gone() -> None:
    code = "from search.liveness import this_process; print(this_process(), flush=True)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        process.stdout.read()
        for _ in range(100):
            if is_gone(name):
                break
            time.sleep(0.05)
        assert process.returncode is None, "nobody has waited for it"
        assert is_gone(name)


def test_a_process_can_follow_its_parent() -> None:
    inner = "import signal, time; from search.liveness import signal_when_parent_ends as s; s(signal.SIGKILL); "
    inner += "print('ready', flush=True); time.sleep(60)"
    outer = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {inner!r}], stdout=subprocess.PIPE); "
    outer += "p.stdout.readline(); print(p.pid, flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", outer], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text():
            return
        time.sleep(0.05)
    raise AssertionError("it outlived its parent")
