"""Linears on sm_90, by kernels and whole, beside BF16, FP8 and int4: times, bandwidth, flops, ratios.

    python bench/bench_gpu_linear.py [--quick] [--model llama-8b ...] [--split 75/20/5 ...] [--csv FILE] [--plot FILE]
    python bench/bench_gpu_linear.py --shares    what more MXFP6 and MXFP8 cost
    python bench/bench_gpu_linear.py --activations same --activations fp8 --rotate    ways to quantize, side by side

A linear is quantize, product and bias, with q, k and v as one, gate and up as one. A time is that of a CUDA graph of
launches over copies of the weights, over 200 MB together, so that L2 does not serve them: median and 20/80 % of replays
per launch. Competitors run in the same process: cuBLAS in BF16; FP8 with a scale a row, quantized by compiled PyTorch,
with fast accumulation; weight-only int4 for few rows; torchao's FP8 and emulated MX and Humming's MXFP4, if they are
installed; and a kernel that only reads the packed bytes. Before anything is timed the products of a small case must be
right.
"""

from __future__ import annotations

import argparse
import gc
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from folded_linears import expand, fold_rows, folded_product, folded_weight, kernels
from fp8_linears import (
    compiled_add_rms_norm,
    compiled_fp8_quantize,
    compiled_rms_norm,
    fp8_bias,
    fp8_mm,
    fp8_quantize,
)
from gpu_timing import Times, copies, measure, read_all, read_sums, size
from humming_linears import humming_contenders
from linear_cases import (
    BF16,
    CUDA,
    E4M3,
    FP6,
    MODELS,
    SPLITS,
    Case,
    Contender,
    Mode,
    cases_of,
    modes_of,
    split_argument,
    split_of,
)
from linear_rows import Row, plot, print_summary, print_table, write_csv
from rich.console import Console
from rich.progress import track
from torchao_linears import torchao_contenders

from micromix_compile.config import MicroMixConfig
from micromix_compile.evaluation.machine import hardware, versions
from micromix_compile.lowering.torch_private.dynamo import dynamo_settings
from micromix_compile.numerics import folding, reference
from micromix_compile.numerics.formats import ScaleRounding
from micromix_compile.numerics.layout import ACTIVATIONS
from micromix_compile.targets.expansion import ExpandedWeights
from micromix_compile.targets.kernels import FoldedWeight, Residual
from micromix_compile.targets.quantizers import reorder_quantize

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from micromix_compile.numerics.layout import Split


SHARE_SPLITS = ("100/0/0", "80/20/0", "80/0/20", "0/100/0", "0/0/100")
SHARE_ROWS = (1, 16, 64, 2048)
ROWS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 8192)
QUICK_ROWS = (1, 16, 64, 128, 256, 512, 1024, 2048, 8192)
INT4_ROWS = 16
"""The most rows at which int4 is measured: it is made for few."""

INT4_GROUP = 128
QUANTIZED_ROWS, QUANTIZED_CHANNELS = 8192, (4096, 14336)


# ---- what is timed


class Linears:
    """One case in all variants; operands live as long as this does."""

    def __init__(self, case: Case, others: Mapping[str, Contender], scale_rounding: str) -> None:
        self._case = case
        self._scale_rounding = scale_rounding
        self._others_by_name = others
        self._bf16: dict[int, Times] = {}
        self._fp8: dict[int, Times] = {}

    def _activation(self, rows: int) -> Tensor:
        return torch.randn(rows, self._case.K, device=CUDA, dtype=BF16)

    def _floor(self, rows: int, weight_bytes: int) -> int:
        """Weights, BF16 activations and outputs, once each."""
        return weight_bytes + 2 * rows * (self._case.K + self._case.N)

    def competitors(self, every_m: Sequence[int]) -> list[Row]:
        """BF16, FP8 and int4, which know no split."""
        case, found = self._case, []
        bias = torch.randn(case.N, device=CUDA, dtype=BF16)
        first = torch.randn(case.N, case.K, device=CUDA, dtype=BF16)
        weights = [first.clone() for _ in range(copies(size(first)))]
        for rows in every_m:
            x = self._activation(rows)
            self._bf16[rows] = measure([lambda w=w, x=x: torch.nn.functional.linear(x, w, bias) for w in weights])
            found.append(case.row("bf16 linear", rows, self._bf16[rows], self._floor(rows, size(first))))
        del weights
        q, scale = fp8_quantize(first)
        weights = [q.clone() for _ in range(copies(size(q)))]
        w_scale = scale.T.contiguous()
        for rows in every_m:
            x = self._activation(rows)
            xq, x_scale = compiled_fp8_quantize(x)
            quantize = measure([lambda x=x: compiled_fp8_quantize(x)] * 8)
            added = fp8_bias(xq, x_scale, weights[0], w_scale, bias)
            product = measure([lambda w=w, a=xq, s=x_scale, b=added: fp8_mm(a, s, w, w_scale, b) for w in weights])
            self._fp8[rows] = measure(
                [lambda w=w, x=x, b=added: fp8_mm(*compiled_fp8_quantize(x), w, w_scale, b) for w in weights]
            )
            found.append(case.row("fp8 quantize", rows, quantize, 3 * rows * case.K))
            found.append(case.row("fp8 product", rows, product, size(q, xq) + 2 * rows * case.N))
            found.append(case.row("fp8 linear", rows, self._fp8[rows], self._floor(rows, size(q))))
        del weights
        return found + self._int4([rows for rows in every_m if rows <= INT4_ROWS]) + self._others(every_m)

    def _others(self, every_m: Sequence[int]) -> list[Row]:
        """torchao's FP8 and emulated MX, Humming's MXFP4, where they are installed, and how far they are off."""
        case, found = self._case, []
        for name, (bits, make) in self._others_by_name.items():
            first = torch.randn(case.N, case.K, device=CUDA, dtype=BF16)
            bias = torch.randn(case.N, device=CUDA, dtype=BF16)
            packed = case.N * case.K * bits // 8  # without scales
            try:
                linears = [make(first, bias) for _ in range(copies(packed))]
                x = self._activation(64)
                want = torch.nn.functional.linear(x, first, bias).double()
                error = float((linears[0](x).double() - want).norm() / want.norm())
                print(f"{name} of {case.name}: {error:.4f} of BF16's norm off")
                for rows in every_m:
                    x = self._activation(rows)
                    times = measure([lambda f=f, x=x: f(x) for f in linears])
                    found.append(case.row(f"{name} linear", rows, times, self._floor(rows, packed)))
            except Exception as error:  # another project's code must not end the run
                print(f"no {name} for {case.name}: {str(error)[:80]}", file=sys.stderr)
        return found

    def _int4(self, every_m: Sequence[int]) -> list[Row]:
        """Weight-only int4 in groups, or nothing where torch does not offer it for the shape."""
        case, found = self._case, []
        try:
            codes = torch.randint(0, 256, (case.N, case.K // 2), dtype=torch.uint8, device=CUDA)
            packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
            scales = torch.randn(case.K // INT4_GROUP, case.N, 2, device=CUDA, dtype=BF16)
            weights = [packed.clone() for _ in range(copies(size(packed)))]
            bias = torch.randn(case.N, device=CUDA, dtype=BF16)
            for rows in every_m:
                x = torch.randn(rows, case.K, device=CUDA, dtype=BF16)
                times = measure([
                    lambda w=w, x=x: torch.ops.aten._weight_int4pack_mm(x, w, INT4_GROUP, scales).add_(bias)
                    for w in weights
                ])  # fmt: skip
                found.append(case.row("int4 linear", rows, times, self._floor(rows, size(packed, scales))))
        except (RuntimeError, NotImplementedError) as error:
            print(f"no int4 for {case.name}: {str(error)[:80]}", file=sys.stderr)
        return found

    def folded(self, every_m: Sequence[int], split_name: str, modes: Sequence[Mode]) -> list[Row]:
        """Ours, by kernels and whole, and the reading of the packed bytes."""
        case, found = self._case, []
        split = split_of(case.K, split_name)
        first = [folded_weight(n, split) for n in case.columns]
        packed = sum(size(*weight) for weight in first)
        groups = [[FoldedWeight(*(part.clone() for part in w)) for w in first] for _ in range(copies(packed))]  # type: ignore[union-attr]
        perm = torch.randperm(case.K, device=CUDA).to(torch.int16)

        words = [torch.randint(-9, 9, (packed // 4,), dtype=torch.int32, device=CUDA) for _ in groups]
        sums = read_sums(words[0])
        read = measure([lambda w=w: read_all(w, sums) for w in words])
        found += [case.row("read", 0, read, packed, mode.behind(split_name)) for mode in modes]
        if max(every_m) >= kernels().tiles.all_expand_from:
            runs = kernels().tiles.expansion_runs(case.columns, folding.fold_width(split, w_fp4=False))
            rooms = [ExpandedWeights.empty(first[run], words[0]) for run in runs]
            times = measure([lambda g=g: expand(g, runs, rooms) for g in groups])
            found.append(case.row("expand", 0, times, packed + sum(size(*room) for room in rooms), split_name))
        del words
        for rows in every_m:
            x = self._activation(rows)
            for mode in modes:

                def fold(x: Tensor = x, mode: Mode = mode) -> folding.FoldedActivation:
                    return fold_rows(x, perm, split, self._scale_rounding, mode, products=[case.columns])

                ready, name = fold(), mode.behind(split_name)
                quantize = measure([fold] * 8)
                product = measure([lambda g=g, a=ready: folded_product(a, g) for g in groups])
                whole = measure([lambda g=g, fold=fold: folded_product(fold(), g) for g in groups])
                found.append(case.row("quantize", rows, quantize, 3 * rows * case.K, name))
                found.append(case.row("product", rows, product, packed + size(ready.q) + 2 * rows * case.N, name))
                found.append(case.row("linear", rows, whole, self._floor(rows, packed), name))
        return found

    def with_ratios(self, rows: Sequence[Row]) -> list[Row]:
        """Whole linears beside those of FP8 and BF16 at the same M, where they were measured."""
        return [
            Row(**asdict(row) | {"to_fp8": self._fp8[row.M].us / row.us, "to_bf16": self._bf16[row.M].us / row.us})
            if row.what.endswith("linear") and row.M in self._fp8
            else row
            for row in rows
        ]


def quantizers(channels: int, scale_rounding: str, modes: Sequence[Mode]) -> list[Row]:
    """Quantizers alone, behind nothing and an RMSNorm, beside a compiled RMSNorm, FP8's and a copy."""
    case, split, rows = Case("quantizers", (0,), channels), split_of(channels, SPLITS[0]), QUANTIZED_ROWS
    xs = [torch.randn(rows, channels, device=CUDA, dtype=BF16) for _ in range(copies(2 * rows * channels))]
    weight = torch.randn(channels, device=CUDA, dtype=BF16)
    perm = torch.randperm(channels, device=CUDA).to(torch.int16)
    ordered = torch.arange(channels, device=CUDA, dtype=torch.int16)
    out = torch.empty_like(xs[0])
    up = {x.data_ptr(): other for x, other in zip(xs, xs[1:] + xs[:1], strict=True)}

    def fold(x: Tensor, mode: Mode, order: Tensor = perm, **producer: Any) -> object:
        return fold_rows(x, order, split, scale_rounding, mode, **producer)

    runs: dict[str, tuple[Callable[[Tensor], object], float]] = {}
    for mode in modes:
        runs |= {
            mode.behind("fold"): (lambda x, m=mode: fold(x, m), 3.0),
            mode.behind("fold, channels in order"): (lambda x, m=mode: fold(x, m, ordered), 3.0),
            mode.behind("rms_norm + fold"): (lambda x, m=mode: fold(x, m, producer="rms_norm", other=weight), 3.0),
            mode.behind("sum + rms_norm + fold"): (
                lambda x, m=mode: fold(
                    x, m, producer="rms_norm", other=weight, residual=Residual(up[x.data_ptr()], torch.empty_like(x))
                ),
                7.0,
            ),
            mode.behind("silu_mul + fold"): (
                lambda x, m=mode: fold(x, m, producer="silu_mul", other=up[x.data_ptr()]), 5.0,
            ),
        }  # fmt: skip
    runs |= {
        "reorder_quantize": (lambda x: reorder_quantize("none", x, None, 0.0, perm, split, FP6, scale_rounding), 2.7),
        "compiled rms_norm": (lambda x: compiled_rms_norm(x, weight), 4.0),
        "compiled sum + rms_norm": (lambda x: compiled_add_rms_norm(x, up[x.data_ptr()], weight), 8.0),
        "fp8 quantize": (compiled_fp8_quantize, 3.0),
        "copy": (out.copy_, 4.0),
    }
    found = []
    for what, (run, bytes_each) in runs.items():
        times = measure([lambda x=x, run=run: run(x) for x in xs])
        found.append(case.row(what, rows, times, int(bytes_each * rows * channels)))
    return found


# ---- the gate


def check(scale_rounding: str, modes: Sequence[Mode]) -> None:
    """End the run unless small products are right: ours within 2 % of the MX product (norms), FP8 within 6 %.

    The error of a wrong order or scale is of the size of the product. 2 %: BF16's rounding is 0.2 %, and a sum over all
    of K in FP8 MMA's 14 bits a few times that.
    """
    split, most = split_of(1024, SPLITS[0]), kernels().tiles.all_expand_from
    values = torch.randn(most, 1024, device=CUDA, dtype=BF16)
    perm = torch.randperm(1024, device=CUDA).to(torch.int16)
    weights = [folded_weight(n, split) for n in (256, 64)]
    wide = [(256, tile) for _, tile in kernels().tiles.wide]
    for mode in modes:
        want = _exact_products(values, perm, split, weights, scale_rounding, mode)
        for rows, tile in (*((m, None) for m in (1, 16, 64, 128, 256, most - 1, most)), *wide):
            x = fold_rows(values[:rows], perm, split, scale_rounding, mode)
            outs = (
                folded_product(x, weights)
                if tile is None
                else kernels().multiply(x, weights, fp6=FP6, out_dtype=BF16, tile=tile)
            )
            got = torch.cat(outs, 1)
            _refuse_unless_near(mode.behind(f"our product of {rows} rows"), got, want[:rows], 0.02)
    w = torch.randn(256, 1024, device=CUDA, dtype=BF16)
    (xq, x_scale), (wq, w_scale) = compiled_fp8_quantize(values), fp8_quantize(w)
    got = fp8_mm(xq, x_scale, wq, w_scale.T.contiguous(), torch.zeros(256, device=CUDA, dtype=BF16))
    _refuse_unless_near("the FP8 product", got, values.double() @ w.double().T, 0.06)


def _exact_products(
    values: Tensor, perm: Tensor, split: Split, weights: Sequence[FoldedWeight], scale_rounding: str, mode: Mode
) -> Tensor:
    """Of quantized values with folded weights, which are taken as they are, rotated or not: (M, sum of N) float64."""
    x = reference.reorder_quantize(
        values, perm, split, fp6=FP6, scale_rounding=ScaleRounding(scale_rounding), activations=mode.activations,
        rotated=mode.rotated(split),
    )  # fmt: skip
    channels = torch.nn.functional.pad(reference.dequantize_activation(*x).double(), (0, 1))  # for -1 a zero
    order, exact = folding.fold_order(split, w_fp4=False).to(CUDA), []
    for weight in weights:
        folded = folding.fold_weight(weight.w4, weight.w6, weight.w8, weight.factor, FP6)
        w = folded.view(E4M3).double() * weight.row_scale.double()[:, None]
        assert weight.bias is not None, "made with one"
        exact.append(channels[:, order] @ w.T + weight.bias.double())
    return torch.cat(exact, 1)


def _refuse_unless_near(what: str, got: Tensor, want: Tensor, limit: float) -> None:
    error = ((got.double() - want).norm() / want.norm()).item()
    if not error <= limit:
        raise SystemExit(f"{what} is off by {error:.3g} of its norm, more than {limit}: nothing is timed")


def run(
    cases: Sequence[Case], every_m: Sequence[int], splits: Sequence[str], scale_rounding: str, modes: Sequence[Mode],
    *, only_ours: bool,
) -> list[Row]:  # fmt: skip
    """Everything, a case after the other."""
    rows, others = [], {} if only_ours else torchao_contenders() | humming_contenders()
    for channels in () if only_ours else QUANTIZED_CHANNELS:
        rows += quantizers(channels, scale_rounding, modes)
    for case in track(cases, "linears", transient=True, console=Console(stderr=True)):
        linears = Linears(case, others, scale_rounding)
        found = [] if only_ours else linears.competitors(every_m)
        for split in splits:
            found += linears.folded(every_m, split, modes)
        rows += linears.with_ratios(found)
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    """Check, measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=MODELS, action="append", help="may be repeated; llama-8b by default")
    parser.add_argument("--quick", action="store_true", help="one split and nine M")
    parser.add_argument(
        "--split",
        action="append",
        type=split_argument,
        metavar="4/6/8",
        help="percent of the channels; may be repeated",
    )
    parser.add_argument("--shares", action="store_true", help="splits that differ in one share, without competitors")
    parser.add_argument("--rows", type=int, action="append", metavar="M", help="may be repeated")
    parser.add_argument("--activations", choices=ACTIVATIONS, action="append", help="may be repeated; same by default")
    parser.add_argument("--rotate", action="store_true", help="each of them with rotated MXFP4 blocks, too")
    default = str(MicroMixConfig().scale_rounding)
    parser.add_argument("--scale-rounding", choices=[str(rule) for rule in ScaleRounding], default=default)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    if arguments.shares and (arguments.quick or arguments.plot):
        parser.error("--shares has splits and rows of its own and no competitors to plot: not with --quick or --plot")
    if not torch.cuda.is_available():
        raise SystemExit("bench_gpu_linear.py needs a GPU")
    console = Console(width=160)
    header: dict[str, Any] = {**hardware(), **versions(), "cuda": torch.version.cuda}
    console.print("  ".join(f"{name} {value}" for name, value in header.items()))
    torch.manual_seed(0)
    every_m, splits = (QUICK_ROWS, SPLITS[:1]) if arguments.quick else (ROWS, SPLITS)
    if arguments.shares:
        every_m, splits = SHARE_ROWS, SHARE_SPLITS
    every_m, splits = tuple(arguments.rows or every_m), tuple(arguments.split or splits)
    modes = modes_of(arguments.activations or ["same"], rotates=arguments.rotate)
    # A compiled competitor has code for each M: with M left open FP8's quantizer takes up to twice as long.
    with torch.inference_mode(), dynamo_settings(recompile_limit=256, automatic_dynamic_shapes=False):
        check(arguments.scale_rounding, modes)
        gc.freeze()  # every capture of a graph collects garbage
        cases = cases_of(arguments.model or ["llama-8b"])
        rows = run(cases, every_m, splits, arguments.scale_rounding, modes, only_ours=arguments.shares)
    print_table(rows, console)
    print_summary(rows, console)
    if arguments.csv:
        write_csv(rows, arguments.csv)
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
