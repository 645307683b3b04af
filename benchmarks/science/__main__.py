"""Published facts on the digits, all figures and tables of docs/science.md: `python -m benchmarks.science`.

Some forty minutes on one core, most of them for the looks of the alarms. Each run is kept under --keep as it ends, and
not made again: after a change of what a run does, give another folder. What the rules say is asked anew each time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.science import alarms, edge, outliers, pictures, rules, tables
from benchmarks.science.setting import cached

DOCS = Path(__file__).parents[2] / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, default=Path("eigenfunc-out/science"), metavar="FOLDER")
    keep = parser.parse_args().keep
    torch.set_num_threads(1)
    figures = DOCS / "figures"
    figures.mkdir(exist_ok=True)

    edges = edge.runs(keep)
    pictures.edges(edges, figures / "edge.png")
    spectra = outliers.runs(keep)
    pictures.outliers(spectra, figures / "outliers.png")
    whole = outliers.density()
    pictures.density(whole, figures / "density.png")
    plans = (alarms.planned(), alarms.planned(fresh=True), alarms.confirming())
    records, fresh, last = ([rules.retold(s) for s in alarms.runs(keep, plan, progress=True)] for plan in plans)
    judged = rules.outcomes(records)
    told = {
        "edge": edge.summary(edges),
        "starts": cached(keep, "starts", edge.starts, edge.SETTINGS["GD, η = 0.2"], 24),
        "outliers": spectra,
        "bulk": tables.bulk(whole),
        "alarms": judged,
        "fresh": rules.confirmed(judged, fresh),
        "last": rules.confirmed(judged, last),
        "mixes": rules.mixes(records),
        "runs": rules.numbers(records),
        "fresh runs": rules.numbers(fresh),
        "last runs": rules.numbers(last),
    }
    pictures.alarms(records, told["alarms"], figures / "alarms.png")
    (DOCS / "science.json").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    tables.fill(DOCS / "science.md", tables.blocks(told))


if __name__ == "__main__":
    main()
