"""What each parameter of a model is: its name, role, view, and the reason.

site       where a parameter sits, and what the modules around it say of themselves
spoken     what the model itself calls its input embeddings and output layers
roles      module type and the model's own word first, then names, then shape
fused      several matrices in one parameter: which blocks
claims     each trainable parameter once
pairs      factors of one matrix
overrides  the user's word over all of it, by pattern
"""

from __future__ import annotations

from .claims import Claim, claims
from .overrides import Override, read_overrides
from .pairs import partner_of
from .site import refuse_pieces

__all__ = ["Claim", "Override", "claims", "partner_of", "read_overrides", "refuse_pieces"]
