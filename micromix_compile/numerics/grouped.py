"""Grouped products: rows of one quantized activation with the weights of the experts that they were routed to.

As in torch's grouped product, output rows are sorted by expert: `offs` (E,) int32 holds where each expert's rows end,
so that expert e computes the rows from offs[e - 1], or 0, to offs[e]. What lies behind offs[E - 1] is zero. `rows` (R,)
int32 says which row of the activation each output row reads: one token may go to several experts, and is quantized
once. Weights, their scales and biases have a leading dimension of experts. In the end each token's rows are summed, by
the weights that the router gave them.

Here is what the products and that sum are, in plain PyTorch. It reads `offs` on the host; kernels need not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from micromix_compile.numerics import folding, reference
from micromix_compile.numerics.checks import check_mixed_mx_mm
from micromix_compile.numerics.folding import factor_shape, fold_width
from micromix_compile.numerics.layout import PackedWeight, packed_shapes, split_of_weight
from micromix_compile.numerics.reference import QuantizedActivation

if TYPE_CHECKING:
    from collections.abc import Callable


def check_grouped_mx_mm(
    x: QuantizedActivation, rows: Tensor, offs: Tensor, w: PackedWeight, bias: Tensor | None, fp6: str
) -> None:
    """Raise TypeError or ValueError unless the operands of `grouped_mx_mm` fit each other; only shapes are read.

    x: as of `reference.reorder_quantize`. w: w4 (E, N, k4 // 2), w6 (E, 3, N, k6 // 4), w8 (E, N, k8), w_scale
    (E, N, K // 32), uint8.
    """
    _check_routing(rows, offs, w.w4, {"w6": w.w6, "w8": w.w8, "w_scale": w.w_scale, "bias": bias})
    check_mixed_mx_mm(*x, *expert_of(w, 0), None if bias is None else bias[0], fp6)


def expert_of(w: PackedWeight, expert: int) -> PackedWeight:
    """One expert's weight."""
    return PackedWeight(*(part.select(0, expert) for part in w))


def check_grouped_folded_mm(
    q: Tensor, row_scale: Tensor, rows: Tensor, offs: Tensor, w4: Tensor, w6: Tensor, w8: Tensor, w_factor: Tensor,
    w_row_scale: Tensor, bias: Tensor | None,
) -> None:  # fmt: skip
    """Raise TypeError or ValueError unless the operands of `grouped_folded_mm` fit each other; only shapes are read.

    q: (T, `fold_width`) uint8. row_scale: (T,) float32. w_factor: (E, *`factor_shape`) uint8. w_row_scale: (E, N)
    float32. Weights, but for their scales: as of `check_grouped_mx_mm`.
    """
    _check_routing(rows, offs, w4, {"w6": w6, "w8": w8, "w_factor": w_factor, "w_row_scale": w_row_scale, "bias": bias})
    (experts, columns), split = w4.shape[:2], split_of_weight(w4, w6, w8)
    width = fold_width(split, w_fp4=False)
    if q.dim() != 2 or q.shape[1] != width:
        raise ValueError(f"q must have rows of {width} bytes, as the weights take them, got shape {tuple(q.shape)}")
    _, of_w6, of_w8, _ = packed_shapes(columns, split)
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "row_scale": (row_scale, (q.shape[0],)),
        "w6": (w6, (experts, *of_w6)),
        "w8": (w8, (experts, *of_w8)),
        "w_factor": (w_factor, (experts, *factor_shape(columns, split))),
        "w_row_scale": (w_row_scale, (experts, columns)),
        "bias": (bias, (experts, columns)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def _check_routing(rows: Tensor, offs: Tensor, w4: Tensor, others: dict[str, Tensor | None]) -> None:
    for name, index in (("rows", rows), ("offs", offs)):
        if index.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {index.dtype}")
        if index.dim() != 1:
            raise ValueError(f"{name} must be 1-dimensional, got shape {tuple(index.shape)}")
    if w4.dim() != 3 or w4.shape[0] == 0:
        raise ValueError(f"w4 must be (E, N, k4 // 2) of at least one expert, got shape {tuple(w4.shape)}")
    for name, part in {"offs": offs, **others}.items():
        if part is not None and (part.dim() == 0 or part.shape[0] != w4.shape[0]):
            raise ValueError(f"{name} must be of the {w4.shape[0]} experts of w4, got shape {tuple(part.shape)}")


def runs_of(rows: Tensor, offs: Tensor) -> list[slice]:
    """The output rows of each expert. Raises ValueError where `offs` descends or passes the last row; reads values."""
    ends = offs.tolist()
    for expert, (start, stop) in enumerate(zip([0, *ends], ends, strict=False)):
        if not start <= stop <= rows.shape[0]:
            raise ValueError(f"offs must ascend from 0 to {rows.shape[0]}, got {stop} behind {start} (expert {expert})")
    return [slice(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]


def grouped_mx_mm(
    x: QuantizedActivation, rows: Tensor, offs: Tensor, w: PackedWeight, bias: Tensor | None, *, fp6: str,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`reference.mixed_mx_mm` of each expert's rows. Returns (R, N) out_dtype; raises as `check_grouped_mx_mm`."""
    check_grouped_mx_mm(x, rows, offs, w, bias, fp6)

    def product(expert: int, taken: Tensor) -> Tensor:
        part = QuantizedActivation(*(one[taken] for one in x))
        own = None if bias is None else bias[expert]
        return reference.mixed_mx_mm(part, *expert_of(w, expert), own, fp6=fp6, out_dtype=out_dtype)

    return _by_expert(rows, offs, x.scale.new_zeros((rows.shape[0], w.w4.shape[1]), dtype=out_dtype), product)


def grouped_folded_mm(
    q: Tensor, row_scale: Tensor, rows: Tensor, offs: Tensor, w4: Tensor, w6: Tensor, w8: Tensor, w_factor: Tensor,
    w_row_scale: Tensor, bias: Tensor | None, *, fp6: str, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`folding.folded_mm` of each expert's rows. Returns (R, N) out_dtype; raises as `check_grouped_folded_mm`."""
    check_grouped_folded_mm(q, row_scale, rows, offs, w4, w6, w8, w_factor, w_row_scale, bias)

    def product(expert: int, taken: Tensor) -> Tensor:
        folded = folding.fold_weight(w4[expert], w6[expert], w8[expert], w_factor[expert], fp6)
        own = None if bias is None else bias[expert]
        return folding.folded_mm(q[taken], row_scale[taken], [(folded, w_row_scale[expert])], [own], out_dtype)[0]

    return _by_expert(rows, offs, q.new_zeros((rows.shape[0], w4.shape[1]), dtype=out_dtype), product)


def check_weighted_sum(rows: Tensor, weights: Tensor, place: Tensor, out_dtype: torch.dtype) -> None:
    """Raise TypeError or ValueError unless these are operands of `weighted_sum`; only shapes and dtypes are read."""
    for name, dtype in (("rows", rows.dtype), ("weights", weights.dtype), ("out_dtype", out_dtype)):
        if not dtype.is_floating_point:
            raise TypeError(f"{name} must be of floating point, got {dtype}")
    if place.dtype not in {torch.int32, torch.int64}:
        raise TypeError(f"place must be int32 or int64, got {place.dtype}")
    if rows.dim() != 2 or place.dim() != 2:
        shapes = f"{tuple(rows.shape)} and {tuple(place.shape)}"
        raise ValueError(f"rows must be (R, N) and place (T, k), got shapes {shapes}")
    if weights.shape != rows.shape[:1]:
        raise ValueError(f"weights must be ({rows.shape[0]},), one a row, got shape {tuple(weights.shape)}")


def weighted_sum(rows: Tensor, weights: Tensor, place: Tensor, out_dtype: torch.dtype) -> Tensor:
    """What experts made of each token, by the weights that the router gave them: out[t] = sum_j weights[p] rows[p].

    rows: (R, N) float. weights: (R,) float. place: (T, k) int32 or int64, p = place[t, j]; negative ones count from
    the end. Products and sums are float32 and are rounded once, to out_dtype. Returns (T, N); raises as
    `check_weighted_sum`, and IndexError where place is outside.
    """
    check_weighted_sum(rows, weights, place, out_dtype)
    place = place.long()
    return (rows[place].float() * weights[place].float().unsqueeze(-1)).sum(1).to(out_dtype)


def _by_expert(rows: Tensor, offs: Tensor, out: Tensor, product: Callable[[int, Tensor], Tensor]) -> Tensor:
    """`out` with product(expert, its rows of x) in each expert's place."""
    for expert, run in enumerate(runs_of(rows, offs)):
        if run.stop > run.start:
            out[run] = product(expert, rows[run].long())
    return out
