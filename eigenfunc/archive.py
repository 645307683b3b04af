"""Results on disk: a folder with plain values in report.json and the tensors of one pytree in eigenvectors.safetensors.

Both are open formats: the first reads in any language, the second with safetensors alone, by the names of the leaves.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from eigenfunc import tree
from eigenfunc._version import __version__
from eigenfunc.errors import FileError, InputError, TreeError
from eigenfunc.tree import Tree

REPORT, VECTORS = "report.json", "eigenvectors.safetensors"
FORMAT = 1  # of the folder; raised when older versions can no longer read it

_KINDS: dict[type, str] = {dict: "dict", OrderedDict: "ordered dict", list: "list", tuple: "tuple"}
_BUILDERS: dict[str, Any] = {name: kind for kind, name in _KINDS.items()}


def write(folder: Path, record: dict[str, Any], vectors: Tree) -> None:
    """Save plain values and a tree of tensors into `folder`, which is made if need be; an earlier save is replaced.

    Each file is written aside and renamed, the report last, and the report holds the checksum of the tensors, so that
    a save that was cut short is never taken for a whole one. Raises `FileError` where the folder cannot be written,
    and `InputError` without safetensors.
    """
    save_file = _safetensors().save_file
    tensors = dict(zip(_labels(vectors), tree.leaves(vectors), strict=True))
    aside = folder / (VECTORS + ".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside.touch()  # so that what stands in the way is an OSError
        mode = aside.stat().st_mode  # safetensors would hide the file from all but its owner
        save_file({label: leaf.detach().cpu().contiguous() for label, leaf in tensors.items()}, aside)
        aside.chmod(mode)
        layout = {"format": FORMAT, "version": __version__, "sha256": _checksum(aside)}
        os.replace(aside, folder / VECTORS)
    except OSError as error:
        raise FileError(f"cannot write to {folder}: {error}") from None
    write_json(folder / REPORT, record | layout | {"leaves": list(tensors), "structure": _structure(vectors)})


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Plain values at full precision as strict JSON: NaN and infinities, which it lacks, become strings.

    Raises `FileError` where the file cannot be written.
    """
    aside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(strict(record), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error}") from None


def read(folder: Path, like: Tree | None = None) -> tuple[dict[str, Any], Tree]:
    """What `write` has saved, the tensors on the CPU.

    Trees of dicts, lists, tuples and bare tensors come back as they were. For containers of other types `like`, a
    tree of that structure, is needed; where it is given, the tensors move to its device.

    Raises `FileError` where files are missing, damaged, of different saves or of a later format, `TreeError` where
    `like` does not fit, and `InputError` where it is missing, or safetensors is.
    """
    load_file = _safetensors().load_file
    with reading(folder):
        record = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        number, labels, structure = record["format"], record["leaves"], record["structure"]
        if number > FORMAT:
            raise FileError(
                f"{folder} was written by eigenfunc {record['version']} in format {number}, this version reads up to "
                f"{FORMAT}: update eigenfunc"
            )
        if _checksum(folder / VECTORS) != record["sha256"]:
            raise FileError(f"{folder / VECTORS} is damaged or of another save than {REPORT}: its checksum differs")
        tensors = load_file(folder / VECTORS)
        leaves = [tensors[label] for label in labels]
        if like is None and structure is not None:
            return record, _built(structure, leaves)
    if like is None:
        raise InputError(
            f"the vectors in {folder} are in containers that only your program knows; pass a tree of that structure, "
            "the parameters say: like=params"
        )
    if _labels(like) != labels:
        raise TreeError(f"`like` has the leaves {_labels(like)}, the vectors in {folder} {labels}")
    refs, rebuild = tree.flatten(like)
    for label, leaf, ref in zip(labels, leaves, refs, strict=True):
        if leaf.shape[1:] != ref.shape:
            raise TreeError(f"`like`: leaf '{label}' has shape {tuple(ref.shape)}, the saved {tuple(leaf.shape[1:])}")
    return record, rebuild([leaf.to(ref.device) for leaf, ref in zip(leaves, refs, strict=True)])


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """What goes wrong inside, because files are missing or hold something else, is a `FileError`."""
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"nothing saved to read in {folder}: {error}") from None
    except (ValueError, TypeError, LookupError) as error:
        raise FileError(f"{folder / REPORT} is damaged, or no report of eigenfunc: {error!r}") from None


def _labels(vectors: Tree) -> list[str]:
    """One name for each leaf, in the order of `tree.leaves`: its own, numbered where two are the same."""
    labels = [name or "vector" for name in tree.names(vectors)]
    if len(set(labels)) == len(labels) and "__metadata__" not in labels:  # a word that safetensors keeps to itself
        return labels
    return [f"{i}: {label}" for i, label in enumerate(labels)]


def _structure(vectors: Tree) -> Any:
    """The containers as lists that JSON can hold, leaves as their indices; None for what those cannot express."""
    flat, rebuild = tree.flatten(vectors)
    try:
        return _described(rebuild(list(range(len(flat)))))
    except TypeError:
        return None


def _described(node: Any) -> Any:
    if type(node) is int:
        return node
    if node is None:
        return ["none", []]
    kind = _KINDS.get(type(node))
    if kind is None:
        raise TypeError
    if not isinstance(node, dict):
        return [kind, [_described(child) for child in node]]
    if any(type(key) not in (str, int) for key in node):
        raise TypeError
    return [kind, [[key, _described(child)] for key, child in node.items()]]


def _built(structure: Any, leaves: list[Tensor]) -> Tree:
    if isinstance(structure, int):
        return leaves[structure]
    kind, children = structure
    if kind == "none":
        return None
    if "dict" in kind:
        return _BUILDERS[kind]((key, _built(child, leaves)) for key, child in children)
    return _BUILDERS[kind](_built(child, leaves) for child in children)


def strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise InputError("saving and loading need safetensors: pip install 'eigenfunc[export]'") from error
    return safetensors.torch
