"""The pictures of a report, drawn by matplotlib: as SVG in the colours of the page, which has two sets, or as PNG."""

from __future__ import annotations

import importlib.util
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from xml.etree import ElementTree

import torch

from micromix_compile.report.facts import BF16_BYTES
from micromix_compile.report.series import series_of_groups, series_of_linears
from micromix_compile.targets.described import SEGMENTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from micromix_compile.report.facts import Facts
    from micromix_compile.report.measured import Measured
    from micromix_compile.report.series import Series

# The high-contrast scheme of Paul Tol's "Colour Schemes" (2021): told apart by the colour-blind, and in grey.
COLOURS: Final = {
    "MXFP4": "#004488",
    "MXFP6": "#ddaa33",
    "MXFP8": "#bb5566",
    "scales": "#777777",
    "orders": "#aaaaaa",
    "left alone": "#cccccc",
}
# His "muted" scheme, for lines that are no formats.
LINES: Final = ("#332288", "#cc6677", "#117733", "#aa4499", "#88ccee", "#999933", "#882255", "#44aa99")
INK: Final = "#1b1b1b"
"""Of texts and axes; the page replaces this, and the colours above, by its own."""

_PANEL: Final = (4.0, 2.1)
"""Inches, at 72 points the size of a phone's screen."""
_DPI: Final = 160
_BINS: Final = 128
_SVG: Final = "http://www.w3.org/2000/svg"
_XLINK: Final = "http://www.w3.org/1999/xlink"
_STYLE: Final = {
    "svg.fonttype": "none",
    "svg.hashsalt": "MicroMix",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """section: of the page it belongs to. name: of its file. caption: what it shows. figure: matplotlib's."""

    section: str
    name: str
    caption: str
    figure: Any

    def svg(self) -> str:
        """An <svg> element for a page, whose names no other picture of the page has."""
        buffer = io.BytesIO()
        with _styled():
            self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        return _for_page(buffer.getvalue(), self.name, self.caption)

    def png(self) -> bytes:
        """A file of its own, on white."""
        buffer = io.BytesIO()
        with _styled():
            self.figure.savefig(
                buffer, format="png", dpi=_DPI, facecolor="white", metadata={"Software": "MicroMix report"}
            )
        return buffer.getvalue()


def check_matplotlib() -> None:
    """Raises ModuleNotFoundError, with the command that helps, where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("the package matplotlib is missing: pip install 'micromix-compile[report]'")


def pictures(facts: Facts, measured: Measured | None) -> list[Picture]:
    """All that there is something to draw of. Raises as `check_matplotlib`."""
    check_matplotlib()
    with _styled():
        return [*_bytes(facts), *_formats(facts), *_errors(facts, measured), *_channels(facts)]


def _styled() -> Any:
    import matplotlib as mpl

    return mpl.rc_context(_STYLE)


def _panel(height: float = _PANEL[1]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_PANEL[0], height), layout="constrained")
    return figure, figure.add_subplot()


def _bytes(facts: Facts) -> Iterator[Picture]:
    """Two bars: what is stored, and the same in BF16."""
    figure, axes = _panel(2.1)
    others, other_bytes = facts.left_alone or (0, 0)
    parts = {**facts.bytes_by_part, "left alone": other_bytes}
    full = {"linears": BF16_BYTES * facts.parameters, "left alone": BF16_BYTES * others}
    unit, factor = ("GiB", 2**30) if sum(full.values()) >= 2**30 else ("MiB", 2**20)
    for y, bar in enumerate((full, parts)):
        start = 0.0
        for name, size in bar.items():
            axes.barh(y, size / factor, left=start, color=COLOURS.get(name, INK), label=name)
            start += size / factor
    axes.set_yticks((0, 1), ("BF16", "stored"))
    axes.set_xlabel(unit)
    bars = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(bars.values(), bars, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    caption = "Bytes by what they hold, beside the same parameters in BF16."
    yield Picture(section="bytes", name="bytes", caption=caption, figure=figure)


def _formats(facts: Facts) -> Iterator[Picture]:
    """Of each series of groups: the share of channels in each format, a bar a layer."""
    for number, series in enumerate(series_of_groups(facts)):
        figure, axes = _panel()
        bottom = torch.zeros(len(series.members))
        for index, name in enumerate(SEGMENTS):
            top = bottom + torch.tensor([100 * one.split[index] / one.channels for one in series.members])
            colour, below = COLOURS[name], bottom.tolist()
            axes.stairs(top.tolist(), _edges(series), baseline=below, fill=True, color=colour, label=name)
            bottom = top
        axes.set_title(series.label)
        axes.set_xlim(-0.5, len(series.members) - 0.5)
        axes.set_ylim(0, 100)
        axes.set_ylabel("% of channels")
        _number_layers(axes)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
        caption = f"Formats of the input channels of {series.label}, a bar a layer."
        yield Picture(section="formats", name=f"formats-{number}", caption=caption, figure=figure)


def _edges(series: Series[Any]) -> list[float]:
    return [index - 0.5 for index in range(len(series.members) + 1)]


def _number_layers(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("layer")


def _errors(facts: Facts, measured: Measured | None) -> Iterator[Picture]:
    """Lines of predicted costs, and of measured errors."""
    if facts.measured is not None:
        groups = {one.label: [group.predicted or 0.0 for group in one.members] for one in series_of_groups(facts)}
        unit = "nats a token" if facts.measured else "of the output"
        figure = _lines(groups, f"predicted cost, {unit}", logarithmic=True)
        caption = "Predicted cost of rounding the activations and weights of each layer."
        yield Picture(section="errors", name="predicted", caption=caption, figure=figure)
    if measured is not None:
        nan = float("nan")
        linears = {
            one.label: [measured.sqnr.get(linear.fqn, nan) for linear in one.members]
            for one in series_of_linears(facts)
        }
        caption = "Signal to quantization noise of each linear's output, on the unquantized model's own inputs."
        figure = _lines(linears, "SQNR, dB", logarithmic=False)
        yield Picture(section="errors", name="sqnr", caption=caption, figure=figure)


def _lines(values: dict[str, list[float]], label: str, *, logarithmic: bool) -> Any:
    figure, axes = _panel(3.4)
    for index, (name, line) in enumerate(values.items()):
        axes.plot(line, marker=".", linewidth=1, color=LINES[index % len(LINES)], label=name)
    if logarithmic and any(value > 0 for line in values.values() for value in line):
        axes.set_yscale("log")
    axes.set_ylabel(label)
    _number_layers(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def _channels(facts: Facts) -> Iterator[Picture]:
    """Of each series of groups: a line a layer, its channels from left to right, with the ends of formats."""
    for number, series in enumerate(series_of_groups(facts)):
        sizes = [group.magnitudes for group in series.members if group.magnitudes is not None]
        if not sizes:
            continue
        figure, axes = _panel(2.6)
        bins = min(_BINS, *(size.numel() for size in sizes))
        rows = torch.stack([torch.nn.functional.adaptive_avg_pool1d(size[None], bins)[0] for size in sizes])
        _heat(figure, axes, rows)
        for index, style in ((1, "-"), (2, ":")):
            ends = [100 * sum(group.split[:index]) / group.channels for group in series.members]
            axes.stairs(ends, _edges(series), orientation="horizontal", color="white", linestyle=style, baseline=None)
        axes.set_title(series.label)
        axes.set_xlabel("channels in stored order, %")
        axes.set_ylabel("layer")
        caption = (
            f"Mean magnitude of the input channels of {series.label}. The solid line is where MXFP4 ends, the dotted "
            f"one where MXFP6 ends."
        )
        yield Picture(section="channels", name=f"channels-{number}", caption=caption, figure=figure)


def _heat(figure: Any, axes: Any, rows: torch.Tensor) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    smallest = rows[rows > 0].min() if (rows > 0).any() else torch.tensor(1.0)
    norm = LogNorm(float(smallest), max(float(rows.max()), float(smallest) * 1.01))
    extent = (0, 100, len(rows) - 0.5, -0.5)
    image = axes.imshow(
        rows.clamp(min=float(smallest)).numpy(), norm=norm, aspect="auto", extent=extent, interpolation="nearest"
    )
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.colorbar(image, ax=axes, label="mean |x|")


def _for_page(svg: bytes, name: str, caption: str) -> str:
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(svg)
    for unwanted in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
        for parent in list(root.iter()):
            for child in parent.findall(unwanted):
                parent.remove(child)
    for element in root.iter():
        for key, value in element.attrib.items():
            element.set(key, _renamed(key, value, name))
    root.attrib.update({"class": "plot", "role": "img", "aria-label": caption})
    for key in ("width", "height", "version"):
        del root.attrib[key]
    return ElementTree.tostring(root, encoding="unicode")


def _renamed(key: str, value: str, name: str) -> str:
    """An attribute with ids of this picture's own, and with the page's colours."""
    if key == "id":
        return f"{name}-{value}"
    if key.endswith("href") and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    for part, colour in {**COLOURS, "ink": INK}.items():
        value = value.replace(colour, f"var(--{part.replace(' ', '-')}, {colour})")
    for index, colour in enumerate(LINES):
        value = value.replace(colour, f"var(--line{index}, {colour})")
    return value.replace("url(#", f"url(#{name}-")
