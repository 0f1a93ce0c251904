"""Choose the cheapest way to update a batch of matrices, and how many matrices one update takes.

Both ask the dry run for the rank at the origin of the mesh, which computes and holds at least as much as any other, so
every rank chooses the same. `FLOPS_PER_BYTE` converts bytes on the wire to flops that take the same time. May import
`rules`, `layout`, `owners`, `parts` and `engine.dryrun`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod

import torch

from .engine.dryrun import Dry, dry_update
from .layout import Replicas
from .owners import split_counts
from .parts import Part
from .rules import MatrixRule

# Flops that a rank does in the time that one byte takes to send; only the order of magnitude matters.
# cpu: 100 GFLOP/s a process and 0.7 GB/s of gloo (measured: benchmarks/results/gpt2-small-2-processes.json).
# Others: half of an H100's 494 TFLOP/s in TF32, over one 400 Gb/s port a GPU (NVIDIA DGX H100 datasheet, 2023).
FLOPS_PER_BYTE = {"cpu": 150.0}
FLOPS_PER_BYTE_ELSEWHERE = 5000.0
# Bytes of temporaries of one update, on any rank. An update takes as many matrices as fit within UPDATE_BYTES. A faster
# way that needs more for one matrix is accepted up to MOST_BYTES, or twice what the leanest way needs.
UPDATE_BYTES = 2**29
MOST_BYTES = 35 * 10**8
# More than any direction holds for an entry of a matrix. If this bound is small enough, no dry run is needed.
BYTES_OF_ENTRY = 64
# What replicas do, and whether whole matrices are dealt to owners.
Way = tuple[Replicas, bool]


@dataclass(frozen=True)
class Alike:
    """Matrices of one part under one rule. ``dtype``: of weights and gradients; ``device``: the device type."""

    rule: MatrixRule
    part: Part
    dtype: torch.dtype
    device: str

    def cheapest(self, ways: Sequence[Way]) -> Way:
        """Return the fastest of the ``ways`` whose temporaries fit."""
        if len(ways) == 1:
            return ways[0]
        held = {way: self.held_at_most(1, *way) for way in ways}
        most = max(MOST_BYTES, 2 * min(held.values()))
        rate = FLOPS_PER_BYTE.get(self.device, FLOPS_PER_BYTE_ELSEWHERE)

        def time(way: Way) -> float:
            dry, _ = self.typical(*way)
            return dry.total_flops + rate * float(dry.wire)

        return min((way for way in ways if held[way] <= most), key=time)

    def most_held(self, matrices: int, replicas: Replicas, dealt: bool) -> int:
        """Return the bytes of temporaries of one update of this many matrices, on the rank that has most of them."""
        return self._dry(split_counts(matrices, self._owners(replicas), 0), replicas, dealt).peak

    def held_at_most(self, matrices: int, replicas: Replicas, dealt: bool) -> int:
        """Return `most_held`, or an upper bound of it if that is small; then nothing is run."""
        bound = matrices * prod(self.part.matrix) * BYTES_OF_ENTRY
        return bound if bound <= UPDATE_BYTES // 2 else self.most_held(matrices, replicas, dealt)

    def most_matrices(self, matrices: int, replicas: Replicas, dealt: bool) -> int:
        """Return how many of the ``matrices`` one update may take. Temporaries stay within `UPDATE_BYTES`, or 5/4 of
        those of one matrix: if owners take whole matrices, one at each owner needs no more than one in all."""

        def held(count: int) -> int:
            return self.held_at_most(count, replicas, dealt)

        ranks = prod(axis.size for axis in self.part.axes)
        if ranks == 1 or matrices == 1 or held(matrices) <= UPDATE_BYTES:
            return matrices
        most = max(UPDATE_BYTES, held(1) * 5 // 4)
        while matrices > 1 and (now := held(matrices)) > most:
            matrices = max(1, min(matrices - 1, matrices * most // now))
            if matrices > ranks:  # then deal without remainder
                matrices -= matrices % ranks
        return matrices

    def worth_averaging(self) -> bool:
        """Return whether replicas with gradients of their own send fewer bytes as factors than as gradients: roughly,
        whether (m + n) r < m n. Only bytes count, because such replicas usually have slow links between them."""
        factors, even = self.typical("average", False)
        rest, _ = self.typical("repeat", False)
        origin = self.part.typical()
        size = origin.rows.local_length * origin.columns.local_length * self.dtype.itemsize * even
        gradients = sum((all_reduce_bytes(size, axis.size) for axis in self.part.unreduced_axes), Fraction(0))
        return factors.wire < rest.wire + gradients

    def typical(self, replicas: Replicas, dealt: bool) -> tuple[Dry, int]:
        """Return the cost of the fewest matrices that are dealt evenly, at the mesh's origin, and their number."""
        even, owners = prod(axis.size for axis in self.part.axes), self._owners(replicas)
        return self._dry([even // owners] * owners, replicas, dealt), even

    def _owners(self, replicas: Replicas) -> int:
        """Return among how many replicas the state is divided."""
        return prod(axis.size for axis in self.part.replicas) if replicas == "own" else 1

    def _dry(self, shares: Sequence[int], replicas: Replicas, dealt: bool) -> Dry:
        """Run an update dry at the origin of the mesh. ``shares``: matrices at each owner, or one number of all."""
        part, several = self.part.typical(), tuple(shares) if len(shares) > 1 else ()
        return dry_update(self.rule, part, self.dtype, self.device, shares[0], 0, replicas, several, dealt)


def all_reduce_bytes(size: int, ranks: int) -> Fraction:
    """Return the bytes that a rank sends in a ring all-reduce of ``size`` bytes (Patarasuk & Yuan, 2009, section 3)."""
    return Fraction(2 * (ranks - 1) * size, ranks)
