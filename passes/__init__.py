"""FX passes, one a file, in the order in which they run.

A pass from outside joins a list of its phase, before the model is compiled:

    CONVERT_PASSES.insert(CONVERT_PASSES.index(share_activations) + 1, my_pass)

It is a function of a graph and a `PassContext` that returns how many places it matched; `dump=("all",)` writes its
graphs, too. What is compiled is cached by the file in which a post-grad pass is defined.
"""

if __name__ == "passes":
    raise ImportError("import micromix_compile.passes: the folder at the repository's root is not a package of its own")

from typing import Final

from micromix_compile.passes.context import LinearPlan, LinearSite, Owner, PassContext
from micromix_compile.passes.graph import input_devices
from micromix_compile.passes.manager import Pass, counted, for_inductor, identities, is_counting, name_of, run_passes
from micromix_compile.passes.post_grad.fuse_residual import fuse_residual
from micromix_compile.passes.post_grad.fuse_rms_norm import fuse_rms_norm
from micromix_compile.passes.post_grad.fuse_silu_mul import fuse_silu_mul
from micromix_compile.passes.post_grad.sum_experts import sum_experts
from micromix_compile.passes.pre_grad.find_linears import find_linears
from micromix_compile.passes.pre_grad.fold_products import fold_products
from micromix_compile.passes.pre_grad.insert_observers import insert_observers
from micromix_compile.passes.pre_grad.open_attention import open_attention
from micromix_compile.passes.pre_grad.rewrite_linears import rewrite_linears
from micromix_compile.passes.pre_grad.share_activations import share_activations

CALIBRATE_PASSES: Final[list[Pass]] = [open_attention, find_linears, insert_observers]
CONVERT_PASSES: Final[list[Pass]] = [open_attention, find_linears, rewrite_linears, share_activations, fold_products]
POST_GRAD_PASSES: Final[list[Pass]] = [fuse_rms_norm, fuse_residual, fuse_silu_mul, sum_experts]

__all__ = [
    "CALIBRATE_PASSES",
    "CONVERT_PASSES",
    "POST_GRAD_PASSES",
    "LinearPlan",
    "LinearSite",
    "Owner",
    "Pass",
    "PassContext",
    "counted",
    "find_linears",
    "fold_products",
    "for_inductor",
    "fuse_residual",
    "fuse_rms_norm",
    "fuse_silu_mul",
    "identities",
    "input_devices",
    "insert_observers",
    "is_counting",
    "name_of",
    "open_attention",
    "rewrite_linears",
    "run_passes",
    "share_activations",
    "sum_experts",
]
