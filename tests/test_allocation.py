"""Memory that is asked for again and again comes from the system once."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from search.allocation import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(32):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_kept_memory_is_not_cleared_again() -> None:
    usual, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS, how], check=True, capture_output=True).stdout)
        for how in ("usual", "kept")
    )
    assert kept < 0.1 * usual
