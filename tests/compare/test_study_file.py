"""Studies from TOML: what is read, chosen and refused; and those that come with orthoshard."""

from pathlib import Path

import pytest

from orthoshard.lab.compare import cli as compare
from orthoshard.lab.compare import rivals
from orthoshard.lab.compare.study import file as studies
from orthoshard.lab.compare.study.figures import KINDS
from orthoshard.lab.compare.study.file import Planned
from orthoshard.lab.train.errors import UserError

OPTIONS = {name: kind.options for name, kind in KINDS.items()}
DION_TAIL = Path(__file__).parents[2] / "experiments" / "dion_tail" / "study.toml"

TWO = """
[[comparison]]
name = "a"
flags = ["--model", "nano"]
minutes = 2
[[comparison]]
name = "b"
rivals = "r.toml"
[[figure]]
name = "both"
kind = "curves"
[[figure]]
name = "one"
kind = "final-loss"
comparisons = ["b"]
rivals = ["muon"]
x = "width"
[[figure]]
name = "none"
kind = "wire"
comparisons = []
"""


def load(tmp_path: Path, text: str, *more: str):
    (tmp_path / "s.toml").write_text(text)
    return studies.load(tmp_path / "s.toml", OPTIONS, more)


def test_what_a_study_says(tmp_path):
    study = load(tmp_path, TWO)
    assert study.comparisons == (Planned("a", ("--model", "nano"), None, 2), Planned("b", (), tmp_path / "r.toml"))
    both, one, none = study.figures
    assert (both.comparisons, both.rivals, both.title) == (("a", "b"), (), "both")
    assert (one.comparisons, one.rivals, one.options) == (("b",), ("muon",), {"x": "width"})
    assert none.comparisons == ()


def test_a_folder_that_is_used_is_one_more_comparison_of_every_figure_that_its_name_fits(tmp_path):
    study = load(tmp_path, TWO, "c", "b")
    assert [each.name for each in study.comparisons] == ["a", "b", "c"]
    assert [figure.comparisons for figure in study.figures] == [("a", "b", "c"), ("b",), ()]


@pytest.mark.parametrize(
    ("patterns", "run", "drawn"),
    [
        ((), ["a", "b"], ["both", "one", "none"]),
        (("a",), ["a"], ["both"]),
        (("b",), ["b"], ["both", "one"]),
        (("one",), ["b"], ["one"]),
        (("none",), [], ["none"]),
        (("*o*",), ["a", "b"], ["both", "one", "none"]),
    ],
)
def test_only(tmp_path, patterns, run, drawn):
    planned, figures = load(tmp_path, TWO).only(patterns)
    assert ([each.name for each in planned], [each.name for each in figures]) == (run, drawn)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a = [", "cannot be read"),
        ("tittle = 'x'", "did you mean 'title'"),
        ("", "names neither"),
        ("[comparison]\nname = 'a'", r"begin each comparison with a line \[\[comparison\]\]"),
        ("[[comparison]]\nflags = []", "give it a name"),
        ("[[comparison]]\nname = '../a'", "give it a name fit for a file"),
        ("[[comparison]]\nname = 'a'\nflag = []", "did you mean 'flags'"),
        ("[[comparison]]\nname = 'a'\nflags = '--model'", "a list of strings"),
        ("[[comparison]]\nname = 'a'\nflags = ['--out=x']", "is said to `orthoshard compare STUDY` itself"),
        ("[[comparison]]\nname = 'a'\nminutes = 0", "minutes is 0"),
        ("[[comparison]]\nname = 'a'\ndiagnostics = -1", "diagnostics is -1"),
        ("[[comparison]]\nname = 'a'\nrivals = 3", "the name of a TOML file"),
        ("[[comparison]]\nname = 'a'\n[[comparison]]\nname = 'a'", "two are called 'a'"),
        ("[[figure]]\nname = 'f'\nkind = 'curve'", "did you mean 'curves'"),
        ("[[figure]]\nname = 'f'\nkind = 'curves'\ncomparisons = ['a']", "no comparison 'a'"),
        ("[[figure]]\nname = 'f'\nkind = 'curves'\nx = 'width'", "no key 'x'"),
    ],
)
def test_what_is_wrong_is_a_sentence_that_names_the_file(tmp_path, text, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        load(tmp_path, text)
    assert "s.toml" in str(caught.value)


def test_only_names_what_there_is(tmp_path):
    with pytest.raises(UserError, match="no comparison or figure 'bot'; did you mean 'both'"):
        load(tmp_path, TWO).only(["bot"])


def test_the_grid_is_of_studies_that_come_with_orthoshard(tmp_path):
    assert studies.find("paper", None).name == "paper-small.toml"
    assert studies.find("paper", "large").name == "paper-large.toml"
    with pytest.raises(UserError, match="did you mean 'paper'"):
        studies.find("papr", None)
    (tmp_path / "s.toml").write_text(TWO)
    with pytest.raises(UserError, match="leave it out"):
        studies.find(str(tmp_path / "s.toml"), "large")


@pytest.mark.parametrize("path", [studies.find("paper", "small"), studies.find("paper", "large"), DION_TAIL])
def test_studies_of_this_repository_can_be_run(path):
    """Their flags are those of compare, and their rivals' files have the labels that they name."""
    study = studies.load(path, OPTIONS)
    for planned in study.comparisons:
        command = compare.parse(planned.flags)
        assert planned.rivals
        labels = [rival.label for rival in rivals.choose(rivals.load(planned.rivals), command.only)]
        assert command.reference in (None, *labels)
        assert planned.minutes
    for figure in study.figures:
        assert figure.comparisons or figure.kind == "wire"


def test_every_optimizer_of_the_paper_is_tuned_by_the_same_sweep():
    """No optimizer has a file, a sweep or seeds of its own."""
    for grid in studies.GRIDS:
        study = studies.load(studies.find("paper", grid), OPTIONS)
        tuned = [compare.parse(planned.flags) for planned in study.comparisons if planned.name != "updates"]
        assert {(command.points, command.most) for command in tuned} == {(3, 7)}
        assert all(len(command.seeds) >= 3 for command in tuned)
