"""A picture of graphs that passes dumped: what each operation of them is, and who reads whom."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

import micromix_compile as micromix
from micromix_compile.report.pictures import COLOURS, INK
from micromix_compile.targets.target import FOLDED, Row, Target, register_target

if TYPE_CHECKING:
    from collections.abc import Iterator

# Which dumps are drawn, by the moments of `passes.manager`.
MOMENTS: Final = {
    "before.open_attention": "traced by Dynamo",
    "after.fold_products": "after the pre-grad passes",
    "after.fuse_silu_mul": "after the post-grad passes",
}
# What moves no data: it is looked through, or, for extents, left out.
_SHAPES: Final = ("getitem", "reshape", "view")
_EXTENTS: Final = ("sym_size",)
_NODE: Final = re.compile(r"%(\w+) : .*?= (call_\w+)\[target=([^\]]+)\]\((.*)\)$")
_READ: Final = re.compile(r"%(\w+)")
_TILE: Final = (1.0, 0.56)


class HalfLayer(torch.nn.Module):
    """What follows attention in a layer of Llama: a sum, a norm, the MLP, a sum."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size)
        self.mlp = LlamaMLP(config)

    def forward(self, x: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """x, attention: (1, M, hidden)."""
        x = x + attention
        return x + self.mlp(self.post_attention_layernorm(x))


@dataclass(frozen=True, slots=True)
class Node:
    """An operation of a graph. label: its name. reads: names of other nodes."""

    name: str
    label: str
    reads: tuple[str, ...]


def nodes_of(dump: Path) -> list[Node]:
    """The operations of a dumped graph, in order, without those on shapes."""
    found: dict[str, Node] = {}
    through: dict[str, str] = {}
    for line in dump.read_text("utf-8").splitlines():
        if match := _NODE.match(line.strip()):
            name, _, target, arguments = match.groups()
            reads = tuple(dict.fromkeys(through.get(one, one) for one in _READ.findall(arguments)))
            label = _label(target)
            if label in _SHAPES:
                through[name] = reads[0]
            elif label not in _EXTENTS:
                found[name] = Node(name, label, tuple(one for one in reads if one in found))
    return list(found.values())


def _label(target: str) -> str:
    """The operation's name without where it comes from."""
    plain = re.sub(r"<(?:built-in (?:function|method)|function|class)\s+'?([\w.]+).*", r"\1", target)
    plain = re.sub(r"\.(default|Tensor|Scalar|Tensor_Scalar|dim|dtype|int)$", "", plain)
    return plain.rpartition(".")[2].rpartition("::")[2]


def dumped(folder: Path) -> dict[str, list[Node]]:
    """The graphs of MOMENTS, by their titles, of the half layer in bfloat16 on a target with all passes of Hopper."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=128, intermediate_size=256, hidden_act="silu")
    model = HalfLayer(config).eval().to(torch.bfloat16)
    inputs = [torch.randn(1, 64, config.hidden_size, dtype=torch.bfloat16) for _ in range(2)]
    recipe = micromix.calibrate(model, [{"x": inputs[0], "attention": inputs[1]}])
    options: dict[str, Any] = {"recipe": recipe, "dump": ("all",), "dump_dir": str(folder)}
    target = Target(name="a GPU that folds", passes=FOLDED)
    remove = register_target(Row(serves=lambda device: not device.exact, target=lambda _: target))
    try:
        with torch.inference_mode():
            torch.compile(model, backend="micromix", options=options)(*inputs)
    finally:
        remove()
    return {title: nodes_of(next(folder.glob(f"*.{moment}.txt"))) for moment, title in MOMENTS.items()}


def draw_passes() -> Figure:
    """A column a graph, an operation a box, in the order in which they run."""
    with tempfile.TemporaryDirectory() as folder:
        graphs = dumped(Path(folder))
    most = max(len(nodes) for nodes in graphs.values())
    figure = Figure(figsize=(8.4, 0.36 * most + 0.7), layout="constrained")
    for index, (title, nodes) in enumerate(graphs.items(), 1):
        axes = figure.add_subplot(1, len(graphs), index)
        axes.set_title(f"{title}:\n{len(nodes)} operations", fontsize=10)
        axes.set_xlim(-0.12, 1.3)
        axes.set_ylim(-most + 0.4, 0.6)
        axes.axis("off")
        for patch in _boxes(nodes):
            axes.add_patch(patch)
        for y, node in enumerate(nodes):
            colour, _ = _colours(node)
            axes.text(0.5, -y, node.label, ha="center", va="center", fontsize=8, color=colour)
        _edges(axes, nodes)
    return figure


def _colours(node: Node) -> tuple[str, str]:
    """Of its text, and of its box: products, quantizers, and all else."""
    if node.label == "linear" or node.label.endswith("_mm"):
        return "white", COLOURS["MXFP4"]
    if "reorder" in node.label:
        return INK, COLOURS["MXFP6"]
    return INK, "#eceef1"


def _boxes(nodes: list[Node]) -> Iterator[FancyBboxPatch]:
    for y, node in enumerate(nodes):
        yield FancyBboxPatch(
            (0, -y - _TILE[1] / 2), *_TILE, boxstyle="round,pad=0,rounding_size=0.08", linewidth=0,
            facecolor=_colours(node)[1],
        )  # fmt: skip


def _edges(axes: Any, nodes: list[Node]) -> None:
    """A short line to the next box, an arc beside the boxes to a later one."""
    places = {node.name: y for y, node in enumerate(nodes)}
    for y, node in enumerate(nodes):
        for start in (places[name] for name in node.reads):
            arrow = {"arrowstyle": "-|>", "color": "#777777", "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
            if y == start + 1:
                axes.annotate("", (0.5, -y + _TILE[1] / 2), (0.5, -start - _TILE[1] / 2), arrowprops=arrow)
            else:
                bend = f"arc3,rad={-0.9 / (y - start) ** 0.5:.2f}"
                axes.annotate("", (1, -y), (1, -start), arrowprops={**arrow, "connectionstyle": bend})
