"""What this machine can run: processor, versions, runtimes and their kernels; measures nothing."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from evaluators.machine import machine, versions
from evaluators.runtime import CODEBOOK, Runtime, Support

KINDS = ("conv", "linear", "embedding", CODEBOOK)
BITS = (2, 3, 4, 6, 8)
MARKS = {Support.KERNEL: "kernel", Support.STORAGE: "size only", Support.REFUSED: "-"}


def report(runtimes: Mapping[str, Runtime], console: Console) -> None:
    """Print machine, versions, and what each runtime makes of each layer kind and bit-width."""
    for title, facts in (("machine", machine()), ("versions", versions())):
        table = Table(title=title, title_justify="left", show_header=False)
        for name, value in facts.items():
            table.add_row(name, str(value))
        console.print(table)
    table = Table(title="runtimes", title_justify="left")
    for column in ("runtime", "rest precisions", "layer", *(f"{bits} bit" for bits in BITS)):
        table.add_column(column)
    for name, runtime in runtimes.items():
        for kind in KINDS:
            cells = (MARKS[runtime.support(kind, bits)] for bits in BITS)
            table.add_row(name, ", ".join(runtime.precisions()), kind, *cells)
    console.print(table)
