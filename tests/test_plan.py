import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressors.plan import CompressionPlan, Scalar, Settings, Step, Target, digest

scalars: st.SearchStrategy[Scalar] = st.one_of(
    st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8)
)
keys = st.text(min_size=1, max_size=8)
setting: st.SearchStrategy[Settings] = st.dictionaries(keys, scalars, max_size=3)
steps = st.builds(Step, method=keys, per_layer=st.dictionaries(keys, setting, max_size=3), shared=setting)
plans = st.builds(
    CompressionPlan,
    target=st.builds(Target, runtime=keys, precision=keys),
    steps=st.lists(steps, max_size=3).map(tuple),
    seed=st.integers(0, 2**32),
)


@settings(deadline=None)  # the first call of an operation is slow on a busy machine
@given(plans)
def test_json_gives_the_same_plan_back(plan: CompressionPlan) -> None:
    back = CompressionPlan.from_json(plan.to_json())
    assert back == plan
    assert back.digest == plan.digest


def _reversed(step: Step) -> Step:
    """The same settings, entered in the opposite order."""
    per_layer = {layer: dict(list(s.items())[::-1]) for layer, s in list(step.per_layer.items())[::-1]}
    return Step(step.method, per_layer, dict(list(step.shared.items())[::-1]))


@settings(deadline=None)  # as above
@given(plans)
def test_the_order_of_keys_does_not_change_the_digest(plan: CompressionPlan) -> None:
    shuffled = CompressionPlan(plan.target, tuple(map(_reversed, plan.steps)), plan.seed)
    assert shuffled.digest == plan.digest


PLAN = CompressionPlan(
    Target("openvino", "fp32"), (Step("prune", {"a": {"sparsity": 0.5}}, {"align": 4}), Step("distill")), seed=1
)


@pytest.mark.parametrize(
    "other",
    [
        CompressionPlan(Target("openvino", "bf16"), PLAN.steps, 1),
        CompressionPlan(PLAN.target, PLAN.steps, 2),
        CompressionPlan(PLAN.target, PLAN.steps[::-1], 1),
        CompressionPlan(PLAN.target, PLAN.steps[:1], 1),
        CompressionPlan(PLAN.target, (Step("prune", {"a": {"sparsity": 0.25}}, {"align": 4}), PLAN.steps[1]), 1),
    ],
)
def test_another_plan_has_another_digest(other: CompressionPlan) -> None:
    assert other.digest != PLAN.digest


def test_the_digest_is_the_same_in_another_process() -> None:
    code = "import sys; from compressors.plan import CompressionPlan as P; print(P.from_json(sys.stdin.read()).digest)"
    told = subprocess.run(
        [sys.executable, "-c", code], input=PLAN.to_json(), capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == PLAN.digest


def test_the_digest_is_a_folder_name() -> None:
    assert len(PLAN.digest) == 16
    assert PLAN.digest.isalnum()


def test_the_text_is_for_people_too() -> None:
    assert json.loads(PLAN.to_json())["steps"][0]["per_layer"]["a"] == {"sparsity": 0.5}
    assert len(PLAN.to_json().splitlines()) > 10


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_cannot_say_has_no_digest(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        digest({"sparsity": value})
