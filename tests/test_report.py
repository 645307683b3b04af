"""The page of a tracked run: well-formed, whole in itself, escaped, and saying no more than the log does."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import example, given, settings, strategies as st

from eigenfunc import courses
from eigenfunc.cli import main
from eigenfunc.errors import FileError
from eigenfunc.report import render, write_report
from eigenfunc.runlog import Run, bottom, certified, of_limit, read_run, top

VOID = {"meta", "br", "img", "link", "input", "hr"}
SVG = "{http://www.w3.org/2000/svg}"


class Page(HTMLParser):
    """Tags must nest; collects the text of cells by table row, all attributes, and the tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tables: list[list[list[str]]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def record(step: int, values: list[Any], **rest: Any) -> dict[str, Any]:
    """A line as the tracker writes it."""
    return {
        "type": "record", "step": step, "values": values, "bounds": [1e-5] * len(values),
        "residuals": [1e-6] * len(values), "converged": [True] * len(values), "kind": "look", "which": "LA",
        "status": "converged", "matrix": "hessian", "ids": list(range(len(values))), "overlaps": [], "trace": 20.0,
        "trace_stderr": 1.5, "gradient_share": 0.75, "rate": 0.1, "limit": 20.0, "matvecs": 40, "verification": 10,
        "passes": 40, "seconds": 0.5, "finite": True, "alerts": [],
    } | rest  # fmt: skip


def alert(step: int, message: str, rule: str = "stability") -> dict[str, Any]:
    return {
        "type": "alert", "step": step, "rule": rule, "message": message, "value": 21.0, "threshold": 20.0,
        "certainty": "certified",
    }  # fmt: skip


def log(folder: Path, lines: list[dict[str, Any]], name: str = "run.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
    return path


def plain_run() -> list[dict[str, Any]]:
    glance = {"kind": "glance", "converged": [False, False], "status": "glance", "trace": None, "gradient_share": None}
    return [
        record(0, [12.0, 3.0]),
        record(10, [15.0, 4.0], **glance),
        record(20, [21.0, 5.0]),
        alert(20, "λ₁ = 21 is 1.05 × the stability limit 20"),
        record(30, [22.0, 5.0], converged=[True, False], status="not converged"),
        record(40, [], bounds=[], converged=[], ids=[], finite=False, status="a parameter holds NaN or infinity"),
    ]


def test_the_page_holds_every_line_of_the_log_and_its_figures(tmp_path: Path) -> None:
    path = write_report(log(tmp_path, plain_run()))
    assert path == tmp_path / "run.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("svg") == page.tags.count("figure") == page.tags.count("figcaption") == 4
    alerts, looks = page.tables
    assert alerts[1] == ["20", "stability", "λ₁ = 21 is 1.05 × the stability limit 20", "certified"]
    heads, rows = looks[0], looks[1:]
    column = {name: [row[i] for row in rows] for i, name in enumerate(heads)}
    assert column["step"] == ["0", "10", "20", "30", "40"]
    assert column["kind"] == ["look", "glance", "look", "look", "look"]
    assert column["largest λ"] == ["12 ± 1e-05", "≥ 15", "21 ± 1e-05", "≥ 22", ""]  # one side only, unless certified
    assert column["converged"] == ["2 of 2", "–", "2 of 2", "1 of 2", "0 of 0"]
    assert column["λ / limit"] == ["0.6", "0.75", "1.05", "1.1", ""]
    assert column["trace"][:2] == ["20 (stderr 1.5)", ""]
    assert column["status"][-1] == "a parameter holds NaN or infinity"
    assert "smallest λ" not in heads
    assert "4 looks and 1 glance from step 0 to 40" in page.words
    assert "200 products in 2.5 s" in page.words


def test_the_figures_are_sound_svg_that_say_what_they_show(tmp_path: Path) -> None:
    text = render(read_run(log(tmp_path, plain_run())), "run")
    parts = [part.split("</svg>")[0] for part in text.split("<svg ")[1:]]
    identities: list[str] = []
    for part in parts:
        tree = ElementTree.fromstring("<svg " + part + "</svg>")
        assert tree.get("role") == "img"
        assert len(tree.get("aria-label") or "") > 20
        assert len(list(tree.iter(f"{SVG}path"))) > 10
        identities += [e.get("id") or "" for e in tree.iter(f"{SVG}clipPath")]
    assert len(set(identities)) == len(identities) > 0  # no figure clips another


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    text = render(read_run(log(tmp_path, plain_run())), "run")
    page = Page(text)
    assert not {"script", "link", "iframe", "img", "object", "embed", "base"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "action", "srcset", "data"):
            assert (value or "").startswith("#"), (name, value)
    for name, value in page.attributes:
        if "http" in (value or ""):
            assert name.startswith("xmlns")
    assert "<!DOCTYPE svg" not in text
    assert "@import" not in text
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in page.attributes


HOSTILE = "<script>alert(1)</script>\"'& </td></table><img src=x onerror=alert(1)>\x00\x1b[31m"


def test_names_and_messages_are_escaped(tmp_path: Path) -> None:
    lines = [
        *plain_run(),
        alert(50, HOSTILE, rule=HOSTILE),
        record(50, [1.0], status=HOSTILE, matrix=HOSTILE, kind="look"),
    ]
    text = render(read_run(log(tmp_path, lines)), HOSTILE)
    page = Page(text)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert "\x00" not in text
    assert "\x1b" not in text
    seen = HOSTILE.replace("\x00", " ").replace("\x1b", " ")
    assert page.tables[0][-1][1:3] == [seen, seen]
    assert page.words.count("<script>alert(1)</script>") == 6  # title, heading, matrix, rule, message, status


FLOATS = st.one_of(
    st.floats(-1e6, 1e6), st.sampled_from(["nan", "inf", "-inf", 0.0, 1e-300, -1e300, 5e-324]), st.integers(-5, 5)
)
MAYBE = st.one_of(st.none(), FLOATS)
ERRORS = st.one_of(st.floats(0, 1e6), st.sampled_from(["nan", "inf", 0, 1e300]))


@st.composite
def entries(draw: st.DrawFn) -> dict[str, Any]:
    step = draw(st.integers(0, 50))
    if draw(st.booleans()) and draw(st.booleans()):
        return alert(step, draw(st.text(max_size=20)), draw(st.text(max_size=8)))
    values = draw(st.lists(FLOATS, max_size=3))
    return record(
        step,
        values,
        bounds=draw(st.lists(ERRORS, min_size=len(values), max_size=len(values))),
        converged=draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))),
        ids=draw(st.lists(st.integers(0, 4), min_size=len(values), max_size=len(values), unique=True)),
        kind=draw(st.sampled_from(["look", "glance"])),
        which=draw(st.sampled_from(["LA", "SA", "LM", "BE"])),
        **{name: draw(MAYBE) for name in ("trace", "gradient_share", "rate", "limit")},
        trace_stderr=draw(st.one_of(st.none(), ERRORS)),
    )


@given(st.lists(entries(), min_size=1, max_size=5))
@example([record(0, [0.0], bounds=[1e300]), record(0, [1.0, 101.0], bounds=[0.0, 0.0])])
@settings(max_examples=8, deadline=None)
def test_any_log_makes_a_page(lines: list[dict[str, Any]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        run = read_run(log(Path(folder), lines))
        page = Page(render(run, "run"))
    assert sum(len(table) - 1 for table in page.tables) == len(lines)


def test_ends_of_the_spectrum_are_only_claimed_where_they_are_known() -> None:
    def ends(values: list[float], which: str) -> tuple[float | None, float | None]:
        line = record(0, values, which=which)
        return tuple(None if end is None else end.value for end in (top(line), bottom(line)))  # type: ignore[return-value]

    assert ends([3.0, 1.0], "LA") == (3.0, None)
    assert ends([-3.0, 1.0], "SA") == (None, -3.0)
    assert ends([3.0, -1.0], "BE") == (3.0, -1.0)
    assert ends([3.0], "BE") == (3.0, None)
    assert ends([5.0, -4.0], "LM") == (5.0, -4.0)
    assert ends([5.0, 4.0], "LM") == (5.0, None)
    assert ends([-5.0, -4.0], "LM") == (None, -5.0)  # the largest one may be any number below 4
    assert ends([], "LA") == (None, None)
    assert of_limit(record(0, [5.0], limit=math.inf)) is None
    assert of_limit(record(0, [5.0], limit=10.0)) == 0.5
    assert not certified(record(0, [5.0], kind="glance"))


def test_a_last_line_that_was_cut_short_is_left_out_and_said(tmp_path: Path) -> None:
    path = log(tmp_path, plain_run())
    path.write_text(path.read_text() + '{"type": "record", "step": 50, "val')
    run = read_run(path)
    assert run.cut
    assert len(run.records) == 5
    assert "cut short" in Page(render(run, "run")).words
    twice = log(tmp_path, [record(0, [1.0]), record(5, [1.0]), record(0, [2.0])], "twice.jsonl")
    assert "the steps start over 1 time: the log holds several runs" in render(read_run(twice), "twice")


BROKEN = {
    "empty": "",
    "no JSON": "λ = 3\n",
    "cut in the middle": '{"type": "rec\n{"type": "record", "step": 1}\n',
    "another type": '{"type": "loss", "step": 1}\n',
    "a number": "3\n",
    "no step": '{"type": "record", "values": []}\n',
    "columns differ": '{"type": "record", "step": 1, "values": [1.0, 2.0], "bounds": [0.1]}\n',
    "a negative bound": '{"type": "record", "step": 1, "values": [1.0], "bounds": [-0.1]}\n',
    "words": '{"type": "record", "step": 1, "values": ["large"], "bounds": [0.1]}\n',
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_log_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(BROKEN[name])
    with pytest.raises(FileError, match=r"run\.jsonl"):
        read_run(path)
    assert main(["report", str(path)]) == 2
    assert "run.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "run.html").exists()


def test_the_command_line_writes_the_page_and_tells_whether_looks_are_certified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = log(tmp_path, plain_run())
    assert main(["report", str(path)]) == 3
    assert f"5 records and 1 alerts; wrote {tmp_path / 'run.html'}" in capsys.readouterr().out
    good = log(tmp_path, plain_run()[:4], "good.jsonl")
    assert main(["report", str(good)]) == 0
    assert main(["report", str(tmp_path / "nowhere.jsonl")]) == 2
    (tmp_path / "good.html").unlink()
    (tmp_path / "good.html").mkdir()
    assert main(["report", str(good)]) == 2


@pytest.mark.parametrize(("tops", "scale"), [((5.0, 4.0, 6.0), "linear"), ((0.01, 4.0, 60.0), "other")])
def test_the_axis_is_logarithmic_for_the_largest_values_alone(tops: tuple[float, ...], scale: str) -> None:
    records = [{"step": i, "values": [top, 1e-4], "bounds": [0.0, 0.0], "kind": "glance"} for i, top in enumerate(tops)]
    drawn = courses.eigenvalues(Run(records, [], False))
    assert drawn is not None
    assert (drawn[0].get_yscale() == "linear") == (scale == "linear")
