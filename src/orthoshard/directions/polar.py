"""Muon's direction: the polar factor of the whole matrix by Newton-Schulz (K. Jordan, 2024).

    U = polar(N)                U Vᵀ of N = U S Vᵀ, by a few odd polynomials, see `linalg.polar`

N (b, m, n). May import torch, `linalg`, `slots`, `checks` and this room.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..checks import one_of
from ..linalg.host_sync import device_type
from ..linalg.polar import POLAR, Iteration, iteration, polar
from ..linalg.polar_express import polynomials
from ..linalg.small import Work, at_once
from ..slots import STATE_DTYPES
from .direction import Direction
from .proposal import Proposal
from .request import Asks, OnWholeMatrices
from .seen import Seen

METHODS = ("auto", "newton_schulz", "gram")
POLAR_DTYPES = {**STATE_DTYPES, "float16": torch.float16}


@dataclass(frozen=True)
class Polar(Direction):
    """Options of the polar factor. ``polar_dtype`` None iterates in the state's dtype on a CPU and in 16 bits
    elsewhere: bfloat16 under Newton-Schulz; on Gram matrices float16, whose three extra bits their products need."""

    linear: ClassVar[bool] = False  # each entry of the polar factor needs every entry of the mean gradient
    full: ClassVar[bool] = True
    dealable: ClassVar[bool] = False  # its one request is for whole matrices

    polar: str = "jordan"
    polar_method: Literal["auto", "newton_schulz", "gram"] = "auto"
    polar_dtype: str | None = None

    def __post_init__(self) -> None:
        polynomials(self.polar)
        one_of("polar_method", self.polar_method, METHODS)
        if self.polar not in POLAR and self.polar_method not in ("auto", "newton_schulz"):
            raise ValueError(
                f"polar_method={self.polar_method!r} does not go with coefficients of your own, because it is not "
                f"known after how many of their steps the Gram matrix has to be computed anew. Choose "
                f"polar_method='auto', or polar as one of {', '.join(map(repr, POLAR))}"
            )
        one_of("polar_dtype", self.polar_dtype, (None, *POLAR_DTYPES))

    def propose(self, seen: Seen, state: dict[str, Tensor], shape: tuple[int, ...]) -> Asks:
        orthogonal = yield OnWholeMatrices(self.factor(shape, seen.N), seen.formed(sized=False), over="both")
        return Proposal(full=orthogonal)

    def factor(self, shape: tuple[int, ...], like: Tensor) -> Callable[[Tensor], Work]:
        """Return the function that makes polar factors of whole (m, n) matrices, for the
        device and dtype of ``like``."""
        m, n = shape
        table, chosen = polynomials(self.polar), self.iteration((m, n), device_type(like), like.dtype)
        return at_once(partial(polar, coefficients=table, dtype=chosen.dtype, rounds=chosen.rounds))

    def iteration(self, shape: tuple[int, int], device: str, held: torch.dtype) -> Iteration:
        """Return how (m, n) matrices are iterated on."""
        table, method = polynomials(self.polar), self.polar_method
        if self.polar not in POLAR:
            method = "newton_schulz"
        named = None if self.polar_dtype is None else POLAR_DTYPES[self.polar_dtype]
        return iteration(method, table, shape, device, held, named)
