"""A model's parameters as named groups: every parameter claimed exactly once, with its reason.

    matrices, experts, LoRA factors                      the matrix rule (Dion, Muon)
    embeddings, positions, heads, routers, vectors, ...  the scalar rule (AdamW, Lion)

`grouping` finds out what a parameter is. May import torch, `rules`, `groups` and `grouping`.
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

# The scalar groups' share of the optimizer's lr. AdamW: all of it, as in the Dion authors' code. Beside Dion, DionTail
# and Muon at lr 0.02, its best rate was 0.012 at width 64, 0.048 or more at width 128 (docs/evidence.md), and 0.003 in
# a byte-level model with a tied head (docs/log.md). Lion: a third, as its paper advises (section 5).
LR_FACTORS = {"adamw": 1.0, "lion": 1 / 3}

# Embeddings and heads in the Dion authors' public configurations: these betas and no weight decay.
EMBEDDING_BETAS = (0.95, 0.98)

# Roles that get the scalar rule only because no matrices were recognized in them, and the share of all entries of
# matrices and kernels from which on we warn. Small channel filters stay below it (ConvNeXt 0.01, MobileNetV2 0.03,
# wav2vec 2 0.05); parameters that matter for training do not (EnCodec 0.17, RegNet 0.29, XLNet 0.38, most of a model
# whose experts have unknown names). Shares of these models as transformers builds them by default.
UNPLACED, LARGE_SHARE = ("convolution", "other"), 0.1
NAMED = 8  # patterns of names in the warning


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
    parameters are included: they train once they are unfrozen, and have no state before. Warns, with names, if a large
    share of a model's matrices and kernels was not recognized.

    Args:
        model: Any module; wrappers (DDP, torch.compile, checkpointing) are looked through.
        matrix: The rule of matrices, any name in `RULES`; None leaves it to the optimizer.
        scalar: The rule of everything else: ``"adamw"`` or ``"lion"``.
        lr: Learning rate of the matrices; None leaves it to the optimizer.
        scalar_lr: Learning rate of everything else; None: the optimizer's lr for AdamW, a third of it for Lion.
        scalar_weight_decay: Weight decay of everything else.
        scalar_betas: Betas of everything else; None: the scalar rule's, and (0.95, 0.98) for embeddings, positions,
            heads.
        overrides: Patterns of names with the group keys that they set, or another ``role``; the first that matches
            wins.
        options: Further keys of the matrix groups (``rank_fraction=0.125``, ``weight_decay=0.1``, ...).

    Raises:
        ValueError, TypeError: A parameter that cannot be treated, a pattern that matches nothing, an option that
            nothing reads, or something else than a model. Raised before anything is built.
    """
    one_of("matrix", matrix, [None, *RULES])
    one_of("scalar", scalar, [name for name, rule in RULES.items() if not rule.matrices])
    check_options({"rule": matrix or _reader_of(options), **options}, {"role", "reason", "view", "rounding_steps"})
    wanted = read_overrides(overrides, ROLES)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"param_groups takes a model, not {type(model).__name__}: the role of a parameter depends on its modules"
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
            "TorchScript hides the types of layers, so an embedding or a head may be taken for a matrix: pass the "
            "model as it was before torch.jit.script, whose parameters are the same, or set roles by overrides",
            stacklevel=3,
        )


def _warn_of_unplaced(claimed: Sequence[Claim], chosen: Mapping[str, Override], matrix: str, scalar: str) -> None:
    """Warn if a large share of all entries of matrices and kernels has an UNPLACED role that the user did not set."""
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
        f"{share:.0%} of the entries of this model's matrices and kernels go to {scalar!r}, because they were not "
        f"recognized as matrices: {', '.join(shown)}{rest}. If they are matrices, give them a view ('stack' for "
        f"experts, 'conv' for kernels, docs/sharding.md): param_groups(model, overrides={{{next(iter(shapes))!r}: "
        f"{{'rule': {matrix!r}, 'view': {view!r}}}}}); if not, {{'rule': {scalar!r}}} confirms that",
        stacklevel=3,
    )


def scalar_share(rule: str) -> float:
    """Return the scalar rule's share of the matrices' lr."""
    return LR_FACTORS.get(rule, 1.0)


def _reader_of(options: dict[str, Any]) -> str:
    """Return a matrix rule that reads all of these options, while the optimizer's is not known; else the first one."""
    matrices = [name for name, rule in RULES.items() if rule.matrices]
    return next((name for name in matrices if set(options) <= {*RULES[name].options(), *COMMON}), matrices[0])


@dataclass(frozen=True)
class _Defaults:
    """The keys of groups before the optimizer completes them: ``scalars`` for groups of the scalar rule, ``options``
    for the others."""

    matrix: str | None
    scalar: str
    lr: Any
    scalar_lr: Any
    scalars: dict[str, Any]
    options: dict[str, Any]

    def group(self, claim: Claim, override: Override | None) -> dict[str, Any]:
        """Return a group of the claim's role, or of the override's; keys that the override sets replace others."""
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
                group["lr_factor"] = 1.0  # the optimizer's own lr
            if RULES[group.get("rule", "dion")].matrices:  # the user may have asked for an elementwise rule
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
        """Return the rule of a matrix that is no factor of a pair, if the matrix rule treats only pairs; else None."""
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
