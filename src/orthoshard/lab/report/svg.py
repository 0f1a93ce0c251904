"""An SVG file made fit to stand inside a page: known elements and attributes, ids of its own, the colours of the page.

Whatever could run, load or reach out (scripts, links, styles of the whole page, foreign content) is left out; what is
no SVG is `Damaged`. White and black become the page's paper and ink, so that a figure is read in the dark too.
May import the standard library.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree

from orthoshard.lab.report.fields import Damaged

SPACE = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"
# Elements and attributes that draw; anything else is left out.
ELEMENTS = """
    svg g defs path text tspan clipPath use rect circle ellipse line polyline polygon image linearGradient stop
"""
ATTRIBUTES = """
    id d x y x1 y1 x2 y2 cx cy r rx ry dx dy width height viewBox points transform clip-path clipPathUnits
    gradientUnits gradientTransform offset preserveAspectRatio fill fill-opacity fill-rule stroke stroke-width
    stroke-opacity stroke-linecap stroke-linejoin stroke-dasharray opacity font-family font-size font-style
    font-weight text-anchor stop-color stop-opacity style
"""
DRAWING, LOOKS = frozenset(ELEMENTS.split()), frozenset(ATTRIBUTES.split())
INSIDE = re.compile(r"url\(\s*['\"]?#([\w.-]+)['\"]?\s*\)")
PICTURE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/=\s]+")
WHITE = re.compile(r"#f{6}\b|#f{3}\b|^white$", re.IGNORECASE)
BLACK = re.compile(r"#0{6}\b|#0{3}\b|^black$", re.IGNORECASE)
PAINT = ("fill", "stroke", "stop-color", "style")


def clean(text: str, prefix: str, label: str) -> str:
    """The figure as an ``<svg>`` of any width. ``prefix`` sets its ids apart from others'; ``label`` names it."""
    if "<!ENTITY" in text:
        raise Damaged("it defines entities, which no figure needs")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise Damaged(f"it is not XML, or was cut short: {error}") from error
    if root.tag != f"{SPACE}svg":
        raise Damaged("it is no SVG")
    made = _copy(root, prefix)
    width, height = (_length(root.get(name)) for name in ("width", "height"))
    if made.get("viewBox") is None and width and height:
        made.set("viewBox", f"0 0 {width:g} {height:g}")
    for name in ("width", "height", "id"):
        made.attrib.pop(name, None)
    if width:
        made.set("style", f"max-width: {width * 4 / 3:.0f}px")  # matplotlib counts points: 72 an inch, a page's 96
    made.set("role", "img")
    made.set("aria-label", label)
    return ElementTree.tostring(made, encoding="unicode", short_empty_elements=False)


def _copy(element: ElementTree.Element, prefix: str) -> ElementTree.Element:
    made = ElementTree.Element(element.tag.removeprefix(SPACE))
    for name, value in element.attrib.items():
        if name in ("href", LINK):
            _link(made, value, prefix)
        elif name == "id":
            made.set("id", prefix + value)
        elif name in LOOKS and (kept := _value(name, value, prefix)):
            made.set(name, kept)
    made.text, made.tail = element.text, element.tail
    for child in element:
        if isinstance(child.tag, str) and child.tag.removeprefix(SPACE) in DRAWING:
            made.append(_copy(child, prefix))
    return made


def _link(made: ElementTree.Element, value: str, prefix: str) -> None:
    """Inside of the figure, or a picture that the link itself holds."""
    if value.startswith("#"):
        made.set("href", f"#{prefix}{value[1:]}")
    elif made.tag == "image" and PICTURE.fullmatch(value):
        made.set("href", value)


def _value(name: str, value: str, prefix: str) -> str:
    """Empty where it reaches out of the figure, or lies over the page."""
    value = INSIDE.sub(rf"url(#{prefix}\1)", value)
    if re.search(r"url\((?!#)|@import|expression|position|javascript:|data:|\\", value, re.IGNORECASE):
        return ""
    return BLACK.sub("var(--ink)", WHITE.sub("var(--paper)", value)) if name in PAINT else value


def _length(text: str | None) -> float:
    """In points or pixels; 0 where there is none."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)(?:pt|px)?\s*", text or "")
    return float(match[1]) if match else 0.0
