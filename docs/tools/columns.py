"""Docstrings of this project for mkdocstrings: columns of names and what they mean become definition lists."""

from __future__ import annotations

import re
from typing import Any

import griffe

_NAME = re.compile(r"[\w.]+(, [\w.]+)*|\"[^\"]+\"|[\w ]{1,16}")
_CODE = re.compile(r"(`[^`]*`)")


class Columns(griffe.Extension):
    """Rewrites every docstring once it is loaded."""

    def on_object(self, *, obj: griffe.Object, **rest: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    return "\n\n".join(_paragraph(part.split("\n")) for part in re.split(r"\n\s*\n", text))


def _paragraph(lines: list[str]) -> str:
    width = _width(lines)
    if width is None:
        return "\n".join(_escaped(line.strip()) for line in lines)
    out: list[str] = []
    for i, line in enumerate(lines):
        name, rest = line[:width], line[width:]
        if not name.strip():
            out.append("    " + _escaped(rest.strip()))
        elif _is_name(line, width):
            out.append(f"\n`{name.strip()}`\n:   {_escaped(rest)}")
        else:  # what follows is prose again
            out.append("\n<!-- -->\n\n" + _paragraph(lines[i:]))
            break
    return "\n".join(out)


def _width(lines: list[str]) -> int | None:
    """Where the second column begins, if the lines begin with two columns."""
    gap = re.match(r"(\S.*?)(  +)\S", lines[0])
    if gap is not None:
        width = gap.end() - 1
    else:  # the widest name is one space away from what it means: lines below it tell
        below = [len(line) - len(line.lstrip()) for line in lines[1:2]]
        after = [m.end() - 1 for line in lines[1:2] if (m := re.match(r"(\S+)(  +)\S", line))]
        width = next((x for x in below + after if x), 0)
    return width if width and _is_name(lines[0], width) else None


def _is_name(line: str, width: int) -> bool:
    if len(line) <= width or line[width - 1] != " " or line[width] == " ":
        return False
    return _NAME.fullmatch(line[:width].strip()) is not None


def _escaped(text: str) -> str:
    """Stars and angle brackets outside code are themselves."""
    parts = _CODE.split(text)
    parts[::2] = [part.replace("*", r"\*").replace("<", "&lt;") for part in parts[::2]]
    return "".join(parts)
