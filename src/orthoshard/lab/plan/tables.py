"""The tables of a plan and of its check, for a terminal and the page of a report. Rows are those of `Line.plain`.

May import ``orthoshard.lab.tables``.
"""

from __future__ import annotations

from typing import Any

from orthoshard.lab.bench.files import size
from orthoshard.lab.bench.tables import milliseconds
from orthoshard.lab.tables import Column

NO_ROOM = "‡ does not fit into memory."


def seconds(value: float) -> str:
    """Return a time as text, in s, ms or µs."""
    if not value:
        return "0"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"


def _name(row: dict[str, Any]) -> str:
    return f"{row['name']}{'' if row.get('fits', True) else ' ‡'}"


NAME = Column("optimizer", "name", cell=_name, short="", words=True)
AMOUNTS = (
    NAME,
    Column("state", "state", size),
    Column("temporaries", "temporaries", size),
    Column("TFLOP", "flops", lambda flops: f"{flops / 1e12:.3g}"),
    Column("memory traffic", "traffic", size),
    Column("inside the node", "sent_by_link.intra", size, short="in node"),
    Column("between nodes", "sent_by_link.inter", size, short="between"),
    Column("gradients", "averaged", size),
)
TIMES = (
    NAME,
    Column("optimizer step", "seconds.optimizer", seconds, short="optimizer"),
    Column("mean of all ranks", "mean_seconds.optimizer", seconds, short="mean of\nranks"),
    Column("products", "seconds.products", seconds),
    Column("passes", "seconds.passes", seconds),
    Column("inside the node", "seconds.intra", seconds, short="in node"),
    Column("between nodes", "seconds.inter", seconds, short="between"),
    Column("gradients averaged", "seconds.sync", seconds, short="gradients"),
    Column("added to a step", "overhead", lambda share: f"{100 * share:.3g} %", short="overhead"),
    Column("days", "days", "{:,.4g}".format),
)
COST = Column("cost", "cost", "{:,.0f}".format)
CHECK = (
    Column("optimizer", "optimizer", short="", words=True),
    Column("processes", "processes", "{:.0f}".format),
    Column("predicted, ms", "predicted_ms", milliseconds),
    Column("of products", "parts_ms.products", milliseconds, ""),
    Column("passes", "parts_ms.passes", milliseconds, ""),
    Column("wire", "parts_ms.wire", milliseconds, ""),
    Column("measured, ms", "measured_ms", milliseconds),
    Column("predicted / measured", "ratio", "{:.2f}".format),
    Column("within the band", "within", lambda within: "yes" if within else "no", words=True),
)


def times(priced: bool) -> tuple[Column, ...]:
    """Return the columns of times, with the cost if ``priced``."""
    return (*TIMES, COST) if priced else TIMES
