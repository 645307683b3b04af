"""A tracked training run as one HTML file that needs nothing else: figures, alerts, and a table of what was seen."""

from __future__ import annotations

import html
import io
import itertools
import os
import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from eigenfunc._version import __version__
from eigenfunc.canvas import GRID
from eigenfunc.courses import FIGURES
from eigenfunc.errors import FileError
from eigenfunc.runlog import End, Run, bottom, certified, of_limit, read_run, top

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 70rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2rem; }
figure { margin: 1rem 0; } figcaption { color: #555; font-size: .9rem; } svg { max-width: 100%; height: auto; }
.wide { overflow-x: auto; max-height: 36rem; overflow-y: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th { position: sticky; top: 0; background: #fff; } td.text, th.text { text-align: left; }
td.long { white-space: normal; overflow-wrap: anywhere; min-width: 16rem; }
tr.open td { color: #8a4b00; } footer { margin-top: 3rem; color: #555; font-size: .85rem; }
"""


def write_report(source: str | PathLike[str], target: str | PathLike[str] | None = None) -> Path:
    """Write the log `source` as a page of HTML; default: beside it, under the same name with .html.

    The page holds everything in itself and loads nothing. Raises `FileError` as `read_run` does and where the page
    cannot be written, `InputError` without matplotlib.
    """
    source = Path(source)
    path = source.with_suffix(".html") if target is None else Path(target)
    page = render(read_run(source), source.name)
    aside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(page, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error}") from None
    return path


def render(run: Run, name: str) -> str:
    """The page, as text. `name` and all that comes out of the log is escaped."""
    title = f"Spectrum of {name}"
    steps = [entry["step"] for entry in (*run.records, *run.alerts)]
    figures = [_figure(*found, steps) for draw in FIGURES if (found := draw(run)) is not None]
    body = [
        f"<h1>{_safe(title)}</h1>",
        f"<p>{_safe(_summary(run))}</p>",
        "<h2>Alerts</h2>",
        _alert_table(run.alerts),
        "<h2>Course</h2>" if figures else "",
        *figures,
        "<h2>Looks and glances</h2>",
        "<p>A look is certified: λ ± its bound. A glance, and a look that has not converged, knows one side only: "
        "the largest eigenvalue is at least, the smallest at most, what was seen, up to rounding. The limit is the "
        "largest eigenvalue that the learning rate allows.</p>",
        _record_table(run.records),
        f"<footer>Made by eigenfunc {__version__}. This file loads nothing.</footer>",
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = (
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_safe(title)}</title><style>{_STYLE}</style>"
    )
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"


def _summary(run: Run) -> str:
    kinds = [record.get("kind") for record in run.records]
    steps = [record["step"] for record in run.records]
    looks, glances = kinds.count("look"), kinds.count("glance")
    parts = [f"{looks} look{'s' * (looks != 1)} and {glances} glance{'s' * (glances != 1)}"]
    if steps:
        parts[0] += f" from step {min(steps):,} to {max(steps):,}"
        matrices = sorted({str(record.get("matrix", "hessian")) for record in run.records})
        parts.append(f"matrix: {', '.join(matrices)}")
        matvecs = sum(int(record.get("matvecs") or 0) for record in run.records)
        seconds = sum(record.get("seconds") or 0.0 for record in run.records)
        parts.append(f"{matvecs:,} products in {seconds:.3g} s")
    parts.append(f"{len(run.alerts)} alert{'s' * (len(run.alerts) != 1)}")
    if again := sum(after < before for before, after in itertools.pairwise(steps)):
        parts.append(f"the steps start over {again} time{'s' * (again != 1)}: the log holds several runs")
    if run.cut:
        parts.append("the last line of the log is cut short and left out")
    return "; ".join(parts) + "."


def _alert_table(alerts: Sequence[dict[str, Any]]) -> str:
    if not alerts:
        return "<p>None was raised.</p>"
    rows = [
        [str(alert["step"]), *(str(alert.get(name, "")) for name in ("rule", "message", "certainty"))]
        for alert in alerts
    ]
    return _table(["step", "rule", "what was seen", "certainty"], rows, text=(1, 2, 3), long=2)


def _record_table(records: Sequence[dict[str, Any]]) -> str:
    rows, open_ = [], []
    for record in records:
        trace, stderr = record.get("trace"), record.get("trace_stderr")
        share, portion = record.get("gradient_share"), of_limit(record)
        converged = record.get("converged") or []
        rows.append(
            [
                f"{record['step']:,}",
                str(record.get("kind", "")),
                _of_end(top(record), "≥"),
                _of_end(bottom(record), "≤"),
                f"{sum(map(bool, converged))} of {len(converged)}" if record.get("kind") == "look" else "–",
                "" if trace is None else f"{trace:.4g}" + ("" if stderr is None else f" (stderr {stderr:.2g})"),
                "" if share is None else f"{share:.3f}",
                "" if record.get("rate") is None else f"{record['rate']:.4g}",
                "" if portion is None else f"{portion:.3g}",
                f"{int(record.get('matvecs') or 0):,}",
                f"{record.get('seconds') or 0.0:.3g}",
                str(record.get("status", "")),
            ]
        )
        open_.append(record.get("kind") == "look" and not certified(record))
    heads = ["step", "kind", "largest λ", "smallest λ", "converged", "trace", "gradient in span", "rate"]
    heads += ["λ / limit", "products", "seconds", "status"]
    kept = [i for i in range(len(heads)) if any(row[i] for row in rows)]
    text = [kept.index(i) for i in (1, 11) if i in kept]
    return _table([heads[i] for i in kept], [[row[i] for i in kept] for row in rows], text=text, open_=open_)


def _of_end(end: End | None, sign: str) -> str:
    if end is None:
        return ""
    return f"{end.value:.5g} ± {end.bound:.1g}" if end.certified else f"{sign} {end.value:.5g}"


def _table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    text: Sequence[int] = (),
    long: int | None = None,
    open_: Sequence[bool] = (),
) -> str:
    kinds = [" ".join(["text"] * (i in text) + ["long"] * (i == long)) for i in range(len(heads))]
    marks = [f' class="{kind}"' if kind else "" for kind in kinds]

    def line(tag: str, cells: Sequence[str], mark: str = "") -> str:
        inner = "".join(f"<{tag}{m}>{_safe(cell)}</{tag}>" for m, cell in zip(marks, cells, strict=True))
        return f"<tr{mark}>{inner}</tr>"

    dark = list(open_) or [False] * len(rows)
    body = "".join(line("td", row, ' class="open"' * mark) for row, mark in zip(rows, dark, strict=True))
    return f'<div class="wide"><table><thead>{line("th", heads)}</thead><tbody>{body}</tbody></table></div>'


def _safe(text: str) -> str:
    """Escaped, without the control characters that HTML forbids."""
    return html.escape("".join(c if c.isprintable() else " " for c in text))


def _figure(axes: Any, words: str, steps: Sequence[int]) -> str:
    """The picture as inline SVG, without the parts that point elsewhere, over the same steps as the others."""
    margin = 0.02 * (max(steps) - min(steps)) or 1.0
    axes.set_xlim(min(steps) - margin, max(steps) + margin)
    axes.grid(color=GRID, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("training step")
    file = io.StringIO()
    axes.figure.savefig(file, format="svg", metadata={"Date": None})
    drawn = file.getvalue()
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    drawn = drawn.replace("<svg ", f'<svg role="img" aria-label="{_safe(words)}" ', 1)
    return f"<figure>{drawn}<figcaption>{_safe(words)}</figcaption></figure>"
