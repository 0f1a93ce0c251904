"""The floor of a step: only its matrix products and one accumulation, in the same batches.

Dion, on the batch X = Wᵀ (b, n, m) as our Dion runs it by default, Q (b, m, r), P (b, n, r), R (b, m, r), M
(b, m, n):

    M += G                                  the accumulation
    P  = X Q    with X = Mᵀ                 2 m n r flops per matrix
    R  = Xᵀ P = M P                         2 m n r
    M -= R Pᵀ   accumulated in place        2 m n r
    W -= Q Pᵀ   accumulated in place        2 m n r

DionTail, likewise, with N in place of M and d one number per row. It has two more sweeps, for Nesterov's momentum and
the tail, and one product fewer:

    N  = M + G                              the accumulation
    P  = Nᵀ Q,  R = N P                     2 m n r each
    W -= R Pᵀ   accumulated in place        2 m n r
    W -= diag(d) N
    M  = N - G

Muon, with D = max(m, n), d = min(m, n), the products of our own iteration on X (b, d, D), in the dtype and rounds that
the rule uses on this device:

    M += G;  then the rounds of `orthoshard.linalg.polar`

M, Q, P and R are in the dtype of the state, W in its own. Orthonormalization, normalization, decay and bookkeeping are
left out: they are the difference between a step and its floor. All floors with one dtype of state share one W and one
M, because they never run at the same time. The products are torch's. Those of `linalg.products` may be faster, so a
step can take less time than its floor. May import torch and `orthoshard.linalg`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from orthoshard.linalg.polar import POLAR, Method, iteration, one_round, squares

# Products are accumulated with this factor. With 0 a BLAS could skip the product; with a factor this far below 1 the
# values do not change over the rounds.
SCALE = -1e-12
TABLE = POLAR["jordan"]  # only its number of steps is used

Shape = tuple[int, int]


class Buffers:
    """Weights and momenta of every batch, each one allocation: W and M (b, m, n), M also as b views.

    ``state`` is the dtype of M. None means the default of our rules: that of the weights, but at least float32.
    """

    def __init__(self, gradients: Sequence[Tensor], seed: int = 0, state: torch.dtype | None = None) -> None:
        device, dtype = gradients[0].device, gradients[0].dtype
        generator = torch.Generator(device).manual_seed(seed)
        grouped: dict[Shape, list[Tensor]] = {}
        for gradient in gradients:
            m, n = gradient.shape
            grouped.setdefault((m, n), []).append(gradient)
        self.generator = generator
        self.weights: dict[Shape, Tensor] = {}
        self.momenta: dict[Shape, Tensor] = {}
        self.gradients: list[Tensor] = []
        for (m, n), batch in grouped.items():
            weight = torch.empty(len(batch), m, n, device=device, dtype=dtype)
            self.weights[m, n] = weight.normal_(0, 0.02, generator=generator)
            self.momenta[m, n] = torch.stack(batch).to(state or torch.promote_types(dtype, torch.float32))
            self.gradients += batch
        self.momentum_views = [matrix for momentum in self.momenta.values() for matrix in momentum.unbind()]

    def accumulate(self) -> None:
        """Compute M += G for all matrices at once."""
        torch._foreach_add_(self.momentum_views, self.gradients)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage] the multi-tensor kernels have no public name

    def take_back(self) -> None:
        """Compute M -= G for all matrices at once."""
        torch._foreach_sub_(self.momentum_views, self.gradients)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage] as above


def view(flat: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the first elements of a flat buffer as a contiguous tensor of ``shape``."""
    return flat[: math.prod(shape)].view(tuple(shape))


def rank(m: int, n: int, fraction: float) -> int:
    """Return the rank of a Dion step: the fraction of the smaller side, rounded up, at least 1."""
    return max(1, min(min(m, n), math.ceil(fraction * min(m, n))))


class DionFloor:
    """The products of a Dion step at one rank fraction; ``step()`` runs them once."""

    PRODUCTS = 4  # of 2 m n r flops

    def __init__(self, buffers: Buffers, fraction: float) -> None:
        self.buffers = buffers
        self.right: dict[Shape, Tensor] = {}
        for (m, n), momentum in buffers.momenta.items():
            shape = (len(momentum), m, rank(m, n, fraction))
            Q = torch.empty(shape, device=momentum.device, dtype=momentum.dtype)
            # Unit columns, as in a step, so that P and R have entries of the momentum's size.
            self.right[m, n] = Q.normal_(0, m**-0.5, generator=buffers.generator)
        self.weight_right = {shape: Q.to(buffers.weights[shape].dtype) for shape, Q in self.right.items()}
        # Allocated once: allocating temporaries is not part of the floor.
        sample = next(iter(buffers.momenta.values()))
        self.P = sample.new_empty(max(Q.shape[0] * n * Q.shape[2] for (_, n), Q in self.right.items()))
        self.R = sample.new_empty(max(Q.numel() for Q in self.right.values()))

    def step(self) -> None:
        self.buffers.accumulate()
        for shape, Q in self.right.items():
            M, W = self.buffers.momenta[shape], self.buffers.weights[shape]
            b, _, r = Q.shape
            P = torch.bmm(M.mT, Q, out=view(self.P, (b, shape[1], r)))
            R = torch.bmm(M, P, out=view(self.R, Q.shape))
            self._spread(shape, M, W, P, R)

    def _spread(self, shape: Shape, M: Tensor, W: Tensor, P: Tensor, R: Tensor) -> None:
        M.baddbmm_(R, P.mT, alpha=SCALE)
        W.baddbmm_(self.weight_right[shape], P.to(W.dtype).mT, alpha=SCALE)

    def flops(self) -> int:
        """Return the flops of a step, from the shapes: 2 m n r per product."""
        return sum(2 * self.PRODUCTS * Q.shape[0] * m * n * Q.shape[2] for (m, n), Q in self.right.items())


class DionTailFloor(DionFloor):
    """The products and the sweeps of a DionTail step at one rank fraction."""

    PRODUCTS = 3

    def __init__(self, buffers: Buffers, fraction: float) -> None:
        super().__init__(buffers, fraction)
        self.rows = {shape: W.new_full((len(W), shape[0], 1), SCALE) for shape, W in buffers.weights.items()}

    def step(self) -> None:
        super().step()
        self.buffers.take_back()

    def _spread(self, shape: Shape, M: Tensor, W: Tensor, P: Tensor, R: Tensor) -> None:
        W.baddbmm_(R.to(W.dtype), P.to(W.dtype).mT, alpha=SCALE)
        W.addcmul_(self.rows[shape], M.to(W.dtype))


class MuonFloor:
    """The products of Muon's polar factor by one of its methods; ``step()`` runs them once."""

    def __init__(self, buffers: Buffers, method: Method = "auto") -> None:
        self.buffers = buffers
        self.device = next(iter(buffers.momenta.values())).device
        self.chosen = {
            shape: iteration(method, TABLE, shape, self.device.type, momentum.dtype)
            for shape, momentum in buffers.momenta.items()
        }
        large = small = count = 0
        for shape, momentum in buffers.momenta.items():
            item = self.chosen[shape].dtype.itemsize
            large = max(large, item * momentum.numel())
            small = max(small, item * len(momentum) * min(shape) ** 2)
            count = max(count, squares(self.chosen[shape].rounds))
        self.X = [self._bytes(large) for _ in range(2)]
        self.squares = [self._bytes(small) for _ in range(count)]

    def _bytes(self, size: int) -> Tensor:
        return torch.empty(-(-size // 8) * 8, dtype=torch.uint8, device=self.device)

    def step(self) -> None:
        self.buffers.accumulate()
        for shape, momentum in self.buffers.momenta.items():
            d, chosen = min(shape), self.chosen[shape]
            x = (momentum.mT if shape[0] > shape[1] else momentum).to(chosen.dtype)
            square = [view(flat.view(chosen.dtype), (len(x), d, d)) for flat in self.squares]
            for number, k in enumerate(chosen.rounds):
                out = view(self.X[number % 2].view(chosen.dtype), x.shape)
                x = one_round(x, [(1.0, SCALE, SCALE)] * k, square, out)

    def flops(self) -> int:
        """Return the flops of all matrices, from the shapes."""
        return sum(
            len(momentum) * int(self.chosen[shape].flops(shape, self.device.type))
            for shape, momentum in self.buffers.momenta.items()
        )
