"""Each parameter of a model once, with its role, its view and the reason. May import torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .fused import view_of
from .roles import role_of
from .site import sites
from .spoken import listen


@dataclass(frozen=True)
class Claim:
    """What a parameter is in its model, and why we think so. ``view``: the matrices that a matrix rule sees in it."""

    name: str
    parameter: nn.Parameter
    role: str
    view: str
    reason: str


def claims(model: nn.Module) -> Iterator[Claim]:
    """Yield each parameter under its first name. Raises ValueError if other software has flattened a parameter."""
    spoken = listen(model)
    for site in sites(model):
        role, reason = role_of(site, spoken)
        view, why = view_of(site, role)
        yield Claim(site.name, site.parameter, role, view, why or reason)
