"""Factors linear and convolution layers into thinner ones; it neither chooses the ranks nor recovers what was lost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from compressors.errors import Infeasible
from compressors.fisher import Effect, Fisher, Question
from compressors.pipeline import Applied, Context, Stage
from compressors.plan import Scalar, Settings, Step
from compressors.replace import Site, directions, input_moments, layer_like, one_thread, put, sites

FORMS = ("tucker", "output")

DAMPING = 0.01
"""Share of the mean input energy that every direction is given, so that unseen ones are not free to go wrong."""


@dataclass(frozen=True)
class LowRank:
    """Truncated singular value decomposition of linear layers, and of convolutions the Tucker-2 decomposition.

    A convolution of `taps` positions becomes 1x1, kxk and 1x1 in the `tucker` form (HOSVD, De Lathauwer 2000, on both
    channel modes as in Kim 2016, arXiv 1511.06530), and kxk and 1x1 in the `output` form; one of 1x1 always two. With
    `whiten` the error is least over the layer's inputs on the calibration split, and not over the weights: through a
    Cholesky factor of their second moment (SVD-LLM, Wang 2024, arXiv 2403.07378), for kxk kernels of that of single
    positions, which is an approximation. The bias stays as it is.

    It does not help where a runtime spends its time on the number of layers, as for small images or one token, nor
    where the spectrum is flat. Grouped convolutions are left out.
    """

    method: ClassVar[str] = "lowrank"
    stage: ClassVar[Stage] = Stage.REPLACE
    off: ClassVar[tuple[str, Scalar]] = ("rank", 1.0)

    def groups(self, model: nn.Module, example: tuple[Tensor, ...]) -> Mapping[str, tuple[str, ...]]:
        """Every layer by itself, if a rank of one would save something."""
        return {name: (name,) for name, site in sites(model, example).items() if _saves(site, Ranks(None, 1))}

    def apply(self, model: nn.Module, step: Step, context: Context, seed: int) -> Applied:
        """`rank` per layer is the share of the rank it has by now; `align`, `form` and `whiten` are for all layers."""
        shared = _Shared.read(step.shared)
        known = sites(model, context.example)
        chosen = {name: _chosen(known, name, settings, shared) for name, settings in step.per_layer.items()}
        factored = {name: ranks for name, ranks in chosen.items() if ranks is not None}
        with one_thread():
            moments = _moments(model, factored, context) if shared.whiten and factored else {}
            for name, ranks in factored.items():
                factors = Bases(known[name].weight, moments.get(name)).factors(ranks)
                put(model, name, _layers(known[name].layer, factors))
        return Applied({name: _achieved(known[name], ranks) for name, ranks in chosen.items()})

    def effects(
        self, model: nn.Module, example: tuple[Tensor, ...], questions: Sequence[Question], fisher: Fisher
    ) -> list[Effect]:
        """What the lost part of the weights was worth, without recovery; `inputs` is the share of the weights.

        That of the multiplications is the same but where a convolution strides. Whitened or not counts as one.
        """
        known = sites(model, example)
        moments = input_moments(model, known, [example])
        bases = cache(lambda name: Bases(known[name].weight))

        @cache
        def effect(name: str, ranks: Ranks | None) -> Effect:
            if ranks is None:
                return Effect(0.0)
            whole = bases(name).weight
            change = product(bases(name).factors(ranks)) - whole
            share = _costs(known[name], ranks)[0] / whole.numel()
            return Effect(fisher.shift(f"{name}.weight", change, moments[name]), inputs={name: share})

        effects = []
        for name, settings in questions:
            try:
                effects.append(effect(name, _chosen(known, name, settings, _Shared.read(settings))))
            except Infeasible:
                effects.append(Effect(math.inf))
        return effects


@dataclass(frozen=True)
class Ranks:
    """Channels between factors: `inputs` before the kxk one, None where nothing is before it; `outputs` behind."""

    inputs: int | None
    outputs: int


@dataclass(frozen=True)
class Bases:
    """A weight `(out, in, taps)` by the directions of its channels that say most; `moment` `(in, in)` is of its inputs.

    Everything is in double precision.
    """

    weight: Tensor
    moment: Tensor | None = None

    def factors(self, ranks: Ranks) -> tuple[Tensor, ...]:
        """Two or three weights `(out, in, taps)`, to be applied in this order; one of them has all the taps."""
        last = self._outputs[:, : ranks.outputs]
        if ranks.inputs is None:
            first = torch.einsum("or,oit->rit", last, self._whitened)
            # Both get the same share of the singular values, which neither training nor rounding likes in one place.
            scale = first.flatten(1).norm(dim=1).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
            return self._unwhitened(first / scale[:, None, None]), (last * scale)[..., None]
        first = self._inputs[:, : ranks.inputs]
        core = torch.einsum("or,oit,is->rst", last, self._whitened, first)
        return self._unwhitened(first.T[..., None]), core, last[..., None]

    @cached_property
    def _root(self) -> Tensor | None:
        if self.moment is None:
            return None
        energy = self.moment.diagonal().mean().clamp_min(1e-12)
        damped = self.moment + DAMPING * energy * torch.eye(len(self.moment), dtype=torch.float64)
        root: Tensor = torch.linalg.cholesky(damped)
        return root

    @cached_property
    def _whitened(self) -> Tensor:
        weight = self.weight.double()
        return weight if self._root is None else torch.einsum("oit,ij->ojt", weight, self._root)

    def _unwhitened(self, factor: Tensor) -> Tensor:
        return factor if self._root is None else torch.einsum("rjt,ji->rit", factor, torch.linalg.inv(self._root))

    @cached_property
    def _outputs(self) -> Tensor:
        return directions(self._whitened.flatten(1))

    @cached_property
    def _inputs(self) -> Tensor:
        return directions(self._whitened.transpose(0, 1).flatten(1))


def product(factors: Sequence[Tensor]) -> Tensor:
    """The one weight `(out, in, taps)` that factors amount to."""
    whole = factors[0]
    for factor in factors[1:]:
        whole = torch.einsum("oct,cis->oits", factor, whole).flatten(2)
    return whole


def _moments(model: nn.Module, names: Mapping[str, Ranks], context: Context) -> Mapping[str, Tensor]:
    moments = input_moments(model, names, (inputs for inputs, _ in context.calibration()))
    if not moments:
        raise Infeasible("lowrank.whiten is true: expected calibration inputs, and there are none")
    return moments


def _layers(old: nn.Module, factors: Sequence[Tensor]) -> list[nn.Module]:
    bias = old._parameters["bias"]
    last = len(factors) - 1
    return [
        layer_like(old, factor, bias if position == last else None, spatial=position == last - 1)
        for position, factor in enumerate(factors)
    ]


def _achieved(site: Site, ranks: Ranks | None) -> Settings:
    if ranks is None:
        return {"rank": 1.0}
    out, inputs, taps = site.weight.shape
    told: dict[str, Scalar] = {"rank": ranks.outputs / min(out, inputs * taps), "outputs": ranks.outputs}
    told |= {} if ranks.inputs is None else {"inputs": ranks.inputs}
    return {**told, "weights": _costs(site, ranks)[0] / site.weight.numel()}


@dataclass(frozen=True)
class _Shared:
    """What is set for all layers."""

    align: int
    form: str
    whiten: bool

    @classmethod
    def read(cls, settings: Settings) -> "_Shared":
        align, form, whiten = settings.get("align", 1), settings.get("form", FORMS[0]), settings.get("whiten", False)
        if not isinstance(align, int) or align < 1:
            raise Infeasible(f"lowrank.align is {align}: expected a whole number of channels, 1 or more")
        if form not in FORMS:
            raise Infeasible(f"lowrank.form is {form}: expected {' or '.join(FORMS)}")
        if not isinstance(whiten, bool):
            raise Infeasible(f"lowrank.whiten is {whiten}: expected true or false")
        return cls(align, str(form), whiten)


def _chosen(known: Mapping[str, Site], name: str, settings: Settings, shared: _Shared) -> Ranks | None:
    """The ranks that a layer gets, None for all of them; raises `Infeasible` where that saves nothing."""
    if name not in known:
        raise Infeasible(f"lowrank has no layer {name}: possible are {', '.join(known) or 'none'}")
    share = settings["rank"]
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise Infeasible(f"lowrank.rank of {name} is {share}: expected a share above 0 and up to 1")
    if share == 1:
        return None
    # Rounding is no reason to refuse: what does not save so is rounded down, and then not at all.
    for unit, up in ((shared.align, 0.5), (shared.align, 0.0), (1, 0.5)):
        ranks = _rounded(known[name], share, shared.form, unit, up)
        if _saves(known[name], ranks):
            return ranks
    weights, macs = (new / old for new, old in zip(_costs(known[name], ranks), _whole(known[name]), strict=True))
    raise Infeasible(
        f"lowrank.rank of {name} is {share}: that takes {weights:.2f} times its weights and {macs:.2f} times its "
        "multiplications, expected less than 1 of both"
    )


def _rounded(site: Site, share: float, form: str, unit: int, up: float) -> Ranks:
    """Multiples of `unit`, never none and never more than there are."""
    out, inputs, taps = site.weight.shape

    def kept(full: int) -> int:
        return min(full, unit * max(1, int(full * share / unit + up)))

    behind = kept(min(out, inputs * taps))
    before = kept(min(inputs, out * taps))
    # All of the input needs no factor of its own.
    return Ranks(before if form == "tucker" and taps > 1 and before < inputs else None, behind)


def _saves(site: Site, ranks: Ranks) -> bool:
    return all(new < old for new, old in zip(_costs(site, ranks), _whole(site), strict=True))


def _whole(site: Site) -> tuple[int, int]:
    """Weights and multiplications of the layer itself."""
    return site.weight.numel(), site.weight.numel() * site.written


def _costs(site: Site, ranks: Ranks) -> tuple[int, int]:
    """Weights and multiplications of the factors; only the first of three works where the layer reads."""
    out, inputs, taps = site.weight.shape
    first = 0 if ranks.inputs is None else inputs * ranks.inputs
    rest = (ranks.inputs or inputs) * taps * ranks.outputs + ranks.outputs * out
    return first + rest, first * site.read + rest * site.written
