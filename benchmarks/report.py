"""The page of benchmarks and its figures, from the numbers in docs/benchmarks.json: `python -m benchmarks.report`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.figures import FIGURES, draw

DOCS = Path(__file__).parent.parent / "docs"
NUMBERS, PAGE = "benchmarks.json", "benchmarks.md"


class Benchmark(NamedTuple):
    title: str
    module: str
    about: str  # what a reader has to know before the table
    quick: tuple[str, ...]  # arguments of a small run
    full: tuple[str, ...] = ()
    numbers: bool = False  # whether it writes its raw numbers with --json
    limit: float = 600.0  # seconds, after which it counts as failed


BENCHMARKS = {
    "products": Benchmark(
        "The cost of a product",
        "products",
        "Seconds for one Hessian-vector product over those of one gradient, as torch computes it with no help. The "
        "errors in the last column, one for each model, are those of the worst parameter block against double "
        "backward in float64.",
        ("--rounds", "1", "--models", "MLP"),
        ("--rounds", "4"),
        numbers=True,
    ),
    "solvers": Benchmark(
        "Products that solvers need",
        "solvers",
        "Diagonal matrices with spectra like those of networks. What counts is a true residual of at most tol·|λ|, "
        "whatever a solver's own criterion. `eigsh` tells apart what it spends on solving and on proving that "
        "nothing is missed; nobody else proves that.",
        ("--quick", "--n", "2000", "--spectra", "hess"),
    ),
    "end_to_end": Benchmark(
        "From a model to ten eigenpairs",
        "end_to_end",
        "Wall time, set-up included, to ten pairs with a true residual of at most 10⁻³·|λ| in float64 and none "
        "missed. The other libraries' settings are chosen for them with knowledge of the spectrum, the cheapest that "
        "make them right; eigenfunc has its defaults.",
        ("--rounds", "1", "--models", "MLP", "--patience", "5"),
        ("--rounds", "2", "--models", "MLP", "ResNet, eval mode, batch 8", "GPT"),
        numbers=True,
    ),
    "density": Benchmark(
        "The density of a spectrum",
        "density",
        "All eigenvalues of a network on handwritten digits, at equal numbers of products. The error is the "
        "Wasserstein distance from the true distribution over the largest |λ|. curvlinops gives a smoothed density "
        "alone, whose smoothing counts; it is given the true ends of the spectrum, so that it need not look for "
        "them.",
        ("--quick",),
        ("--rounds", "7"),
        numbers=True,
    ),
    "memory": Benchmark(
        "Peak memory of a product",
        "memory",
        "Beside a gradient whose graph is kept for a second backward pass, in plain torch.",
        ("--repeats", "1", "--models", "MLP"),
        ("--repeats", "1"),
        numbers=True,
    ),
    "vocabulary": Benchmark(
        "Peak memory with a large vocabulary",
        "vocabulary",
        "Gauss–Newton products with 50,000 classes, where tensors shaped as the logits are all that counts.",
        ("--tokens", "128"),
        ("--tokens", "512", "2048"),
        numbers=True,
    ),
    "scaling": Benchmark(
        "As n grows",
        "scaling",
        "Two eigenpairs of a diagonal operator with thirty vectors in memory and on disk.",
        ("--largest", "1e6"),
        numbers=True,
    ),
    "compiled": Benchmark(
        "A compiled Lanczos step",
        "compiled",
        "Of a diagonal matrix, so that almost all the time is the step's own.",
        ("--rounds", "2", "--sizes", "1000"),
    ),
    "derivatives": Benchmark(
        "The gradient of sharpness",
        "derivatives",
        "What the derivative of the largest eigenvalue costs, in Hessian-vector products.",
        ("--rounds", "1"),
    ),
    "overhead": Benchmark(
        "Time outside the products",
        "overhead",
        "What a run of `eigsh` adds to its products, and how often it reads its basis.",
        ("--rounds", "1", "--models", "MLP"),
        ("--rounds", "2"),
    ),
    "fuzz": Benchmark(
        "A hunt for false certificates",
        "fuzz_solver",
        "Random problems of known spectrum, of every family in `eigenfunc.testing`.",
        ("--examples", "100"),
        ("--examples", "2000"),
    ),
}


def page(results: dict[str, dict[str, Any]], figures: dict[str, str]) -> str:
    """Markdown: a section for each benchmark that has run, in the order of BENCHMARKS; `figures` are lines for some."""
    lines = [
        "# Benchmarks",
        "",
        "One thread; libraries take turns in each round, and a figure of time is a median with its quartiles. Answers",
        "are held against double backward in float64, and what is wrong or raises stays in the tables. Run by",
        "`python -m benchmarks`, which takes the other libraries from the extra `bench`; page and figures are drawn by",
        "`python -m benchmarks.report` from docs/benchmarks.json, which has the raw numbers.",
    ]
    for name, benchmark in BENCHMARKS.items():
        if result := results.get(name):
            how = "**a quick run, not to be quoted,** " if result["quick"] else ""
            lines += ["", f"## {benchmark.title}", "", benchmark.about, ""]
            where = f"{result['machine']}, load {result['load']:.1f} at its start"
            lines += [f"`{result['command']}`, {how}{result['date']}, {result['seconds']:.0f} s, on {where}."]
            if result["exit_code"]:
                lines += ["", f"**Failed**: {result['ended']}."]
            if figure := figures.get(name):
                lines += ["", figure]
            lines += ["", *shown(result["output"])]
    return "\n".join(lines) + "\n"


def shown(output: str) -> list[str]:
    """Tables and lists as they are, all else as text to the letter."""
    lines: list[str] = []
    for part in output.replace("```", "'''").split("\n\n"):
        marked = part.lstrip().startswith(("|", "- "))
        lines += [part.strip("\n"), ""] if marked else ["```text", part.strip("\n"), "```", ""]
    return lines[:-1]


def write(results: dict[str, dict[str, Any]], folder: Path) -> None:
    """The page and its figures; a figure that cannot be drawn leaves the error in its place."""
    figures = {}
    for name in FIGURES.keys() & results.keys():
        path = folder / "figures" / f"benchmarks_{name}.png"
        if results[name]["numbers"] is not None:
            try:
                draw(name, results[name]["numbers"], path)
                figures[name] = f"![{BENCHMARKS[name].title}](figures/{path.name})"
            except Exception as error:
                figures[name] = f"*No figure: {type(error).__name__}.*"
    (folder / PAGE).write_text(page(results, figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DOCS, metavar="DIR", help=f"folder with {NUMBERS}")
    folder = parser.parse_args().out
    write(json.loads((folder / NUMBERS).read_text()), folder)
    print(f"wrote {folder / PAGE}")


if __name__ == "__main__":
    main()
