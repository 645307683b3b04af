"""The import graph of the design page: `python docs/tools/floors.py` writes its table and docs/figures/floors.png.

Floors come from tests/test_architecture.py, imports from the sources. The picture leaves out an import that others imply.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "design.md"
BEGIN, END = "<!-- by python docs/tools/floors.py -->", "<!-- end -->"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")  # Okabe & Ito


def floors() -> list[list[str]]:
    """From the lowest; what a reader does not import (`__init__`, `__main__`) is left out."""
    source = (ROOT / "tests" / "test_architecture.py").read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS":
            kept = [sorted(x for x in names if not x.startswith("__")) for names in ast.literal_eval(node.value)]
            return [names for names in kept if names]
    raise LookupError("tests/test_architecture.py does not define FLOORS")


def files(house: str) -> list[Path]:
    folder = ROOT / "eigenfunc" / house
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def imports(names: set[str]) -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for house in names:
        found = set()
        for path in files(house):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("eigenfunc"):
                    parts = node.module.split(".")
                    found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        graph[house] = (found & names) - {house}
    return graph


def first_line(house: str) -> str:
    """What a file says of itself, or, for a folder, its own `__init__`."""
    path = ROOT / "eigenfunc" / house
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = ast.get_docstring(ast.parse(source.read_text())) or "The version."
    return text.split("\n\n")[0].replace("\n", " ").replace("|", r"\|")


def table() -> str:
    lines = ["| floor | module | what it is | imports |", "|---|---|---|---|"]
    rows = floors()
    graph = imports({name for names in rows for name in names})
    for height in range(len(rows) - 1, -1, -1):
        for i, name in enumerate(rows[height]):
            shown = f"`{name}/`" if (ROOT / "eigenfunc" / name).is_dir() else f"`{name}`"
            below = ", ".join(sorted(graph[name])) or "–"
            lines.append(f"| {'' if i else height + 1} | {shown} | {first_line(name)} | {below} |")
    return "\n".join(lines)


def draw(path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = floors()
    graph = imports({name for names in rows for name in names})
    figure = Figure(figsize=(9, 0.62 * len(rows) + 0.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_axis_off()
    at = {}
    for height, names in enumerate(rows):
        for i, name in enumerate(names):
            x = (i + 0.5) / len(names) + (0.12 / len(names) if height % 2 else -0.12 / len(names))
            at[name] = x, height, COLOURS[height % len(COLOURS)]
    for name, (x, y, colour) in at.items():
        for below in graph[name] - {far for near in graph[name] for far in reached(graph, near)}:
            x0, y0, _ = at[below]
            axes.annotate(
                "", (x0, y0 + 0.22), (x, y - 0.22), arrowprops={"arrowstyle": "->", "color": colour, "lw": 0.7}
            )
    for name, (x, y, colour) in at.items():
        box = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": colour, "lw": 1.3}
        axes.text(x, y, name, ha="center", va="center", fontsize=8.5, bbox=box)
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.5, len(rows) - 0.5)
    figure.savefig(path, dpi=80)


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    todo = set(graph[start])
    while todo:
        name = todo.pop()
        found.add(name)
        todo |= graph[name] - found
    return found


def written(page: str) -> str:
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


def main() -> None:
    PAGE.write_text(written(PAGE.read_text()))
    draw(ROOT / "docs" / "figures" / "floors.png")


if __name__ == "__main__":
    main()
