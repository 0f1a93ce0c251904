"""The same iteration by the kernels of `gram-newton-schulz` (Zhang, Amsel, Chen, Dao, 2026), where they are installed.

They compute products with symmetric results by tiles, on NVIDIA Hopper and Blackwell, in float16; products of matrices
below one tile the package leaves to torch. Imported when they are first used: it brings two more packages, large ones.
May import torch, `polar` and, inside functions, `gram_newton_schulz`.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from orthoshard.linalg.polar import Coefficients, Rounds, unit_norm

PACKAGE = "gram_newton_schulz"
DEVICE = "cuda"


def check_kernels(dtype: str | None) -> None:
    """Raises ValueError where the kernels cannot be."""
    if dtype not in (None, "float16"):
        raise ValueError(f"polar_dtype={dtype!r} cannot be with polar_method='gram_kernels', which iterates in float16")
    if not installed():
        raise ValueError(
            "polar_method='gram_kernels' needs a package that is not installed: pip install 'orthoshard[kernels]' "
            "--no-build-isolation, or choose polar_method='gram', which is the same iteration by torch's products"
        )
    if not torch.cuda.is_available():
        raise ValueError(
            "polar_method='gram_kernels' needs a CUDA device, and torch finds none here; choose polar_method='gram'"
        )


def polar_by_kernels(x: Tensor, coefficients: Coefficients, rounds: Rounds) -> Tensor:
    """As `polar.polar`, in float16."""
    if x.device.type != DEVICE:
        raise ValueError(f"polar_method='gram_kernels' needs matrices on a CUDA device; these are on {x.device}")
    if not x.numel():
        return torch.zeros_like(x)
    # from float32, so that the package copies its result: no memory of its own is left in our hands
    return made(coefficients, rounds)(unit_norm(x, torch.float32)).to(x.dtype)


@cache
def installed() -> bool:
    return find_spec(PACKAGE) is not None


@cache
def made(coefficients: Coefficients, rounds: Rounds) -> Any:
    """The package's function for a table. Not compiled, which would be done anew for each shape."""
    from gram_newton_schulz import GramNewtonSchulz  # pyright: ignore[reportMissingImports] an extra

    return GramNewtonSchulz(
        ns_coefficients=[list(step) for step in coefficients.steps],
        gram_newton_schulz_reset_iterations=list(accumulate(rounds))[:-1],
        compile_kwargs=None,
    )
