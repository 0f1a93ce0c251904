"""Reading values from a JSON file, with a function for each type. A value of another type raises `Damaged`.

May import the standard library.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

Table = dict[str, Any]


class Damaged(ValueError):
    """Something is wrong with a file. The message ends a sentence that begins with the name of the file."""


def load(path: Path) -> Table:
    """Return the JSON object in a file. Raises ``Damaged``, also for NaN and infinities, which are not JSON."""

    def refuse(name: str) -> NoReturn:
        raise Damaged(f"it holds {name}, which is no JSON number")

    try:
        found: object = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except OSError as error:
        raise Damaged(f"it cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise Damaged("it is not text") from error
    except RecursionError as error:
        raise Damaged("it is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise Damaged(f"it is not JSON, or was cut short: {error.msg} in line {error.lineno}") from error
    except Damaged:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise Damaged(f"it is not JSON that can be read: {error}") from error
    if not isinstance(found, dict):
        raise Damaged("it is JSON, but not an object")
    return cast("Table", found)


def at(values: Table, key: str) -> Any:
    if key not in values:
        raise Damaged(f"it has no {key!r}")
    return values[key]


def table(values: Table, key: str) -> Table:
    found = at(values, key)
    if not isinstance(found, dict):
        raise Damaged(f"{key!r} is not a table")
    return cast("Table", found)


def tables(values: Table, key: str) -> list[Table]:
    found = listed(values, key)
    if not all(isinstance(item, dict) for item in found):
        raise Damaged(f"{key!r} is not a list of tables")
    return cast("list[Table]", found)


def listed(values: Table, key: str) -> list[Any]:
    found = at(values, key)
    if not isinstance(found, list):
        raise Damaged(f"{key!r} is not a list")
    return cast("list[Any]", found)


def real(values: Table, key: str) -> float:
    found = maybe(values, key)
    if found is None:
        raise Damaged(f"{key!r} is not a number")
    return found


def maybe(values: Table, key: str) -> float | None:
    """Return a finite number, or None if it is null or missing. Raises ``Damaged``."""
    return as_number(values.get(key), key)


def as_number(found: object, key: str) -> float | None:
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise Damaged(f"{key!r} is not a number")
    try:
        value = float(found)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise Damaged(f"{key!r} is not finite")
    return value


def text(values: Table, key: str, default: str | None = None) -> str:
    return as_text(at(values, key) if default is None else values.get(key, default), key)


def as_text(found: object, key: str) -> str:
    if not isinstance(found, str | int | float):
        raise Damaged(f"{key!r} is not a text")
    return str(found)


def reals(values: Table, key: str) -> list[float]:
    found = [as_number(item, key) for item in listed(values, key)]
    if None in found:
        raise Damaged(f"{key!r} holds a null")
    return cast("list[float]", found)


def pairs(values: Table, key: str) -> list[tuple[float, float | None]]:
    """Return a list of pairs [number, number or null]. Raises ``Damaged``."""
    made: list[tuple[float, float | None]] = []
    for item in listed(values, key):
        pair: object = item
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(cast("Sequence[Any]", pair)) != 2:
            raise Damaged(f"{key!r} is not a list of pairs")
        first, second = cast("Sequence[object]", pair)
        x = as_number(first, key)
        if x is None:
            raise Damaged(f"{key!r} holds a null")
        made.append((x, as_number(second, key)))
    return made
