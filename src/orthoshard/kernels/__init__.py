"""Which kernels make the passes over full-size matrices: an option of the optimizer.

    kernels="auto"      on CUDA, where Triton is installed, its form of the passes in `FASTER`; torch's of all others
    kernels="torch"     torch's operations, on every device
    kernels="triton"    Triton's form of every pass that has one, on CUDA: docs/kernels.md

Rules and engine know nothing of it: `linalg.forms` puts other forms in the place of torch's while a step runs. Triton
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
# Passes that are one sweep in Triton and several in torch: 1.5 to 8 times as fast on an H100, see docs/kernels.md. Two
# more have products on their way, and lose where operands must be whole float32 or wider. A product added to weights
# alone is torch's: there cuBLAS is up to 3 times as fast.
FASTER = ("accumulate", "look_ahead", "look_back", "scaled_copy", "wide_row_squares", "add_scaled")

Forms = Mapping[str, Callable[..., Any]]


def check_kernels(name: str) -> None:
    """Raises ValueError for an unknown name, and where what it needs is not installed."""
    if name not in KERNELS:
        raise ValueError(f"kernels={name!r} is unknown; choose one of {', '.join(map(repr, KERNELS))}")
    if name == "triton" and find_spec("triton") is None:
        raise ValueError(
            "kernels='triton' needs Triton, which comes with torch for CUDA and is not installed here: "
            "pip install 'orthoshard[triton]', or leave kernels out"
        )


def using(name: str) -> AbstractContextManager[None]:
    """The kernels of this name while the context lasts, in this thread. With "triton", tensors that they cannot treat
    are refused when they come; none is passed on to slower ones in silence."""
    return replacing(_forms(name))


@cache
def _forms(name: str) -> Forms:
    if name == "torch" or (name == "auto" and (find_spec("triton") is None or not torch.cuda.is_available())):
        return {}
    forms: Forms = import_module(".forms", __name__).FORMS
    if name == "triton":
        return forms
    return {
        **{name: _where(_on_cuda, forms[name], PLAIN[name]) for name in FASTER},
        "add_product_and_rows": _where(_narrow_on_cuda, forms["add_product_and_rows"], PLAIN["add_product_and_rows"]),
        "add_products": _where(_one_pass_on_cuda, forms["add_products"], PLAIN["add_products"]),
    }


def _where(good: Callable[..., bool], form: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """``form`` for arguments of which that is so, ``plain`` for others."""

    @wraps(form)
    def chosen(*args: Any, **options: Any) -> Any:
        return (form if good(*args, **options) else plain)(*args, **options)

    return chosen


def _on_cuda(x: Tensor | Sequence[Tensor], *rest: Any, **options: Any) -> bool:
    first = x if isinstance(x, Tensor) else next(iter(x), None)  # a rank may have no matrix of a bucket
    return first is not None and first.device.type == "cuda"


def _narrow_on_cuda(*args: Any, **options: Any) -> bool:
    """Whether the operands of the products need no more than 11 bits."""
    tensors = [x for each in args for x in (each if isinstance(each, (list, tuple)) else (each,))]
    dtypes = {x.dtype for x in tensors if isinstance(x, Tensor) and x.ndim == 3}
    whole = torch.float64 in dtypes or (torch.float32 in dtypes and not {"tf32", "bfloat16"} & _words(args, options))
    return _on_cuda(*args) and not whole


def _one_pass_on_cuda(momentum: Tensor, taken: Any, weights: Any, added: Any, *rest: Any, **options: Any) -> bool:
    """The same, of two products that have a factor in common: else Triton's form is two of its products."""
    common = taken.right is added.right or taken.left is added.left
    return common and _narrow_on_cuda(momentum, taken, weights, added, *rest, **options)


def _words(args: tuple[Any, ...], options: dict[str, Any]) -> set[str]:
    return {x for x in (*args, *options.values()) if isinstance(x, str)}
