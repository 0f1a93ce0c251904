"""Which form of a pass over full-size matrices runs: torch's, or another in its place.

    @replaceable            def accumulate(...)         torch's form, and the name by which rules call it
    with replacing({"accumulate": other}): ...          other(...) runs inside, in this thread

So neither rules nor the engine know of the choice. Every other form has the signature of torch's and agrees with it to
rounding. May import the standard library alone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

PLAIN: dict[str, Callable[..., Any]] = {}
_others: ContextVar[Mapping[str, Callable[..., Any]] | None] = ContextVar("orthoshard_forms", default=None)


def replaceable(plain: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Return a function that calls ``plain``, or what `replacing` has put in its place."""
    name = plain.__name__
    assert name not in PLAIN, name
    PLAIN[name] = plain

    @wraps(plain)
    def chosen(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return cast("Result", (_others.get() or {}).get(name, plain)(*args, **kwargs))

    return chosen


@contextmanager
def replacing(others: Mapping[str, Callable[..., Any]]) -> Generator[None]:
    """Use these forms, by name, inside the context, and torch's for all other names."""
    unknown = set(others) - set(PLAIN)
    assert not unknown, f"{unknown} are no passes of linalg"
    token = _others.set(others)
    try:
        yield
    finally:
        _others.reset(token)
