"""The rules as optax transformations: a direction, its stages, and defaults with their sources.

May import this room, `linalg.polar_express`, jax and optax.
"""

# ruff: noqa: PIE790 (for pyright `...` is a body that is elsewhere)

from collections.abc import Callable
from dataclasses import fields
from fractions import Fraction
from typing import Any, Literal

import optax
from jax.sharding import Mesh

from ..linalg.polar_express import POLAR
from .directions import Dion, DionTail, Polar
from .directions.polar import ROUNDS
from .options import Declared, Options, fraction, hands_on, one_of, static
from .stages import EQUILIBRATIONS, SCALES
from .transform import Names, Rule, transformation

Fractional = float | Fraction
Numbers = Any  # DimensionNumbers, or a tree of them, or a function of the parameters
Sides = Literal["rows", "columns", "both"]
CHOICES: dict[str, tuple[Any, ...]] = {
    "q_side": ("rows", "columns"),
    "polar": tuple(POLAR),
    "polar_dtype": (None, *ROUNDS),
    "equilibrate": (None, *EQUILIBRATIONS),
    "scale": tuple(SCALES),
    "shard_state": (None, "zero1"),
}


def _rule(direction: type[Dion] | type[DionTail] | type[Polar]) -> Callable[[Declared], Declared]:
    """Make the transformation of a direction and the stages that a signature names."""

    def make(given: Options) -> optax.GradientTransformation:
        _check(given)
        own = direction(**{field.name: given[field.name] for field in fields(direction)})
        stages = {field.name: given[field.name] for field in fields(Rule) if field.name in given}
        seed, names = given.get("seed"), given.get("names")
        return transformation(Rule(own, **stages), given["dimension_numbers"], seed, names, given["mesh"])

    return hands_on(make)


@_rule(Dion)
def scale_by_dion(
    momentum: Any = 0.95,
    rank_fraction: Fractional = Fraction(1, 4),
    *,
    rank_multiple_of: int | None = None,
    error_feedback: bool = True,
    q_side: Literal["rows", "columns"] = "rows",
    equilibrate: Sides | None = None,
    row_moment: Any = None,
    frobenius: bool = False,
    scale: str = "spectral",
    state_dtype: Any = None,
    precision: Any = "highest",
    dimension_numbers: Numbers = None,
    seed: int | None = None,
    names: Names | None = None,
    mesh: Mesh | None = None,
    shard_state: Literal["zero1"] | None = None,
    replicas: int | None = None,
) -> optax.GradientTransformation:
    """Scale updates by Dion (arXiv 2504.05295): a rank-r orthonormal update with error feedback.

    State: ``momentum`` like the parameter, ``Q`` like it with r in place of the first reduction axis and 1 in place of
    further ones (with ``q_side="columns"``, of the output axes), r = ceil(rank_fraction · min(m, n)).

    Args:
        momentum: mu, in [0, 1).
        rank_fraction: in (0, 1]. It decides shapes: under `optax.inject_hyperparams` name it in ``static_args``.
        rank_multiple_of: what r is rounded up to, such as the number of devices that shard it.
        error_feedback: False turns it off, and momentum is M = mu M + G.
        q_side: the side that Q spans. An FSDP axis that shards the other side costs least; see docs/frameworks.md.
        equilibrate: brings rows, columns or both of what the direction sees to one length.
        row_moment: the decay of a running mean of the update's squared rows, which evens them out; 0.95 in NorMuon.
            None turns it off.
        frobenius: bring the update of each matrix to Frobenius norm sqrt(min(m, n)) (Muon+).
        scale: "spectral" sqrt(d_out / d_in), "original" sqrt(max(1, d_out / d_in)), "rms" 0.2 sqrt(max(d_out, d_in)),
            "none" 1.
        state_dtype: of momentum and Q; None is the parameter's, but at least float32.
        precision: of products with full-size matrices, as `jnp.einsum` takes it. Noise is judged as if they were exact
            to float32; with less, use ``row_moment`` or a small rank with care.
        dimension_numbers: one `DimensionNumbers` for all leaves, a tree of them (or a prefix), or a function that makes
            it from the parameters. None: the last two axes are (in, out), all others count matrices.
        seed: of the initial Q, with the parameter's name; None is 0. Q is the same on every sharding.
        names: the name of a parameter from its path (jax.tree_util); None: its keys, joined by dots.
        mesh: over which parameters are sharded, if it is not known from `jax.set_mesh` or explicit axes. It saves
            traffic if a mesh shards reduction axes and with them Q; results are the same.
        shard_state: "zero1" if `state_shardings` gave the state of stacked matrices to owners: these publish thin
            factors, and no update travels.
        replicas: how many replicas bring gradients of their own, (replicas, ...) for each parameter, in place of their
            mean. Each keeps its momentum, and they exchange thin products: see docs/frameworks.md.

    Raises:
        ValueError: for an option out of range, and for ``equilibrate`` with ``replicas`` (row norms are not linear); at
            ``init`` for a parameter that holds no matrix.
        TypeError: for a traced ``rank_fraction``.
    """
    ...


@_rule(DionTail)
def scale_by_dion_tail(
    momentum: Any = 0.95,
    rank_fraction: Fractional = Fraction(1, 4),
    *,
    rank_multiple_of: int | None = None,
    nesterov: bool = True,
    tail_weight: Any = 1.0,
    equilibrate: Sides | None = None,
    row_moment: Any = None,
    frobenius: bool = False,
    scale: str = "spectral",
    state_dtype: Any = None,
    precision: Any = "highest",
    dimension_numbers: Numbers = None,
    seed: int | None = None,
    names: Names | None = None,
    mesh: Mesh | None = None,
) -> optax.GradientTransformation:
    """Scale updates by DionTail (docs/rules.md): an orthonormal part of rank r, and the remainder
    with its rows at one length.

    State, other arguments and errors are those of `scale_by_dion`.

    Args:
        nesterov: the direction sees G + mu B instead of B.
        tail_weight: c, the weight of the remainder; 0 leaves a Dion without error feedback.
    """
    ...


@_rule(Polar)
def scale_by_muon(
    momentum: Any = 0.95,
    *,
    nesterov: bool = True,
    polar: str = "jordan",
    polar_dtype: str | None = None,
    equilibrate: Sides | None = None,
    row_moment: Any = None,
    frobenius: bool = False,
    scale: str = "original",
    state_dtype: Any = None,
    precision: Any = "highest",
    dimension_numbers: Numbers = None,
    mesh: Mesh | None = None,
) -> optax.GradientTransformation:
    """Scale updates by Muon (K. Jordan, 2024): the polar factor of the momentum, by five odd polynomials.

    State: ``momentum`` like the parameter; with ``row_moment`` one number per row. Other arguments and errors are those
    of `scale_by_dion`. Momentum is M = mu M + G here. `optax.contrib.scale_by_muon` corrects it for its start, which
    changes a direction in the first steps only, by Nesterov's share of the new gradient.

    Args:
        nesterov: the direction sees G + mu M instead of M.
        polar: "jordan" (3.4445, -4.7750, 2.0315) five times, or "polar_express" (arXiv 2505.16932).
        polar_dtype: what the iteration computes in, such as "bfloat16"; None: float32 (float64 for such state).
    """
    ...


@_rule(Polar)
def scale_by_normuon(
    momentum: Any = 0.95,
    row_moment: Any = 0.95,
    *,
    nesterov: bool = True,
    polar: str = "jordan",
    polar_dtype: str | None = None,
    equilibrate: Sides | None = None,
    frobenius: bool = False,
    scale: str = "original",
    state_dtype: Any = None,
    precision: Any = "highest",
    dimension_numbers: Numbers = None,
    mesh: Mesh | None = None,
) -> optax.GradientTransformation:
    """Scale updates by NorMuon (arXiv 2510.05491): `scale_by_muon` with rows evened out by a
    running mean of their squares."""
    ...


def _check(given: Options) -> None:
    for key, choices in CHOICES.items():
        if key in given:
            one_of(key, given[key], choices)
    fraction("momentum", given["momentum"], zero=True)
    if given["row_moment"] is not None:
        fraction("row_moment", given["row_moment"])
    for key in ("rank_fraction", "rank_multiple_of", "seed", "replicas"):
        static(key, given.get(key))
    if "rank_fraction" in given:
        fraction("rank_fraction", given["rank_fraction"], one=True)
    multiple = given.get("rank_multiple_of")
    if multiple is not None and (not isinstance(multiple, int) or multiple < 1):
        raise ValueError(f"rank_multiple_of={multiple!r} must be a whole number, 1 or larger")
    if given.get("replicas") is not None and given["equilibrate"] is not None:
        raise ValueError(
            "equilibrate needs the row norms of the mean gradient, which replicas do not exchange: leave one out"
        )
