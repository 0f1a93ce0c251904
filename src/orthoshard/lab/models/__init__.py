"""Real models by name, on torch's meta device: every parameter has its shape and takes no memory."""

from __future__ import annotations

from .described import Described, describe, known

__all__ = ["Described", "describe", "known"]
