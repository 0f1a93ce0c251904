"""The figures of a study: NAME.svg is the drawing, and NAME.json beside it describes it and names its runs.

A drawing is shown as an image. In images browsers run no script and load nothing, whatever the file holds.

May import the standard library.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from orthoshard.lab.report import fields
from orthoshard.lab.report.content import Figure, Section
from orthoshard.lab.report.fields import Damaged


def recognised(found: dict[str, Any]) -> bool:
    """Return whether this is the description of a figure."""
    return {"name", "kind", "title", "caption", "data"} <= found.keys()


def figure(found: dict[str, Any], path: Path) -> Figure:
    """Return the figure described by ``found``, which is the file ``path``. Raises ``Damaged``."""
    drawing = path.with_suffix(".svg")
    try:
        text = drawing.read_text(encoding="utf-8")
    except OSError as error:
        raise Damaged(f"its drawing {drawing.name} cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise Damaged(f"its drawing {drawing.name} is not text") from error
    title = fields.text(found, "title")
    try:
        if "<!ENTITY" in text or ElementTree.fromstring(text).tag != "{http://www.w3.org/2000/svg}svg":
            raise Damaged(f"its drawing {drawing.name} is no figure")
    except ElementTree.ParseError as error:
        raise Damaged(f"its drawing {drawing.name} is no figure: it is not XML, or was cut short ({error})") from error
    notes = [
        f"{what}: {', '.join(str(name) for name in fields.listed(found, key))}."
        for key, what in (("unfinished", "Not finished"), ("missing", "Missing"))
        if found.get(key)
    ]
    caption = " ".join([fields.text(found, "caption"), *notes, f"(study {fields.text(found, 'study', '?')})"])
    return Figure(title, base64.b64encode(text.encode()).decode(), caption)


def section(found: dict[str, Any], source: str) -> Section:
    """Return the section of one figure, whose description is the file ``source``. Raises ``Damaged``."""
    return gathered(Path(source), [figure(found, Path(source))])


def gathered(path: Path, figures: list[Figure]) -> Section:
    """Return the section of ``figures``, which were found at ``path``."""
    name = path.resolve().stem
    title = "Figures" if name == "figures" else f"Figures: {name}"
    return Section(title, "figures", (str(path),), figures=tuple(figures))
