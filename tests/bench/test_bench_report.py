"""Ratios against hand-computed values, the table's cells, and what goes into the file."""

import os

from rich.console import Console

from orthoshard.lab.bench.report import Measured, ratios, to_json
from orthoshard.lab.bench.tables import steps_table
from orthoshard.lab.bench.timing import Spread

ROWS = [
    Measured(
        "dion-1/4",
        Spread((12.0, 10.0, 14.0)),
        (30.0, 18.0, 24.0),
        "floor-dion-1/4",
        None,
        1_500_000,
        2_000,
        weights_bytes=8_000,
    ),
    Measured("floor-dion-1/4", Spread((8.0, 5.0, 9.0)), flops=16_000_000),
    Measured("adamw-fused", Spread((3.0, 2.0, 4.0)), (6.0,), None, None, 999, 0),
    Measured("torch-muon", Spread((48.0, 40.0, 50.0))),
]
ABOUT = {"model": {"name": "tiny"}, "dtype": "float32", "device": "cpu"}


def test_ratios_of_medians_and_of_minima():
    rows = {row.name: row for row in ROWS}
    assert ratios(rows, "dion-1/4") == {"floor": 1.5, "adamw-fused": 4.0, "torch-muon": 0.25}
    assert ratios(rows, "dion-1/4", least=True) == {"floor": 2.0, "adamw-fused": 5.0, "torch-muon": 0.25}
    assert ratios(rows, "adamw-fused") == {"torch-muon": 3 / 48}, "nobody is compared with itself"


def test_who_was_not_timed_is_no_yardstick():
    assert ratios({"dion-1/4": ROWS[0]}, "dion-1/4") == {}


def test_the_file_holds_every_time():
    result = to_json(ROWS, ABOUT)
    row = result["contestants"]["dion-1/4"]
    assert (row["median_ms"], row["min_ms"], row["max_ms"], row["rounds"]) == (12, 10, 14, 3)
    assert row["times_ms"] == [12, 10, 14]
    assert (row["first_ms"], row["first_over_median"]) == (24, 2)
    assert (row["state_bytes"], row["peak_bytes"], row["peak_over_weights"]) == (1_500_000, 2_000, 0.25)
    assert result["contestants"]["torch-muon"]["peak_over_weights"] is None
    floor = result["contestants"]["floor-dion-1/4"]
    assert floor["gflops_per_second"] == 2.0  # 16 Mflop in 8 ms
    assert floor["first_ms"] is None
    assert result["model"]["name"] == "tiny"


def drawn(result, width=200) -> str:
    console = Console(width=width, file=open(os.devnull, "w"), record=True)  # noqa: SIM115 it lives as long as the console
    console.print(steps_table(result))
    return console.export_text()


def test_the_table_shows_the_ratios():
    line = next(line for line in drawn(to_json(ROWS, ABOUT)).splitlines() if line.strip().startswith("dion-1/4"))
    assert line.split() == [
        "dion-1/4",
        *["12", "10", "14", "1.50", "4.00", "0.25", "2.00", "1.5", "MB", "0.250"],
    ]
