"""Options: declared in a function's signature, checked in one place. May import jax."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import wraps
from typing import Any, TypeVar, cast

import jax

Declared = TypeVar("Declared", bound=Callable[..., Any])
Options = Mapping[str, Any]
OTHER_WORDS = {"lr": "learning_rate", "wd": "weight_decay", "rank": "rank_fraction", "beta2": "row_moment"}


def hands_on(make: Callable[[Options], Any]) -> Callable[[Declared], Declared]:
    """Turn a declared signature into a function that calls ``make`` with all options by name, defaults filled in.

    Editors and `optax.inject_hyperparams` see the signature. The function raises TypeError for
    an option that is not in it.
    """

    def of(declared: Declared) -> Declared:
        signature = inspect.signature(declared)

        @wraps(declared)
        def call(*args: Any, **options: Any) -> Any:
            for key in options:
                if key not in signature.parameters:
                    raise TypeError(f"{declared.__name__} has no option {key!r}; {_hint(key, [*signature.parameters])}")
            given = signature.bind(*args, **options)
            given.apply_defaults()
            return make(given.arguments)

        return cast(Declared, call)

    return of


def one_of(key: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse a value that is not among the choices."""
    if value not in choices:
        raise ValueError(f"{key}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}")


def static(key: str, value: Any) -> None:
    """Refuse a JAX array for an option that decides shapes or the initial Q."""
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{key} decides shapes or the initial Q and cannot be a JAX array; under optax.inject_hyperparams name it: "
            f"inject_hyperparams(dion, static_args=({key!r},))"
        )


def fraction(key: str, value: Any, *, zero: bool = False, one: bool = False) -> None:
    """Refuse a number outside [0, 1]; ``zero`` and ``one`` say whether the ends are allowed. Injected and
    traced numbers are not read."""
    if isinstance(value, jax.Array):
        return
    if isinstance(value, bool) or not isinstance(value, int | float | Fraction):
        raise TypeError(f"{key}={value!r} must be a number, not {type(value).__name__}")
    if not ((value >= 0 if zero else value > 0) and (value <= 1 if one else value < 1)):
        raise ValueError(f"{key}={value!r} is outside {'[' if zero else '('}0, 1{']' if one else ')'}")


def _hint(key: str, known: list[str]) -> str:
    near = [OTHER_WORDS[key]] if OTHER_WORDS.get(key) in known else difflib.get_close_matches(key, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
