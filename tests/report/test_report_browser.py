"""The page in a real browser: `make browser` installs one. Slow, for it is started, and plans are made."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from report_kit import everything

from orthoshard.lab.report.cli import main

pytestmark = pytest.mark.slow
NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    """Chromium of the machine, or else the one that playwright has installed."""
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as play:
        path = next((found for found in map(shutil.which, NAMES) if found), None)
        try:
            chromium = play.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        except Error as error:
            pytest.fail(f"no Chromium starts here; `make browser` installs one: {error}")
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    assert main([*map(str, everything(folder)), "--out", str(folder / "page.html")]) == 0
    return folder / "page.html"


@pytest.fixture
def opened(browser, file):
    """``opened(**options)``: the page, in a browser of that size and taste. Whatever it asks for or complains of is an
    error."""
    contexts, said = [], []

    def open_page(**options):
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("request", lambda asked: asked.url.startswith(("file:", "data:")) or said.append(asked.url))
        page.goto(file.as_uri())
        page.wait_for_selector(".plot canvas")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


LOOKS = {
    "light": {"color_scheme": "light"},
    "dark": {"color_scheme": "dark"},
    "phone": {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True},
    "narrow": {"viewport": {"width": 320, "height": 600}, "color_scheme": "dark"},
}

# What is read against what is behind it: WCAG 2.2, 1.4.3 asks for 4.5 : 1.
CONTRAST = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => {
    const f = (c) => ((c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * f(r) + 0.7152 * f(g) + 0.0722 * f(b);
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = parse(getComputedStyle(e).backgroundColor);
      if (color.length === 3 || color[3] > 0) return color;
    }
  };
  const found = [];
  const read = "h1,h2,h3,p,td,th,dt,dd,a,label,legend,caption,figcaption,li,select,text,output,span";
  for (const element of document.querySelectorAll(read)) {
    if (!element.textContent.trim() || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const a = light(parse(element instanceof SVGElement ? style.fill : style.color)), b = light(behind(element));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push([element.tagName, element.textContent.slice(0, 30), ratio]);
  }
  return found;
}"""


@pytest.mark.parametrize("look", LOOKS)
def test_it_is_readable_and_as_wide_as_the_screen(opened, look, tmp_path):
    page = opened(**LOOKS[look])
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    assert page.evaluate(CONTRAST) == []
    page.screenshot(path=Path(os.environ.get("REPORT_SCREENSHOTS", tmp_path)) / f"{look}.png", full_page=True)


def shown_rows(page):
    return page.evaluate(
        """() => [...document.querySelectorAll('[data-calculator="rows"] tbody tr')].map((row) =>
            [row.cells[0].textContent, ...[...row.cells].slice(1).map((cell) => Number(cell.dataset.value))])"""
    )


def test_the_calculator_by_keyboard(opened):
    page = opened()
    before = shown_rows(page)
    assert [row[0] for row in before if "1/4" in row[0]]
    # cost = days · 24 · ranks · price, and days of forward and backward longer by what is added
    days, count, price = (float(page.input_value(f"#calculator-{name}")) for name in ("days", "count", "price"))
    for row in before:
        assert row[3] == pytest.approx(days * (1 + row[2]))
        assert row[4] == pytest.approx(row[3] * 24 * count * price)
    page.fill("#calculator-price", "8")
    assert [row[4] for row in shown_rows(page)] == pytest.approx([row[4] * 8 / price for row in before])
    page.fill("#calculator-saving", "25")
    assert [row[3] for row in shown_rows(page)] == pytest.approx([before[0][3], *(row[3] * 0.75 for row in before[1:])])
    page.fill("#calculator-share", "50")
    assert shown_rows(page)[-1][2] == pytest.approx(1), "half of a step is as much as forward and backward"
    page.focus('[data-moves="days"]')
    page.keyboard.press("Home")
    assert page.input_value("#calculator-days") == "0.1"
    page.keyboard.press("End")
    assert page.input_value("#calculator-days") == "1000"
    page.fill("#calculator-price", "-1")
    assert "not below 0" in page.inner_text('[data-calculator="warning"]')
    page.fill("#calculator-price", "3")
    assert page.inner_text('[data-calculator="warning"]') == ""
    page.fill("#calculator-count", "7")
    assert "the count is in the cost alone" in page.inner_text('[data-calculator="warning"]')
    page.select_option("#calculator-case", label="llama3-8b, fsdp=64")
    assert page.input_value("#calculator-count") == "64"
    page.select_option("#calculator-fraction", label="1/64")
    assert [row[0] for row in shown_rows(page) if "1/64" in row[0]]
    page.select_option("#calculator-machine", label="a100")
    assert shown_rows(page) != before


def test_a_table_is_sorted_by_its_headings(opened):
    page = opened()
    table = page.locator("table.sortable", has_text="Each optimizer at its best learning rate")

    def column(k):
        return [row.locator("td, th").nth(k).inner_text() for row in table.locator("tbody tr").all()]

    button = table.get_by_role("button", name="validation loss")
    button.focus()
    page.keyboard.press("Enter")
    losses = [float(text) for text in column(3)]
    assert losses == sorted(losses)
    assert table.locator('th[aria-sort="ascending"]').inner_text().startswith("validation")
    page.keyboard.press("Space")
    assert [float(text) for text in column(3)] == sorted(losses, reverse=True)
    assert table.locator("th[aria-sort]").count() == 1
    table.get_by_role("button", name="optimizer", exact=True).click()
    assert column(0) == sorted(column(0))


def test_a_chart_by_keyboard_pointer_and_choices(opened, file):
    page = opened()
    data = json.loads(page.locator("#data").text_content() or "")
    index = next(k for k, chart in enumerate(data["charts"]) if chart["title"] == "Loss at the best learning rate")
    chart, spec = page.locator(f'figure.chart[data-chart="{index}"]'), data["charts"][index]
    muon = next(k for k, series in enumerate(spec["series"]) if series["label"] == "muon, lr 0.02")
    line = spec["series"][muon]["lines"]["validation"]
    value = chart.locator(".legend .value").nth(muon)
    slider = chart.locator(".position")
    slider.focus()
    page.keyboard.press("End")
    assert float(value.inner_text()) == pytest.approx(line["y"][-1], rel=1e-3)
    page.keyboard.press("ArrowLeft")
    assert float(value.inner_text()) == pytest.approx(line["y"][-2], rel=1e-3)
    assert "muon, lr 0.02" in (slider.get_attribute("aria-valuetext") or "")
    assert chart.locator(".at").inner_text() == "275 steps"
    plot = chart.locator(".plot")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 60, box["y"] + 50)
    assert chart.locator(".at").inner_text() == "50 steps", "the first tenth is left out"
    chart.locator(".late").uncheck()
    page.mouse.move(box["x"] + 54, box["y"] + 60)
    assert chart.locator(".at").inner_text() == "0 steps"
    assert float(value.inner_text()) == pytest.approx(line["y"][0], rel=1e-3)
    canvas = chart.locator(".plot canvas")
    before = canvas.screenshot()
    chart.locator(".choose-scale").select_option("log")
    assert canvas.screenshot() != before
    chart.locator(".choose-x").select_option("tokens")
    slider.focus()
    page.keyboard.press("End")
    assert chart.locator(".at").inner_text() == "614K tokens"
    chart.locator(".choose-value").select_option("training")
    assert float(value.inner_text()) == pytest.approx(spec["series"][muon]["lines"]["training"]["y"][-1], rel=1e-3)
    before = canvas.screenshot()
    chart.locator(".legend input").nth(muon).uncheck()
    assert canvas.screenshot() != before
    assert value.inner_text() == ""
    while chart.locator(".legend input:checked").count():
        chart.locator(".legend input:checked").first.uncheck()
    assert "no curve is switched on" in chart.locator(".plot").inner_text()


def test_everything_is_reached_by_tab_and_shows_it(opened):
    page = opened()
    count = page.evaluate(
        """() => [...document.querySelectorAll("a[href],button,select,input,summary,[tabindex='0']")]
            .filter((e) => !e.disabled && e.getClientRects().length && !e.closest("[hidden]")).length"""
    )
    reached = set()
    for _ in range(count + 5):
        page.keyboard.press("Tab")
        state = page.evaluate(
            """() => {
              const e = document.activeElement, all = [...document.querySelectorAll("*")];
              const { outlineStyle, outlineWidth } = getComputedStyle(e);
              return [all.indexOf(e), e.tagName, outlineStyle, parseFloat(outlineWidth)];
            }"""
        )
        if state[1] == "BODY":
            break
        assert state[2] != "none", state
        assert state[3] >= 1, state
        reached.add(state[0])
    assert len(reached) == count


def test_without_scripts_tables_and_figures_stay(browser, file):
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(file.as_uri())
    assert "need JavaScript" in page.locator("noscript").inner_text()
    assert page.locator("table.sortable").first.is_visible()
    assert page.locator("figure.drawn img").is_visible()
    assert not page.locator("figure.chart").first.is_visible()
    assert not page.locator("#calculator").is_visible()
