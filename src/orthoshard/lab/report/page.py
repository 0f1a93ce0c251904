"""Sections to one file of HTML: template, style and scripts of this folder, and the data of charts and calculator.
Curves are drawn by uPlot 1.6.32 (MIT), which lies in templates/uplot as npm has it.

What files say is text: the template escapes it, data stand in a block that no browser runs, with every < as \\u003c,
and the page's own policy lets one script run, by its hash, and nothing load. May import jinja2.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from orthoshard.lab.report.calculator import HEADINGS, START
from orthoshard.lab.report.content import Section

SCRIPTS = ("uplot/uPlot.iife.min.js", "tables.js", "chart.js", "form.js", "main.js")


def render(
    title: str,
    sections: Sequence[Section],
    calculator: Mapping[str, Any] | None,
    start: Mapping[str, Any] = START,
) -> str:
    """``start``: the settings with which the calculator opens."""
    environment = Environment(
        loader=PackageLoader("orthoshard.lab.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    script = script_text()
    charts = [chart for section in sections for chart in section.charts]
    return environment.get_template("page.html.j2").render(
        title=title,
        version=version("orthoshard"),
        sections=sections,
        charts=charts,
        calculator=calculator,
        calculator_headings=HEADINGS,
        start=start,
        style=asset("uplot/uPlot.min.css") + asset("style.css"),
        script=script,
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        data=embedded({"charts": [asdict(chart) for chart in charts], "calculator": calculator}),
    )


def asset(name: str) -> str:
    return files("orthoshard.lab.report").joinpath("templates", name).read_text(encoding="utf-8")


def script_text() -> str:
    """All scripts as one."""
    return "\n" + "\n".join(asset(name) for name in SCRIPTS)


def embedded(data: Mapping[str, Any]) -> str:
    """JSON that cannot end its element. Numbers that are not finite are refused."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
