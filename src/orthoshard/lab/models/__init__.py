"""Real models by name, on torch's meta device: every parameter with its shape, and no memory for any."""

from __future__ import annotations

from .described import Described, describe, known

__all__ = ["Described", "describe", "known"]
