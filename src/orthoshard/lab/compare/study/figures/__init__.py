"""The kinds of figures: a new one is a file with a function, and one line here.

A figure is data first: what is drawn, and everything else that is said of it, is made from its JSON. May import
``orthoshard.lab.compare``.
"""

from __future__ import annotations

from orthoshard.lab.compare.study.figures import curves, final, rates, reach, table, updates, wire
from orthoshard.lab.compare.study.figures.drawn import Kind

KINDS: dict[str, Kind] = {
    "reach": Kind(reach.draw, frozenset({"reference"})),
    "curves": Kind(curves.draw, frozenset()),
    "final-loss": Kind(final.draw, frozenset({"x"})),
    "rates": Kind(rates.draw, frozenset({"panels"})),
    "updates": Kind(updates.draw, frozenset()),
    "wire": Kind(wire.draw, frozenset({"matrix", "ranks"})),
    "table": Kind(table.draw, frozenset({"reference"})),
}
