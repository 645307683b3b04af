"""Which leaves of a tree are meant: by their names, one by one or in groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from eigenfunc import tree
from eigenfunc.errors import InputError
from eigenfunc.tree import Tree

Select: TypeAlias = Callable[[str], bool] | str | Sequence[str]
By: TypeAlias = Callable[[str], str] | str | Sequence[str]


def chosen(all_names: Sequence[str], select: Select, what: str) -> list[str]:
    """Those of `all_names` that a predicate accepts, or that match a glob pattern, a name or a dotted prefix.

    Raises `InputError` where nothing is selected or one pattern selects nothing.
    """
    if callable(select):
        picked = [name for name in all_names if select(name)]
        if not picked:
            raise InputError(f"{what}: the predicate selects none of {_some(all_names)}")
        return picked
    patterns = [select] if isinstance(select, str) else list(select)

    def matches(name: str, pattern: str) -> bool:
        return fnmatchcase(name, pattern) or name.startswith(pattern + ".")

    for pattern in patterns:
        if not any(matches(name, pattern) for name in all_names):
            raise InputError(f"{what}: '{pattern}' selects none of {_some(all_names)}")
    if not patterns:
        raise InputError(f"{what}: an empty selection; the names are {_some(all_names)}")
    return [name for name in all_names if any(matches(name, pattern) for pattern in patterns)]


def grouped(x: Tree, by: By, what: str) -> dict[str, list[str]]:
    """The names of the leaves by group, groups and names in the order in which dicts were filled.

    `by` is "module", which groups by the dotted prefix before the last name ("" where there is none; what belongs to a
    parametrisation of torch counts as its module's own); "parameter", each leaf by itself; a function from a name to
    the name of its group; or a list of selections as `chosen` takes them, a group each, where leaves that none selects
    are left out.

    Raises `InputError` for anything else, and where a selection selects nothing.
    """
    all_names = tree.filled_names(x)
    if isinstance(by, str) and by not in _GROUPS:
        raise InputError(f"{what} must be 'module', 'parameter', a function or a list of patterns, got {by!r}")
    if not isinstance(by, str) and not callable(by):
        return {pattern: chosen(all_names, pattern, what) for pattern in by}
    group = _GROUPS[by] if isinstance(by, str) else by
    found: dict[str, list[str]] = {}
    for name in all_names:
        key = group(name)
        if not isinstance(key, str):
            raise InputError(f"{what}: the function gives a {type(key).__name__} for '{name}', not the name of a group")
        found.setdefault(key, []).append(name)
    return found


def _module(name: str) -> str:
    owner = name.rpartition(".")[0]
    return f".{owner}.".partition(".parametrizations.")[0].strip(".")


_GROUPS: dict[str, Callable[[str], str]] = {"module": _module, "parameter": lambda name: name}


def _some(all_names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in all_names[:8])
    return shown + (f", … ({len(all_names)} in all)" if len(all_names) > 8 else "")
