"""A model's parameters as named groups: every trainable parameter claimed exactly once, with its reason.

    matrices                         the matrix rule (Dion, Muon)
    embeddings, heads, norms, biases  the scalar rule (AdamW, Lion)

May import torch and `rules`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .rules import RULES
from .rules.rule import one_of

# The scalar groups' share of the optimizer's lr. At Dion's 0.02 they give AdamW 3e-3 and Lion 1e-3: the first is the
# best of a sweep on a small GPT (docs/log.md), the second a third of it, as Lion's paper advises (section 5).
LR_FACTORS = {"adamw": 0.15, "lion": 0.05}

# Embeddings and heads in the Dion authors' public configurations: these betas and no weight decay.
EMBEDDING_BETAS = (0.95, 0.98)

# Last names of output layers, and of tables that models keep as raw parameters.
HEADS = ("lm_head", "head", "classifier", "score", "fc_out", "decoder")
TABLES = ("pos_emb", "position_emb", "cls_token", "mask_token", "relative_attention_bias")


@dataclass(frozen=True)
class Claim:
    """What a parameter is in its model, and why we think so."""

    name: str
    parameter: nn.Parameter
    role: str
    reason: str


def param_groups(
    model: nn.Module,
    *,
    matrix: str | None = None,
    scalar: str = "adamw",
    lr: float | Tensor | None = None,
    scalar_lr: float | Tensor | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Groups for `Dion`, `Muon` or `RuleOptimizer`, one for each role that the model has.

    matrix     the rule of matrices: any name in `RULES`; None leaves it to the optimizer
    scalar     the rule of everything else: ``"adamw"`` or ``"lion"``
    lr         of the matrices; None leaves it to the optimizer
    scalar_lr  of everything else; None: a fixed share of the optimizer's lr (0.15 for AdamW, 0.05 for Lion)
    options    further keys of the matrix group (``rank_fraction=0.125``, ``weight_decay=0.1``, ...)

    Each group is a plain dict with ``params``, ``param_names``, ``rule``, ``role`` and ``reason``. Frozen parameters
    are left out. Raises ValueError where a parameter cannot be treated, before anything is built.
    """
    one_of("matrix", matrix, [None, *RULES])
    one_of("scalar", scalar, [name for name, rule in RULES.items() if not rule.matrices])
    groups: dict[str, dict[str, Any]] = {}
    for claim in claims(model):
        group = groups.setdefault(claim.role, {"params": [], "param_names": [], "role": claim.role})
        group["params"].append(claim.parameter)
        group["param_names"].append(claim.name)
        group.setdefault("reason", claim.reason)
    if not groups:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter: call requires_grad_(True) on what should train"
        )
    for role, group in groups.items():
        if role in ("matrix", "experts"):
            group.update(options if matrix is None else {"rule": matrix, **options})
            if lr is not None:
                group["lr"] = lr
            continue
        group.update(rule=scalar, weight_decay=0.0)
        if role in ("embedding", "head"):
            group["betas"] = EMBEDDING_BETAS
        if scalar_lr is not None:
            group["lr"] = scalar_lr
        elif matrix is None or RULES[matrix].matrices:
            group["lr_factor"] = LR_FACTORS[scalar]
            if lr is not None:
                group["lr"] = lr * LR_FACTORS[scalar]
        elif lr is not None:
            group["lr"] = lr
    return list(groups.values())


def claims(model: nn.Module) -> Iterator[Claim]:
    """Each trainable parameter of the model once, under its first name, with its role."""
    heads = _heads(model)
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            name = plain_name(f"{prefix}.{leaf}" if prefix else leaf)
            refuse_flattened(name, parameter)
            role, reason = _role(module, leaf, parameter, id(parameter) in tied, module in heads)
            yield Claim(name, parameter, role, reason)


def plain_name(name: str) -> str:
    """A parameter's name without the prefixes of wrappers, so that it is the same with and without them."""
    for prefix in ("_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(prefix, "")
    return name


def refuse_flattened(name: str, parameter: Tensor) -> None:
    """Raise where other software has flattened the parameter: its matrix is gone."""
    if hasattr(parameter, "ds_id") or hasattr(parameter, "ds_shape"):
        raise ValueError(
            f"parameter {name!r} is partitioned by DeepSpeed ZeRO, which flattens matrices; use PyTorch's "
            f"fully_shard (FSDP2) instead, which keeps them"
        )
    if type(parameter).__name__ == "FlatParameter" or "_flat_param" in name:
        raise ValueError(
            f"parameter {name!r} is an FSDP1 flat parameter, whose matrices are gone; wrap the model with "
            f"torch.distributed.fsdp.fully_shard (FSDP2) instead of FullyShardedDataParallel"
        )


def _heads(model: nn.Module) -> set[nn.Module]:
    """The output layers: what the model itself calls so, else Linears of such a name, else the last one where it is as
    wide as the largest table."""
    ask = getattr(model, "get_output_embeddings", None)
    said = ask() if callable(ask) else None
    if isinstance(said, nn.Module):
        return {said}
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    named = {module for name, module in linears if name.rsplit(".", 1)[-1] in HEADS}
    if named or not linears:
        return set(named)
    last = linears[-1][1]
    vocabulary = max((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=0)
    return {last} if last.out_features == vocabulary else set()


def _role(module: nn.Module, leaf: str, parameter: Tensor, tied: bool, head: bool) -> tuple[str, str]:
    kind = type(module).__name__
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or tied or any(table in leaf for table in TABLES):
        return "embedding", "rows of a table are looked up, not multiplied"
    if head and parameter.ndim == 2:
        return "head", "the output layer: its rows are classes"
    if parameter.ndim < 2:
        return ("bias", "a vector") if "bias" in leaf else ("norm", "a vector or a number")
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution", f"a {kind} kernel, not a matrix"
    if "norm" in kind.lower():
        return "norm", f"a weight of {kind}"
    if parameter.ndim == 2 and 1 in parameter.shape:
        return "norm", "a vector in the shape of a matrix"
    if parameter.ndim == 2:
        if kind == "Conv1D":
            warnings.warn(
                "a Conv1D stores its weight as (in, out): give scale='rms', whose factor is the same for both; the "
                "others would take d_in for d_out",
                stacklevel=2,
            )
        return "matrix", "a matrix that multiplies activations"
    if parameter.ndim == 3 and min(parameter.shape) > 1:
        return "experts", "a stack of matrices (expert, row, column)"
    return "other", f"{parameter.ndim} dimensions: not a matrix"
