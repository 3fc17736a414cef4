"""Records as text and back, and fingerprints compared: what a study keeps of its trials, wherever it keeps it."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from compressors.errors import ConfigError
from compressors.plan import CompressionPlan, Scalar
from evaluators.measurement import Measurement, Metric
from search.trial import Stop, TrialRecord


def record_to_json(record: TrialRecord) -> str:
    """The whole record as text that `record_from_json` takes back."""
    return json.dumps(asdict(record), indent=1, allow_nan=False)


def record_from_json(text: str) -> TrialRecord:
    """The inverse of `record_to_json`; takes records from before candidates could be stopped, too."""
    raw = json.loads(text)
    raw["plan"] = CompressionPlan.from_json(json.dumps(raw["plan"]))
    raw["measurements"] = tuple(map(measurement_from, raw["measurements"]))
    if raw.get("stopped"):
        raw["stopped"] = Stop(**{**raw["stopped"], "interval": tuple(raw["stopped"]["interval"])})
    return TrialRecord(**raw)


def measurement_from(raw: Mapping[str, Any]) -> Measurement:
    """A measurement from what `dataclasses.asdict` and JSON made of it."""
    return Measurement(Metric(**raw["metric"]), raw["value"], tuple(raw["interval"]), raw["n"], raw["conditions"])


def refuse_another(name: str, known: Mapping[str, Scalar | None], now: Mapping[str, Scalar | None]) -> None:
    """Raises `ConfigError` with what differs between a study as it was begun and as it would go on."""
    differing = differences(known, now)
    if differing:
        remedy = "choose another name with study=NAME"
        raise ConfigError("study", f"{name!r} was begun differently: {'; '.join(differing[:3])}", remedy)


def differences(known: Mapping[str, Scalar | None], now: Mapping[str, Scalar | None]) -> list[str]:
    """One phrase for each entry of two fingerprints that is not the same."""
    names = sorted(key for key in {**known, **now} if known.get(key) != now.get(key))
    return [f"{key} was {known.get(key)}, is {now.get(key)}" for key in names]
