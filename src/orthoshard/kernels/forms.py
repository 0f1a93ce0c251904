"""The Triton forms of the passes, by the names that rules call: every function in these files that has the name of a
form of torch's. May import `linalg.forms` and this room."""

from __future__ import annotations

from ..linalg.forms import PLAIN
from . import add, ahead, copy, sweep

FORMS = {name: form for room in (add, ahead, copy, sweep) for name, form in vars(room).items() if name in PLAIN}
