"""What every direction is: frozen options, the state it keeps beside the momentum, and one proposal.

A direction knows matrices as batches (b, m, n) and never how they are sharded. It writes nothing, and knows nothing of
skipped steps, rounding, replicas, owners and diagnostics. May import torch, `linalg`, `slots`, `checks` and this room.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import Options, Scalar
from ..linalg.products import Precision
from ..slots import Slot
from .proposal import Proposal
from .request import Asks
from .seen import Seen


@dataclass(frozen=True)
class Direction(Options, ABC):
    """Makes U (`Proposal`) from X, what a direction sees (`Seen`). Its fields are its options, and their names are keys
    of groups. A subclass needs only `propose`, and overrides these defaults if they do not hold for it:

    linear     whether U depends on X only through tall products, whose `Sum` and `OnWholeMatrices` are marked
               ``linear_in_gradient``; replicas may then exchange thin factors in place of gradients
    withholds  whether it reports what it applied (`Proposal.captured` or `Proposal.selected`), as error feedback needs
    full       whether U is a full matrix that takes products of whole matrices, as Muon's: for the cost model
    dealable   whether it may also run on whole matrices at their owners: False if it requests whole matrices itself
    paired     whether it updates factors, each of which needs its partner's Gram matrix. It then runs on whole
               matrices, and takes no stages, because these apply to the matrix and not to a factor of it
    """

    linear: ClassVar[bool] = False
    withholds: ClassVar[bool] = False
    full: ClassVar[bool] = False
    dealable: ClassVar[bool] = True
    paired: ClassVar[bool] = False

    def slots(self, shape: tuple[int, ...], kept: torch.dtype) -> dict[str, Slot]:
        """Return the state kept beside the momentum of an (m, n) matrix. ``kept``: the dtype of the momentum."""
        return {}

    @property
    def precision(self) -> Precision | None:
        """Precision of products of full-size matrices with thin ones."""
        return None

    def size(self, shape: tuple[int, ...]) -> float:
        """Return the direction's own factor of the learning rate, for an (m, n) matrix."""
        return 1.0

    def split(self, rate: Scalar, decay: Scalar) -> tuple[Scalar, Scalar]:
        """Return the rate and decay of this matrix. A factor of a pair gets its share of those given."""
        return rate, decay

    @abstractmethod
    def propose(self, seen: Seen, state: dict[str, Tensor], shape: tuple[int, ...]) -> Asks | Proposal:
        """Return a `Proposal` for a batch, as a generator that yields `Sum` and `OnWholeMatrices` if it needs more
        than this rank's piece. It writes nothing. ``state``: local pieces of its slots. ``shape``: (m, n) of the whole
        matrices."""
