"""Which process works on a trial, and whether it is still there."""

import subprocess
import sys

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
