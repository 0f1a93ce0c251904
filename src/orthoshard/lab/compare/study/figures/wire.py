"""Communication and memory of one matrix (Table 2 of the Dion paper): formula beside counted bytes.

The formulas stand in `orthoshard.lab.compare.study.wire`, which counts. Options: ``matrix = [m, n]``, ``ranks``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orthoshard.lab.bench.files import size
from orthoshard.lab.canvas import COLORS, panels, svg
from orthoshard.lab.compare.study.figures.drawn import Drawn, Options
from orthoshard.lab.compare.study.results import Results
from orthoshard.lab.tables import Column, markdown
from orthoshard.lab.train.errors import UserError

RULES = (
    ("adamw", "adamw", 0.0),
    ("muon", "muon", 0.0),
    ("dion-1", "dion", 1.0),
    ("dion-1/4", "dion", 1 / 4),
    ("dion-1/16", "dion", 1 / 16),
)
HEADS = {
    "state": "state of a whole matrix",
    "replicas": "sent over replicas",
    "rows": "sent, rows cut (FSDP)",
    "columns": "sent, columns cut (TP)",
}


def draw(given: Sequence[Results], options: Options) -> Drawn:
    from orthoshard.lab.compare.study import wire

    m, n = _matrix(options.get("matrix", [512, 512]))
    ranks = options.get("ranks", 4)
    if not isinstance(ranks, int) or ranks < 2 or m % ranks or n % ranks:
        raise UserError(f"ranks = {ranks!r}; give 2 or more, that divide both sides of the matrix {m}×{n}.")
    lines = wire.count(wire.Setting(m, n, ranks, RULES))
    data = {"matrix": [m, n], "ranks": ranks, "dtype": "float32", "lines": wire.rows(lines)}

    def fill(figure: Any) -> None:
        for axes, (layout, head) in zip(panels(figure, len(HEADS), most=4), HEADS.items(), strict=True):
            mine = [line for line in lines if line.layout == layout]
            for k, line in enumerate(mine):
                axes.bar(k - 0.2, line.formula / 1e3, 0.4, color=COLORS[0], label=None if k else "formula")
                axes.bar(k + 0.2, line.counted / 1e3, 0.4, color=COLORS[1], label=None if k else "counted")
            axes.set_xticks(range(len(mine)), [line.label for line in mine], rotation=45, ha="right")
            axes.set_title(head)
        figure.axes[0].set_ylabel("kB for one matrix, one rank")
        figure.axes[0].legend()

    caption = (
        f"One {m}×{n} matrix in float32, {ranks} ranks, one step. Counted: what one rank sends and keeps in a step run "
        f"dry, over the {ranks} such matrices of the step, with small things that the formula leaves out. Replicas of "
        "AdamW and Muon average gradients, those of Dion factors."
    )
    return Drawn(data, svg(fill, 12, 3.2), caption, _table(lines))


def _matrix(value: Any) -> tuple[int, int]:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(side, int) and side >= 16 for side in value):
        return value[0], value[1]
    raise UserError(f"matrix = {value!r}; give two sides of at least 16, such as [512, 512].")


def _table(lines: Sequence[Any]) -> str:
    rows: dict[str, dict[str, Any]] = {}
    for line in lines:
        rows.setdefault(line.label, {"label": line.label})[line.layout] = line
    columns = [Column(head, layout, _cell) for layout, head in HEADS.items()]
    return markdown([Column("", "label", words=True), *columns], rows.values())


def _cell(line: Any) -> str:
    more = f", {100 * (line.counted / line.formula - 1):+.2f}%" if line.formula else ""
    return f"{size(line.formula)}; counted {size(line.counted)}{more}"
