"""Results of bench as tables: the columns of each mode, for a terminal and for the page of a report.

Rows are the contestants in the JSON file, each with its name. The caller checks rows that come from a file. May import
rich and ``orthoshard.lab.tables``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table

from orthoshard.lab.bench.files import size
from orthoshard.lab.tables import Column, screen

YARDSTICKS = ("adamw-fused", "torch-muon", "muon")
SHORT = {"adamw-fused": "AdamW", "torch-muon": "torch\nMuon", "muon": "ours"}


def milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _seconds(value: float) -> str:
    return f"{value / 1e3:.3f}"


RATIO = "{:.2f}".format
NAME = Column("optimizer", "name", short="", words=True)
SHARDED = (
    NAME,
    Column("one process, ms", "one_process_ms", milliseconds, short="one process"),
    Column("cut, ms", "sharded_ms", milliseconds, short="sharded"),
    Column("collectives alone, ms", "collectives_ms", milliseconds, short="collectives"),
    Column("cut / (one process + collectives)", "ratio", RATIO, short="ratio"),
    Column("sent by a rank", "bytes", size),
)
OWNERS = (
    NAME,
    Column("all state, ms", "none.ms", milliseconds, short="step, ms"),
    Column("owners, ms", "zero1.ms", milliseconds, short="owners"),
    Column("all state, sent by a replica", "none.bytes", size, short="sent"),
    Column("owners, sent by a replica", "zero1.bytes", size, short="owners"),
    Column("all state, state", "none.state", size, short="state"),
    Column("owners, state", "zero1.state", size, short="owners"),
    Column("owners / all", "ratio", RATIO, short="ratio"),
    Column("weights apart", "difference", "{:.1e}".format, "", short="apart"),
)
LINK = (
    Column("optimizer and what is sent", "name", short="", words=True),
    Column("Mbit/s", "mbit", "{:g}".format),
    Column("sent by a replica", "bytes", size),
    Column("predicted, s", "predicted_ms", _seconds),
    Column("measured, s", "measured_ms", _seconds),
    Column("predicted / measured", "ratio", RATIO, short="ratio"),
    Column("gradients / this", "gain", "{:.1f}".format, ""),
    Column("bound by", "bound_by", words=True),
)
BOUND_BY = "Bound by transport: moving the data took this machine longer than the link would."


def named(contestants: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a table: each contestant with its name."""
    return [{"name": name, **row} for name, row in contestants.items()]


def steps(rows: Iterable[Mapping[str, Any]]) -> list[Column]:
    """Return the columns of the default mode, with a column for everything that any row has a ratio to."""
    against = dict.fromkeys(key for row in rows for key in row["ratios_of_medians"])
    return [
        NAME,
        Column("median, ms", "median_ms", milliseconds, short="median\nms"),
        Column("shortest, ms", "min_ms", milliseconds, short="min"),
        Column("longest, ms", "max_ms", milliseconds, short="max"),
        *(
            Column(f"over {key}", f"ratios_of_medians.{key}", RATIO, "", short=f"over\n{SHORT.get(key, key)}")
            for key in against
        ),
        Column("first step / later", "first_over_median", RATIO, "", short="first\n/ later"),
        Column("state", "state_bytes", size, ""),
        Column("peak / weights", "peak_over_weights", "{:.3f}".format, "", short="peak /\nweights"),
    ]


def steps_table(result: Mapping[str, Any]) -> Table:
    """Return a table with a row for each contestant; floors are dim."""
    title = f"one optimizer step, {result['model']['name']}, {result['dtype']}, {result['device']}"
    rows = named(result["contestants"])
    return screen(steps(rows), rows, title=title, style=lambda row: "dim" if row["flops"] else None)


def sharded_table(result: Mapping[str, Any]) -> Table:
    title = f"one step of {result['model']} over {result['processes']} gloo processes, ms (medians)"
    return screen(SHARDED, named(result["contestants"]), title=title)


def owners_table(result: Mapping[str, Any]) -> Table:
    title = f"one step of {result['model']} at {result['replicas']} replicas (medians; the most of any)"
    return screen(OWNERS, named(result["contestants"]), title=title)


def link_table(result: Mapping[str, Any]) -> Table:
    """Return a table with a row for each bandwidth and rival."""
    title = f"one step of {result['model']}, {result['replicas']} replicas over a slow link"
    rows = [{**row, **point} for row in named(result["contestants"]) for point in row["points"]]
    rows.sort(key=lambda row: row["mbit"])
    return screen(LINK, rows, title=title, caption=BOUND_BY)
