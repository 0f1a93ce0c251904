"""Which form of a pass over full-size matrices runs: torch's, or another that was put in its place.

    @replaceable            def accumulate(...)         torch's form, and the name by which rules call it
    replace({"accumulate": other})                      other(...) runs from now on, in this process
    replace({})                                         torch's form again

The choice is one table for the whole process, so that neither rules nor the engine ask for it. Every other form has the
signature of torch's less ``skip``, and agrees with it to rounding. Where ``skip`` is given, torch's form runs whatever
was chosen: only its kernels leave state as it is by a flag on the device. May import the standard library alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar, cast

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

PLAIN: dict[str, Callable[..., Any]] = {}
_others: dict[str, Callable[..., Any]] = {}


def replaceable(plain: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """``plain``, or what `replace` has put in its place."""
    name = plain.__name__
    assert name not in PLAIN, name
    PLAIN[name] = plain

    names = list(signature(plain).parameters)
    place = names.index("skip") if "skip" in names else None
    assert place in (None, len(names) - 1), f"{name}: skip comes last, so that it can be left out"

    @wraps(plain)
    def chosen(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if name not in _others:
            return plain(*args, **kwargs)
        skip = args[place] if place is not None and len(args) > place else kwargs.get("skip")
        if skip is not None:
            return plain(*args, **kwargs)
        rest = {key: value for key, value in kwargs.items() if key != "skip"}
        return cast("Result", _others[name](*args[:place], **rest))

    return chosen


def replace(others: Mapping[str, Callable[..., Any]]) -> None:
    """These forms from now on, by name, and torch's for all names that are not among them."""
    unknown = set(others) - set(PLAIN)
    assert not unknown, f"{unknown} are no passes of linalg"
    _others.clear()
    _others.update(others)
