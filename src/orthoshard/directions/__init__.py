"""Directions: how a momentum becomes an update. One file each; `rules` names the rules that they are part of."""

from .dion import Dion
from .dion_tail import DionTail
from .direction import Direction
from .pair import Pair
from .polar import Polar
from .proposal import Proposal
from .request import Asks, OnWholeMatrices, Sum
from .rows import Rows
from .seen import Seen
from .select import Select

__all__ = [
    "Asks",
    "Dion",
    "DionTail",
    "Direction",
    "OnWholeMatrices",
    "Pair",
    "Polar",
    "Proposal",
    "Rows",
    "Seen",
    "Select",
    "Sum",
]
