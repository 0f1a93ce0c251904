"""The floor of a step: its own matrix products and one accumulation, batched alike, and nothing else.

Dion, on the batch X = Wᵀ (b, n, m) as our Dion runs it by default, Q (b, m, r), P (b, n, r), R (b, m, r), M
(b, m, n):

    M += G                                  the accumulation
    P  = X Q    with X = Mᵀ                 2 m n r flops a matrix
    R  = Xᵀ P = M P                         2 m n r
    M -= R Pᵀ   accumulated in place        2 m n r
    W -= Q Pᵀ   accumulated in place        2 m n r

Muon, on D = max(m, n), d = min(m, n), ``steps`` Newton-Schulz steps on X (b, d, D) in ``polar_dtype``:

    M += G;  then each step  A = X Xᵀ (2 D d²),  B = b A + c A A (2 d³),  X = a X + B X (2 D d²)

M, Q, P and R are in the dtype of the state, W in its own. Orthonormalization, normalization, decay and the rule's
bookkeeping are left out: what a step takes above its floor is what it pays for them. All floors of one state dtype
share one W and one M, for they never run at once. The products are torch's; `floor-own-dion-R` takes the two thin ones
from `linalg.products`, whose kernels may be faster: a step can then cost less than the plain floor. May import torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# The results of the products must be accumulated, since a scale of 0 lets a BLAS skip the product, but must
# not grow over the rounds: this far below 1 the values that come in stay what they are.
SCALE = -1e-12

Shape = tuple[int, int]
Product = Callable[[Tensor, Tensor], Tensor]


class Buffers:
    """Weights and momenta of every batch, each one allocation: W and M (b, m, n), M also as b views. ``state`` is the
    dtype of M; None: what our rules take where nothing is said, float32 where the weights are narrower."""

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
        """M += G, over all matrices at once."""
        torch._foreach_add_(self.momentum_views, self.gradients)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage] the multi-tensor kernels have no public name


def view(flat: Tensor, shape: Sequence[int]) -> Tensor:
    """The first elements of a flat buffer, as a contiguous tensor of that shape."""
    return flat[: math.prod(shape)].view(tuple(shape))


def rank(m: int, n: int, fraction: float) -> int:
    """The rank of a Dion step: the fraction of the smaller side, rounded up, at least 1."""
    return max(1, min(min(m, n), math.ceil(fraction * min(m, n))))


class DionFloor:
    """The products of a Dion step at one rank fraction; ``step()`` runs them once. ``product``: what makes the two thin
    ones, in place of torch's bmm into one buffer."""

    def __init__(self, buffers: Buffers, fraction: float, product: Product | None = None) -> None:
        self.buffers = buffers
        self.product = product
        self.right: dict[Shape, Tensor] = {}
        for (m, n), momentum in buffers.momenta.items():
            shape = (len(momentum), m, rank(m, n, fraction))
            Q = torch.empty(shape, device=momentum.device, dtype=momentum.dtype)
            # Unit columns, as in a step: the sizes of P and R then stay those of the momentum.
            self.right[m, n] = Q.normal_(0, m**-0.5, generator=buffers.generator)
        self.weight_right = {shape: Q.to(buffers.weights[shape].dtype) for shape, Q in self.right.items()}
        # Made once: the memory of a temporary is not the products' own cost.
        sample = next(iter(buffers.momenta.values()))
        self.P = sample.new_empty(max(Q.shape[0] * n * Q.shape[2] for (_, n), Q in self.right.items()))
        self.R = sample.new_empty(max(Q.numel() for Q in self.right.values()))

    def step(self) -> None:
        self.buffers.accumulate()
        for shape, Q in self.right.items():
            M, W = self.buffers.momenta[shape], self.buffers.weights[shape]
            b, _, r = Q.shape
            P = self._thin(M.mT, Q, view(self.P, (b, shape[1], r)))
            R = self._thin(M, P, view(self.R, Q.shape))
            M.baddbmm_(R, P.mT, alpha=SCALE)
            W.baddbmm_(self.weight_right[shape], P.to(W.dtype).mT, alpha=SCALE)

    def _thin(self, A: Tensor, B: Tensor, out: Tensor) -> Tensor:
        return self.product(A, B) if self.product else torch.bmm(A, B, out=out)

    def flops(self) -> int:
        """8 m n r a matrix, from the shapes."""
        return sum(8 * Q.shape[0] * m * n * Q.shape[2] for (m, n), Q in self.right.items())


class MuonFloor:
    """The products of Muon's Newton-Schulz iteration; ``step()`` runs them once."""

    def __init__(self, buffers: Buffers, polar_dtype: torch.dtype, steps: int = 5) -> None:
        self.buffers = buffers
        self.steps = steps
        sample = next(iter(buffers.momenta.values()))
        large = max(momentum.numel() for momentum in buffers.momenta.values())
        small = max(len(momentum) * min(m, n) ** 2 for (m, n), momentum in buffers.momenta.items())
        self.X = [sample.new_empty(large, dtype=polar_dtype) for _ in range(2)]
        self.A, self.B = (sample.new_empty(small, dtype=polar_dtype) for _ in range(2))

    def step(self) -> None:
        self.buffers.accumulate()
        for (m, n), momentum in self.buffers.momenta.items():
            d = min(m, n)
            x = (momentum.mT if m > n else momentum).to(self.A.dtype)
            A, B = (view(flat, (len(x), d, d)) for flat in (self.A, self.B))
            for k in range(self.steps):
                torch.bmm(x, x.mT, out=A)
                torch.baddbmm(A, A, A, alpha=SCALE, out=B)
                x = torch.baddbmm(x, B, x, alpha=SCALE, out=view(self.X[k % 2], x.shape))

    def flops(self) -> int:
        """20 D d² + 10 d³ a matrix at five steps, from the shapes."""
        total = 0
        for (m, n), momentum in self.buffers.momenta.items():
            d, D = min(m, n), max(m, n)
            total += len(momentum) * self.steps * (4 * D * d * d + 2 * d**3)
        return total
