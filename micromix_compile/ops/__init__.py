"""The operations that every path meets at, as `torch.library` ops: of `exact`, `folded`, `grouped`, `kv_cache`."""

from micromix_compile.numerics.producers import rms_norm
from micromix_compile.ops.exact import (
    dequantize_weight,
    mixed_mx_mm,
    reorder_quantize,
    rms_norm_reorder_quantize,
    silu_mul_reorder_quantize,
)
from micromix_compile.ops.folded import (
    add_rms_norm_reorder_fold,
    folded_mm,
    reorder_fold,
    rms_norm_reorder_fold,
    silu_mul_reorder_fold,
)
from micromix_compile.ops.grouped import grouped_folded_mm, grouped_mx_mm, weighted_sum
from micromix_compile.ops.kv_cache import write_kv

__all__ = [
    "add_rms_norm_reorder_fold",
    "dequantize_weight",
    "folded_mm",
    "grouped_folded_mm",
    "grouped_mx_mm",
    "mixed_mx_mm",
    "reorder_fold",
    "reorder_quantize",
    "rms_norm",
    "rms_norm_reorder_fold",
    "rms_norm_reorder_quantize",
    "silu_mul_reorder_fold",
    "silu_mul_reorder_quantize",
    "weighted_sum",
    "write_kv",
]
