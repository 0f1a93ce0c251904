"""The optimizer under the names of its rules, with every option spelt out.

The signatures are what editors and the API page show; a rule's own defaults are the ones that hold, and a test compares
the two. What an option means is said once, in `MEANINGS`. May import `optimizer`, and the names of types.
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

Init = TypeVar("Init", bound=Callable[..., None])
Named = TypeVar("Named", bound=type[RuleOptimizer])

# What each argument means; a class whose argument means something else says so.
MEANINGS = {
    "params": (
        "A model, the groups of `param_groups`, (name, parameter) pairs, group dicts, or parameters. Frozen "
        "parameters of a model are members that train once they are unfrozen."
    ),
    "lr": (
        "Learning rate of the matrices, what `scale` is multiplied by. A 0-d tensor is copied for each group, and "
        "schedulers fill the copies."
    ),
    "weight_decay": "Decoupled decay of the matrices: a step multiplies weights by 1 - lr·weight_decay.",
    "momentum": "Decay of the momentum, mu in M = mu M + G; in [0, 1).",
    "rank_fraction": "Rank of an (m, n) matrix as a share of min(m, n), rounded up; in (0, 1].",
    "rank_multiple_of": "The rank is rounded up to a multiple of this, at most min(m, n).",
    "scale": (
        'Factor of the orthonormal update of an (m, n) matrix: "spectral" sqrt(m/n) (Dion, v3 Table 1), "original" '
        "sqrt(max(1, m/n)) (K. Jordan's Muon), \"rms\" 0.2 sqrt(max(m, n)), the size of AdamW's updates (Moonlight, "
        'arXiv 2502.16982), "none" 1.'
    ),
    "error_feedback": "Keep in the momentum what rank r did not capture; False decays all of it alike.",
    "nesterov": "Use the momentum as it will be with the same gradient once more; not together with error feedback.",
    "q_side": (
        'The side of the weights that Q spans ("shorter": the columns where it is neither); it decides what travels '
        "where matrices are sharded, and never depends on the sharding itself."
    ),
    "equilibrate": (
        'Lengths that are made one before the direction: "rows", "columns", "both"; see `docs/rules.md`, as for the '
        "next four."
    ),
    "row_moment": "Decay of NorMuon's second moment of the rows of the update; 0: off.",
    "frobenius": "Bring the update of each matrix to Frobenius norm sqrt(min(m, n)).",
    "decay": (
        '"decoupled", "cautious" (only where update and weight have one sign) or "hyperball" (the norm of each matrix '
        "stays; takes no ``weight_decay``)."
    ),
    "update_floor": "Least Frobenius norm of an update, before lr, as a share of its matrix's; 0: off.",
    "shard_compute": (
        "Where matrices are cut: the direction works on the pieces, or whole matrices are dealt to owners, or the "
        "cheaper."
    ),
    "state_dtype": (
        'Dtype of the state; None: the parameter\'s, at least float32; "int8": momentum and Q in 8 bits, '
        "see `docs/memory.md`."
    ),
    "matmul_precision": (
        'Precision of products with full-size matrices; None: "tf32" on CUDA, "float32" elsewhere, whatever torch\'s '
        "setting. See `docs/numerics.md`."
    ),
    "rounding": "How bfloat16 weights are rounded after a step.",
    "scalar": "Rule of everything that is no matrix, where a model is given.",
    "scalar_lr": "Learning rate of everything else; None: ``lr`` for AdamW, a third of it for Lion.",
    "scalar_weight_decay": "Decoupled decay of everything else.",
    "scalar_betas": (
        "Betas of everything else; None: the scalar rule's, and (0.95, 0.98) for embeddings, positions and heads, as "
        "in the Dion authors' configurations."
    ),
    "seed": "Of the initial Q, with each parameter's name, and of stochastic rounding; no global generator is touched.",
    "process_group": (
        "Replicas that hold the same plain tensors, as a group or a mesh of one dimension; None: those of a "
        "DistributedDataParallel model, if any. Sharded parameters need none."
    ),
    "replica_sync": (
        "What replicas with gradients of their own exchange: nothing, for gradients are equal already; gradients; "
        "thin factors, of Dion alone; or the cheaper; see `docs/slow_links.md`."
    ),
    "reduce_dtype": "Dtype in which factors travel; None: the state's.",
    "replica_compute": (
        "What replicas with equal gradients do: split the work and send results, each repeat all of it, or the cheaper."
    ),
    "shard_state": (
        '"zero1": each replica keeps the state of its own share of the matrices and sends what all weights take; see '
        "`docs/sharding.md`."
    ),
    "state_offload": "Keep the state in host memory, pinned where the device is CUDA; see `docs/memory.md`.",
    "capturable": "Never read the device in a step, so that it can be captured in a CUDA graph: `docs/numerics.md`.",
    "drift_check": "Every so many steps, see that replicas hold the same weights to the bit; 0: never.",
    "kernels": (
        "Who makes the passes over full-size matrices: torch, Triton (on CUDA), or Triton only those that it makes "
        "faster; see `docs/numerics.md`."
    ),
    "fused": "Of the scalar rule AdamW: False leaves its fused kernel out.",
    "foreach": "Of the scalar rule AdamW: False leaves its multi-tensor kernels out.",
    "tail_weight": "Weight c of the tail beside the low-rank part; 0 leaves a Dion without error feedback.",
    "polar": (
        'Polynomials of the iteration: "jordan" (K. Jordan, 2024) and "polar_express" (arXiv 2505.16932), five steps '
        'each, or the coefficients of each step as text, "a,b,c; a,b,c".'
    ),
    "polar_method": "Iterate on the matrix or on its Gram matrix; the same polynomial either way.",
    "polar_dtype": "Dtype of the iteration; None: the state's on a CPU, 16 bits elsewhere.",
    "fraction": (
        "Share of the rows, or of the columns where these are fewer, that move in a step; in (0, 1]. The update is "
        "multiplied by 1/sqrt(fraction)."
    ),
    "tangent": "First remove the part of each row along the row of the weights (Nora).",
}
RAISES = """
    Raises:
        ValueError, TypeError: An option that nothing reads, a value out of range, or a parameter that its rule cannot
            treat; before anything is built.
    """


def _hands_on(declared: Init) -> Init:
    """An ``__init__`` that hands what was passed, and only that, to `RuleOptimizer`: where the user said nothing, a
    group of another rule keeps the default of its own rule. What was not declared gets its hint there."""

    @wraps(declared)
    def init(self: RuleOptimizer, params: nn.Module | Iterable[Any], **given: Any) -> None:
        RuleOptimizer.__init__(self, params, **given)

    return cast(Init, init)


def _documented(**meanings: str) -> Callable[[Named], Named]:
    """Add what each argument means, and its default, to the docstring of a class. ``meanings``: of its own."""

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
    """Dion with its remainder applied at once, at unit row length, in place of error feedback; see `docs/rules.md`.

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

    ``LoRAMuon(peft_model, lr=0.02)``. The factors are found by their names, lora_A and lora_B, as PEFT and torchtune
    have them; other matrices go to Muon, everything else to AdamW or Lion. ``lr`` is that of the product B A, before
    PEFT's factor alpha / r. State of a factor: ``momentum``, of its own shape.
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
    """NorMuon (arXiv 2510.05491): Muon whose rows are evened out by their second moment.

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
    error_feedback="Only the momentum of what moved decays; False decays all of it alike.",
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
    """RowNorm: the momentum with every row at one length (RMNP, arXiv 2603.20527; Nora, arXiv 2605.03769).

    ``RowNorm(model, lr=3e-3)``. Matrices go to RowNorm, everything else to AdamW or Lion. State of an (m, n) matrix:
    ``momentum`` (m, n). Where rows are sharded it sends nothing.
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
