"""The pictures of README and docs, from what was measured and from graphs that are dumped anew.

    python bench/pictures.py [--only accuracy speed passes] [--folder docs/pictures]

accuracy: perplexity against stored bits, from results/accuracy.csv. speed: times as fast as BF16 by rows, from
results/h200-llama-8b.csv. passes: the second half of a Llama layer before the passes, after those on Dynamo's graph,
and after those on Inductor's, as they are on Hopper; plain PyTorch computes there, so any machine draws it.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl
from graph_pictures import draw_passes
from matplotlib.figure import Figure

from micromix_compile.report.pictures import COLOURS, INK

if TYPE_CHECKING:
    from collections.abc import Callable

HERE: Final = Path(__file__).parent
RESULTS: Final = HERE / "results"
FOLDER: Final = HERE.parent / "docs" / "pictures"

# Colour and marker of each line; a name that is not here ends the run.
ACCURACY: Final = {
    "one format": ("#777777", "s"),
    "the paper's method": (COLOURS["MXFP8"], "^"),
    "ours, activations in their weights' formats": (COLOURS["MXFP6"], "D"),
    "ours, 8-bit activations": (COLOURS["MXFP4"], "o"),
}
# Of which series, or single points, the points have names, how far away, and turned by how much.
LABELLED: Final = {"one format": ((6, 4), 0), "the paper's method": ((-1, 6), 30), "MXFP6 E2M3": ((7, -4), 0)}
# What each line is in the results: the measurement and its split.
SPEED: Final = {
    "micromix": ("linear", "75/20/5 fp8", COLOURS["MXFP4"], "o"),
    "FP8": ("fp8 linear", "", "#777777", "s"),
}
STYLE: Final = {
    "font.size": 10,
    "svg.hashsalt": "MicroMix",
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e6ea",
    "axes.axisbelow": True,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


def read_rows(name: str) -> list[dict[str, str]]:
    """A CSV of results."""
    with (RESULTS / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def accuracy() -> Figure:
    """Perplexity against stored bits: the unquantized model is a line, what has more bits than the axis is left out."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes, rows = figure.add_subplot(), read_rows("accuracy.csv")
    full = next(float(row["perplexity"]) for row in rows if row["series"] == "unquantized")
    axes.axhline(full, color=INK, linewidth=1, linestyle="--")
    axes.annotate(f"float32, {full}", (4.05, full), (0, -11), textcoords="offset points", fontsize=9)
    for name, (colour, marker) in ACCURACY.items():
        points = sorted(
            (float(row["stored_bits"]), float(row["perplexity"]), row["what"]) for row in rows if row["series"] == name
        )
        linestyle = "-" if len(points) > 2 and name != "one format" else "none"
        bits, perplexity, texts = zip(*points, strict=True)
        axes.plot(bits, perplexity, linestyle=linestyle, color=colour, marker=marker, label=name)
        for point, text in zip(zip(bits, perplexity, strict=True), texts, strict=True) if name in LABELLED else ():
            away, turned = LABELLED.get(text, LABELLED[name])
            axes.annotate(text, point, away, textcoords="offset points", rotation=turned, fontsize=8, color=colour)
    assert {row["series"] for row in rows} == {*ACCURACY, "unquantized"}, "every series has a colour"
    axes.set_yscale("log")
    ticks = (18, 19, 20, 22, 25, 30, 40, 60)
    axes.set_ylim(17, 68)
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.set_yticks((), minor=True)
    axes.set_xlim(4, 9.1)
    axes.set_xlabel("stored bits a weight, with scales, padding and orders")
    axes.set_ylabel("perplexity")
    axes.set_title("SmolLM2-135M-Instruct, 12 windows of 512 tokens", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    return figure


def speed() -> Figure:
    """Times as fast as BF16 by rows, the geometric mean over a layer's linears, and from least to most."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    rows = [row for row in read_rows("h200-llama-8b.csv") if row["to_bf16"]]
    axes.axhline(1, color=INK, linewidth=1, linestyle="--")
    axes.annotate("BF16", (1, 1), (0, 4), textcoords="offset points", fontsize=9)
    for name, (what, split, colour, marker) in SPEED.items():
        ratios: dict[int, list[float]] = {}
        for row in rows:
            if (row["what"], row["split"]) == (what, split):
                ratios.setdefault(int(row["M"]), []).append(float(row["to_bf16"]))
        means = [geometric_mean(values) for values in ratios.values()]
        axes.fill_between(
            list(ratios), [min(v) for v in ratios.values()], [max(v) for v in ratios.values()], color=colour, alpha=0.12
        )
        axes.plot(list(ratios), means, color=colour, marker=marker, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(ratios), [str(m) for m in ratios])
    axes.set_xlabel("rows (tokens) in a call")
    axes.set_ylabel("times as fast as BF16")
    axes.set_ylim(bottom=0)
    axes.set_title("Whole linears of Llama-3.1-8B on an H200", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=9, title="mean of four linears, least to most shaded", title_fontsize=8)
    return figure


def passes() -> Figure:
    """See `draw_passes`."""
    return draw_passes()


PICTURES: Final[dict[str, Callable[[], Any]]] = {"accuracy": accuracy, "speed": speed, "passes": passes}


def main() -> None:
    """Draw what was asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=list(PICTURES))
    parser.add_argument("--folder", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for name in arguments.only:
            path = arguments.folder / f"{name}.svg"
            PICTURES[name]().savefig(path, facecolor="white", metadata={"Date": None})
            print(path)


if __name__ == "__main__":
    main()
