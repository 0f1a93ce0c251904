"""What all verbs have in common: their names, what ends them early, and packages that are not there."""

from __future__ import annotations

import importlib
import io
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tyro

import orthoshard
from orthoshard.__main__ import VERBS, main
from orthoshard.lab.train.config import OptimizerConfig

# Of the packages of the extra "lab", those without which no verb can read its flags.
FLAGS = {"tyro", "rich"}
HIDDEN = {
    "jinja2",
    "matplotlib",
    "numpy",
    "optuna",
    "safetensors",
    "sqlalchemy",
    "tensorboard",
    "tokenizers",
    "transformers",
}


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag, capsys):
    assert main([flag]) == 0
    assert capsys.readouterr().out == f"orthoshard {orthoshard.__version__}\n"


@pytest.mark.parametrize(("word", "verb"), [("explian", "explain"), ("tran", "train"), ("explan", "explain")])
def test_a_misspelt_verb_has_a_hint(word, verb, capsys):
    assert main([word]) == 2
    error = capsys.readouterr().err
    assert f"there is no verb {word!r}; did you mean {verb!r}?" in error
    assert all(f"  {known}" in error for known in VERBS)


@pytest.mark.parametrize(
    ("line", "new"),
    [
        ("sweep --trials 3", "orthoshard compare --search --trials 3"),
        ("reproduce", "orthoshard compare paper"),
        ("reproduce my.toml --out x", "orthoshard compare my.toml --out x"),
        ("reproduce --only a", "orthoshard compare paper --only a"),
        ("migrate", "orthoshard explain --from-adamw lr=3e-4"),
        ("advise runs/x --json", "orthoshard explain runs/x --json"),
        ("advise --json", "orthoshard explain RUN --json"),
    ],
)
def test_an_earlier_verb_answers_with_the_new_line(line, new, capsys):
    assert main(line.split()) == 2
    assert capsys.readouterr().err == f"orthoshard: {line.split()[0]} is now: {new}\n"


FLAGS_THAT_ARE_WRONG = {
    "train": "--stpes 3",
    "data": "shakespeare --vocab 3",
    "train ": "--rank-fraction 1/0",
    "train  ": "--scalar-lr x",
    "compare": "--jobs x",
    "compare paper": "--grid huge",
    "compare --search": "--trails 3",
    "plan": "--dtype float8",
    "explain": "--mesh",
    "explain --from-muon": "--mesh fsdp=2",
    "explain run": "--jsn",
    "bench": "--modle tiny",
    "report": "--titel x",
}


@pytest.mark.parametrize("form", FLAGS_THAT_ARE_WRONG)
def test_a_wrong_flag_is_one_sentence(form, capsys):
    with pytest.raises(SystemExit) as end:
        main([*form.split(), *FLAGS_THAT_ARE_WRONG[form].split()])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"orthoshard {form.split()[0]}")
    assert error.endswith("--help.\n")
    assert "<" not in error


def test_the_text_of_a_flag_is_broken_where_it_is_shown_alone():
    """And not where its source is: tyro would take the indent of a next line for a layout."""
    importlib.import_module("orthoshard.lab.verb")
    texts = tyro._docstrings.parse_docstring_from_object(OptimizerConfig)
    assert len(texts) > 5
    assert not any("\n" in text for text in texts.values())


def test_help_fits_one_screen(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80


def test_a_word_like_no_verb_has_none(capsys):
    assert main(["zzz"]) == 2
    assert "there is no verb 'zzz'.\n" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_ctrl_c_is_one_line(verb, monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module(VERBS[verb][0]), "main", interrupted)
    assert main([verb]) == 130
    assert capsys.readouterr().err == f"orthoshard {verb}: stopped.\n"


def test_a_reader_that_has_enough_ends_it_quietly(monkeypatch, capsys):
    """As under ``| head -1``: nobody holds the other end of the pipe."""
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(importlib.import_module(VERBS["explain"][0]), "main", lambda argv: print("a line"))
    with open(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["explain"]) == 141
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


def test_a_sign_that_the_output_lacks_ends_nothing(monkeypatch):
    """As under PYTHONIOENCODING=ascii."""
    monkeypatch.setattr(importlib.import_module(VERBS["explain"][0]), "main", lambda argv: print("2 \u00d7 3 \u2013 4"))
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert main(["explain"]) == 0
    assert shown.getvalue() == b"2 ? 3 ? 4\n"


def test_the_readme_lists_the_verbs_as_help_does():
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert all(f"\northoshard {verb:<9}{what}\n" in readme for verb, (_, what) in VERBS.items())


@pytest.mark.parametrize("hidden", [HIDDEN, FLAGS], ids=["imported deep", "flags"])
def test_what_is_not_installed_is_named_with_its_extra(hidden):
    """At whatever depth a package is imported; what reads flags before torch, which takes seconds and may warn."""
    verbs = {
        "train": ["--model", "nano", "--out", "never"],
        "compare": ["--out", "never"],
        "explain": ["--model", "nano"],
        "plan": ["--model", "nano"],
        "report": [],
        "bench": ["--replicas", "2", "--model", "tiny"],
    }
    script = (
        "import sys\n"
        "finder = sys.meta_path[-1]\n"
        "class Hide:\n"
        "    def find_spec(self, name, *rest):\n"
        f"        return None if name.partition('.')[0] in {hidden} else finder.find_spec(name, *rest)\n"
        "sys.meta_path[-1] = Hide()\n"
        "from orthoshard.__main__ import main\n"
        f"print([main([verb, *rest]) for verb, rest in {verbs}.items()], 'torch' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=120)
    assert run.stdout == f"{[2] * len(verbs)} {hidden is HIDDEN}\n", run.stderr
    lines = run.stderr.splitlines()
    assert len(lines) == len(verbs), run.stderr
    for line, verb in zip(lines, verbs, strict=True):
        assert line.startswith(f"orthoshard {verb}")
        assert line.rstrip(".").endswith("pip install 'orthoshard[lab]'")


def test_the_packages_that_are_hidden_are_those_of_the_extra():
    extras = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert {line.partition(">")[0] for line in extras["lab"]} == FLAGS | HIDDEN
