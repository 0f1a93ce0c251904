"""Docstrings of functions begin with a verb in the imperative (PEP 257), as far as a list of words can tell."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import orthoshard

ROOT = Path(orthoshard.__file__).parent

# Words that begin sentences and are no verbs. A word that ends in one s is a plural or a third person.
NO_VERBS = """
a about after all an and any anything as at before below both but by can each either every everything few first for
from half here how if in is it its last least less many may more most neither never no none not nothing now of on once
one only or other own same several so some such than that the their then there these they this those three through to
two under until what when where whether which while who whole whose why with within without
"""


def functions() -> Iterator[tuple[str, str]]:
    """Yield where each function is, and the first word of its docstring."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            text = ast.get_docstring(node)
            if text and not any("property" in ast.unparse(each) for each in node.decorator_list):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", text.split(maxsplit=1)[0]


def test_they_do():
    found, no_verbs = list(functions()), set(NO_VERBS.split())
    assert len(found) > 500
    words = ((where, word.lower()) for where, word in found if re.fullmatch(r"[A-Z][a-z]+|A", word))  # others: formulas
    wrong = [f"{where}: {word}" for where, word in words if word in no_verbs or re.search(r"[^s]s$", word)]
    assert not wrong, "\n".join(wrong)
