"""FX passes, one a file, in the order in which they run."""

if __name__ == "passes":
    raise ImportError("import micromix_compile.passes: the folder at the repository's root is not a package of its own")

from micromix_compile.passes.manager import (
    LinearPlan,
    LinearSite,
    Owner,
    PassContext,
    dumping,
    input_devices,
    run_passes,
)
from micromix_compile.passes.post_grad.fuse_residual import fuse_residual
from micromix_compile.passes.post_grad.fuse_rms_norm import fuse_rms_norm
from micromix_compile.passes.post_grad.fuse_silu_mul import fuse_silu_mul
from micromix_compile.passes.pre_grad.find_linears import find_linears
from micromix_compile.passes.pre_grad.fold_products import fold_products
from micromix_compile.passes.pre_grad.insert_observers import insert_observers
from micromix_compile.passes.pre_grad.open_attention import open_attention
from micromix_compile.passes.pre_grad.rewrite_linears import rewrite_linears
from micromix_compile.passes.pre_grad.share_activations import share_activations

CALIBRATE_PASSES = (open_attention, find_linears, insert_observers)
CONVERT_PASSES = (open_attention, find_linears, rewrite_linears, share_activations, fold_products)
POST_GRAD_PASSES = (fuse_rms_norm, fuse_residual, fuse_silu_mul)

__all__ = [
    "CALIBRATE_PASSES",
    "CONVERT_PASSES",
    "POST_GRAD_PASSES",
    "LinearPlan",
    "LinearSite",
    "Owner",
    "PassContext",
    "dumping",
    "input_devices",
    "run_passes",
]
