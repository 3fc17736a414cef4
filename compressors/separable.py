"""Replaces convolutions by a depthwise and a pointwise one; it neither chooses which nor recovers what was lost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from compressors.errors import Infeasible
from compressors.fisher import Effect, Fisher, Question
from compressors.pipeline import Applied, Context, Stage
from compressors.plan import Scalar, Settings, Step
from compressors.replace import Site, layer_like, one_thread, put, sites, svd


@dataclass(frozen=True)
class Separable:
    """A kxk convolution becomes one of kxk within each channel and one of 1x1 across them.

    That is the form of MobileNet (Howard 2017, arXiv 1704.04861). It begins as the best approximation there is: of
    every input channel's kernels the one that says most, with a share of it for each output. Without distillation it
    does not help: one kernel a channel is far too little for a network that was trained with many. Nor does it help
    where a runtime has no fast depthwise kernel, or the layer has few channels.
    """

    method: ClassVar[str] = "separable"
    stage: ClassVar[Stage] = Stage.REPLACE
    off: ClassVar[tuple[str, Scalar]] = ("replace", False)

    def groups(self, model: nn.Module, example: tuple[Tensor, ...]) -> Mapping[str, tuple[str, ...]]:
        """Every convolution by itself, if it would get smaller."""
        return {name: (name,) for name, site in sites(model, example).items() if _share(site) < 1}

    def apply(self, model: nn.Module, step: Step, context: Context, seed: int) -> Applied:
        """`replace` per layer: whether it is replaced."""
        known = sites(model, context.example)
        replaced = [name for name, settings in step.per_layer.items() if _replaces(known, name, settings)]
        with one_thread():
            for name in replaced:
                put(model, name, _layers(known[name]))
        return Applied({name: _achieved(known[name], name in replaced) for name in step.per_layer})

    def effects(
        self, model: nn.Module, example: tuple[Tensor, ...], questions: Sequence[Question], fisher: Fisher
    ) -> list[Effect]:
        """What the lost kernels were worth, without recovery; `inputs` is the share of weights and multiplications."""
        known = sites(model, example)
        effects = []
        for name, settings in questions:
            effects.append(_effect(known[name], name, fisher) if _replaces(known, name, settings) else Effect(0.0))
        return effects


def separated(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Depthwise `(in, 1, taps)` and pointwise `(out, in, 1)` weights whose product is closest to `(out, in, taps)`.

    Closest in the sum of squares, channel by channel; in double precision.
    """
    left, values, right = svd(weight.transpose(0, 1))
    # Both get the same share of the size, as neither training nor rounding likes all of it in one place.
    scale = values[:, :1].sqrt()
    return (scale * right[:, 0])[:, None], (scale * left[..., 0]).T[..., None]


def _effect(site: Site, name: str, fisher: Fisher) -> Effect:
    depthwise, pointwise = separated(site.weight)
    change = (pointwise * depthwise.transpose(0, 1) - site.weight).float()
    shape = site.layer.get_parameter("weight").shape
    return Effect(fisher.rounding(f"{name}.weight", change.reshape(shape)), inputs={name: _share(site)})


def _layers(site: Site) -> list[nn.Module]:
    depthwise, pointwise = separated(site.weight)
    return [
        layer_like(site.layer, depthwise, spatial=True, groups=len(depthwise)),
        layer_like(site.layer, pointwise, site.layer._parameters["bias"]),
    ]


def _replaces(known: Mapping[str, Site], name: str, settings: Settings) -> bool:
    if name not in known:
        raise Infeasible(f"separable has no layer {name}: possible are {', '.join(known) or 'none'}")
    replace = settings["replace"]
    if not isinstance(replace, bool):
        raise Infeasible(f"separable.replace of {name} is {replace}: expected true or false")
    if replace and _share(known[name]) >= 1:
        raise Infeasible(
            f"separable.replace of {name} is true: that takes {_share(known[name]):.2f} times its weights, "
            "expected less than 1"
        )
    return replace


def _achieved(site: Site, replaced: bool) -> Settings:
    return {"replace": True, "weights": _share(site)} if replaced else {"replace": False}


def _share(site: Site) -> float:
    """Weights of the two over those of the one; that of the multiplications is the same."""
    out, _, taps = site.weight.shape
    return (taps + out) / (taps * out)
