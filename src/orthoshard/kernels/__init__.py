"""Which kernels make the passes over full-size matrices: an option of the optimizer.

    kernels="auto"      on CUDA with Triton installed: Triton's form of the passes in `FASTER`, torch's of all others
    kernels="torch"     torch's operations, on every device
    kernels="triton"    Triton's form of every pass that has one, on CUDA: docs/numerics.md

Rules and engine know nothing of this: `linalg.forms` puts other forms in place of torch's while a step runs. Triton
is imported when it is first needed, never with the library. May import torch, `linalg` and, in the files beside this
one, Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..linalg.forms import PLAIN, replacing

KERNELS = ("auto", "torch", "triton")
# Passes that are one sweep in Triton and several in torch: 1.5 to 8 times as fast on an H100, see docs/numerics.md.
FASTER = ("accumulate", "look_ahead", "look_back", "scaled_copy", "wide_row_squares", "add_scaled")
# Two more passes contain products, and are faster if operands need no more than 11 bits. A product added to weights
# alone has no Triton form: torch's was up to 3 times as fast.

Forms = Mapping[str, Callable[..., Any]]


def check_kernels(name: str) -> None:
    """Check that a name is known and that what it needs is installed. Raises ValueError otherwise."""
    if name not in KERNELS:
        raise ValueError(f"kernels={name!r} is unknown; choose one of {', '.join(map(repr, KERNELS))}")
    if name == "triton" and find_spec("triton") is None:
        raise ValueError(
            "kernels='triton' needs Triton, which comes with torch for CUDA and is not installed here: "
            "pip install 'orthoshard[triton]', or leave kernels out"
        )


def using(name: str) -> AbstractContextManager[None]:
    """Use the kernels of this name while the context lasts, in this thread. With "triton", tensors that the kernels
    cannot treat raise an error; none is silently passed on to slower kernels."""
    return replacing(_forms(name))


@cache
def _forms(name: str) -> Forms:
    if name == "torch" or (name == "auto" and (find_spec("triton") is None or not torch.cuda.is_available())):
        return {}
    forms: Forms = import_module(".forms", __name__).FORMS
    if name == "triton":
        return forms
    good = {**dict.fromkeys(FASTER, _on_cuda), "add_product_and_rows": _narrow_rows, "add_products": _narrow_products}
    return {each: _where(condition, forms[each], PLAIN[each]) for each, condition in good.items()}


def _where(good: Callable[..., bool], form: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls ``form`` for arguments that are ``good``, and ``plain`` for others."""

    @wraps(form)
    def chosen(*args: Any, **options: Any) -> Any:
        return (form if good(*args, **options) else plain)(*args, **options)

    return chosen


def _on_cuda(x: Tensor | Sequence[Tensor], *rest: Any, **options: Any) -> bool:
    first = x if isinstance(x, Tensor) else next(iter(x), None)  # a rank may have no matrix of a bucket
    return first is not None and first.device.type == "cuda"


def _narrow_rows(
    weights: Sequence[Tensor], left: Tensor, right: Tensor, rows: Tensor, N: Tensor, alpha: Any, decay: Any,
    precision: str | None = None, *rest: Any,
) -> bool:  # fmt: skip
    return _on_cuda(weights) and _narrow(N, weights, precision)


def _narrow_products(
    momentum: Tensor, taken: Any, weights: Sequence[Tensor], added: Any, decay: Any, precision: str | None = None,
    *rest: Any,
) -> bool:  # fmt: skip
    return _on_cuda(momentum) and _narrow(momentum, weights, precision)


def _narrow(state: Tensor, weights: Sequence[Tensor], precision: str | None) -> bool:
    """Return whether the operands of products need no more than 11 bits."""
    return precision in ("tf32", "bfloat16") and torch.float64 not in (state.dtype, weights[0].dtype)
