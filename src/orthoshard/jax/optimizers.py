"""Whole optimizers: a rule on matrices, AdamW on everything else. May import this room, jax and optax."""

# ruff: noqa: PIE790 (for pyright `...` is a body that is elsewhere)

import inspect
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal

import jax
import optax
from jax.sharding import Mesh

from .axes import DimensionNumbers
from .decay import add_cautious_decay, hyperball, update_floor
from .options import Declared, Options, hands_on, one_of
from .rules import Fractional, Numbers, Sides, scale_by_dion, scale_by_dion_tail, scale_by_muon, scale_by_normuon
from .transform import Names, path_name, resolved

Decay = Literal["decoupled", "cautious", "hyperball"]
# Module names such as "embed", "token_embedding", "Embed_0", "wte", "head", "lm_head", but not "multi_head_attention".
TABLE = re.compile(r"(^|[.])([a-z_]*_)?(unembed|embed|embedding|embeddings|embedder|wte|wpe|head)(_\d+)?([.]|$)")


def matrix_dimension_numbers(params: Any) -> Any:
    """Make the default choice of `dion`, `muon` and the others: `DimensionNumbers` for a
    matrix, None for anything else.

    A matrix has two axes, (in, out), and no module on its path is called an embedding table or an output head
    ("embed", "token_embedding", "wte", "head", "lm_head", ...): rows of a table are looked up, not multiplied, and
    those of a head are classes. Look at the tree that it makes of your model, and edit it if a guess is wrong.
    """

    def one(path: Any, p: Any) -> DimensionNumbers | None:
        name = path_name(path).lower()
        return DimensionNumbers(0, 1) if p.ndim == 2 and not TABLE.search(name) else None

    return jax.tree_util.tree_map_with_path(one, params)


def _with_adamw(scale_by: Callable[..., optax.GradientTransformation]) -> Callable[[Declared], Declared]:
    """Make the whole optimizer of a rule, for a signature that includes the rule's options."""
    own = inspect.signature(scale_by).parameters

    def make(given: Options) -> optax.GradientTransformation:
        numbers = given["dimension_numbers"]
        numbers = matrix_dimension_numbers if numbers is None else numbers
        given = {**given, "dimension_numbers": numbers}
        rule = scale_by(**{key: value for key, value in given.items() if key in own})

        def labels(params: Any) -> Any:
            structure = jax.tree.structure(params)
            return structure.unflatten("rest" if each is None else "matrix" for each in resolved(params, numbers))

        return optax.partition({"matrix": optax.chain(rule, *_moves(given)), "rest": _adamw(given)}, labels)

    return hands_on(make)


def _moves(given: Options) -> list[optax.GradientTransformation]:
    """Return the transformations that make a step of a direction."""
    rate, decay, least = given["learning_rate"], given["decay"], given["update_floor"]
    one_of("decay", decay, ("decoupled", "cautious", "hyperball"))
    numbers = given["dimension_numbers"]
    if decay == "hyperball":
        if least is not None:
            raise ValueError('decay="hyperball" sets the length of each update itself: leave update_floor out')
        return [hyperball(rate, dimension_numbers=numbers)]
    decayed = add_cautious_decay if decay == "cautious" else optax.add_decayed_weights
    floor = [] if least is None else [update_floor(least, dimension_numbers=numbers)]
    return [*floor, decayed(given["weight_decay"]), optax.scale_by_learning_rate(rate)]


def _adamw(given: Options) -> optax.GradientTransformation:
    rate = given["adam_learning_rate"]
    if rate is None:
        rate = given["learning_rate"]  # as in the torch library (docs/rules.md)
    return optax.adamw(
        rate, given["adam_b1"], given["adam_b2"], given["adam_eps"], weight_decay=given["adam_weight_decay"]
    )


@_with_adamw(scale_by_dion)
def dion(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Any = 0.95,
    rank_fraction: Fractional = Fraction(1, 4),
    weight_decay: Any = 0.01,
    *,
    rank_multiple_of: int | None = None,
    error_feedback: bool = True,
    q_side: Literal["rows", "columns"] = "rows",
    equilibrate: Sides | None = None,
    row_moment: Any = None,
    frobenius: bool = False,
    decay: Decay = "decoupled",
    update_floor: Any = None,
    scale: str = "spectral",
    state_dtype: Any = None,
    precision: Any = "highest",
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_b1: Any = 0.9,
    adam_b2: Any = 0.95,
    adam_eps: Any = 1e-8,
    adam_weight_decay: Any = 0.0,
    dimension_numbers: Numbers = None,
    seed: int | None = None,
    names: Names | None = None,
    mesh: Mesh | None = None,
) -> optax.GradientTransformation:
    """Make an optimizer that uses Dion on matrices and AdamW on everything else.

    Args:
        learning_rate: of the matrices, a number or a schedule; around 0.02.
        weight_decay: of the matrices, decoupled, times the bare learning rate.
        decay: "decoupled"; "cautious": only entries that the update does not oppose; "hyperball": none, the Frobenius
            norm of each matrix is held, and the learning rate is relative to it.
        update_floor: the least Frobenius norm of a matrix's update, as a share of that of its weights; None: no floor.
        adam_learning_rate: of the rest; None is ``learning_rate``.
        adam_b1, adam_b2, adam_eps, adam_weight_decay: of AdamW.
        dimension_numbers: a tree like the parameters, or a prefix of it, or a function that makes one of them:
            `DimensionNumbers` for a matrix, None for AdamW. Default: `matrix_dimension_numbers`.

    All other arguments, and the errors, are those of `scale_by_dion`.
    """
    ...


@_with_adamw(scale_by_dion_tail)
def dion_tail(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Any = 0.95,
    rank_fraction: Fractional = Fraction(1, 4),
    weight_decay: Any = 0.01,
    *,
    rank_multiple_of: int | None = None,
    nesterov: bool = True,
    tail_weight: Any = 1.0,
    equilibrate: Sides | None = None,
    row_moment: Any = None,
    frobenius: bool = False,
    decay: Decay = "decoupled",
    update_floor: Any = None,
    scale: str = "spectral",
    state_dtype: Any = None,
    precision: Any = "highest",
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_b1: Any = 0.9,
    adam_b2: Any = 0.95,
    adam_eps: Any = 1e-8,
    adam_weight_decay: Any = 0.0,
    dimension_numbers: Numbers = None,
    seed: int | None = None,
    names: Names | None = None,
    mesh: Mesh | None = None,
) -> optax.GradientTransformation:
    """Make an optimizer that uses DionTail on matrices and AdamW on everything else. Arguments as in
    `scale_by_dion_tail` and `dion`."""
    ...


@_with_adamw(scale_by_muon)
def muon(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Any = 0.95,
    weight_decay: Any = 0.01,
    *,
    nesterov: bool = True,
    polar: str = "jordan",
    polar_dtype: str | None = None,
    equilibrate: Sides | None = None,
    row_moment: Any = None,
    frobenius: bool = False,
    decay: Decay = "decoupled",
    update_floor: Any = None,
    scale: str = "original",
    state_dtype: Any = None,
    precision: Any = "highest",
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_b1: Any = 0.9,
    adam_b2: Any = 0.95,
    adam_eps: Any = 1e-8,
    adam_weight_decay: Any = 0.0,
    dimension_numbers: Numbers = None,
    mesh: Mesh | None = None,
) -> optax.GradientTransformation:
    """Make an optimizer that uses Muon on matrices and AdamW on everything else. Arguments as in
    `scale_by_muon` and `dion`."""
    ...


@_with_adamw(scale_by_normuon)
def normuon(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Any = 0.95,
    row_moment: Any = 0.95,
    weight_decay: Any = 0.01,
    *,
    nesterov: bool = True,
    polar: str = "jordan",
    polar_dtype: str | None = None,
    equilibrate: Sides | None = None,
    frobenius: bool = False,
    decay: Decay = "decoupled",
    update_floor: Any = None,
    scale: str = "original",
    state_dtype: Any = None,
    precision: Any = "highest",
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_b1: Any = 0.9,
    adam_b2: Any = 0.95,
    adam_eps: Any = 1e-8,
    adam_weight_decay: Any = 0.0,
    dimension_numbers: Numbers = None,
    mesh: Mesh | None = None,
) -> optax.GradientTransformation:
    """Make an optimizer that uses NorMuon on matrices and AdamW on everything else. Arguments as in
    `scale_by_normuon` and `dion`."""
    ...
