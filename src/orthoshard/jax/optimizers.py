"""Whole optimizers: a rule on matrices, AdamW on everything else. May import this room, jax and optax."""

import re
from fractions import Fraction
from typing import Any, Literal

import jax
import optax
from jax.sharding import Mesh

from .axes import DimensionNumbers
from .decay import add_cautious_decay, hyperball
from .rules import Fractional, Numbers, one_of, scale_by_dion, scale_by_dion_tail, scale_by_muon
from .transform import Names, path_name, resolved

Decay = Literal["decoupled", "cautious", "hyperball"]
Sides = Literal["rows", "columns", "both"]
# Of the matrices' learning rate, for AdamW on the rest: as in the torch library (docs/rules.md).
ADAM_SHARE, RMS_SHARE = 0.3, 1.0
# The name of a module: "embed", "token_embedding", "Embed_0", "wte"; "head", "lm_head", but not "multi_head_attention".
TABLE = re.compile(r"(^|[.])([a-z_]*_)?(unembed|embed|embedding|embeddings|embedder|wte|wpe|head)(_\d+)?([.]|$)")


def matrix_dimension_numbers(params: Any) -> Any:
    """The default choice of `dion`, `muon` and the others: `DimensionNumbers` where a parameter is a matrix, else None.

    A matrix has two axes, (in, out), and no module on its path is called an embedding table or an output head
    ("embed", "token_embedding", "wte", "head", "lm_head", ...): rows of a table are looked up, not multiplied, and
    those of a head are classes. Look at the tree that it makes of your model, and edit it where a guess is wrong.
    """

    def one(path: Any, p: Any) -> DimensionNumbers | None:
        name = path_name(path).lower()
        return DimensionNumbers(0, 1) if p.ndim == 2 and not TABLE.search(name) else None

    return jax.tree_util.tree_map_with_path(one, params)


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
    decay: Decay = "decoupled",
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
    """Dion on matrices, AdamW on everything else.

    Args:
        learning_rate: of the matrices, a number or a schedule; around 0.02.
        weight_decay: of the matrices, decoupled, times the bare learning rate.
        decay: "decoupled"; "cautious": only entries that the update does not oppose; "hyperball": none, the Frobenius
            norm of each matrix is held, and the learning rate is relative to it.
        adam_learning_rate: of the rest; None is 0.3 of ``learning_rate``, or all of it with scale "rms".
        adam_b1, adam_b2, adam_eps, adam_weight_decay: of AdamW.
        dimension_numbers: a tree like the parameters, or a prefix of it, or a function that makes one of them:
            `DimensionNumbers` for a matrix, None for AdamW. Default: `matrix_dimension_numbers`.

    All others as in `scale_by_dion`, with its errors.
    """
    rule = scale_by_dion(
        momentum,
        rank_fraction,
        rank_multiple_of=rank_multiple_of,
        error_feedback=error_feedback,
        q_side=q_side,
        equilibrate=equilibrate,
        row_moment=row_moment,
        scale=scale,
        state_dtype=state_dtype,
        precision=precision,
        dimension_numbers=_of_matrices(dimension_numbers),
        seed=seed,
        names=names,
        mesh=mesh,
    )
    rest = _adamw(learning_rate, adam_learning_rate, scale, adam_b1, adam_b2, adam_eps, adam_weight_decay)
    return _whole(rule, rest, learning_rate, weight_decay, decay, dimension_numbers)


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
    decay: Decay = "decoupled",
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
    """DionTail on matrices, AdamW on everything else: arguments as in `scale_by_dion_tail` and `dion`."""
    rule = scale_by_dion_tail(
        momentum,
        rank_fraction,
        rank_multiple_of=rank_multiple_of,
        nesterov=nesterov,
        tail_weight=tail_weight,
        equilibrate=equilibrate,
        row_moment=row_moment,
        scale=scale,
        state_dtype=state_dtype,
        precision=precision,
        dimension_numbers=_of_matrices(dimension_numbers),
        seed=seed,
        names=names,
        mesh=mesh,
    )
    rest = _adamw(learning_rate, adam_learning_rate, scale, adam_b1, adam_b2, adam_eps, adam_weight_decay)
    return _whole(rule, rest, learning_rate, weight_decay, decay, dimension_numbers)


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
    decay: Decay = "decoupled",
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
    """Muon on matrices, AdamW on everything else: arguments as in `scale_by_muon` and `dion`."""
    rule = scale_by_muon(
        momentum,
        nesterov=nesterov,
        polar=polar,
        polar_dtype=polar_dtype,
        equilibrate=equilibrate,
        row_moment=row_moment,
        scale=scale,
        state_dtype=state_dtype,
        precision=precision,
        dimension_numbers=_of_matrices(dimension_numbers),
        mesh=mesh,
    )
    rest = _adamw(learning_rate, adam_learning_rate, scale, adam_b1, adam_b2, adam_eps, adam_weight_decay)
    return _whole(rule, rest, learning_rate, weight_decay, decay, dimension_numbers)


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
    decay: Decay = "decoupled",
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
    """NorMuon on matrices, AdamW on everything else: arguments as in `scale_by_normuon` and `dion`."""
    return muon(
        learning_rate,
        momentum,
        weight_decay,
        nesterov=nesterov,
        polar=polar,
        polar_dtype=polar_dtype,
        equilibrate=equilibrate,
        row_moment=row_moment,
        decay=decay,
        scale=scale,
        state_dtype=state_dtype,
        precision=precision,
        adam_learning_rate=adam_learning_rate,
        adam_b1=adam_b1,
        adam_b2=adam_b2,
        adam_eps=adam_eps,
        adam_weight_decay=adam_weight_decay,
        dimension_numbers=dimension_numbers,
        mesh=mesh,
    )


def _of_matrices(dimension_numbers: Numbers) -> Numbers:
    return matrix_dimension_numbers if dimension_numbers is None else dimension_numbers


def _adamw(
    learning_rate: optax.ScalarOrSchedule,
    own: optax.ScalarOrSchedule | None,
    scale: str,
    b1: Any,
    b2: Any,
    eps: Any,
    decay: Any,
) -> optax.GradientTransformation:
    if own is None:
        share = RMS_SHARE if scale == "rms" else ADAM_SHARE
        own = (lambda count: share * learning_rate(count)) if callable(learning_rate) else share * learning_rate
    return optax.adamw(own, b1, b2, eps, weight_decay=decay)


def _whole(
    rule: optax.GradientTransformation,
    rest: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Any,
    decay: str,
    dimension_numbers: Numbers,
) -> optax.GradientTransformation:
    numbers = _of_matrices(dimension_numbers)

    def labels(params: Any) -> Any:
        structure = jax.tree.structure(params)
        return structure.unflatten("rest" if each is None else "matrix" for each in resolved(params, numbers))

    behind = {
        "decoupled": lambda: (optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(learning_rate)),
        "cautious": lambda: (add_cautious_decay(weight_decay), optax.scale_by_learning_rate(learning_rate)),
        "hyperball": lambda: (hyperball(learning_rate, dimension_numbers=numbers),),
    }
    one_of("decay", decay, tuple(behind))
    return optax.partition({"matrix": optax.chain(rule, *behind[decay]()), "rest": rest}, labels)
