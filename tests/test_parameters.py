"""How many parameters a deployed model had, as its evaluator says after real plans."""

from dataclasses import replace
from pathlib import Path

import pytest

from compressors.errors import Infeasible
from compressors.lowrank import LowRank
from compressors.pipeline import Compressor
from compressors.plan import CompressionPlan, Step, Target
from compressors.prune import Prune
from compressors.quantize import Quantize
from compressors.sparsify import Sparsify
from evaluators.measurement import exact
from evaluators.parameters import Parameters
from search.trial import Clock
from tests.studies import make_search
from tests.zoo import build

METHODS: dict[str, Compressor] = {c.method: c for c in (Prune(), LowRank(), Sparsify(), Quantize())}
TARGET = Target("fake", "fp32")
WHOLE = sum(p.numel() for p in build("residual").parameters())
# A convolution of 16 to 32 channels with its norm, and the linear layer with 5 outputs that reads it.
PLANS: dict[str, tuple[Step | None, int]] = {
    "uncompressed": (None, WHOLE),
    "rank 8 of the 16x32 shortcut": (Step("lowrank", {"shortcut": {"rank": 0.5}}), WHOLE - 16 * 32 + 8 * (16 + 32)),
    "half of the 32 channels before the head": (
        Step("prune", {"down.0": {"sparsity": 0.5}}, {"align": 1}),
        WHOLE - 16 * (16 * 9 + 2 + 16 + 1 + 5),
    ),
    "zeros": (Step("sparsify", {"head": {"sparsity": 0.5}}, {"group": 0, "criterion": "magnitude", "ramp": 0}), WHOLE),
    "8 bits": (Step("quantize", {"head": {"bits": 8}}), WHOLE),
}


@pytest.mark.parametrize("name", PLANS)
def test_what_is_gone_does_not_count_and_what_is_only_smaller_does(name: str, tmp_path: Path) -> None:
    step, expected = PLANS[name]
    bench = replace(make_search(tmp_path, 1).workbench, compressors=METHODS, evaluators={"parameters": Parameters()})
    reference, examples = bench.reference(TARGET, Clock()), bench.examples("validation")
    (tmp_path / "out").mkdir()
    plan = CompressionPlan(TARGET, (step,) if step else ())
    record, _ = bench.run(7, plan, reference, examples, tmp_path / "out", Clock())
    assert record.value("parameters") == exact(Parameters().metrics()[0], expected)
    assert reference.parameters == WHOLE


def test_files_alone_do_not_tell(tmp_path: Path) -> None:
    bench = make_search(tmp_path, 1).workbench
    files = replace(bench.reference(TARGET, Clock()), parameters=None)
    with pytest.raises(Infeasible, match="files alone do not tell"):
        Parameters().measure(files, files, bench.examples("validation"))
