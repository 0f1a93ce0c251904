"""Rendering sections as one HTML file: template, style and scripts of this folder, and data of charts and calculator.
Curves are drawn by uPlot 1.6.32 (MIT), an unchanged copy of which is in templates/uplot.

Text from input files cannot become code: the template escapes it, data are in a block that browsers do not run, with
every < as \\u003c, and the page's policy allows one script, by its hash, and no loading. May import jinja2.
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
    """Return the page as text. ``start`` are the initial settings of the calculator."""
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
    """Return the text of a file in templates."""
    return files("orthoshard.lab.report").joinpath("templates", name).read_text(encoding="utf-8")


def script_text() -> str:
    """Return all scripts as one text."""
    return "\n" + "\n".join(asset(name) for name in SCRIPTS)


def embedded(data: Mapping[str, Any]) -> str:
    """Return ``data`` as JSON that cannot close its HTML element. Raises ValueError for numbers that are not finite."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
