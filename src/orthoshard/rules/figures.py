"""What rules show of an update where somebody watches (`request.Note`): numbers of each matrix, (b,), in float64.

    rank, live      columns of the factors, and how many of them are above noise
    captured        |R Pᵀ|² = |R|², R = X P: what rank r captures of what the rule saw
    orthogonality   |PᵀP - I|², I without the columns that are zero; or |O Oᵀ - I|²
    basis           |VᵀV - I|², of the new Q
    update          |U|² in W = decay W - U

All of it comes from Grams of thin factors and from row norms, finished as sums, so that it does not depend on how the
matrices are cut: |V Pᵀ|² = ⟨VᵀV, PᵀP⟩. P (b, n, r), V, R (b, m, r); or m and n the other way round; O (b, m, n).
May import torch, `linalg` and `request`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg.unit import row_squares
from .request import Dim, Measure, Shown, Sum


def factor_figures(P: Tensor, V: Tensor, captured: Tensor, size: float | Tensor, p_side: Dim, q_side: Dim) -> Shown:
    """Of the update U = size · V Pᵀ. ``captured`` (b,), finished."""
    of_p = yield Sum(_gram(P), over=p_side)
    of_v = yield Sum(_gram(V), over=q_side)
    live, error = _orthogonality(of_p)
    return {
        "rank": torch.full_like(live, P.shape[-1]),
        "live": live,
        "captured": captured.double(),
        "orthogonality": error,
        "basis": _orthogonality(of_v)[1],
        "update": (of_p * of_v).sum((-2, -1)) * size**2,
    }


def tail_figures(P: Tensor, V: Tensor, R: Tensor, D: Tensor, tail: Tensor, size: float | Tensor) -> Shown:
    """Of DionTail's U = size · (V Pᵀ + D E): the rows of E have the squared lengths ``tail`` (b, m, 1) and are
    orthogonal to those of V Pᵀ, so that |U|² adds up."""
    squares = torch.cat([row_squares(R), D.square() * tail], -1).double().sum(-2)
    captured, applied = (yield Sum(squares, over="rows")).unbind(-1)
    figures = yield from factor_figures(P, V, captured, size, "columns", "rows")
    return {**figures, "update": figures["update"] + applied * size**2}


def polar_figures(orthogonal: Tensor, size: float | Tensor) -> Shown:
    """Of Muon's U = size · O, O orthogonal."""
    update = yield Sum(row_squares(orthogonal).double().sum((-2, -1)), over="both")
    error = yield Measure(_polar_error, orthogonal, over="both")
    return {"rank": error[:, 0], "orthogonality": error[:, 1], "update": update * size**2}


def _polar_error(X: Tensor) -> Tensor:
    """d, the smaller side, and |X Xᵀ - I|² on it: (b, 2)."""
    gram = _gram(X if X.shape[-2] >= X.shape[-1] else X.mT)
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    error = gram.square().sum((-2, -1))
    return torch.stack([torch.full_like(error, gram.shape[-1]), error], -1)


def _gram(P: Tensor) -> Tensor:
    """PᵀP."""
    wide = P.double()
    return torch.bmm(wide.mT, wide)


def _orthogonality(gram: Tensor) -> tuple[Tensor, Tensor]:
    """How many columns are live, and |G - I|² where I is zero for the others."""
    live = (gram.diagonal(dim1=-2, dim2=-1) > 0.5).to(gram.dtype)
    return live.sum(-1), (gram - torch.diag_embed(live)).square().sum((-2, -1))
