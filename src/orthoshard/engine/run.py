"""Drives the updates of a step: advances each generator and answers its requests.

In one process every matrix is whole, so a sum is finished as it stands and a function of whole matrices is applied
on the spot. May import torch and `rules`.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ..rules.request import Request, Sum, Update


def run(updates: Iterable[Update]) -> None:
    """Bring every update to its end, in order."""
    for update in updates:
        answer: Tensor | None = None
        while True:
            try:
                request = next(update) if answer is None else update.send(answer)
            except StopIteration:
                break
            answer = answer_here(request)


def answer_here(request: Request) -> Tensor:
    """The answer where nothing is cut."""
    return request.x if isinstance(request, Sum) else request.f(request.x)
