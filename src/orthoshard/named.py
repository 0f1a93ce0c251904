"""The optimizer under the names of its rules, with every option spelt out.

The signatures are for editors and the API page. The defaults that apply are those of the rules; a test compares the
two. `MEANINGS` describes each option once. May import `optimizer`, and the names of types.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, Literal, TypeVar, cast

from torch import Tensor, nn

from .linalg.products import Precision
from .optimizer import RuleOptimizer
from .params import Overrides

Init = TypeVar("Init", bound=Callable[..., None])
Named = TypeVar("Named", bound=type[RuleOptimizer])

# The meaning of each argument; a class whose argument means something else passes its own to `_documented`.
MEANINGS = {
    "params": (
        "A model, the groups of `param_groups`, (name, parameter) pairs, group dicts, or parameters. Frozen "
        "parameters of a model are included, and train once they are unfrozen."
    ),
    "lr": (
        "Learning rate of the matrices; an update is multiplied by it and by `scale`. A 0-d tensor is copied for each "
        "group, and schedulers fill the copies."
    ),
    "weight_decay": "Decoupled decay of the matrices: a step multiplies weights by 1 - lr·weight_decay.",
    "momentum": "Decay of the momentum, mu in M = mu M + G; in [0, 1).",
    "rank_fraction": "Rank of an (m, n) matrix as a share of min(m, n), rounded up; in (0, 1].",
    "rank_multiple_of": "The rank is rounded up to a multiple of this, at most min(m, n).",
    "scale": (
        'Factor of the orthonormal update of an (m, n) matrix: "spectral" sqrt(m/n) (Dion, v3 Table 1), "original" '
        "sqrt(max(1, m/n)) (K. Jordan's Muon), \"rms\" 0.2 sqrt(max(m, n)), which gives the size of AdamW's updates "
        '(Moonlight, arXiv 2502.16982), "none" 1.'
    ),
    "error_feedback": "Keep in the momentum what rank r did not capture; False: the whole momentum decays alike.",
    "nesterov": "Look ahead: use the momentum after one more step with the same gradient; excludes error_feedback.",
    "q_side": (
        'The side of the weights that Q spans; "shorter" means the columns of a square matrix. It decides what sharded '
        "matrices send, and never depends on the sharding."
    ),
    "equilibrate": (
        'Scale "rows", "columns" or "both" to unit length before the direction. `docs/rules.md` describes this and the '
        "next four options."
    ),
    "row_moment": "Decay of NorMuon's second moment of the rows of the update; 0: off.",
    "frobenius": "Scale the update of each matrix to Frobenius norm sqrt(min(m, n)).",
    "decay": (
        '"decoupled", "cautious" (only entries whose update and weight have the same sign decay) or "hyperball" (each '
        "matrix keeps its norm; takes no ``weight_decay``)."
    ),
    "update_floor": "Least Frobenius norm of an update, before lr, as a share of the matrix's own norm; 0: off.",
    "shard_compute": (
        "How sharded matrices are updated: in place, on the pieces; dealt, as whole matrices at owners; or the cheaper."
    ),
    "state_dtype": (
        'Dtype of the state; None: the parameter\'s, at least float32; "int8": momentum and Q in 8 bits, '
        "see `docs/memory.md`."
    ),
    "matmul_precision": (
        'Precision of products with full-size matrices, independent of torch\'s setting; None: "tf32" on CUDA, '
        '"float32" elsewhere. See `docs/numerics.md`.'
    ),
    "rounding": "How bfloat16 weights are rounded after a step.",
    "scalar": "Rule of a model's parameters that are not matrices.",
    "scalar_lr": "Learning rate of everything else; None: ``lr`` for AdamW, a third of it for Lion.",
    "scalar_weight_decay": "Decoupled decay of everything else.",
    "scalar_betas": (
        "Betas of everything else; None: the scalar rule's, and (0.95, 0.98) for embeddings, positions and heads, as "
        "in the Dion authors' configurations."
    ),
    "overrides": (
        "Patterns of a model's parameter names, each with the group keys that it sets, or another ``role``; the first "
        "that matches wins. See `docs/sharding.md`."
    ),
    "seed": (
        "Seed of the initial Q, together with each parameter's name, and of stochastic rounding. Global generators are "
        "not touched."
    ),
    "process_group": (
        "Replicas that hold the same plain tensors, as a group or a mesh of one dimension; None: those of a "
        "DistributedDataParallel model, if any. Sharded parameters need none."
    ),
    "replica_sync": (
        "What the optimizer exchanges between replicas: nothing, because their gradients are equal; gradients; thin "
        "factors (Dion only); or the cheaper of these two. See `docs/slow_links.md`."
    ),
    "reduce_dtype": "Dtype in which factors travel; None: the state's.",
    "replica_compute": (
        "What replicas with equal gradients do: split the work and send results, each repeat all of it, or the cheaper."
    ),
    "shard_state": (
        '"zero1": each replica keeps the state of its own share of the matrices, and sends their updates to the '
        "others; see `docs/sharding.md`."
    ),
    "state_offload": "Keep the state in host memory, pinned if the device is CUDA; see `docs/memory.md`.",
    "capturable": "Never read the device in a step, so that a CUDA graph can capture it; see `docs/numerics.md`.",
    "drift_check": "Interval, in steps, at which replicas check that their weights are equal to the bit; 0: never.",
    "kernels": (
        'What runs the passes over full-size matrices: torch, Triton (on CUDA), or "auto": Triton only for the passes '
        "that it makes faster; see `docs/numerics.md`."
    ),
    "fused": "For the scalar rule AdamW: False turns off its fused kernel.",
    "foreach": "For the scalar rule AdamW: False turns off its multi-tensor kernels.",
    "tail_weight": "Weight c of the tail beside the low-rank part; 0 gives Dion without error feedback.",
    "polar": (
        'Polynomials of the iteration: "jordan" (K. Jordan, 2024) and "polar_express" (arXiv 2505.16932), five steps '
        'each, or the coefficients of each step as text, "a,b,c; a,b,c".'
    ),
    "polar_method": "Iterate on the matrix or on its Gram matrix; the same polynomial either way.",
    "polar_dtype": "Dtype of the iteration; None: the state's on a CPU, 16 bits elsewhere.",
    "fraction": (
        "Share of the rows, or of the columns if these are fewer, that move in a step; in (0, 1]. The update is "
        "multiplied by 1/sqrt(fraction)."
    ),
    "tangent": "First remove from each row its component along the same row of the weights (Nora).",
}
RAISES = """
    Raises:
        ValueError, TypeError: An option that nothing reads, a value out of range, or a parameter that its rule cannot
            treat. Raised before anything is built.
    """


def _hands_on(declared: Init) -> Init:
    """Return an ``__init__`` that hands `RuleOptimizer` only the arguments that were passed. Options that the user left
    out then keep, in groups of another rule, the defaults of that rule. Undeclared arguments get their hint there."""

    @wraps(declared)
    def init(self: RuleOptimizer, params: nn.Module | Iterable[Any], **given: Any) -> None:
        RuleOptimizer.__init__(self, params, **given)

    return cast(Init, init)


def _documented(**meanings: str) -> Callable[[Named], Named]:
    """Add the meaning and default of each argument to the docstring of a class. ``meanings``: the class's own ones."""

    def documented(named: Named) -> Named:
        lines = [(named.__doc__ or "").rstrip(), "", "    Args:"]
        for key, shown in list(inspect.signature(named.__init__).parameters.items())[1:]:
            default = "" if shown.default is inspect.Parameter.empty else f" Default: {shown.default!r}."
            text = f"{key}: {({**MEANINGS, **meanings})[key]}{default}"
            lines += textwrap.wrap(text, 120, initial_indent=" " * 8, subsequent_indent=" " * 12)
        named.__doc__ = "\n".join(lines) + "\n" + RAISES
        return named

    return documented


@_documented(
    momentum="Share of the captured part that stays in the momentum; in [0, 1).",
)
class Dion(RuleOptimizer):
    """Dion (Ahn, Xu, Abreu, Langford, arXiv 2504.05295): low-rank orthonormalized updates with error feedback.

    ``Dion(model, lr=0.02, rank_fraction=0.25)``. Matrices go to Dion, everything else to AdamW or Lion. State of an
    (m, n) matrix: ``momentum`` (m, n) and ``Q`` (m, r), or (n, r) with ``q_side="columns"``, where r is
    ceil(rank_fraction min(m, n)). Defaults are the paper's where it gives one (v3, section 4 and appendix D).
    """

    default_rule = "dion"

    @_hands_on
    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        *,
        lr: float | Tensor = 0.02,
        weight_decay: float | Tensor = 0.01,
        momentum: float = 0.95,
        rank_fraction: float = 0.25,
        rank_multiple_of: int = 1,
        scale: Literal["spectral", "original", "rms", "none"] = "spectral",
        error_feedback: bool = True,
        nesterov: bool = False,
        q_side: Literal["rows", "columns", "shorter"] = "rows",
        equilibrate: Literal["none", "rows", "columns", "both"] = "none",
        row_moment: float = 0.0,
        frobenius: bool = False,
        decay: Literal["decoupled", "cautious", "hyperball"] = "decoupled",
        update_floor: float = 0.0,
        shard_compute: Literal["auto", "in_place", "dealt"] = "auto",
        state_dtype: Literal["float32", "bfloat16", "float64", "int8"] | None = None,
        matmul_precision: Precision | None = None,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        scalar: Literal["adamw", "lion"] = "adamw",
        scalar_lr: float | Tensor | None = None,
        scalar_weight_decay: float | Tensor = 0.0,
        scalar_betas: tuple[float, float] | None = None,
        overrides: Overrides | None = None,
        seed: int = 0,
        process_group: Any = None,
        replica_sync: Literal["none", "gradients", "factors", "auto"] = "none",
        reduce_dtype: Literal["bfloat16"] | None = None,
        replica_compute: Literal["auto", "split", "repeat"] = "auto",
        shard_state: Literal["none", "zero1"] = "none",
        state_offload: bool = False,
        capturable: bool = False,
        drift_check: int = 0,
        kernels: Literal["auto", "torch", "triton"] = "auto",
        fused: bool | None = None,
        foreach: bool | None = None,
    ) -> None: ...


@_documented()
class DionTail(RuleOptimizer):
    """Dion that applies its remainder at once, at unit row length, instead of error feedback; see `docs/rules.md`.

    ``DionTail(model, lr=0.02, rank_fraction=0.25)``. Matrices go to DionTail, everything else to AdamW or Lion. State
    of an (m, n) matrix: ``momentum`` (m, n) and ``Q`` (m, r), where r is ceil(rank_fraction min(m, n)).
    """

    default_rule = "dion_tail"

    @_hands_on
    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        *,
        lr: float | Tensor = 0.02,
        weight_decay: float | Tensor = 0.01,
        momentum: float = 0.95,
        nesterov: bool = True,
        rank_fraction: float = 0.25,
        rank_multiple_of: int = 1,
        tail_weight: float = 1.0,
        scale: Literal["spectral", "original", "rms", "none"] = "spectral",
        equilibrate: Literal["none", "rows", "columns", "both"] = "none",
        row_moment: float = 0.0,
        frobenius: bool = False,
        decay: Literal["decoupled", "cautious", "hyperball"] = "decoupled",
        update_floor: float = 0.0,
        shard_compute: Literal["auto", "in_place", "dealt"] = "auto",
        state_dtype: Literal["float32", "bfloat16", "float64", "int8"] | None = None,
        matmul_precision: Precision | None = None,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        scalar: Literal["adamw", "lion"] = "adamw",
        scalar_lr: float | Tensor | None = None,
        scalar_weight_decay: float | Tensor = 0.0,
        scalar_betas: tuple[float, float] | None = None,
        overrides: Overrides | None = None,
        seed: int = 0,
        process_group: Any = None,
        replica_sync: Literal["none", "gradients", "factors", "auto"] = "none",
        reduce_dtype: Literal["bfloat16"] | None = None,
        replica_compute: Literal["auto", "split", "repeat"] = "auto",
        shard_state: Literal["none", "zero1"] = "none",
        state_offload: bool = False,
        capturable: bool = False,
        drift_check: int = 0,
        kernels: Literal["auto", "torch", "triton"] = "auto",
        fused: bool | None = None,
        foreach: bool | None = None,
    ) -> None: ...


@_documented()
class Muon(RuleOptimizer):
    """Muon (K. Jordan, 2024): momentum orthogonalized by Newton-Schulz.

    ``Muon(model, lr=0.02)``. Matrices go to Muon, everything else to AdamW or Lion. State of an (m, n) matrix:
    ``momentum`` (m, n).
    """

    default_rule = "muon"

    @_hands_on
    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        *,
        lr: float | Tensor = 0.02,
        weight_decay: float | Tensor = 0.01,
        momentum: float = 0.95,
        nesterov: bool = True,
        scale: Literal["spectral", "original", "rms", "none"] = "original",
        polar: Literal["jordan", "polar_express"] = "jordan",
        polar_method: Literal["auto", "newton_schulz", "gram"] = "auto",
        polar_dtype: Literal["float32", "bfloat16", "float64", "float16"] | None = None,
        equilibrate: Literal["none", "rows", "columns", "both"] = "none",
        row_moment: float = 0.0,
        frobenius: bool = False,
        decay: Literal["decoupled", "cautious", "hyperball"] = "decoupled",
        update_floor: float = 0.0,
        shard_compute: Literal["auto", "in_place", "dealt"] = "auto",
        state_dtype: Literal["float32", "bfloat16", "float64", "int8"] | None = None,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        scalar: Literal["adamw", "lion"] = "adamw",
        scalar_lr: float | Tensor | None = None,
        scalar_weight_decay: float | Tensor = 0.0,
        scalar_betas: tuple[float, float] | None = None,
        overrides: Overrides | None = None,
        seed: int = 0,
        process_group: Any = None,
        replica_sync: Literal["none", "gradients", "factors", "auto"] = "none",
        reduce_dtype: Literal["bfloat16"] | None = None,
        replica_compute: Literal["auto", "split", "repeat"] = "auto",
        shard_state: Literal["none", "zero1"] = "none",
        state_offload: bool = False,
        capturable: bool = False,
        drift_check: int = 0,
        kernels: Literal["auto", "torch", "triton"] = "auto",
        fused: bool | None = None,
        foreach: bool | None = None,
    ) -> None: ...


@_documented()
class LoRAMuon(RuleOptimizer):
    """LoRA-Muon (arXiv 2606.12921): Muon's step on the product of the two factors of each LoRA adapter.

    ``LoRAMuon(peft_model, lr=0.02)``. Factors are found by the names of PEFT and torchtune, lora_A and lora_B; other
    matrices go to Muon, everything else to AdamW or Lion. ``lr`` is the learning rate of the product B A, before PEFT's
    factor alpha / r. State of a factor: ``momentum``, of its own shape.
    """

    default_rule = "lora_muon"

    @_hands_on
    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        *,
        lr: float | Tensor = 0.02,
        weight_decay: float | Tensor = 0.01,
        momentum: float = 0.95,
        nesterov: bool = False,
        scale: Literal["spectral", "original", "rms", "none"] = "original",
        polar: Literal["jordan", "polar_express"] = "jordan",
        polar_method: Literal["auto", "newton_schulz", "gram"] = "auto",
        polar_dtype: Literal["float32", "bfloat16", "float64", "float16"] | None = None,
        shard_compute: Literal["auto", "in_place", "dealt"] = "auto",
        state_dtype: Literal["float32", "bfloat16", "float64", "int8"] | None = None,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        scalar: Literal["adamw", "lion"] = "adamw",
        scalar_lr: float | Tensor | None = None,
        scalar_weight_decay: float | Tensor = 0.0,
        scalar_betas: tuple[float, float] | None = None,
        overrides: Overrides | None = None,
        seed: int = 0,
        process_group: Any = None,
        replica_sync: Literal["none", "gradients", "factors", "auto"] = "none",
        reduce_dtype: Literal["bfloat16"] | None = None,
        replica_compute: Literal["auto", "split", "repeat"] = "auto",
        shard_state: Literal["none", "zero1"] = "none",
        state_offload: bool = False,
        capturable: bool = False,
        drift_check: int = 0,
        kernels: Literal["auto", "torch", "triton"] = "auto",
        fused: bool | None = None,
        foreach: bool | None = None,
    ) -> None: ...


@_documented()
class NorMuon(RuleOptimizer):
    """NorMuon (arXiv 2510.05491): Muon with the rows of the update normalized by their second moment.

    ``NorMuon(model, lr=0.02)``. Matrices go to NorMuon, everything else to AdamW or Lion. State of an (m, n) matrix:
    ``momentum`` (m, n) and ``row_moment`` (m).
    """

    default_rule = "normuon"

    @_hands_on
    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        *,
        lr: float | Tensor = 0.02,
        weight_decay: float | Tensor = 0.01,
        momentum: float = 0.95,
        nesterov: bool = True,
        scale: Literal["spectral", "original", "rms", "none"] = "original",
        polar: Literal["jordan", "polar_express"] = "jordan",
        polar_method: Literal["auto", "newton_schulz", "gram"] = "auto",
        polar_dtype: Literal["float32", "bfloat16", "float64", "float16"] | None = None,
        equilibrate: Literal["none", "rows", "columns", "both"] = "none",
        row_moment: float = 0.95,
        frobenius: bool = False,
        decay: Literal["decoupled", "cautious", "hyperball"] = "decoupled",
        update_floor: float = 0.0,
        shard_compute: Literal["auto", "in_place", "dealt"] = "auto",
        state_dtype: Literal["float32", "bfloat16", "float64", "int8"] | None = None,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        scalar: Literal["adamw", "lion"] = "adamw",
        scalar_lr: float | Tensor | None = None,
        scalar_weight_decay: float | Tensor = 0.0,
        scalar_betas: tuple[float, float] | None = None,
        overrides: Overrides | None = None,
        seed: int = 0,
        process_group: Any = None,
        replica_sync: Literal["none", "gradients", "factors", "auto"] = "none",
        reduce_dtype: Literal["bfloat16"] | None = None,
        replica_compute: Literal["auto", "split", "repeat"] = "auto",
        shard_state: Literal["none", "zero1"] = "none",
        state_offload: bool = False,
        capturable: bool = False,
        drift_check: int = 0,
        kernels: Literal["auto", "torch", "triton"] = "auto",
        fused: bool | None = None,
        foreach: bool | None = None,
    ) -> None: ...


@_documented(
    error_feedback="Only the momentum of the selected rows or columns decays; False: all of it decays alike.",
)
class Dion3(RuleOptimizer):
    """Dion3 (arXiv 2608.11612): the polar factor of the rows with the largest momentum, whose momentum then decays.

    ``Dion3(model, lr=0.02, fraction=1/4)``. Matrices go to Dion3, everything else to AdamW or Lion. State of an (m, n)
    matrix: ``momentum`` (m, n) and ``row_moment`` (m).
    """

    default_rule = "dion3"

    @_hands_on
    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        *,
        lr: float | Tensor = 0.02,
        weight_decay: float | Tensor = 0.01,
        momentum: float = 0.95,
        fraction: float = 0.25,
        error_feedback: bool = True,
        nesterov: bool = False,
        scale: Literal["spectral", "original", "rms", "none"] = "original",
        polar: Literal["jordan", "polar_express"] = "jordan",
        polar_method: Literal["auto", "newton_schulz", "gram"] = "auto",
        polar_dtype: Literal["float32", "bfloat16", "float64", "float16"] | None = None,
        equilibrate: Literal["none", "rows", "columns", "both"] = "none",
        row_moment: float = 0.95,
        frobenius: bool = False,
        decay: Literal["decoupled", "cautious", "hyperball"] = "decoupled",
        update_floor: float = 0.0,
        shard_compute: Literal["auto", "in_place", "dealt"] = "auto",
        state_dtype: Literal["float32", "bfloat16", "float64", "int8"] | None = None,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        scalar: Literal["adamw", "lion"] = "adamw",
        scalar_lr: float | Tensor | None = None,
        scalar_weight_decay: float | Tensor = 0.0,
        scalar_betas: tuple[float, float] | None = None,
        overrides: Overrides | None = None,
        seed: int = 0,
        process_group: Any = None,
        replica_sync: Literal["none", "gradients", "factors", "auto"] = "none",
        reduce_dtype: Literal["bfloat16"] | None = None,
        replica_compute: Literal["auto", "split", "repeat"] = "auto",
        shard_state: Literal["none", "zero1"] = "none",
        state_offload: bool = False,
        capturable: bool = False,
        drift_check: int = 0,
        kernels: Literal["auto", "torch", "triton"] = "auto",
        fused: bool | None = None,
        foreach: bool | None = None,
    ) -> None: ...


@_documented()
class RowNorm(RuleOptimizer):
    """RowNorm: the momentum with all rows scaled to equal length (RMNP, arXiv 2603.20527; Nora, arXiv 2605.03769).

    ``RowNorm(model, lr=3e-3)``. Matrices go to RowNorm, everything else to AdamW or Lion. State of an (m, n) matrix:
    ``momentum`` (m, n). Matrices that are sharded by rows send nothing.
    """

    default_rule = "row_norm"

    @_hands_on
    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        *,
        lr: float | Tensor = 3e-3,
        weight_decay: float | Tensor = 0.01,
        momentum: float = 0.95,
        nesterov: bool = True,
        scale: Literal["spectral", "original", "rms", "none"] = "original",
        tangent: bool = False,
        equilibrate: Literal["none", "rows", "columns", "both"] = "none",
        row_moment: float = 0.0,
        frobenius: bool = False,
        decay: Literal["decoupled", "cautious", "hyperball"] = "decoupled",
        update_floor: float = 0.0,
        shard_compute: Literal["auto", "in_place", "dealt"] = "auto",
        state_dtype: Literal["float32", "bfloat16", "float64", "int8"] | None = None,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        scalar: Literal["adamw", "lion"] = "adamw",
        scalar_lr: float | Tensor | None = None,
        scalar_weight_decay: float | Tensor = 0.0,
        scalar_betas: tuple[float, float] | None = None,
        overrides: Overrides | None = None,
        seed: int = 0,
        process_group: Any = None,
        replica_sync: Literal["none", "gradients", "factors", "auto"] = "none",
        reduce_dtype: Literal["bfloat16"] | None = None,
        replica_compute: Literal["auto", "split", "repeat"] = "auto",
        shard_state: Literal["none", "zero1"] = "none",
        state_offload: bool = False,
        capturable: bool = False,
        drift_check: int = 0,
        kernels: Literal["auto", "torch", "triton"] = "auto",
        fused: bool | None = None,
        foreach: bool | None = None,
    ) -> None: ...
