"""What each parameter of a model is: its name, role, view, and the reason.

site       where a parameter sits, and what the modules around it and their configurations tell
spoken     which modules the model itself declares as its input embeddings and output layers
roles      the role, by module type and the model's declarations, then by name, then by shape
fused      the blocks of parameters that hold several matrices
claims     each parameter once
pairs      the two factors of one matrix
overrides  settings of the user by pattern of names, which take precedence
"""

from __future__ import annotations

from .claims import Claim, claims
from .overrides import Override, read_overrides
from .pairs import partner_of
from .site import refuse_pieces

__all__ = ["Claim", "Override", "claims", "partner_of", "read_overrides", "refuse_pieces"]
