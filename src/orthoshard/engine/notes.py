"""The figures of a recorded step: sums over the matrices of each parameter, kept on the device.

They come from X, what a direction saw, and its proposal U = L Rᵀ + diag(d) X, of each matrix:

    rank, live      columns of the factors, and how many of them are above noise
    captured        |X P|² of the orthonormal factor P: what rank r captures of X
    tail_flatness   the effective rank of E = X - X P Pᵀ, over d - r: DionTail's tail assumes that E is flat
    orthogonality   |PᵀP - I|², I without the columns that are zero; or |U Uᵀ - I|² of a full update
    basis           |VᵀV - I|² of the new Q
    update          |size U|² in W = decay W - size U

All figures come from Grams of thin factors and from row norms, finished as sums, so they do not depend on the sharding.
They are summed over a parameter's matrices on this rank, then over the ranks that hold its other matrices. So every
rank has the same numbers, and reading them sends nothing. May import torch, `linalg`, `directions`, `stages`, `plan`,
`diagnostics` and this room.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor

from ..diagnostics import FRACTIONS, Figures, figures
from ..directions.low_rank import NOISE, rounding_of
from ..directions.proposal import Proposal
from ..directions.request import Asks, Sum
from ..directions.seen import Seen
from ..linalg.products import multiply_add
from ..linalg.spectrum import spectrum
from ..plan import Entry
from ..stages import Move
from .gather import Task
from .transport import Transport

# What may be recorded of a step; a higher level includes the lower ones.
NOTHING, FIGURES, SPECTRA = 0, 1, 2


class Notes:
    """The figures of one step."""

    def __init__(self, level: int) -> None:
        self._fractions = FRACTIONS if level == SPECTRA else ()
        self._sums: dict[str, tuple[list[str], Tensor]] = {}

    def take(self, entries: Sequence[Entry], seen: Seen, proposal: Proposal, move: Move, transport: Transport) -> Task:
        """Record the figures of one update of ``entries``."""
        formed = seen.formed()
        for axis in transport.averaging:
            formed = (formed / axis.size).contiguous()
            yield transport.comm.all_reduce(formed, axis)
        mean = Seen(formed, seen.precision)
        inside, first, last, join = transport.split(formed.shape[0])
        of_part = partial(spectrum, fractions=self._fractions)
        spread = yield from inside.measured(of_part, formed[first:last], over="both")
        (spread,) = yield from join([spread])
        if not proposal.orthonormal:
            error = yield from transport.measured(_polar_error, proposal.formed(), over="both")
            shown = {"rank": error[:, 0], "orthogonality": error[:, 1]}
        else:
            shown = yield from transport.run(_factors(mean, proposal))
            rest, basis = shown.pop("rest"), proposal.basis
            assert basis is not None
            of_rest = yield from inside.measured(spectrum, rest[first:last], over="both")
            (of_rest,) = yield from join([of_rest])
            beyond = min(transport.part.matrix) - basis.shape[-1]  # 0 at full rank, where E is rounding
            eps = torch.finfo(torch.promote_types(formed.dtype, torch.float32)).eps
            noise = max(NOISE * eps * math.sqrt(max(transport.part.matrix)), 2 * rounding_of(formed, seen.precision))
            tails = ((of_rest[:, 0] > noise**2 * spread[:, 0]) & (beyond > 0)).to(of_rest.dtype)
            shown |= {"tails": tails, "tail_flatness": of_rest[:, 1] / max(beyond, 1) * tails}
        square = (yield from transport.run(proposal.square())).double()
        size = move.size if not isinstance(move.size, Tensor) else move.size.double()
        shown["update"] = (square * size**2).view(-1)
        energy, part = spread[:, 0], transport.part
        if "captured" in shown:
            share = shown["captured"] / energy
            shown["captured"] = share.where(energy > 0, 0).clamp(max=1)  # above 1 only by rounding
        shown |= {
            "matrices": torch.ones_like(energy),
            "seen": (energy > 0).to(energy.dtype),
            "entries": torch.full_like(energy, prod(part.matrix)),
            "effective_rank": spread[:, 1],
        }
        table = torch.cat([torch.stack(list(shown.values()), -1), spread[:, 2:]], -1)
        counts = [part.count(entry.batch) * entry.is_owner for entry in entries]
        sums = torch.stack([matrices.sum(0) for matrices in table.split(counts)])
        one = entries[0]  # other ranks may hold further matrices of it: experts, whole blocks, another replica's state
        apart = [axis for cut in one.layout.shard_axes[: one.batch_dims + part.blocks_as_batch] for axis in cut]
        for axis in (*apart, *one.owners):
            yield transport.comm.all_reduce(sums, axis)
        for entry, row in zip(entries, sums, strict=True):
            _, before = self._sums.get(entry.name, ([], 0))
            self._sums[entry.name] = list(shown), row + before

    def read(self) -> dict[str, Figures]:
        """Return the figures by parameter name. Waits for the device."""
        found: dict[str, Figures] = {}
        for name, (keys, sums) in self._sums.items():
            values: list[float] = sums.tolist()
            spread = values[len(keys) :] if self._fractions else None
            found[name] = figures(dict(zip(keys, values, strict=False)), spread)
        return found


def _factors(X: Seen, proposal: Proposal) -> Asks:
    """Return what thin factors show."""
    right, basis = proposal.orthonormal == "right", proposal.basis
    P = proposal.right if right else proposal.left
    assert P is not None
    assert basis is not None
    p_side, q_side = ("columns", "rows") if right else ("rows", "columns")
    of_p = yield Sum(_gram(P), over=p_side)
    of_v = yield Sum(_gram(basis), over=q_side)
    R = yield Sum((X if right else X.mT).times(P), over=p_side)
    wide = torch.promote_types(X.N.dtype, torch.float32)
    left, other = (R, P) if right else (P, R)
    captured = yield Sum(R.double().square().sum((-2, -1)), over=q_side)
    live, error = _orthogonality(of_p)
    return {
        "rank": torch.full_like(live, P.shape[-1]),
        "live": live,
        "captured": captured,
        "orthogonality": error,
        "basis": _orthogonality(of_v)[1],
        "rest": multiply_add(X.N.to(wide), left.to(wide), other.to(wide).mT, alpha=-1),
    }


def _polar_error(X: Tensor) -> Tensor:
    """Return d, the smaller side, and |X Xᵀ - I|² on that side: (b, 2)."""
    gram = _gram(X if X.shape[-2] >= X.shape[-1] else X.mT)
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    error = gram.square().sum((-2, -1))
    return torch.stack([torch.full_like(error, gram.shape[-1]), error], -1)


def _gram(P: Tensor) -> Tensor:
    """Return PᵀP, in float64."""
    wide = P.double()
    return torch.bmm(wide.mT, wide)


def _orthogonality(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many columns are live, and |G - I|², where I is zero for the other columns."""
    live = (gram.diagonal(dim1=-2, dim2=-1) > 0.5).to(gram.dtype)
    return live.sum(-1), (gram - torch.diag_embed(live)).square().sum((-2, -1))
