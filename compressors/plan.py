"""What is to be done to a model, as plain frozen data; standard library only."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

Scalar = bool | int | float | str
Settings = Mapping[str, Scalar]


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One weighted layer of the uncompressed model.

    `kind` is `conv`, `linear` or `embedding`; `weight_shape` is torch's: `(out, in / groups, kh, kw)`, `(out, in)` or
    `(rows, width)`; `macs` counts multiply-accumulates for one example over all calls of the layer. `tied_to` names
    the layer that owns the same weight tensor, if another one came first.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    params: int
    macs: int
    tied_to: str | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One method with its settings: per layer (or tied group, named by its owner) and shared by all of them."""

    method: str
    per_layer: Mapping[str, Settings] = field(default_factory=dict)
    shared: Settings = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Target:
    """Where the candidate will run: a runtime by name and the precision of whatever is not quantized."""

    runtime: str
    precision: str


@dataclass(frozen=True)
class CompressionPlan:
    """Everything needed to rebuild a candidate from the uncompressed model; no steps means the model as it came."""

    target: Target
    steps: tuple[Step, ...] = ()
    seed: int = 0

    @cached_property
    def digest(self) -> str:
        """Same plan, same digest, on any machine: the cache key, the tracker's tag and the folder name."""
        return digest(asdict(self))

    def to_json(self) -> str:
        """The plan as text that a person can read and `from_json` takes back."""
        return json.dumps(asdict(self), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "CompressionPlan":
        """The inverse of `to_json`; the digest survives the round trip."""
        raw = json.loads(text)
        steps = tuple(Step(s["method"], s["per_layer"], s["shared"]) for s in raw["steps"])
        return cls(target=Target(**raw["target"]), steps=steps, seed=raw["seed"])


def digest(value: Any) -> str:
    """Sixteen hex digits of any JSON-like value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
