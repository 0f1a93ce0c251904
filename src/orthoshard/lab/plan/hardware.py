"""Machines: by name, from a TOML file with the same keys, or this machine as measured.

May import tomllib, torch (by `measure`) and ``orthoshard``.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from orthoshard.lab.plan.estimate import Machine

DTYPES = ("bfloat16", "tf32", "float32")
NUMBERS = (*DTYPES, "memory", "capacity", "intra", "inter")
USES = ("polar", "factors", "model")
SHARES = ("products", "memory", "links")
QUARTER, SIXTEENTH = 1 / 4, 1 / 16


@dataclass(frozen=True)
class Hardware:
    """A machine with its name and source.

    Args:
        words: assumptions, one sentence each.
        thin: if measured, FLOP/s of Dion's products at rank 1/16 (`Machine.factors` is the rate at 1/4).
        links: if measured, pairs (bytes that a rank sends in one collective, seconds that the collective costs ranks
            that compute before and after it), in ascending order.
    """

    name: str
    about: str
    source: str
    machine: Machine
    words: tuple[str, ...]
    thin: float | None = None
    links: tuple[tuple[float, float], ...] = ()

    def at(self, rank: float, messages: Sequence[float] = ()) -> Machine:
        """Return the machine with its rates for a row of this rank fraction and these bytes in each collective.

        If the machine was measured, the rate of products is interpolated between the two measured ranks, in logarithms.
        The rate of links is that of all collectives together; the time of each is interpolated between measured sizes.
        """
        machine = self.machine
        if self.thin is not None:
            share = min(max(math.log(QUARTER / rank) / math.log(QUARTER / SIXTEENTH), 0.0), 1.0)
            machine = replace(machine, factors=machine.factors ** (1 - share) * self.thin**share)
        seconds = sum(_between(self.links, size) for size in messages) if self.links else 0.0
        if seconds > 0:
            rate = sum(messages) / seconds
            machine = replace(machine, intra=rate, inter=rate)
        return machine


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    """Return y at x, interpolated linearly. Before the first point it is constant, after the last proportional to x."""
    sizes = [size for size, _ in points]
    after = bisect(sizes, x)
    if after == 0:
        return points[0][1]
    if after == len(points):
        return points[-1][1] * x / sizes[-1]
    (x0, y0), (x1, y1) = points[after - 1 : after + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def catalogue() -> dict[str, dict[str, Any]]:
    return tomllib.loads(files("orthoshard.lab.plan").joinpath("hardware.toml").read_text(encoding="utf-8"))


def find(name: str, per_node: int | None = None) -> Hardware:
    """Return the machine of that name, or of a TOML file: ``machines.toml``, with ``:name`` if it has several.

    Raises ValueError for an unknown name, or a file that lacks figures.
    """
    tables, chosen, where = catalogue(), name, "the catalogue"
    path, colon, entry = name.partition(".toml:")
    if name.endswith(".toml") or colon:
        where = path + ".toml" if colon else name
        tables, chosen = _file(Path(where)), entry
        if not chosen and len(tables) != 1:
            raise ValueError(
                f"{where} has {len(tables)} machines; name one, such as {where}:{next(iter(tables), 'h100')}"
            )
        chosen = chosen or next(iter(tables))
    if chosen not in tables:
        near = difflib.get_close_matches(chosen, tables, n=1, cutoff=0.0)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(
            f"there is no hardware {chosen!r} in {where}{hint} Known: {', '.join(tables)}; or `measure`, or a TOML "
            f"file with the same keys"
        )
    return read(chosen, tables[chosen], where, per_node)


def _file(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = tomllib.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML ({error}); see hardware.toml beside the planner") from None
    return {name: cast("dict[str, Any]", table) for name, table in found.items() if isinstance(table, dict)}


def read(name: str, table: dict[str, Any], where: str, per_node: int | None = None) -> Hardware:
    """Check a table and return its machine. Raises ValueError."""

    def positive(values: dict[str, Any], key: str) -> float:
        value = values.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (value > 0 and math.isfinite(value)):
            raise ValueError(f"[{name}] in {where}: {key} is {value!r}; give a number above 0, such as {key} = 5e10")
        return float(value)

    number = {key: positive(table, key) for key in NUMBERS}
    shares = table.get("achieved", {})
    share = {key: positive(shares if isinstance(shares, dict) else {}, key) for key in SHARES}
    for key, value in share.items():
        if value > 1:
            raise ValueError(f"[{name}] in {where}: achieved {key} is {value}; give a share of at most 1")
    ranks = table.get("per_node") if per_node is None else per_node
    if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
        raise ValueError(f"[{name}] in {where}: per_node is {ranks!r}; give the number of devices per node, such as 8")
    for use in USES:
        if table.get(use) not in DTYPES:
            raise ValueError(f"[{name}] in {where}: {use} is {table.get(use)!r}; choose one of {', '.join(DTYPES)}")
    machine = Machine(
        polar=number[table["polar"]] * share["products"],
        factors=number[table["factors"]] * share["products"],
        memory=number["memory"] * share["memory"],
        intra=number["intra"] * share["links"],
        inter=number["inter"] * share["links"],
        per_node=ranks,
        peak=number[table["model"]],
        capacity=number["capacity"],
    )
    words = (
        f"On {table.get('about', name)}, products reach {share['products']:g} of the datasheet's FLOP/s, passes "
        f"{share['memory']:g} of its memory bandwidth, and collectives {share['links']:g} of its links' bandwidth "
        f"({table.get('source', 'no source given')}).",
        f"Muon iterates in {table['polar']}. Dion's and DionTail's products run in {table['factors']}, with state in "
        f"float32. With another precision their time changes as the FLOP/s do.",
        "The time of a collective is its bytes over the bandwidth of its link. Waiting for other ranks counts as 0 s, "
        "since no datasheet gives it. `--hardware measure` times it.",
    )
    return Hardware(name, str(table.get("about", name)), str(table.get("source", "")), machine, words)
