"""Checkpoints of several processes, each with its part of the basis: whenever one dies, the same bits in the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import parts, ranks


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return ranks.together("parted", 2, tmp_path_factory.mktemp("parted"))


@pytest.mark.parametrize("name", list(parts.PARTED))
def test_a_run_that_one_process_stops_ends_like_one_that_was_not(pair: list[Any], name: str) -> None:
    for found in pair:
        assert len(found[name]) >= 2
        assert all(found[name])


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("other steps", "not of one step of one run"),
        ("one missing", "none of rank 1"),
        ("other problem", "tol was 1e-08 there and is 0.001 here"),
        ("other matrix", "of another matrix"),
        ("other matrix, afresh", "of another matrix"),
        ("no group", "is of several processes"),
        ("of one process", "is of one process"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_all(pair: list[Any], what: str, words: str) -> None:
    for found in pair:
        assert found[what][0] == "CheckpointError"
        assert words in found[what][1]


def test_another_number_of_processes_is_refused(pair: list[Any]) -> None:
    kind, said = pair[0]["fewer processes"]
    assert kind == "CheckpointError"
    assert "of 2 processes, and here are 1" in said


def test_a_part_that_is_damaged_is_told_to_all(pair: list[Any]) -> None:
    assert pair[1]["one damaged"][0] == "CheckpointError"
    assert pair[0]["one damaged"][0] == "DistributedError"
    assert "rank 1: CheckpointError" in pair[0]["one damaged"][1]


@pytest.mark.parametrize("when", ["renamed in part", "written in part"])
def test_files_of_processes_that_died_while_they_saved_fit_together(pair: list[Any], when: str) -> None:
    for found in pair:
        assert found[when]
        assert not found["left aside"]


def test_a_file_that_one_process_cannot_rename_is_told_to_all_at_once(tmp_path: Path) -> None:
    for found in ranks.together("unrenamed", 2, tmp_path):
        kind, said, _ = found[1]  # the very first ends the run
        assert kind == "CheckpointError"
        assert "Permission denied" in said
        kind, _, warned = found[3]  # a later one does not
        assert kind == "Stopped"
        assert any("goes on without being saved" in words and "Permission denied" in words for words in warned)
        assert found["same"]


def test_a_run_of_which_a_process_is_killed_goes_on(tmp_path: Path) -> None:
    for kill in ({"product": 9}, {"save": 4}):
        (tmp_path / "kill").write_text(json.dumps(kill))
        (tmp_path / "meet").unlink(missing_ok=True)
        codes = ranks.wait(ranks.start("killed", 2, tmp_path), tmp_path, 100.0)
        assert codes == [7, -9], ranks.errors(tmp_path)
        assert "DistributedError" in (tmp_path / "0.err").read_text()
    (tmp_path / "kill").write_text("{}")
    (tmp_path / "meet").unlink(missing_ok=True)
    for found in ranks.together("killed", 2, tmp_path):
        assert found["bits"] == found["whole"]
        assert found["calls"] < json.loads(found["bits"][0])["matvecs"] - 8


def test_a_budget_is_that_of_each_process_and_the_smallest_counts(tmp_path: Path) -> None:
    first, second = ranks.together("budgeted", 2, tmp_path)
    alone, free = first["alone"], first["free"]
    assert free.basis_bytes == second["free"].basis_bytes == (alone.basis_bytes + 4 * 24) / 2
    assert free.memory_bytes < alone.memory_bytes
    assert "the part of one of 2 processes" in str(free)
    for name in parts.BUDGETED:
        assert first[name][0] == second[name][0]
        for planned, (held, allowed), size, true in (first[name], second[name]):
            assert held <= allowed
            assert size == planned.basis_size
            assert true
    planned = first["smaller"][0]
    assert planned.basis_size < free.basis_size
    assert first["smaller"][1][1] <= first["budget"] < second["budget"]
    assert first["one has a budget"] == second["one has a budget"] < free.basis_size
    assert first["refused"] == second["refused"]
    assert first["refused"][0] == "BudgetError"
