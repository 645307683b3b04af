"""The picture of the first page, docs/figures/digits.png: `python docs/tools/first_picture.py`, some seconds.

The Hessian of a small network trained on handwritten digits: its twenty eigenvalues of largest magnitude, found one by
one, as marks along the lower edge, and the density of all others with its 95% band.
"""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eigenfunc import demo, eigsh, hessian, plot, spectral_density


def main() -> None:
    A = hessian(*demo.make_problem("mlp", seed=0, epochs=30, report=lambda: None))
    solution = eigsh(A, 20, seed=0)
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    plot.density(spectral_density(A, pairs=solution, seed=0), figure.add_subplot())
    figure.savefig(Path(__file__).parent.parent / "figures" / "digits.png", dpi=110)
    print(solution)


if __name__ == "__main__":
    main()
