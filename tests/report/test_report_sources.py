"""Files of every kind are recognised by what they hold; whatever is damaged is named in a sentence."""

from __future__ import annotations

import base64
import copy
import json
import math
import random
import shutil

import pytest
from report_kit import (
    BENCHES,
    COMPARISON,
    RESULTS,
    STEPS,
    TOKENS,
    everything,
    make_check,
    make_figure,
    make_plan,
    make_run,
    make_stages,
)

from orthoshard.lab.report import sources
from orthoshard.lab.report.cli import main
from orthoshard.lab.train.errors import UserError


def only(path):
    (section,) = sources.read([path])
    return section


def cells(section, row, table=0):
    return [cell.text for cell in section.tables[table].rows[row]]


def test_a_run(tmp_path):
    section = only(make_run(tmp_path / "run"))
    validation = section.charts[0].series[0].lines["validation"]
    assert validation.x["steps"] == [0, 10, 20, 30, 40]
    assert validation.x["seconds"] == [0, 5, 10, 15, 20]
    assert validation.x["tokens"] == [0, 10 * TOKENS, 20 * TOKENS, 30 * TOKENS, 40 * TOKENS]
    assert validation.y[1:] == pytest.approx([2.1 + math.exp(-step / 10) for step in (10, 20, 30, 40)], rel=1e-5)
    assert len(section.charts[0].series[0].lines["training"].y) == STEPS
    row = dict(zip(section.tables[0].headings, cells(section, 0), strict=True))
    assert row["last validation loss"] == f"{2.1 + math.exp(-4):.3f}"
    assert row["tokens"] == "20.5K"
    assert row["in the optimizer"] == "20.0%"
    assert row["optimizer state"] == "4.0 MB"
    assert row["status"] == "finished"


def test_a_long_run_is_thinned(tmp_path):
    folder = make_run(tmp_path / "run")
    lines = (folder / "run.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines if '"step"' in line and json.loads(line)["kind"] == "step"]
    long = [json.dumps(steps[0] | {"step": step + 1}) for step in range(5000)]
    (folder / "run.jsonl").write_text("\n".join([lines[0], *long]) + "\n")
    steps = only(folder).charts[0].series[0].lines["training"].x["steps"]
    assert steps[0] == 1
    assert steps[-1] == 5000
    assert 500 < len(steps) <= 600


def test_an_unfinished_run_with_a_torn_line_and_a_loss_that_was_not_finite(tmp_path):
    folder = make_run(tmp_path / "run")
    lines = (folder / "run.jsonl").read_text().splitlines()
    broken = json.dumps(json.loads(lines[3]) | {"loss": None})
    (folder / "run.jsonl").write_text("\n".join([*lines[:3], broken, lines[4]]) + "\n" + lines[5][:20])
    section = only(folder)
    assert section.charts[0].series[0].lines["training"].x["steps"] == [1, 3]
    assert cells(section, 0)[-1] == "not finished"


def test_runs_stand_together_and_twice_is_once(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", speed=2.0)
    sections = sources.read([b, COMPARISON, a, b / "run.jsonl", b])
    assert [section.kind for section in sections] == ["runs", "comparison"]
    assert [row[0].text for row in sections[0].tables[0].rows] == ["b", "a"]


def test_a_comparison_is_the_table_that_compare_wrote():
    section = only(COMPARISON)
    wanted = (COMPARISON / "table.md").read_text().splitlines()
    head, _, *rows = [[text.strip() for text in line.strip("|").split("|")] for line in wanted if line.startswith("|")]
    assert list(section.tables[0].headings) == head
    assert [cells(section, k) for k in range(len(rows))] == rows
    shown = [series.label for series in section.charts[0].series if series.shown]
    assert shown[:2] == ["adamw, lr 0.003", "muon, lr 0.02"]
    assert len(shown) == len(rows)
    muon = section.charts[0].series[1].lines["validation"]
    assert f"{min(muon.y):.3f}" == rows[1][3]
    assert muon.x["tokens"][-1] == 300 * 2048


@pytest.mark.parametrize("name", BENCHES)
def test_benchmarks(name):
    found = json.loads((RESULTS / name).read_text())
    section = only(RESULTS / name)
    assert section.kind == "bench"
    (table,) = section.tables
    assert table.rows[0][0].text == next(iter(found["contestants"]))
    assert all(len(row) == len(table.headings) for row in table.rows)
    first = next(iter(found["contestants"].values()))
    values = [cell.order for cell in table.rows[0]]
    expected = {"median_ms": 1, "one_process_ms": 1}
    for key, column in expected.items():
        if key in first:
            assert values[column] == first[key]
    if "zero1" in first:
        assert values[1:4] == [first["none"]["ms"], first["zero1"]["ms"], first["none"]["bytes"]]
    if "points" in first:
        assert values[1:5] == [
            first["points"][0]["mbit"],
            first["bytes"],
            first["points"][0]["predicted_ms"],
            first["points"][0]["measured_ms"],
        ]


def test_stages(tmp_path):
    section = only(make_stages(tmp_path / "stages.json"))
    assert cells(section, 0) == ["dion-1/4", "products", "30", "75.0%"]
    assert dict(section.facts)["machine"] == "AMD EPYC, 2 cores, 1 thread, torch 2.13.0"


def test_a_check_of_the_plan(tmp_path):
    section = only(make_check(tmp_path / "check.json"))
    assert [cells(section, k) for k in (0, 1)] == [
        ["adamw", "1", "62", "40", "10", "0", "50", "1.24", "yes"],
        ["muon", "2", "300", "40", "10", "0", "150", "2.00", "no"],
    ]
    assert dict(section.facts)["2 processes"] == "Measured."


def test_figures(tmp_path):
    folder = make_figure(tmp_path / "study" / "figures")
    for path in (folder, folder.parent, folder / "fig2.json"):
        (figure,) = only(path).figures
        assert figure.title == "A figure"
        assert figure.caption == "What is seen. Not finished: width-64. (study paper.toml)"
        assert base64.b64decode(figure.svg).endswith(b"</svg>\n")


def test_a_plan(tmp_path):
    path = make_plan(tmp_path / "plan.json")
    found = json.loads(path.read_text())
    section = only(path)
    assert section.title == "Plan: llama3.2-1b on dp=2 × fsdp=8"
    for row, table in zip(found["rows"], section.tables[0].rows, strict=True):
        assert table[0].text.removesuffix(" †") == row["name"]
        assert table[1].order == row["seconds"]["optimizer"]
        assert table[-1].order == row["cost"]
    assert dict(section.lists)["Assumptions"] == tuple(found["assumptions"])
    assert section.plan["machine"]["per_node"] == 8


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Every JSON file of every kind."""
    folder = tmp_path_factory.mktemp("files")
    paths = everything(folder)
    return [path for path in [*paths, COMPARISON / "results.json", folder / "figures" / "fig2.json"] if path.is_file()]


def spoiled(value, pick):
    """The same with one value, somewhere, gone or of another kind."""
    value = copy.deepcopy(value)
    place = value
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = pick.choice(keys)
        deeper = isinstance(place[key], dict | list) and len(place[key]) > 0
        if deeper and pick.random() < 0.8:
            place = place[key]
            continue
        if pick.random() < 0.25:
            del place[key]
        else:
            place[key] = pick.choice([None, "text", "", -1, 0, 1e300, 10**400, True, [], {}, [[]], {"a": []}])
        return value


def said_of(path):
    """The sentence with which it is refused; None where it is shown. Anything else is raised."""
    try:
        sources.read([path])
    except UserError as error:
        return str(error)
    return None


def test_whatever_is_spoiled_is_shown_or_named(files, tmp_path):
    """Nothing but a section or a sentence that begins with the file."""
    pick = random.Random(0)
    named = 0
    for path in files:
        whole = json.loads(path.read_text())
        if "runs" in whole:
            whole["runs"] = [run | {"train": run["train"][:3]} for run in whole["runs"][:2]]
        if (path.parent / "fig2.svg").exists():
            shutil.copy(path.parent / "fig2.svg", tmp_path / "x.svg")
        spoilt = tmp_path / "x.json"
        for _ in range(120):
            spoilt.write_text(json.dumps(spoiled(whole, pick)))
            sentence = said_of(spoilt)
            named += sentence is not None
            assert sentence is None or (sentence.startswith(str(spoilt)) and sentence.endswith("."))
    assert named > 100


def test_a_spoiled_record_is_shown_or_named(tmp_path):
    lines = (make_run(tmp_path / "run") / "run.jsonl").read_text().splitlines()
    pick = random.Random(1)
    named = 0
    for _ in range(200):
        k = pick.choice([0, pick.randrange(len(lines))])
        line = json.dumps(spoiled(json.loads(lines[k]), pick))
        (tmp_path / "run" / "run.jsonl").write_text("\n".join([*lines[:k], line, *lines[k + 1 :]]) + "\n")
        sentence = said_of(tmp_path / "run")
        named += sentence is not None
        assert sentence is None or str(tmp_path / "run") in sentence
    assert named > 50


CASES = {
    "missing": (None, "there is no"),
    "cut short": (b'{"contestants": {', "was cut short"),
    "not JSON": (b"hello", "not JSON"),
    "not text": (b"\xff\xfe\x00", "not text"),
    "empty": (b"", "not JSON"),
    "a list": (b"[]", "not an object"),
    "unknown": (b'{"a": 1}', "of no kind that a report can show"),
    "NaN": (b'{"contestants": {}, "model": NaN, "torch": "2"}', "no JSON number"),
    "deep": (b'{"a":' * 100000, "nested too deeply"),
    "too many digits": (b'{"a": ' + b"1" * 5000 + b"}", "not JSON that can be read"),
}


@pytest.mark.parametrize(("content", "sentence"), CASES.values(), ids=CASES)
def test_bad_files_are_sentences_and_leave_no_page(content, sentence, tmp_path, capsys):
    path, out = tmp_path / "bench.json", tmp_path / "page.html"
    if content is not None:
        path.write_bytes(content)
    assert main([str(path), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert str(path) in error
    assert "Traceback" not in error
    assert not out.exists()


def test_bad_folders_are_sentences(tmp_path):
    for name in ("empty", "compare", "text"):
        (tmp_path / name).mkdir()
    (tmp_path / "compare" / "compare.json").write_text("{}")
    (tmp_path / "text" / "notes.txt").write_text("hello")
    figures = make_figure(tmp_path / "figures")
    (figures / "fig2.svg").write_text("<svg")
    record = make_run(tmp_path / "run") / "run.jsonl"
    record.write_text("{}\nnonsense\n" + record.read_text())
    sentences = {
        "empty": "holds nothing that a report can show",
        "compare": "orthoshard compare --report-only --out",
        "text/notes.txt": "is nothing that a report can show",
        "figures": "is no figure",
        "run": "line 2 of",
    }
    for name, sentence in sentences.items():
        with pytest.raises(UserError, match=sentence) as caught:
            sources.read([tmp_path / name])
        assert str(tmp_path / name) in str(caught.value)


def test_out_is_checked_first_and_nothing_to_show_is_said(tmp_path, capsys):
    assert main([str(COMPARISON), "--out", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert main(["--no-calculator", "--out", str(tmp_path / "a.html")]) == 2
    assert "nothing to show" in capsys.readouterr().err


@pytest.mark.parametrize("link", [False, True])
def test_out_replaces_nothing_but_a_page(link, tmp_path, capsys):
    kept, out = tmp_path / "keep.json", tmp_path / "link.json"
    kept.write_text('{"a": 1}')
    out.symlink_to(kept)
    before = kept.read_bytes()
    assert main([str(kept), "--out", str(out if link else kept)]) == 2
    assert "is one of the input files" in capsys.readouterr().err
    assert main(["--out", str(out if link else kept)]) == 2
    assert "is no page of HTML" in capsys.readouterr().err
    assert kept.read_bytes() == before


def test_all_that_cannot_be_shown_is_named_at_once(tmp_path):
    (tmp_path / "a.md").write_text("notes")
    sentence = r"2 of 3 cannot be shown: .*a\.md is nothing.*; there is no .*b\.json; leave"
    with pytest.raises(UserError, match=sentence) as caught:
        sources.read([tmp_path / "a.md", COMPARISON, tmp_path / "b.json"])
    assert str(caught.value).count("give the folder") == 1


def test_a_study_whose_results_are_no_comparison_is_its_figures(tmp_path):
    make_figure(tmp_path / "figures")
    (tmp_path / "results.json").write_text('{"rows": []}')
    assert sources.read([tmp_path])
