"""The contestants that are timed: our optimizers, torch's and the floors, each a name and a way to build it.

Every optimizer has its own weights, because a step changes them. All share the gradients, which no step changes. Floors
with one dtype of state share one set of buffers. May import torch and ``orthoshard``.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from orthoshard import RuleOptimizer
from orthoshard.lab.bench.floor import Buffers, DionFloor, DionTailFloor, MuonFloor
from orthoshard.lab.bench.models import ModelShapes
from orthoshard.rules import OWN, RULES, MatrixRuleType
from orthoshard.spelling import did_you_mean

LR = 1e-3  # small, so that the weights hardly change, however many steps are timed


class Floor(Protocol):
    """The common interface of all floors."""

    def step(self) -> None: ...

    def flops(self) -> int: ...


class Workload:
    """The random gradients of one model, shared by all contestants, and the buffers that the floors share."""

    def __init__(
        self,
        shapes: ModelShapes,
        device: torch.device,
        dtype: torch.dtype,
        spectrum: str = "flat",
        seed: int = 0,
    ) -> None:
        self.shapes = shapes
        self.device = device
        self.dtype = dtype
        generator = torch.Generator(device).manual_seed(seed)
        self.gradients = [random_gradient(m, n, spectrum, generator, dtype) for m, n in shapes.matrices]
        self._buffers: dict[torch.dtype | None, Buffers] = {}

    def parameters(self, count: int | None = None) -> list[nn.Parameter]:
        """Return new weights with the shared gradients, or the first ``count`` of them; the same values each time."""
        generator = torch.Generator(self.device).manual_seed(1)
        made: list[nn.Parameter] = []
        for gradient in self.gradients[:count]:
            weight = nn.Parameter(torch.empty_like(gradient).normal_(0, 0.02, generator=generator))
            weight.grad = gradient
            made.append(weight)
        return made

    def buffers(self, state: torch.dtype | None = None) -> Buffers:
        """Return the buffers of floors with a momentum of dtype ``state``; None is the rules' own choice."""
        if state not in self._buffers:
            self._buffers[state] = Buffers(self.gradients, state=state)
        return self._buffers[state]


def random_gradient(m: int, n: int, spectrum: str, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Return a Gaussian matrix (``flat``), or one whose k-th singular value falls about as 1/k (``falling``)."""
    device = generator.device

    def gaussian(rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, device=device).normal_(0, 1e-3, generator=generator)

    if spectrum == "flat":
        return gaussian(m, n).to(dtype)
    d = min(m, n)
    sizes = 1 / torch.arange(1, d + 1, device=device)
    return ((gaussian(m, d) * sizes) @ gaussian(d, n) / (1e-3 * d**0.5)).to(dtype)


@dataclass(frozen=True, slots=True)
class Contestant:
    """One row of the table. Exactly one of ``optimizer`` and ``products`` is set.

    Args:
        memory: what it holds besides the gradients, in multiples of the weights, for the check before the start.
        floor: name of its floor.
        rival: name of the contestant that it should beat.
        state: dtype of its state, if not the rule's own choice.
        kernels: the kernels of its passes over full-size matrices.
        of_a_rule: whether it is an optimizer with a rule of orthoshard or of a plugin.
        usual: whether it is timed if ``--only`` is not given.
    """

    name: str
    memory: float
    floor: str | None = None
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = field(default=None, repr=False)
    products: Callable[[Workload], Floor] | None = field(default=None, repr=False)
    rival: str | None = None
    state: torch.dtype | None = None
    kernels: Literal["auto", "torch", "triton"] = "auto"
    of_a_rule: bool = False
    usual: bool = True


def parse_rank(text: str) -> Fraction:
    """Return the rank fraction in (0, 1] that a text such as ``1``, ``1/4`` or ``0.25`` means. Raises ValueError."""
    try:
        fraction = Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"A rank fraction is a number such as 1, 1/4 or 0.25, not {text!r}.") from None
    if not 0 < fraction <= 1:
        raise ValueError(f"A rank fraction lies in (0, 1], and {text!r} does not: give one such as 1/4.")
    return fraction


@dataclass(frozen=True, slots=True)
class Form:
    """A variant of our rules, which has its own rows: tag in the name, options, dtype of the state, kernels.

    ``floor`` is the tag of its floor; None if it has none.
    """

    tag: str = ""
    options: tuple[tuple[str, str], ...] = ()
    state: torch.dtype | None = None
    kernels: Literal["auto", "torch", "triton"] = "auto"
    floor: str | None = ""


PLAIN = Form()
STATE = Form("-bf16", (("state_dtype", "bfloat16"),), torch.bfloat16, floor="-bf16")
PRODUCTS = Form("-bf16-products", (("matmul_precision", "bfloat16"),), floor=None)
BOTH = Form("-bf16-both", (("state_dtype", "bfloat16"), ("matmul_precision", "bfloat16")), torch.bfloat16, floor=None)
TRITON = Form("-triton", kernels="triton")
TORCH = Form("-torch", kernels="torch")
EIGHT = Form("-int8", (("state_dtype", "int8"),), floor=None)
NARROW = {"bfloat16": (STATE, PRODUCTS, BOTH), "int8": (EIGHT,)}


USUAL = ("dion", "dion_tail", "muon")
FLOORS: dict[str, Callable[[Buffers, float], Floor]] = {
    "dion": DionFloor,
    "dion_tail": DionTailFloor,
    "muon": lambda buffers, _: MuonFloor(buffers),
}


def _label(rule: str) -> str:
    return rule.replace("_", "-") if rule in OWN else rule


def _row(rule: str, form: Form, at: str, fraction: Fraction | None) -> Contestant:
    """Return the row of a rule in a form, at a rank if it has one.

    The rival of any other form is the plain rule; the rival of plain DionTail is Dion.
    """
    options: dict[str, Any] = {"lr": LR, "kernels": form.kernels, **dict(form.options)}
    if fraction is not None:
        options["rank_fraction"] = float(fraction)
    rival = _label(rule) if form != PLAIN else "dion" if rule == "dion_tail" else None
    return Contestant(
        f"{_label(rule)}{form.tag}{at}",
        memory=2 + float(fraction or 0),
        floor=f"floor-{_label(rule)}{form.floor}{at}" if rule in FLOORS and form.floor is not None else None,
        optimizer=partial(RuleOptimizer, rule=rule, **options),
        rival=rival and rival + at,
        state=form.state,
        kernels=form.kernels,
        of_a_rule=True,
        usual=rule in USUAL or rule not in OWN,
    )


def _floor(rule: str, form: Form, at: str, fraction: Fraction | None) -> Contestant:
    return Contestant(
        f"floor-{_label(rule)}{form.tag}{at}",
        memory=1 if fraction is None else float(fraction),
        products=lambda work: FLOORS[rule](work.buffers(form.state), float(fraction or 0)),
        rival=f"floor-dion{form.tag}{at}" if rule == "dion_tail" else None,
        state=form.state,
    )


def _rows(
    rule: str, kind: MatrixRuleType, forms: Sequence[Form], fractions: Sequence[Fraction]
) -> Iterator[Contestant]:
    """Yield the rows of a rule and its floor, in all forms whose options it has, at each rank if it has ranks."""
    known = kind.options()
    for form in forms:
        if all(key in known for key, _ in form.options):
            for fraction in fractions if "rank_fraction" in known else (None,):
                at = "" if fraction is None else f"-{fraction}"
                yield _row(rule, form, at, fraction)
                if rule in FLOORS and form.floor == form.tag:
                    yield _floor(rule, form, at, fraction)


def all_contestants(ranks: Sequence[str], beside: Sequence[Form] = ()) -> list[Contestant]:
    """Return the rows of all rules of whole matrices, plugins' too, and of torch's optimizers, in the table's order.

    ``beside`` are the forms of our rules to add to the plain one.
    """
    fractions = list(dict.fromkeys(parse_rank(rank) for rank in ranks))
    kinds = {
        rule: kind for rule, kind in RULES.items() if isinstance(kind, MatrixRuleType) and not kind.direction.paired
    }
    return [
        *(row for rule, kind in kinds.items() for row in _rows(rule, kind, (PLAIN, *beside), fractions)),
        Contestant("adamw-fused", 3, optimizer=partial(torch.optim.AdamW, lr=LR, fused=True)),
        Contestant("torch-muon", 2, optimizer=partial(torch.optim.Muon, lr=LR)),
    ]


def rules_alone(contestants: Sequence[Contestant]) -> list[Contestant]:
    """Return the contestants that are rules of orthoshard or a plugin: neither floors nor torch's optimizers."""
    return [contestant for contestant in contestants if contestant.of_a_rule]


def choose(contestants: Sequence[Contestant], patterns: Sequence[str]) -> list[Contestant]:
    """Return the contestants that match one of the patterns (see `matching`), or the usual ones if there are none."""
    chosen = matching([contestant.name for contestant in contestants], patterns)
    return [contestant for contestant in contestants if contestant.name in chosen and (patterns or contestant.usual)]


def matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Return the names that match one of the patterns (``dion-1/4``, ``*1/16``, ``floor-*``), or all if there are none.

    Raises ValueError if a pattern matches no name; the message gives the most similar name.
    """
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            near = did_you_mean(pattern, names, 0.0)
            raise ValueError(f"--only {pattern!r} matches no contestant{near} All: {', '.join(names)}.")
    return [name for name in names if not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def memory_needed(contestants: Sequence[Contestant], shapes: ModelShapes, dtype: torch.dtype) -> int:
    """Return about how many bytes are held at once: gradients, all contestants, and the temporaries of one step."""
    wide = torch.promote_types(dtype, torch.float32)  # of our rules' state, by their own choice

    def state(one: Contestant) -> int:
        return (one.state or (wide if one.of_a_rule or one.products else dtype)).itemsize

    optimizers = [one for one in contestants if not one.products]
    floors = [one for one in contestants if one.products]
    held = sum(dtype.itemsize + (one.memory - 1) * state(one) for one in optimizers)
    held += sum(one.memory * state(one) for one in floors)
    shared = sum({one.state: 2 * state(one) for one in floors}.values())
    return int((dtype.itemsize + held + shared + 1.5 * wide.itemsize) * shapes.elements)
