"""Inductor's lowering of micromix::mixed_mx_mm: a Triton template with fused epilogues, or the op itself elsewhere."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

import sympy

from micromix_compile import ops, templates
from micromix_compile.lowering import inductor
from micromix_compile.lowering.launches import Operand
from micromix_compile.lowering.torch_private.lowerings import (
    V,
    config,
    fallback_handler,
    ir,
    register_lowering,
    size_hint,
)
from micromix_compile.lowering.torch_private.templates import (
    SymbolicGridFn,
    TritonTemplate,
    TritonTemplateKernel,
    select_algorithm,
)
from micromix_compile.numerics.layout import block_counts, product_split, split_of_activation, split_of_weight

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

TEMPLATE: Final = "triton/mixed_mx_mm.py.jinja"


class _MixedKernel(TritonTemplateKernel):
    """Adds what templates lack: integers of one call as run-time arguments of the kernel."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._register_extra_template_env_fns(self.segment_blocks)

    def segment_blocks(self) -> str:
        """Template hook: the blocks of 32 channels in each segment, as a tuple expression.

        As literals they would make one kernel a layer, for each layer has its own split. Kernels are specialized on
        arguments that are 1, equal, or multiples of 16, too; odd numbers that ascend from 3 are none of these.
        """
        parts = [Operand(self.named_input_nodes[name]) for name in ("X4", "X6", "X8", "W4", "W6", "W8")]
        split = product_split(split_of_activation(*parts[:3]), split_of_weight(*parts[3:]))
        arguments, value = [], 1
        for blocks in block_counts(split):
            value += 2 * (blocks + 1)
            arguments.append(self.args._lookup("ks", self.args.sizevars, sympy.Integer(value)))
        first, second, third = arguments
        return f"({first} - 3) // 2, ({second} - {first}) // 2 - 1, ({third} - {second}) // 2 - 1"


class _MixedTemplate(TritonTemplate):
    kernel_type = _MixedKernel


@SymbolicGridFn
def _grid(m: Any, n: Any, meta: dict[str, Any], *, cdiv: Callable[[Any, int], Any]) -> tuple[Any, Any, Any]:
    return (cdiv(m, meta["BLOCK_M"]) * cdiv(n, meta["BLOCK_N"]), 1, 1)


@cache
def _template() -> TritonTemplate:
    source = resources.files(templates).joinpath(TEMPLATE).read_text()
    return _MixedTemplate(name="mixed_mx_mm", grid=_grid, source=source)


_call_op = fallback_handler(ops.mixed_mx_mm, add_to_fallback_set=False)


@register_lowering(ops.mixed_mx_mm, type_promotion_kind=None)
def _lower_mixed_mx_mm(
    x4: Any, x6: Any, x8: Any, x_scale: Any, w4: Any, w6: Any, w8: Any, w_scale: Any, bias: Any, fp6: str,
    out_dtype: torch.dtype,
) -> Any:  # fmt: skip
    target = inductor.target_for_us(x_scale)
    if target is None or target.exact.tiles is None:
        return _call_op(x4, x6, x8, x_scale, w4, w6, w8, w_scale, bias, fp6, out_dtype)
    tensors = [x4, x6, x8, x_scale, w4, w6, w8, w_scale] + ([] if bias is None else [bias])
    operands = [_in_memory(tensor) for tensor in tensors]
    size = [x_scale.get_size()[0], w_scale.get_size()[0]]
    layout = ir.FixedLayout(x_scale.get_device(), out_dtype, size)
    split, w_split = split_of_activation(*map(Operand, (x4, x6, x8))), split_of_weight(*map(Operand, (w4, w6, w8)))
    tiles = target.exact.tiles.tiles_for(size_hint(V.graph.sizevars, size[0]))
    choices: list[Any] = []
    for tile in tiles if config.max_autotune or config.max_autotune_gemm else tiles[:1]:
        constants = target.exact.tiles.constants(tile, fp6=fp6, split=split, w_split=w_split, has_bias=bias is not None)
        options = {name: repr(value) if isinstance(value, str) else value for name, value in constants.items()}
        options |= {"OUT_DTYPE": "tl." + str(out_dtype).removeprefix("torch.")}
        error = _template().maybe_append_choice(
            choices, input_nodes=tuple(operands), layout=layout, num_warps=tile.num_warps, num_stages=tile.num_stages,
            **options,
        )  # fmt: skip
        assert error is None, f"the template takes every tile of the table: {error}"
    return select_algorithm("mixed_mx_mm", choices, operands, layout)


def _in_memory(tensor: Any) -> Any:
    """An operand as the kernel reads it: in memory, row after row. What is empty is never read."""
    if 0 not in tensor.get_size():
        tensor = ir.ExternKernel.require_contiguous(tensor)
    return ir.ExternKernel.realize_input(tensor)
