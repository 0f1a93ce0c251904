"""Which form of a pass over full-size matrices runs: torch's, or another that stands in its place.

    @replaceable            def accumulate(...)         torch's form, and the name by which rules call it
    with replacing({"accumulate": other}): ...          other(...) runs within, in this thread

So neither rules nor the engine ask for the choice. Every other form has the signature of torch's less ``skip``, and
agrees with it to rounding. Where ``skip`` is given, torch's form runs whatever was chosen: only its kernels leave state
as it is by a flag on the device. May import the standard library alone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar, cast

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

PLAIN: dict[str, Callable[..., Any]] = {}
_others: ContextVar[Mapping[str, Callable[..., Any]] | None] = ContextVar("orthoshard_forms", default=None)


def replaceable(plain: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """``plain``, or what `replacing` has put in its place."""
    name = plain.__name__
    assert name not in PLAIN, name
    PLAIN[name] = plain

    names = list(signature(plain).parameters)
    place = names.index("skip") if "skip" in names else None
    assert place in (None, len(names) - 1), f"{name}: skip comes last, so that it can be left out"

    @wraps(plain)
    def chosen(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        other = (_others.get() or {}).get(name)
        if other is None:
            return plain(*args, **kwargs)
        skip = args[place] if place is not None and len(args) > place else kwargs.get("skip")
        if skip is not None:
            return plain(*args, **kwargs)
        rest = {key: value for key, value in kwargs.items() if key != "skip"}
        return cast("Result", other(*args[:place], **rest))

    return chosen


@contextmanager
def replacing(others: Mapping[str, Callable[..., Any]]) -> Generator[None]:
    """Within, these forms, by name, and torch's for all names that are not among them."""
    unknown = set(others) - set(PLAIN)
    assert not unknown, f"{unknown} are no passes of linalg"
    token = _others.set(others)
    try:
        yield
    finally:
        _others.reset(token)
