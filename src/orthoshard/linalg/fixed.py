"""Factors of Gram matrices where nobody looks: the same judgements as `gram.careful_factor`, in a third of the calls.

    G = YᵀY,  D = diag(1 / |Y_j|),  A = D G D + error I,      Y D X has orthonormal columns

G, A, X (b, r, r). On a device where the host reads nothing each call is a kernel launch or more, and at this size costs
its launch. So columns are brought to length 1 once, after which lengths are known and a column that is set aside is one
of ``ridge`` = (1 + error) I; errors stay squared, from pass to pass; and one product weighs all that is asked of X.
What an entry rounds to differs from `gram.careful_factor`, what is asked does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orthoshard.linalg.gram import inverse_factor


def fixed_factor(gram: Tensor, noise: Tensor, eye: Tensor, *, last: bool) -> tuple[Tensor, Tensor]:
    """D X, and the squared errors of the columns of Y D X, (b, 1, r). All but G in float64.

    ``noise`` (b, 1, r): those of the columns of Y. Two rounds: suspects that the first clears are judged by the second
    without those that it convicted. What is open then is postponed, see `gram.careful_factor`; or, where this judgement
    is the ``last``, zero: left in, it would be made as long as the others without being orthogonal to them.
    """
    eps = torch.finfo(gram.dtype).eps
    gram = gram.double()
    squares = gram.diagonal(dim1=1, dim2=2)
    lengths = squares.rsqrt().masked_fill_(squares <= noise[:, 0], 0)  # NaN counts as live and shows in the result
    noise = noise * lengths.square()[:, None]
    A = gram * (lengths[:, :, None] * lengths[:, None, :])
    least = 8 * 4 * eps * torch.linalg.vector_norm(A, dim=(1, 2), keepdim=True)  # eight times the error
    shift = least / 8 + 1
    A.diagonal(dim1=1, dim2=2).copy_(shift[:, 0])
    ridge = eye * shift
    weights = torch.cat([noise, least.expand_as(noise)], 1)

    sound = _sound(inverse_factor(A, eye), weights)
    _, rest, blur = _projected(_inverse(A, ridge, sound, eye), A, noise)
    kept = sound | (rest > torch.maximum(least, blur))[:, 0]
    trusted = kept & _sound(inverse_factor(torch.where(_pairs(kept), A, ridge), eye), weights)
    x = _inverse(A, ridge, trusted, eye)
    if not last:
        within, rest, blur = _projected(x, A, noise)
        postponed = ~(trusted[:, None] | (torch.maximum(rest, least) <= blur))
        x = torch.where(postponed, eye - within, x)
    return x * lengths[:, :, None], torch.bmm(noise, x.square())


def last_factor(gram: Tensor, eye: Tensor) -> Tensor:
    """X for the G of a Y that is orthonormal, nearly, but for its zero columns. Changes G."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal.add_(diagonal == 0)
    return inverse_factor(gram, eye)


def _pairs(columns: Tensor) -> Tensor:
    return columns[:, :, None] & columns[:, None, :]


def _sound(x: Tensor, weights: Tensor) -> Tensor:
    """Which columns (b, r) are longer than their error, and are told from rounding. Not those of NaN."""
    return (torch.bmm(weights, x.square()) < 1).all(1)


def _inverse(A: Tensor, ridge: Tensor, trusted: Tensor, eye: Tensor) -> Tensor:
    """X of the ``trusted`` columns (b, r), zero for the others."""
    return inverse_factor(torch.where(_pairs(trusted), A, ridge), eye) * trusted[:, None, :]


def _projected(x: Tensor, A: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each column: the coefficients (b, r, r) of its projection on the columns of Y D X before it, the square of
    what that leaves, and the squared error of this, (b, 1, r)."""
    onto = torch.triu(torch.bmm(x.mT, A), diagonal=1)
    within = torch.bmm(x, onto)
    rest = 1 - onto.square().sum(1, keepdim=True)
    return within, rest, torch.baddbmm(noise, noise, within.square())
