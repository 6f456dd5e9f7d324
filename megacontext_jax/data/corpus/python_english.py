"""Real English that every machine has: the docstrings and the help topics of its Python installation.

Collected at run time, nothing is stored in the project; the same Python version gives the same text.
"""

import ast
import functools
import re
import sysconfig
import warnings
import zlib
from pathlib import Path

from megacontext_jax.errors import UserError

_SKIP = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__", "turtledemo", "lib2to3"}
_SKIP |= {"ensurepip", "pydoc_data", "msilib"}
_LEAST = 200_000  # characters; a stripped installation without sources has almost none


@functools.cache
def passages(target_chars: int = 700) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(training, held-out) passages of about `target_chars` characters, in a fixed order.

    Every text goes to one side as a whole, and a paragraph that several texts share is taken once. Raises
    UserError where the installation carries too little text.
    """
    sides: tuple[list[str], list[str]] = ([], [])
    seen: set[str] = set()
    for text in _texts():
        digest = zlib.crc32(text.encode(errors="replace"))
        sides[digest % 16 == 0].extend(_cut(text, target_chars, seen))
    if sum(map(len, sides[0])) < _LEAST:
        raise UserError(
            f"The Python installation at {sysconfig.get_paths()['stdlib']} carries no source files to take"
            " English from; use a standard Python build or give your own text with --data-dir."
        )
    return tuple(sides[0]), tuple(sides[1])


def _texts() -> list[str]:
    """Help topics first, then docstrings in path order."""
    texts = []
    try:
        from pydoc_data.topics import topics

        texts += [topics[name] for name in sorted(topics)]
    except ImportError:
        pass
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if not _SKIP & set(path.relative_to(root).parts):
            texts += _docstrings(path)
    return texts


def _docstrings(path: Path) -> list[str]:
    try:
        source = path.read_text(encoding="utf-8")
        if '"""' not in source:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (
        OSError,
        SyntaxError,
        ValueError,
    ):  # a file in another encoding, or made to fail: not English for us
        return []
    found: list[str] = []
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        text = ast.get_docstring(node)
        if text and len(text) > 120:
            found.append(text)
        inner = [n for n in node.body if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
        nodes += reversed(inner)
    return found


def _cut(text: str, target_chars: int, seen: set[str]) -> list[str]:
    """Prose paragraphs of the text joined to passages, without code, tables, grammar and what was `seen`."""
    out: list[str] = []
    current = ""
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(paragraph.split())
        letters = sum(c.isalpha() or c == " " for c in line)
        if len(line) < 40 or letters < 0.85 * len(line) or ">>>" in line or not line.isascii():
            continue
        if line in seen:
            continue
        seen.add(line)
        if current and len(current) + len(line) > target_chars:
            out.append(current)
            current = ""
        current = f"{current}\n{line}" if current else line
        while len(current) > 2 * target_chars:
            cut = current.rfind(". ", 0, target_chars) + 1 or target_chars
            out.append(current[:cut])
            current = current[cut:].strip()
    if current:
        out.append(current)
    return out
