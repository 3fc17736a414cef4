"""The machine's report: facts, versions, and what each runtime makes of each bit-width."""

import io

import torch
from rich.console import Console

from evaluators.runtime import Support
from search.doctor import report
from tests.fakes import FakeRuntime


class Picky(FakeRuntime):
    def support(self, kind: str, bits: int) -> Support:
        if kind == "linear" and bits == 4:
            return Support.STORAGE
        return super().support(kind, bits)


def test_the_report_has_machine_versions_and_every_kind_of_layer() -> None:
    console = Console(width=160, file=io.StringIO())
    report({"picky": Picky()}, console)
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert torch.__version__.split("+")[0] in said
    assert all(word in said for word in ("cpu", "cores", "python", "onnxruntime", "openvino", "nncf"))
    rows = {cells[2]: cells for line in said.splitlines() if (cells := _cells(line))[:1] == ["picky"]}
    assert rows["conv"] == ["picky", "fp32", "conv", "-", "-", "-", "-", "kernel"]
    assert rows["linear"] == ["picky", "fp32", "linear", "-", "-", "size only", "-", "kernel"]
    assert {"embedding", "codebook"} <= rows.keys()


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("│").split("│")]
