"""Rows that the Triton quantizer quantized, rows that the reference did, and whether they are the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from micromix_compile.numerics import reference
from micromix_compile.numerics.formats import ScaleRounding
from micromix_compile.numerics.layout import RowLayout, Split
from micromix_compile.targets import quantizers

if TYPE_CHECKING:
    from torch import Tensor

    from micromix_compile.numerics.reference import QuantizedActivation


def assert_same_bytes(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for name, a, b in zip(("q4", "q6", "q8", "scale"), got, want, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        wrong = (a.cpu() != b).nonzero()
        assert not len(wrong), f"{name} differs in {len(wrong)} bytes, first at {wrong[0].tolist()}"


def quantized(
    producer: str, x: Tensor, other: Tensor | None, eps: float, perm: Tensor, *layout: Any
) -> QuantizedActivation:
    """layout: the fields of a `RowLayout`."""
    k4, k6, k8, fp6, rounding, activations, rotated = RowLayout(*layout)
    return quantizers.reorder_quantize(
        producer, x, other, eps, perm, (k4, k6, k8), fp6, rounding, activations=activations, rotated=rotated
    )


def launch(x: Tensor, perm: Tensor, *layout: Any) -> QuantizedActivation:
    return quantized("none", x, None, 0.0, perm, *layout)


def launch_behind_norm(x: Tensor, weight: Tensor, eps: float, perm: Tensor, *layout: Any) -> QuantizedActivation:
    return quantized("rms_norm", x, weight, eps, perm, *layout)


def launch_behind_silu_mul(gate: Tensor, up: Tensor, perm: Tensor, *layout: Any) -> QuantizedActivation:
    return quantized("silu_mul", gate, up, 0.0, perm, *layout)


def quantized_by_the_reference(
    x: Tensor, perm: Tensor, split: Split, fp6: str, rounding: str = "rceil", activations: str = "same",
    rotated: int = 0,
) -> QuantizedActivation:  # fmt: skip
    scale_rounding = ScaleRounding(rounding)
    return reference.reorder_quantize(
        x, perm, split, fp6=fp6, scale_rounding=scale_rounding, activations=activations, rotated=rotated
    )
