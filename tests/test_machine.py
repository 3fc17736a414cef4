"""What the machine may give, where a container or a job gets less of it."""

from pathlib import Path

import pytest

from evaluators.machine import _limits_of_groups, memory_bytes


@pytest.mark.parametrize(
    ("line", "folder", "name"),
    [("0::/job/1", "job", "memory.max"), ("4:memory:/job/1", "memory/job", "memory.limit_in_bytes")],
)
def test_the_limits_of_a_group_and_of_those_above_it(line: str, folder: str, name: str, tmp_path: Path) -> None:
    membership, group = tmp_path / "cgroup", tmp_path / "fs" / folder / "1"
    membership.write_text(f"3:cpuset:/other\n{line}\n")
    group.mkdir(parents=True)
    (group / name).write_text("max\n")
    assert list(_limits_of_groups(membership, tmp_path / "fs")) == []
    (group.parent / name).write_text("8000000000\n")
    assert list(_limits_of_groups(membership, tmp_path / "fs")) == [8_000_000_000]


def test_without_control_groups_it_is_the_machines_memory(tmp_path: Path) -> None:
    assert list(_limits_of_groups(tmp_path / "none", tmp_path)) == []
    assert memory_bytes() > 1e8
