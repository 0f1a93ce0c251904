"""The rules as optax transformations: a direction, its stages, and defaults with their sources. May import this room,
jax and optax."""

from fractions import Fraction
from typing import Any, Literal

import jax
import optax
from jax.sharding import Mesh

from ..linalg.polar_express import POLAR
from .directions import Dion, DionTail, Polar
from .directions.polar import ROUNDS
from .stages import EQUILIBRATIONS, SCALES
from .transform import Names, Rule, transformation

Fractional = float | Fraction
Numbers = Any  # DimensionNumbers, or a tree of them, or a function of the parameters


def scale_by_dion(
    momentum: Any = 0.95,
    rank_fraction: Fractional = Fraction(1, 4),
    *,
    rank_multiple_of: int | None = None,
    error_feedback: bool = True,
    q_side: Literal["rows", "columns"] = "rows",
    equilibrate: Literal["rows", "columns", "both"] | None = None,
    row_moment: Any = None,
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
    """Dion (arXiv 2504.05295): a rank-r orthonormal update with error feedback.

    State: ``momentum`` like the parameter, ``Q`` like it with r in place of the first reduction axis and 1 in place of
    further ones (with ``q_side="columns"``, of the output axes), r = ceil(rank_fraction · min(m, n)).

    Args:
        momentum: mu, in [0, 1).
        rank_fraction: in (0, 1]. It decides shapes: under `optax.inject_hyperparams` name it in ``static_args``.
        rank_multiple_of: what r is rounded up to, such as the devices that cut it.
        error_feedback: False leaves it out, and momentum is M = mu M + G.
        q_side: which side Q spans. An FSDP axis that cuts the other side costs least; see docs/jax.md.
        equilibrate: rows, columns or both of what the direction sees at length 1.
        row_moment: the decay of a running mean of the update's squared rows, which evens them out; 0.95 in NorMuon.
        scale: "spectral" sqrt(d_out / d_in), "original" sqrt(max(1, d_out / d_in)), "rms" 0.2 sqrt(max(d_out, d_in)).
        state_dtype: of momentum and Q; None is the parameter's, but float32 at least.
        precision: of products with full-size matrices, as `jnp.einsum` takes it. Noise is judged as if they were exact
            to float32: with less, use at least ``row_moment`` or a small rank with care.
        dimension_numbers: one `DimensionNumbers` for all leaves, a tree of them (or a prefix), or a function that makes
            it from the parameters. None: the last two axes are (in, out), all others count matrices.
        seed: of the initial Q, with the parameter's name; None is 0. The same on every sharding.
        names: the name of a parameter from its path (jax.tree_util); None: its keys with dots.
        mesh: over which parameters are sharded, where it is not known from `jax.set_mesh` or explicit axes. It saves
            traffic where a mesh cuts reduction axes and Q with them; results are the same.
        shard_state: "zero1" where `state_shardings` gave the state of stacked matrices to owners: these publish thin
            factors, and no update travels.
        replicas: how many replicas bring gradients of their own, (replicas, ...) for each parameter, in place of their
            mean. Each keeps its momentum, and they exchange thin products: see docs/jax.md.

    Raises:
        ValueError: for an option out of range, and ``equilibrate`` with ``replicas`` (row norms are not linear); at
            ``init`` for a parameter that holds no matrix.
        TypeError: for a traced ``rank_fraction``.
    """
    one_of("q_side", q_side, ("rows", "columns"))
    one_of("shard_state", shard_state, (None, "zero1"))
    if replicas is not None and equilibrate is not None:
        raise ValueError(
            "equilibrate needs the row norms of the mean gradient, which replicas do not exchange: leave one out"
        )
    rule = Rule(
        Dion(q_side),
        momentum,
        error_feedback=error_feedback,
        rank_fraction=rank_fraction,
        rank_multiple_of=rank_multiple_of,
        by_owners=shard_state == "zero1",
        replicas=replicas,
        **_common(equilibrate, row_moment, scale, state_dtype, precision),
    )
    return transformation(_checked(rule), dimension_numbers, _static("seed", seed), names, mesh)


def scale_by_dion_tail(
    momentum: Any = 0.95,
    rank_fraction: Fractional = Fraction(1, 4),
    *,
    rank_multiple_of: int | None = None,
    nesterov: bool = True,
    tail_weight: Any = 1.0,
    equilibrate: Literal["rows", "columns", "both"] | None = None,
    row_moment: Any = None,
    scale: str = "spectral",
    state_dtype: Any = None,
    precision: Any = "highest",
    dimension_numbers: Numbers = None,
    seed: int | None = None,
    names: Names | None = None,
    mesh: Mesh | None = None,
) -> optax.GradientTransformation:
    """DionTail (docs/dion_tail.md): an orthonormal part of rank r, and the remainder with its rows at one length.

    State as `scale_by_dion`'s; other arguments and errors too.

    Args:
        nesterov: the direction sees G + mu B instead of B.
        tail_weight: c, the weight of the remainder; 0 leaves a Dion without error feedback.
    """
    rule = Rule(
        DionTail(tail_weight),
        momentum,
        nesterov=nesterov,
        rank_fraction=rank_fraction,
        rank_multiple_of=rank_multiple_of,
        **_common(equilibrate, row_moment, scale, state_dtype, precision),
    )
    return transformation(_checked(rule), dimension_numbers, _static("seed", seed), names, mesh)


def scale_by_muon(
    momentum: Any = 0.95,
    *,
    nesterov: bool = True,
    polar: str = "jordan",
    polar_dtype: str | None = None,
    equilibrate: Literal["rows", "columns", "both"] | None = None,
    row_moment: Any = None,
    scale: str = "original",
    state_dtype: Any = None,
    precision: Any = "highest",
    dimension_numbers: Numbers = None,
    mesh: Mesh | None = None,
) -> optax.GradientTransformation:
    """Muon (K. Jordan, 2024): the polar factor of the momentum, by five odd polynomials.

    State: ``momentum`` like the parameter; with ``row_moment`` a number for each row. Other arguments and errors as
    `scale_by_dion`'s. Momentum is M = mu M + G here; `optax.contrib.scale_by_muon` corrects it for its
    start, which a direction sees in the first steps only, by Nesterov's share of the fresh gradient.

    Args:
        nesterov: the direction sees G + mu M instead of M.
        polar: "jordan" (3.4445, -4.7750, 2.0315) five times, or "polar_express" (arXiv 2505.16932).
        polar_dtype: what the iteration computes in, such as "bfloat16"; None: float32 (float64 for such state).
    """
    one_of("polar", polar, tuple(POLAR))
    one_of("polar_dtype", polar_dtype, (None, *ROUNDS))
    rule = Rule(
        Polar(polar, polar_dtype),
        momentum,
        nesterov=nesterov,
        **_common(equilibrate, row_moment, scale, state_dtype, precision),
    )
    return transformation(_checked(rule), dimension_numbers, None, None, mesh)


def scale_by_normuon(
    momentum: Any = 0.95,
    row_moment: Any = 0.95,
    *,
    nesterov: bool = True,
    polar: str = "jordan",
    polar_dtype: str | None = None,
    equilibrate: Literal["rows", "columns", "both"] | None = None,
    scale: str = "original",
    state_dtype: Any = None,
    precision: Any = "highest",
    dimension_numbers: Numbers = None,
    mesh: Mesh | None = None,
) -> optax.GradientTransformation:
    """NorMuon (arXiv 2510.05491): `scale_by_muon` whose rows are evened out by a running mean of their squares."""
    return scale_by_muon(
        momentum,
        nesterov=nesterov,
        polar=polar,
        polar_dtype=polar_dtype,
        equilibrate=equilibrate,
        row_moment=row_moment,
        scale=scale,
        state_dtype=state_dtype,
        precision=precision,
        dimension_numbers=dimension_numbers,
        mesh=mesh,
    )


def _common(equilibrate: Any, row_moment: Any, scale: Any, state_dtype: Any, precision: Any) -> dict[str, Any]:
    return {
        "equilibrate": equilibrate,
        "row_moment": row_moment,
        "scale": scale,
        "state_dtype": state_dtype,
        "precision": precision,
    }


def _checked(rule: Rule) -> Rule:
    one_of("equilibrate", rule.equilibrate, (None, *EQUILIBRATIONS))
    one_of("scale", rule.scale, tuple(SCALES))
    _fraction("momentum", rule.momentum, zero=True, one=False)
    if rule.row_moment is not None:
        _fraction("row_moment", rule.row_moment, zero=True, one=False)
    if rule.rank_fraction is not None:
        _fraction("rank_fraction", _static("rank_fraction", rule.rank_fraction), zero=False, one=True)
    multiple = _static("rank_multiple_of", rule.rank_multiple_of)
    if multiple is not None and (not isinstance(multiple, int) or multiple < 1):
        raise ValueError(f"rank_multiple_of={multiple!r} must be a whole number, 1 or larger")
    return rule


def _static(key: str, value: Any) -> Any:
    """A value that decides shapes or the initial Q, which nothing may trace."""
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{key} decides shapes or the initial Q and cannot be a JAX array; under optax.inject_hyperparams name it: "
            f"inject_hyperparams(dion, static_args=({key!r},))"
        )
    return value


def _fraction(key: str, value: Any, *, zero: bool, one: bool) -> None:
    if isinstance(value, jax.Array):  # injected or traced: nobody waits for it
        return
    if isinstance(value, bool) or not isinstance(value, int | float | Fraction):
        raise TypeError(f"{key}={value!r} must be a number, not {type(value).__name__}")
    if not ((value >= 0 if zero else value > 0) and (value <= 1 if one else value < 1)):
        raise ValueError(f"{key}={value!r} is outside {'[' if zero else '('}0, 1{']' if one else ')'}")


def one_of(key: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{key}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}")
