"""Pass 0: replace torch.nn's fused attention by its plain operations, so that its linears are seen.

In evaluation without gradients nn.TransformerEncoderLayer is one operation, and nn.MultiheadAttention always is one.
"""

from __future__ import annotations

import logging
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from micromix_compile.lowering.torch_private.operators import ENCODER_LAYER, ENTER_AUTOCAST, MULTI_HEAD_ATTENTION
from micromix_compile.lowering.torch_private.tracing import make_fx
from micromix_compile.passes.graph import copy_meta

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from micromix_compile.passes.context import PassContext

logger = logging.getLogger("micromix_compile")
functional = torch.nn.functional


def open_attention(graph: fx.Graph, context: PassContext) -> int:
    """Replace what `PLAIN` knows, with the numbers of torch.nn's own path without fused kernels.

    What can't be replaced is noted in `context.unopened` under the names of its weights. Returns how many were.
    """
    inputs = dict(zip(graph.find_nodes(op="placeholder"), context.example_inputs, strict=True))
    opened = 0
    for node in list(graph.nodes):
        plain = PLAIN.get(node.target) if node.op == "call_function" else None
        if plain is None:
            continue
        reason = _why_not(node) or _replace(graph, node, plain)
        if reason is None:
            opened += 1
            continue
        weights = [value for n in node.all_input_nodes if isinstance(value := inputs.get(n), nn.Parameter)]
        context.unopened |= {context.owner.name_of(weight): reason for weight in weights if weight.dim() == 2}
    return opened


def say_unopened(unopened: Mapping[str, str], *, strict: bool) -> None:
    """Log what was left alone. Raises ValueError instead if `strict`."""
    if unopened and strict:
        name, reason = next(iter(unopened.items()))
        raise ValueError(f"strict=True: {name} runs unquantized: {reason}")
    for name, reason in unopened.items():
        logger.warning("%s runs unquantized: %s", name, reason)


def _why_not(node: fx.Node) -> str | None:
    examples = [n.meta.get("example_value") for n in node.all_input_nodes]
    tensors = [example for example in examples if isinstance(example, Tensor)]
    if any(example is None for example in examples):
        return "torch.nn's fused attention gets an input of unknown shape here"
    if any(tensor.is_nested for tensor in tensors):
        return "torch.nn's fused attention gets a nested tensor here"
    if any(torch.is_autocast_enabled(tensor.device.type) for tensor in tensors) or _enters_autocast(node.graph):
        return "torch.nn's fused attention runs under autocast here"
    is_tuple = node.target is not ENCODER_LAYER
    if is_tuple and any(user.target is not operator.getitem for user in node.users):
        return "the results of torch.nn's fused attention are passed on as a tuple here"
    return None


def _enters_autocast(graph: fx.Graph) -> bool:
    return any(node.target is ENTER_AUTOCAST for node in graph.nodes)


def _replace(graph: fx.Graph, node: fx.Node, plain: Callable[..., Any]) -> str | None:
    """Put the operations of `plain` in the place of `node`, or say why not."""
    operands = node.all_input_nodes
    try:
        traced = _trace(node, operands, plain)
    except NotImplementedError as error:
        return str(error)
    copies = dict(zip(traced.find_nodes(op="placeholder"), operands, strict=True))
    with graph.inserting_before(node):
        for inner in traced.nodes:
            if inner.op not in ("placeholder", "output"):
                copies[inner] = copy_meta(node, graph.node_copy(inner, copies.__getitem__))
                copies[inner].meta["example_value"] = inner.meta["val"]
    results: Any = fx.node.map_arg(traced.output_node().args[0], copies.__getitem__)
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(results)
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)
    return None


def _trace(node: fx.Node, operands: list[fx.Node], plain: Callable[..., Any]) -> fx.Graph:
    """The operations of `plain` on what `node` gets; its placeholders are `operands`."""

    def run(*values: Any) -> Any:
        value = dict(zip(operands, values, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value.__getitem__)
        return plain(*args, **kwargs)

    examples = [operand.meta["example_value"] for operand in operands]
    with torch.no_grad(), examples[0].fake_mode:
        traced = make_fx(run, pre_dispatch=True)(*examples).graph
    if traced.find_nodes(op="get_attr"):
        raise NotImplementedError("torch.nn's fused attention makes constants here")
    return traced


def _native_attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor, qkv_bias: Tensor,
    proj_weight: Tensor, proj_bias: Tensor, mask: Tensor | None = None, need_weights: bool = True,
    average_attn_weights: bool = True, mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """MULTI_HEAD_ATTENTION: (B, T, C) -> (B, T, C), with a mask of `MultiheadAttention.merge_masks`."""
    if query is not key or key is not value:
        raise NotImplementedError("torch.nn's fused attention gets different queries, keys and values here")
    x = query.transpose(0, 1)
    key_padding_mask = mask if mask_type == 1 else None
    attn_mask = mask if mask_type != 1 else None
    if attn_mask is not None and attn_mask.dim() == 4:
        attn_mask = attn_mask.reshape(-1, *attn_mask.shape[2:])
    out, weights = functional.multi_head_attention_forward(
        x, x, x, embed_dim, num_heads, qkv_weight, qkv_bias, None, None, False, 0.0, proj_weight, proj_bias,
        training=False, key_padding_mask=key_padding_mask, need_weights=need_weights, attn_mask=attn_mask,
        average_attn_weights=average_attn_weights,
    )  # fmt: skip
    return out.transpose(0, 1), weights


def _encoder_layer(
    src: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor,
    proj_bias: Tensor, use_gelu: bool, norm_first: bool, eps: float, norm_weight_1: Tensor, norm_bias_1: Tensor,
    norm_weight_2: Tensor, norm_bias_2: Tensor, ffn_weight_1: Tensor, ffn_bias_1: Tensor, ffn_weight_2: Tensor,
    ffn_bias_2: Tensor, mask: Tensor | None = None, mask_type: int | None = None,
) -> Tensor:  # fmt: skip
    """ENCODER_LAYER: (B, T, C) -> (B, T, C), as nn.TransformerEncoderLayer's other path."""

    def attend(x: Tensor) -> Tensor:
        weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)
        return _native_attention(x, x, x, embed_dim, num_heads, *weights, mask, False, True, mask_type)[0]

    def feed_forward(x: Tensor) -> Tensor:
        h = functional.linear(x, ffn_weight_1, ffn_bias_1)
        h = functional.gelu(h) if use_gelu else functional.relu(h)
        return functional.linear(h, ffn_weight_2, ffn_bias_2)

    def norm_1(x: Tensor) -> Tensor:
        return functional.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Tensor) -> Tensor:
        return functional.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        src = src + attend(norm_1(src))
        return src + feed_forward(norm_2(src))
    src = norm_1(src + attend(src))
    return norm_2(src + feed_forward(src))


PLAIN: dict[Any, Callable[..., Any]] = {
    ENCODER_LAYER: _encoder_layer,
    MULTI_HEAD_ATTENTION: _native_attention,
    functional.multi_head_attention_forward: functional.multi_head_attention_forward,
}
"""Fused operations of a Dynamo graph, and the same in plain ones."""
