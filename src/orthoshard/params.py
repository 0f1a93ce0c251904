"""A model's parameters as named groups: every parameter claimed exactly once, with its reason.

    matrices, experts, LoRA factors                      the matrix rule (Dion, Muon)
    embeddings, positions, heads, routers, vectors, ...  the scalar rule (AdamW, Lion)

What a parameter is, `grouping` finds out. May import torch, `rules`, `groups` and `grouping`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .checks import one_of
from .grouping import Claim, Override, claims, partner_of, read_overrides, refuse_pieces
from .grouping.overrides import Overrides, choose
from .grouping.roles import MATRICES, ROLES
from .groups import COMMON, check_options
from .rules import RULES

__all__ = ["EMBEDDING_BETAS", "claims", "param_groups", "partner_of", "refuse_pieces", "scalar_share"]

# The scalar groups' share of the optimizer's lr. AdamW: all of it, as in the Dion authors' code. At lr 0.02 the best
# rate of Dion, DionTail and Muon was 0.012 at width 64 and 0.048 or more at 128 (docs/evidence.md), 0.003 in a
# byte-level model with a tied head (docs/log.md). Lion: a third, as its paper advises (section 5).
LR_FACTORS = {"adamw": 1.0, "lion": 1 / 3}

# Embeddings and heads in the Dion authors' public configurations: these betas and no weight decay.
EMBEDDING_BETAS = (0.95, 0.98)

# Roles under the scalar rule only because no matrices were seen in them; and their share of the entries of matrices and
# kernels from which on we say so. Small filters of channels stay below (ConvNeXt 0.01, MobileNetV2 0.03, wav2vec 2
# 0.05), what a model's speed of learning rests on does not (EnCodec 0.17, RegNet 0.29, XLNet 0.38, most of them where
# experts have unknown names). Shares of these models as transformers builds them by default.
UNPLACED, LARGE_SHARE = ("convolution", "other"), 0.1
NAMED = 8  # so many patterns of names in the warning


def param_groups(
    model: nn.Module,
    *,
    matrix: str | None = None,
    scalar: str = "adamw",
    lr: float | Tensor | None = None,
    scalar_lr: float | Tensor | None = None,
    scalar_weight_decay: float | Tensor = 0.0,
    scalar_betas: tuple[float, float] | None = None,
    overrides: Overrides | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Return groups for `Dion`, `Muon` or `RuleOptimizer`, one for each role, view and reason that the model has.

    Each group is a plain dict with ``params``, ``param_names``, ``rule``, ``role``, ``view`` and ``reason``. Frozen
    parameters are members that have no gradient yet: they train once they are unfrozen, and take no state before.
    Warns where much of a model is neither a matrix nor meant to be none, with the names.

    Args:
        model: Any module; wrappers (DDP, torch.compile, checkpointing) are looked through.
        matrix: The rule of matrices, any name in `RULES`; None leaves it to the optimizer.
        scalar: The rule of everything else: ``"adamw"`` or ``"lion"``.
        lr: Of the matrices; None leaves it to the optimizer.
        scalar_lr: Of everything else; None: the optimizer's lr for AdamW, a third of it for Lion.
        scalar_weight_decay: Of everything else.
        scalar_betas: Of everything else; None: the scalar rule's, and (0.95, 0.98) for embeddings, positions, heads.
        overrides: Patterns of names with the group keys that they set, or another ``role``; the first that matches
            wins.
        options: Further keys of the matrix groups (``rank_fraction=0.125``, ``weight_decay=0.1``, ...).

    Raises:
        ValueError, TypeError: A parameter cannot be treated, a pattern matches nothing, nothing reads an option, or
            this is no model; before anything is built.
    """
    one_of("matrix", matrix, [None, *RULES])
    one_of("scalar", scalar, [name for name, rule in RULES.items() if not rule.matrices])
    check_options({"rule": matrix or _reader_of(options), **options}, {"role", "reason", "view", "rounding_steps"})
    wanted = read_overrides(overrides, ROLES)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"param_groups takes a model, not {type(model).__name__}: the modules around a parameter say what it is"
        )
    _warn_of_scripted(model)
    claimed = list(claims(model))
    if not any(claim.parameter.requires_grad for claim in claimed):
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter: call requires_grad_(True) on what should train"
        )
    chosen = choose(wanted, [claim.name for claim in claimed])
    if matrix is None or RULES[matrix].matrices:
        trained = [claim for claim in claimed if claim.parameter.requires_grad and not claim.parameter.is_complex()]
        _warn_of_unplaced(trained, chosen, matrix or "dion", scalar)
    scalars = {"weight_decay": scalar_weight_decay} | ({} if scalar_betas is None else {"betas": scalar_betas})
    defaults = _Defaults(matrix, scalar, lr, scalar_lr, scalars, options)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for claim in claimed:
        override = chosen.get(claim.name)
        fresh = defaults.group(claim, override)
        key = (fresh["role"], fresh.get("view"), fresh["reason"], id(override))
        group = groups.setdefault(key, fresh)
        group["params"].append(claim.parameter)
        group["param_names"].append(claim.name)
    return list(groups.values())


def _warn_of_scripted(model: nn.Module) -> None:
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        warnings.warn(
            "TorchScript hides the types of layers, so that an embedding or a head may be taken for a matrix: give the "
            "model as it was before torch.jit.script, whose parameters are the same, or say roles by overrides",
            stacklevel=3,
        )


def _warn_of_unplaced(claimed: Sequence[Claim], chosen: Mapping[str, Override], matrix: str, scalar: str) -> None:
    """Where a large share of all entries of matrices and kernels is unplaced, and the user did not say so."""
    placed = sum(claim.parameter.numel() for claim in claimed if claim.role in (*MATRICES, *UNPLACED))
    unplaced = [claim for claim in claimed if claim.role in UNPLACED and claim.name not in chosen]
    share = sum(claim.parameter.numel() for claim in unplaced) / max(placed, 1)
    if share < LARGE_SHARE:
        return
    shapes = {re.sub(r"(?<![^.])\d+(?![^.])", "*", claim.name): claim.parameter.shape for claim in unplaced}
    shown = [f"{name!r} ({'×'.join(map(str, shape))})" for name, shape in list(shapes.items())[:NAMED]]
    rest = f" and {len(shapes) - NAMED} more" if len(shapes) > NAMED else ""
    view = "conv" if unplaced[0].role == "convolution" else "stack"
    warnings.warn(
        f"{share:.0%} of the entries of this model's matrices and kernels go to {scalar!r}, for nothing says that they "
        f"are matrices: {', '.join(shown)}{rest}. Where they are, say which (view='stack' for experts, 'conv' for "
        f"kernels, docs/sharding.md): param_groups(model, overrides={{{next(iter(shapes))!r}: {{'rule': {matrix!r}, "
        f"'view': {view!r}}}}}); where they are not, {{'rule': {scalar!r}}} says so",
        stacklevel=3,
    )


def scalar_share(rule: str) -> float:
    """Return the scalar rule's share of the matrices' lr."""
    return LR_FACTORS.get(rule, 1.0)


def _reader_of(options: dict[str, Any]) -> str:
    """A rule of matrices that reads all of these, where the optimizer will choose it; else the first one."""
    matrices = [name for name, rule in RULES.items() if rule.matrices]
    return next((name for name in matrices if set(options) <= {*RULES[name].options(), *COMMON}), matrices[0])


@dataclass(frozen=True)
class _Defaults:
    """The keys of a group before the optimizer completes it: ``scalars`` of the scalar rule's, ``options`` of the
    others."""

    matrix: str | None
    scalar: str
    lr: Any
    scalar_lr: Any
    scalars: dict[str, Any]
    options: dict[str, Any]

    def group(self, claim: Claim, override: Override | None) -> dict[str, Any]:
        """A group of this claim's role, or of the one that the override gives it, whose own keys go on top."""
        settings = dict(override.settings) if override else {}
        role = settings.get("role", claim.role)
        rule = settings.get("rule")
        one_of(f"rule of overrides[{override.pattern!r}]" if override else "rule", rule, [None, *RULES])
        matrices = RULES[rule].matrices if rule else role in MATRICES
        reason = f"as the pattern {override.pattern!r} says" if override else claim.reason
        group: dict[str, Any] = {"params": [], "param_names": [], "role": role, "reason": reason}
        if matrices:
            other = None if rule else self._for_no_factor(claim)
            group.update(self._matrix(rule or other))
            if other:
                group["lr_factor"] = 1.0  # of the optimizer's own rate
            if RULES[group.get("rule", "dion")].matrices:  # an elementwise rule on request has no use for blocks
                group["view"] = claim.view
        else:
            group.update(self._scalar(role, rule or self.scalar))
        factor = settings.get("lr_factor", group.get("lr_factor", 1.0))
        base = self.scalar_lr if "lr_factor" not in group and not matrices and self.scalar_lr is not None else self.lr
        if base is not None and "lr" not in settings:
            group["lr"] = base if factor == 1 else base * factor
        if "lr" in settings:
            group.pop("lr_factor", None)
        return {**group, **settings}

    def _for_no_factor(self, claim: Claim) -> str | None:
        """The rule of what is no factor of a pair, where the matrix rule is of pairs alone."""
        paired = self.matrix and RULES[self.matrix].paired
        return "muon" if paired and partner_of(claim.name) is None else None

    def _matrix(self, rule: str | None) -> dict[str, Any]:
        if rule is None or rule == self.matrix:
            return dict(self.options) if self.matrix is None else {"rule": self.matrix, **self.options}
        own = RULES[rule].options()
        return {"rule": rule, **{key: value for key, value in self.options.items() if key in own}}

    def _scalar(self, role: str, rule: str) -> dict[str, Any]:
        keys: dict[str, Any] = {"rule": rule}
        if role in ("embedding", "position", "head"):
            keys["betas"] = EMBEDDING_BETAS
        keys |= self.scalars
        if self.scalar_lr is None and (self.matrix is None or RULES[self.matrix].matrices):
            keys["lr_factor"] = scalar_share(rule)
        return keys
