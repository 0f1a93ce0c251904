"""Dion and its relatives as optax transformations, for parameters sharded in any way. Needs the extra `jax`.

    from orthoshard.jax import dion
    optimizer = dion(learning_rate=0.02, rank_fraction=1 / 4)      # in place of optax.adamw(...)

The rules are those of `orthoshard` for PyTorch; importing this imports no torch. `docs/frameworks.md` has the tour.

    axes          which axes of a parameter are its rows and columns; products of matrices in place
    scaled        a matrix as directions see it
    directions    dion, dion_tail, polar: one per file
    stages decay  what surrounds them, and how weights move
    orthonormal   orthonormal columns by Gram matrices
    placement     what the compiler is told about shardings; the only file that knows of them
    transform     a direction with its stages over a tree of parameters
    options       options as signatures declare them, checked
    rules optimizers          scale_by_...; the same with decay, a learning rate and AdamW for the rest
    torch_bridge  the initial Q of the torch library, and its state, both ways
"""

from .axes import DimensionNumbers
from .decay import add_cautious_decay, hyperball, update_floor
from .optimizers import dion, dion_tail, matrix_dimension_numbers, muon, normuon
from .placement import state_shardings
from .rules import scale_by_dion, scale_by_dion_tail, scale_by_muon, scale_by_normuon
from .transform import MatrixState, average_replicas

__all__ = [
    "DimensionNumbers",
    "MatrixState",
    "add_cautious_decay",
    "average_replicas",
    "dion",
    "dion_tail",
    "hyperball",
    "matrix_dimension_numbers",
    "muon",
    "normuon",
    "scale_by_dion",
    "scale_by_dion_tail",
    "scale_by_muon",
    "scale_by_normuon",
    "state_shardings",
    "update_floor",
]
