"""Rows of bench_gpu_linear.py: what one measurement is, tables, CSV and plot."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, fields
from statistics import geometric_mean
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console

FEW_ROWS = 64
"""Up to here TB/s is printed, from there on TFLOP/s: what bounds a linear."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. floor_bytes: what must be read and written; to_fp8, to_bf16: how many times as fast."""

    case: str
    M: int
    N: int
    K: int
    split: str
    what: str
    us: float
    p20: float
    p80: float
    floor_bytes: int
    tbps: float
    tflops: float
    to_fp8: float | None = None
    to_bf16: float | None = None


def print_table(rows: Sequence[Row], console: Console) -> None:
    """All measurements, a section a case."""
    table = Table(title="us: median per launch; × FP8, × BF16: times as fast")
    for name in ("case", "M", "N", "K", "split", "what", "us", "20 %", "80 %", "MB", "rate", "× FP8", "× BF16"):
        table.add_column(name, justify="left" if name in ("case", "split", "what") else "right")
    last = None
    for row in rows:
        if last is not None and (row.case, row.split) != last:
            table.add_section()
        last = row.case, row.split
        by_bytes = row.M <= FEW_ROWS or row.N == 0 or "quantize" in row.what
        rate = f"{row.tbps:.2f} TB/s" if by_bytes else f"{row.tflops:.0f} TFLOP/s"
        ratios = ("" if ratio is None else f"{ratio:.2f}" for ratio in (row.to_fp8, row.to_bf16))
        table.add_row(
            row.case, str(row.M or ""), str(row.N or ""), str(row.K), row.split, row.what, f"{row.us:.1f}",
            f"{row.p20:.1f}", f"{row.p80:.1f}", f"{row.floor_bytes / 1e6:.1f}", rate, *ratios,
        )  # fmt: skip
    console.print(table)


def print_summary(rows: Sequence[Row], console: Console) -> None:
    """Our linears by M and split: geometric means over the cases, and the slowest and fastest beside FP8."""
    table = Table(title="geometric mean over the cases")
    for name in ("split", "M", "us", "× FP8", "least", "most", "× BF16", "product / read"):
        table.add_column(name, justify="right")
    reads = {(row.case, row.split): row.us for row in rows if row.what == "read"}
    ours = [row for row in rows if row.what == "linear" and row.split]
    products = {(row.case, row.split, row.M): row.us for row in rows if row.what == "product"}
    for split, m in dict.fromkeys((row.split, row.M) for row in ours):
        group = [row for row in ours if (row.split, row.M) == (split, m)]
        to_fp8 = [row.to_fp8 for row in group if row.to_fp8]
        to_bf16 = [row.to_bf16 for row in group if row.to_bf16]
        ratios = ["", "", "", ""]
        if to_fp8:
            ratios = [f"{x:.2f}" for x in (geometric_mean(to_fp8), min(to_fp8), max(to_fp8), geometric_mean(to_bf16))]
        by_read = geometric_mean([products[row.case, split, m] / reads[row.case, split] for row in group])
        us = geometric_mean([row.us for row in group])
        table.add_row(split, str(m), f"{us:.1f}", *ratios, f"{by_read:.2f}" if m <= FEW_ROWS else "")
    console.print(table)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """One line a measurement."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def plot(rows: Sequence[Row], path: Path) -> None:
    """A panel a case: how many times as fast as BF16, by M."""
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(row.case for row in rows if row.to_bf16 is not None))
    figure, panels = plt.subplots(
        1, len(cases), figsize=(4 * len(cases), 3.5), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, case in zip(panels[0], cases, strict=True):
        lines: dict[str, list[Row]] = {}
        for row in rows:
            if row.case == case and row.to_bf16 is not None:
                lines.setdefault(f"MicroMix {row.split}" if row.split else row.what.removesuffix(" linear"), []).append(
                    row
                )
        for name, line in lines.items():
            panel.plot([row.M for row in line], [row.to_bf16 for row in line], marker="o", label=name)
        panel.set_xscale("log", base=2)
        panel.set_xlabel("M")
        panel.set_title(case)
    panels[0][0].set_ylabel("times as fast as BF16")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=8)
    figure.savefig(path)
