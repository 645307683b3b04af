"""The tables of docs/science.md, and the figures in them as plain numbers."""

from __future__ import annotations

import re
import statistics
from functools import partial
from pathlib import Path

from benchmarks.science import edge
from benchmarks.science.alarms import DATA, HARMLESS, OPTIMISERS
from benchmarks.science.outliers import LATE
from benchmarks.science.rules import MIXES
from benchmarks.science.setting import Json
from eigenfunc.stochastic.density import Density


def _span(values: list[float], digits: str = ".2f") -> str:
    low, high = (format(end, digits) for end in (min(values), max(values)))
    return low if low == high else f"{low} – {high}"


def counts(found: Json) -> str:
    lines = [
        "| loss, classes | expected | Hessian has exactly that | Gauss–Newton | λ_k/λ_k+1 there | overlap |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in found["counts"].items():
        rows = [row for run in runs for row in run["rows"]]
        right = [sum(row[key] == row["expected"] for row in rows) for key in ("hessian", "ggn")]
        lines.append(
            f"| {name.replace('ce', 'cross-entropy').replace('mse', 'squared error')} | {rows[0]['expected']} | "
            f"{right[0]} of {len(rows)} | {right[1]} of {len(rows)} | {_span([row['gap'] for row in rows], '.1f')} | "
            f"{_span([row['overlap'] for row in rows], '.3f')} |"
        )
    return "\n".join(lines)


def late(found: Json) -> str:
    """The counts where the window has been left, level by level, over the seeds."""
    heads = [f"loss {level}" for level in LATE]
    lines = [f"| cross-entropy, classes | expected | {' | '.join(heads)} |", "|---|---|" + "---|" * len(LATE)]
    for classes, runs in found["late"].items():
        levels = zip(*(run["rows"] for run in runs), strict=True)
        cells = [", ".join(str(row["hessian"]) for row in rows) for rows in levels]
        lines.append(f"| {classes} | {int(classes) - 1} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shares(found: Json) -> str:
    """The first two steps by themselves; the others together, with their medians."""
    lines = ["| step | full gradient | gradient of a batch of 64 | random vector |", "|---|---|---|---|"]
    looks = list(zip(*(run["rows"] for run in found["shares"]), strict=True))
    for looked in ([looks[0]], [looks[1]], looks[2:]):
        rows = [row for look in looked for row in look]
        when = f"{rows[0]['step']}" if len(looked) == 1 else f"{rows[0]['step']} to {rows[-1]['step']}, every 30"
        cells = []
        for key, digits in (("full", ".2f"), ("batch", ".2f"), ("random", ".4f")):
            values = [row[key] for row in rows]
            middle = f", median {statistics.median(values):{digits}}" if len(looked) > 1 else ""
            cells.append(_span(values, digits) + middle)
        lines.append(f"| {when} | {' | '.join(cells)} |")
    late = [row["full"] >= 0.85 for look in looks[2:] for row in look]
    lines += [
        "",
        f"From step 100 on at least 0.85 of the full gradient lies there in {sum(late)} of {len(late)} looks.",
    ]
    return "\n".join(lines)


def norms(found: Json) -> str:
    lines = ["| loss first below | λ₁ without | λ₁ with | ratio | λ₁/λ₁₁ without | with |", "|---|---|---|---|---|---|"]
    for i, level in enumerate((0.2, 0.1)):
        off = [run["without"][i]["values"] for run in found["norms"]]
        on = [run["with"][i]["values"] for run in found["norms"]]
        cells = [
            _span([v[0] for v in off], ".1f"), _span([v[0] for v in on], ".1f"),
            _span([a[0] / b[0] for a, b in zip(off, on, strict=True)], ".1f"),
            *(_span([v[0] / v[10] for v in some], ".1f") for some in (off, on)),
        ]  # fmt: skip
        lines.append(f"| {level} | {' | '.join(cells)} |")
    return "\n".join(lines)


def bulk(density: Density) -> Json:
    """How many eigenvalues are small beside the smallest outlier, with the band of the estimate."""
    edge = float(density.values.min())
    found: Json = {"n": density.n, "outliers": density.values.tolist()}
    for part in (0.1, 0.01):
        share, band = density.cdf([-part * edge, part * edge])
        found[f"within {part}"] = [
            float(share[1] - share[0]),
            float(band[0, 1] - band[1, 0]),
            float(band[1, 1] - band[0, 0]),
        ]
    return found


def bulk_words(told: Json) -> str:
    low, high = min(told["outliers"]), max(told["outliers"])
    parts = [
        f"{share:.1%} (95%: {a:.1%} – {min(b, 1):.1%}) are smaller in size than {part} times the smallest of them"
        for part in (0.1, 0.01)
        for share, a, b in [told[f"within {part}"]]
    ]
    first = f"Of {told['n']:,} eigenvalues {len(told['outliers'])} are outliers, {low:.2f} to {high:.2f}"
    return "; ".join([first, *parts]) + "."


def _of(pair: list[int]) -> str:
    return f"{pair[0]} of {pair[1]}"


def _about_rates(told: Json) -> Json:
    """Without the monitors that are there for other faults."""
    return {name: row for name, row in told.items() if row["caught"][0]}


def _share(pair: list[int]) -> str:
    return f"{pair[0] / pair[1]:.1%} ({_of(pair)})"


def alarms(told: Json) -> str:
    heads = [
        "monitor",
        "threshold",
        "false alarms, unseen runs",
        "alarms before a jump",
        *OPTIMISERS,
        "all caught",
        "by the first alarm",
        "×10",
        "×30",
        "×100",
        "mean of 30 splits",
    ]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name, row in _about_rates(told).items():
        limits = list(row["thresholds"].values())
        limit = ", ".join(f"{x:.2g}" for x in dict.fromkeys(limits)) if row["tuned"] else "untuned"
        mean = f"{row['mean false']:.1%} false, {row['mean caught']:.0%} caught"
        cells = [_share(row["false"]), _of(row["early"]), *(_of(row[o]) for o in OPTIMISERS)]
        cells += [f"**{_share(row['caught'])}**", _of(row["at once"]), *map(_of, row["by factor"].values()), mean]
        lines.append("| " + " | ".join([name, limit, *cells]) + " |")
    return "\n".join(lines)


def kinds(told: Json) -> str:
    """False alarms on the unseen healthy runs, by what was harmless about them."""
    lines = [f"| monitor | {' | '.join(HARMLESS)} | jumps that did no harm |", "|" + "---|" * (2 + len(HARMLESS))]
    for name, row in _about_rates(told).items():
        cells = [*map(_of, row["false by kind"].values()), _of(row["other jumps"])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def confirmed(told: Json) -> str:
    """Both counts: by any alarm between the fault and the doubling, and by the first alarm of the run."""
    heads = ["monitor", "false alarms", "alarms before a jump", *OPTIMISERS, "all caught"]
    heads += [*(f"{name}, first alarm" for name in OPTIMISERS), "all, first alarm"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name, row in told.items():
        cells = [_share(row["false"]), _share(row["early"])]
        cells += [*(_of(row[o]) for o in OPTIMISERS), f"**{_share(row['caught'])}**"]
        cells += [*(_of(row[f"{o} at once"]) for o in OPTIMISERS), _share(row["at once"])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mixes(told: Json) -> str:
    lines = [f"| monitor | {' | '.join(MIXES)} |", "|" + "---|" * (1 + len(MIXES))]
    for name, row in told.items():
        cells = [f"{false:.1%}, {caught:.0%}" for false, caught in row.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def faults(told: Json) -> str:
    lines = [f"| monitor | {' | '.join(DATA)} |", "|" + "---|" * (1 + len(DATA))]
    for name, row in told.items():
        cells = [
            f"{seen} of {number}" + (f", after {delay:g}" if delay is not None else "")
            for seen, number, delay in (row[kind] for kind in DATA)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def runs(told: Json) -> str:
    words = [
        f"{name}: {number:.1g}" if isinstance(number, float) else f"{name}: {number}" for name, number in told.items()
    ]
    return "; ".join(words) + "."


def blocks(told: Json) -> dict[str, str]:
    """All generated parts of the page, by name."""
    return {
        "edge": edge.table(told["edge"]),
        "starts": edge.starts_words(told["starts"]),
        "counts": counts(told["outliers"]),
        "late": late(told["outliers"]),
        "shares": shares(told["outliers"]),
        "norms": norms(told["outliers"]),
        "bulk": bulk_words(told["bulk"]),
        "runs": runs(told["runs"]),
        "fresh runs": runs(told["fresh runs"]),
        "alarms": alarms(told["alarms"]),
        "fresh": confirmed(told["fresh"]),
        "last runs": runs(told["last runs"]),
        "last": confirmed(told["last"]),
        "kinds": kinds(told["alarms"]),
        "mixes": mixes(told["mixes"]),
        "faults": faults(told["alarms"]),
    }


def _around(block: str, found: re.Match[str]) -> str:
    return f"{found[1]}{block}\n{found[2]}"


def fill(path: Path, blocks: dict[str, str]) -> None:
    """Put each block between its marks, <!-- name --> and <!-- end -->, in the page."""
    page = path.read_text()
    for name, block in blocks.items():
        pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, number = pattern.subn(partial(_around, block), page)
        if number != 1:
            raise ValueError(f"{path} has {number} blocks called {name}")
    path.write_text(page)
