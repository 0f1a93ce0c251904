"""What is shown of a step where somebody watches: sums over the matrices of each parameter, kept on the device.

Answers a rule's `Note`: the rule's own figures and the spectrum of what it saw, of each matrix of the batch; summed
over a parameter's matrices here, then over the ranks that hold others of them. So every rank has the same numbers, and
to read them sends nothing. May import torch, `linalg`, `rules`, `plan`, `diagnostics` and this room.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor

from ..diagnostics import FRACTIONS, Figures, figures
from ..linalg.spectrum import spectrum
from ..plan import Entry
from ..rules.request import Measure, Note, Part, Share
from .answers import Answers, drive
from .gather import Answer

# What may be asked of a step; more includes less.
NOTHING, FIGURES, SPECTRA = 0, 1, 2


class Notes:
    """Of one step."""

    def __init__(self, watch: int) -> None:
        self._fractions = FRACTIONS if watch == SPECTRA else ()
        self._sums: dict[str, tuple[list[str], Tensor]] = {}

    def take(self, entries: Sequence[Entry], note: Note, answers: Answers) -> Answer:
        """Of one update of ``entries``."""
        seen = note.seen
        for axis in answers.averaging:
            seen = (seen / axis.size).contiguous()
            yield answers.comm.all_reduce(seen, axis)
        (spread,) = yield from answers.to(Share(partial(_measured, self._fractions), (seen,)))
        shown = yield from drive(note.figures(*note.inputs), answers)
        energy, part = spread[:, 0], answers.part
        if "captured" in shown:
            share = shown["captured"] / energy
            shown["captured"] = share.where(energy > 0, 0).clamp(max=1)  # above it only by rounding
        shown |= {
            "matrices": torch.ones_like(energy),
            "seen": (energy > 0).to(energy.dtype),
            "entries": torch.full_like(energy, prod(part.matrix)),
            "effective_rank": spread[:, 1],
        }
        table = torch.cat([torch.stack(list(shown.values()), -1), spread[:, 2:]], -1)
        counts = [part.folds * entry.batch * entry.here for entry in entries]
        sums = torch.stack([matrices.sum(0) for matrices in table.split(counts)])
        first = entries[0]  # its other matrices: experts cut apart, or whole blocks, or state that one replica keeps
        apart = [axis for cut in first.layout.cuts[: first.ahead + part.folded] for axis in cut]
        for axis in (*apart, *first.owners):
            yield answers.comm.all_reduce(sums, axis)
        for entry, row in zip(entries, sums, strict=True):
            _, before = self._sums.get(entry.name, ([], 0))
            self._sums[entry.name] = list(shown), row + before

    def read(self) -> dict[str, Figures]:
        """By parameter name. Waits for the device."""
        found: dict[str, Figures] = {}
        for name, (keys, sums) in self._sums.items():
            values: list[float] = sums.tolist()
            spread = values[len(keys) :] if self._fractions else None
            found[name] = figures(dict(zip(keys, values, strict=False)), spread)
        return found


def _measured(fractions: Sequence[float], x: Tensor) -> Part:
    return ((yield Measure(partial(spectrum, fractions=fractions), x, over="both")),)
