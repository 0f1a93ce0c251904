"""Directions: what an update is made of, one per file. Each sees a `Scaled` matrix and returns a `Proposal`."""

from .dion import Dion
from .dion_tail import DionTail
from .polar import Polar

__all__ = ["Dion", "DionTail", "Polar"]
