"""Comparing two results of the bench. Each contestant is compared with a reference in the same file.

    change = (new contestant / new reference) / (old contestant / old reference)

of medians, and of minima, which a disturbed machine changes less. The reference is the contestant's own floor, else its
rival's floor, else the first yardstick that both files timed. So whatever slowed down all rows of a file cancels. Two
files fit each other if the same work was timed in the same way. A file of another machine fits too; the differences are
then listed. May import rich and ``orthoshard.lab.bench``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from orthoshard.lab.bench.tables import YARDSTICKS
from orthoshard.lab.tables import Column, screen

# If these differ, a ratio of ratios means nothing.
MUST_FIT = ("device", "dtype", "threads", "spectrum", "matmul_precision")
# If these differ, the reader is told.
WORTH_SAYING = ("cpu", "cores", "gpu", "torch", "python")


@dataclass(frozen=True, slots=True)
class Row:
    """One contestant in both files. The row of a reference has no ``reference``; its ``change`` is the machine's."""

    name: str
    reference: str | None
    old_ms: float
    new_ms: float
    old: float
    new: float
    change: float
    change_of_minima: float


def read_result(path: Path) -> dict[str, Any]:
    """Return the contents of a file that the bench wrote in its default mode. Raises ValueError for any other file."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise ValueError(f"--compare {path} cannot be read ({why}): give a JSON file of an earlier bench.") from None
    except ValueError:
        raise ValueError(f"--compare {path} is not JSON: give a file that an earlier bench wrote.") from None
    rows = result.get("contestants") if isinstance(result, dict) else None
    if not isinstance(rows, dict) or not all("ratios_of_medians" in row for row in rows.values()):
        raise ValueError(f"--compare {path} does not compare contestants: give a file of a bench without other modes.")
    return result


def check_fit(old: Mapping[str, Any], new: Mapping[str, Any], old_name: str, new_name: str) -> None:
    """Check that both files timed the same work in the same way. Raises ValueError, which lists every difference.

    ``new`` may also be the head of a run that has not begun.
    """
    wrong = [f"{key} {old.get(key)} against {new.get(key)}" for key in MUST_FIT if old.get(key) != new.get(key)]
    if old["model"]["batches"] != new["model"]["batches"]:
        wrong.insert(0, f"matrices of {old['model']['name']} against {new['model']['name']}")
    if wrong:
        raise ValueError(
            f"{old_name} does not fit {new_name}: {'; '.join(wrong)}. Steps of different work cannot be compared: run "
            f"the bench again with the flags of the other file, which holds its command."
        )


def rows_of(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Row]:
    """Return a row for each contestant in both files, in the order of the new file. Raises ValueError if none is."""
    before, after = old["contestants"], new["contestants"]
    found: list[Row] = []
    for name in after:
        if name not in before:
            continue
        reference = _reference(name, before, after)
        against = reference or name

        def share(rows: Mapping[str, Any], key: str, name: str = name, against: str = against) -> float:
            return rows[name][key] / rows[against][key]

        if reference is None:
            medians, minima = (after[name][key] / before[name][key] for key in ("median_ms", "min_ms"))
        else:
            medians, minima = (share(after, key) / share(before, key) for key in ("median_ms", "min_ms"))
        times = before[name]["median_ms"], after[name]["median_ms"]
        ratios = share(before, "median_ms"), share(after, "median_ms")
        found.append(Row(name, reference, *times, *ratios, medians, minima))
    if not found:
        raise ValueError(
            f"The two files have no contestant in common: {', '.join(before)} against {', '.join(after)}. Name the "
            f"same ones with --only."
        )
    return found


def _reference(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """Return the reference of a contestant, which both files have, or None for floors and the first yardstick."""
    if after[name]["flops"]:  # a floor
        return None
    rival = after.get(after[name]["rival"], {})
    for floor in (after[name]["floor"], rival.get("floor")):
        if floor in before and floor in after:
            return floor
    order = YARDSTICKS[: YARDSTICKS.index(name)] if name in YARDSTICKS else YARDSTICKS
    return next((other for other in order if other in before and other in after), None)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Return a sentence that lists the other differences between the two files, or None."""
    said = [f"{key} {old.get(key)}, then {new.get(key)}" for key in WORTH_SAYING if old.get(key) != new.get(key)]
    return f"The files also differ in {'; '.join(said)}: read only the last columns." if said else None


COLUMNS = (
    Column("", "name", words=True),
    Column("over", "reference", none="itself", words=True),
    Column("old ms", "old_ms", "{:.4g}".format),
    Column("new ms", "new_ms", "{:.4g}".format),
    Column("old ratio", "old", cell=lambda row: f"{row.old:.2f}" if row.reference else ""),
    Column("new ratio", "new", cell=lambda row: f"{row.new:.2f}" if row.reference else ""),
    Column("change", "change", "{:.2f}".format),
    Column("of minima", "change_of_minima", "{:.2f}".format),
)


def table(rows: list[Row], title: str) -> Table:
    caption = "change: new ratio / old ratio; for a reference itself, new time / old time, the change of the machine"
    return screen(COLUMNS, rows, title=title, caption=caption, style=lambda row: None if row.reference else "dim")
