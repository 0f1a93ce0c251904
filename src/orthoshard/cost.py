"""What is cheaper for a batch of matrices, and how many of them: asked of the dry run, for a rank at the origin of the
mesh, which has as much to do and to hold as any.

Every rank can ask this and gets the same answer. `FLOPS_PER_BYTE` turns bytes on the wire into flops of the same time.
May import `rules`, `layout`, `owners`, `parts` and `engine.dryrun`.
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

# Flops that a rank does in the time in which it sends a byte; only the order of magnitude matters.
# cpu: 100 GFLOP/s a process and 0.7 GB/s of gloo (measured: benchmarks/results/gpt2-small-2-processes.json).
# Others: half of an H100's 494 TFLOP/s in TF32, over one 400 Gb/s port a GPU (NVIDIA DGX H100 datasheet, 2023).
FLOPS_PER_BYTE = {"cpu": 150.0}
FLOPS_PER_BYTE_ELSEWHERE = 5000.0
# Temporaries of one update, on any rank. An update of several matrices has as many as hold this much; a way that takes
# more for one matrix is accepted, where it saves time, up to MOST_BYTES or twice what the leanest way takes.
UPDATE_BYTES = 2**29
MOST_BYTES = 35 * 10**8
# More than any direction holds for an entry of a matrix: where that is little, nobody has to ask.
BYTES_OF_ENTRY = 64
# What replicas do, and whether the direction is dealt.
Way = tuple[Replicas, bool]


@dataclass(frozen=True)
class Alike:
    """Matrices of one part under one rule. ``dtype``: of weights and gradients; ``device``: its kind."""

    rule: MatrixRule
    part: Part
    dtype: torch.dtype
    device: str

    def cheapest(self, ways: Sequence[Way]) -> Way:
        """The one of ``ways`` that takes least time, of those that fit."""
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
        """Bytes of temporaries of one update of so many matrices, on the rank that has most of them."""
        return self._dry(split_counts(matrices, self._owners(replicas), 0), replicas, dealt).peak

    def held_at_most(self, matrices: int, replicas: Replicas, dealt: bool) -> int:
        """`most_held`, or an upper bound where that is little: then nothing is run."""
        bound = matrices * prod(self.part.matrix) * BYTES_OF_ENTRY
        return bound if bound <= UPDATE_BYTES // 2 else self.most_held(matrices, replicas, dealt)

    def most_matrices(self, matrices: int, replicas: Replicas, dealt: bool) -> int:
        """How many of so many matrices one update may have, so that its temporaries stay within `UPDATE_BYTES`, or near
        those of one matrix: where owners take whole ones, the first of each costs, and not the first of all."""

        def held(count: int) -> int:
            return self.held_at_most(count, replicas, dealt)

        ranks = prod(axis.size for axis in self.part.axes)
        if ranks == 1 or matrices == 1 or held(matrices) <= UPDATE_BYTES:
            return matrices
        most = max(UPDATE_BYTES, held(1) * 5 // 4)
        while matrices > 1 and (now := held(matrices)) > most:
            matrices = max(1, min(matrices - 1, matrices * most // now))
            if matrices > ranks:  # dealt out without remainder
                matrices -= matrices % ranks
        return matrices

    def worth_averaging(self) -> bool:
        """Whether replicas with gradients of their own send less by exchanging factors than gradients, which is where
        (m + n) r < m n. By bytes alone: who trains in this way has slow links between replicas."""
        factors, even = self.typical("average", False)
        rest, _ = self.typical("repeat", False)
        origin = self.part.typical()
        size = origin.rows.local_length * origin.columns.local_length * self.dtype.itemsize * even
        gradients = sum((all_reduce_bytes(size, axis.size) for axis in self.part.unreduced_axes), Fraction(0))
        return factors.wire < rest.wire + gradients

    def typical(self, replicas: Replicas, dealt: bool) -> tuple[Dry, int]:
        """What as many matrices cost as are dealt out evenly, at the origin of the mesh; and their number."""
        even, owners = prod(axis.size for axis in self.part.axes), self._owners(replicas)
        return self._dry([even // owners] * owners, replicas, dealt), even

    def _owners(self, replicas: Replicas) -> int:
        """How many replicas share the state out."""
        return prod(axis.size for axis in self.part.replicas) if replicas == "own" else 1

    def _dry(self, shares: Sequence[int], replicas: Replicas, dealt: bool) -> Dry:
        """An update at the origin of the mesh. ``shares``: matrices at each owner, or at all."""
        part, several = self.part.typical(), tuple(shares) if len(shares) > 1 else ()
        return dry_update(self.rule, part, self.dtype, self.device, shares[0], 0, replicas, several, dealt)


def all_reduce_bytes(size: int, ranks: int) -> Fraction:
    """What a rank sends of a ring all-reduce of ``size`` bytes (Patarasuk & Yuan, 2009, section 3)."""
    return Fraction(2 * (ranks - 1) * size, ranks)
