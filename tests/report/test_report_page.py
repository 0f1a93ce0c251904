"""The page asks nothing of any network, runs one script, and shows what files say as text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from copy import deepcopy
from html.parser import HTMLParser

import pytest
from report_kit import everything, make_figure, make_plan, make_run

from orthoshard.lab.report import cases, plans
from orthoshard.lab.report.calculator import HEADINGS, START, calculator
from orthoshard.lab.report.cli import main
from orthoshard.lab.report.fields import Damaged
from orthoshard.lab.report.page import asset, embedded

VOID = {"meta", "link", "input", "br", "img"}


class Page(HTMLParser):
    """Every element with its attributes, and the text of scripts."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.open = [], [], []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        else:
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    assert main([*map(str, everything(folder)), "--out", str(folder / "page.html"), "--title", "All & everything"]) == 0
    return (folder / "page.html").read_text()


def test_nothing_is_loaded_and_one_script_runs(whole):
    page = Page(whole)
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:")), (tag, target)
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
    assert not re.search(r"url\((?!#)|@import", whole.split("<script")[0])
    (data, run) = page.scripts
    assert data[0] == {"type": "application/json", "id": "data"}
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(run[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_the_page_is_made_of_what_it_should_be(whole):
    page = Page(whole)
    assert page.all("html")[0]["lang"] == "en"
    assert "All & everything" in page.text
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for link in page.all("a"):
        assert link["href"][1:] in ids
    for label in page.all("label"):
        assert "for" not in label or label["for"] in ids
    assert all(heading.get("scope") in ("col", "row") for heading in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(region.get("aria-label") for region in page.all("div") if region.get("role") == "region")
    headings = [tag for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert headings.count("h1") == 1


def test_data_are_the_sections_data(whole):
    found = json.loads(Page(whole).scripts[0][1])
    titles = [case["title"] for case in found["calculator"]["cases"]]
    assert titles[0] == "llama3.2-1b, dp=2 × fsdp=8, as planned"
    assert START["case"] in titles
    muon = next(series for chart in found["charts"] for series in chart["series"] if series["label"] == "muon, lr 0.02")
    assert round(min(muon["lines"]["validation"]["y"]), 3) == 3.437


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"&{{ 1234*4321 }}\u2028"


def test_what_files_say_is_text(tmp_path):
    folder = make_run(tmp_path / "run", optimizer=EVIL)
    evil = tmp_path / "<b>&'\"{{ 1234*4321 }}"
    folder.rename(evil)
    figures = make_figure(tmp_path / "figures")
    found = json.loads((figures / "fig2.json").read_text())
    (figures / "fig2.json").write_text(json.dumps(found | {"title": EVIL, "caption": EVIL}))
    assert main([str(evil), str(figures), "--out", str(tmp_path / "page.html"), "--title", EVIL]) == 0
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert len(page.scripts) == 2
    (image,) = page.all("img")
    assert image["src"].startswith("data:image/svg+xml;base64,")
    assert image["alt"] == EVIL
    assert not page.all("b")
    assert "5332114" not in text
    assert page.text.count(EVIL) >= 4, "title twice, a cell, a heading and a caption"
    label = json.loads(page.scripts[0][1])["charts"][0]["series"][0]["label"]
    assert label == evil.name
    assert all(character not in page.scripts[0][1] for character in "<>&")


def test_embedded_data_come_back():
    data = {"a": "</script>&<!--", "b": [1.5, None, "\u2028"]}
    assert json.loads(embedded(data)) == data
    assert "<" not in embedded(data)
    with pytest.raises(ValueError, match="Out of range"):
        embedded({"a": float("nan")})


HOSTILE = """<?xml version="1.0"?>
<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">
<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="72pt" height="36pt"
     onload="alert(1)">
  <style>*{display:none}</style><script>alert(2)</script><metadata/><!-- a comment -->
  <foreignObject><body xmlns="http://www.w3.org/1999/xhtml"><iframe src="http://x"/></body></foreignObject>
  <a xlink:href="javascript:alert(3)"><text>linked</text></a>
  <defs><clipPath id="c"><rect width="1" height="1"/></clipPath></defs>
  <path id="p" d="M0 0" clip-path="url(#c)" style="fill: #ffffff; stroke: #000000" onclick="alert(4)"/>
  <use xlink:href="#p"/><use href="http://x/y.svg#z"/>
  <image href="data:image/png;base64,AAAA"/><image href="http://x/y.png"/><image href="data:text/html,x"/>
  <rect style="fill: url(http://x)" fill="url('http://y')"/><text style="position: fixed">text</text>
</svg>"""


def test_hostile_figures_are_images(tmp_path):
    """In which browsers run and load nothing; `test_report_browser.py` sees that they do not."""
    folder = make_figure(tmp_path / "figures")
    (folder / "fig2.svg").write_text(HOSTILE)
    assert main([str(folder), "--no-calculator", "--out", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    (image,) = Page(text).all("img")
    assert base64.b64decode(image["src"].partition(",")[2]).decode() == HOSTILE
    assert "alert" not in text


@pytest.mark.parametrize("text", ["<svg", "<html/>", "<svg/>", '<!DOCTYPE a [<!ENTITY b "c">]><svg>&b;</svg>', ""])
def test_what_is_no_figure_is_refused(text, tmp_path, capsys):
    folder = make_figure(tmp_path / "figures")
    (folder / "fig2.svg").write_text(text)
    assert main([str(folder), "--out", str(tmp_path / "page.html")]) == 2
    assert "is no figure" in capsys.readouterr().err


@pytest.fixture(scope="module")
def plan_of_1b(tmp_path_factory):
    return json.loads(make_plan(tmp_path_factory.mktemp("plan") / "plan.json").read_text())


def test_the_calculator_opens_with_the_plan(plan_of_1b):
    found = deepcopy(plan_of_1b)
    found["hardware"] |= {"name": "mine", "memory": 1e9}
    found["rows"][1]["seconds"]["passes"] = 123.0  # as measured there
    plan = plans.section(found, "plan.json").plan
    plain, start = calculator([plan])
    assert (start["case"], start["machine"]) == (plain["cases"][0]["title"], "mine")
    assert (start["tokens_per_step"], start["count"], start["price"]) == ("4", "16", "2")
    days = found["job"]["tokens"] / 4e6 * found["rows"][0]["seconds"]["model"] / 86400
    assert float(start["days"]) == pytest.approx(days, rel=1e-5)
    row, wanted = plain["cases"][0]["rows"][1], found["rows"][1]
    names = [entry["name"] for entry in plain["machines"]]
    assert row["seconds"][names.index("mine")]["passes"] == 123.0
    assert row["seconds"][names.index("h100")]["passes"] == pytest.approx(wanted["passes"] / (0.8 * 3.35e12), rel=1e-5)
    assert (row["name"], row["memory"], row["state"]) == tuple(wanted[key] for key in ("name", "memory", "state"))
    wanted["sent"]["pp"] = 1.0
    with pytest.raises(Damaged, match="no axis of its mesh"):
        plans.section(found, "plan.json")


def test_cases_are_what_the_planner_says(plan_of_1b):
    """Of one model; all were made by the same command."""
    stored = json.loads(cases.FILE.read_text())
    meshes = [",".join(f"{axis}={size}" for axis, size in case["mesh"].items()) for case in stored]
    assert [*zip([case["model"]["name"] for case in stored], meshes, strict=True)] == [*cases.CASES]
    known = {row["name"]: row for case in stored if case["model"] == plan_of_1b["model"] for row in case["rows"]}
    for row in plan_of_1b["rows"]:
        for key in cases.ROW:
            assert known[row["name"]][key] == pytest.approx(row[key]), "python -m orthoshard.lab.report.cases"


def test_every_column_of_the_calculator_has_a_heading():
    columns = re.findall(r"^    \[\(found\)", asset("form.js"), re.MULTILINE)
    assert len(columns) == len(HEADINGS)


def test_without_the_calculator(tmp_path):
    out = tmp_path / "page.html"
    assert main([str(make_run(tmp_path / "run")), "--no-calculator", "--out", str(out)]) == 0
    page = Page(out.read_text())
    assert not page.all("form")
    assert json.loads(page.scripts[0][1])["calculator"] is None
