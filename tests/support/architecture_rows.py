"""What becomes of a model of each architecture: how much of it is packed, what is not and why, and how far it runs off.

The rows of the table in `docs/architectures.md`, which are kept in `architecture_rows.json`.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig
from micromix_compile.linear.experts import MicroMixExperts
from micromix_compile.linear.packed import MicroMixLinear
from micromix_compile.lowering.torch_private.tensors import is_convolution

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from support.architectures import Architecture

OPTIONS: Final[dict[str, Any]] = {"policy": "mxfp8-anchor", "weight_rounding": "nearest", "scale_search": False}
"""Quick to calibrate, and the same without gradients: what the one-line form comes to, `calibrate` does, too."""
WAYS: Final = ("recipe", "one line", "packed")
OUTPUTS: Final = ("logits", "text_embeds", "image_embeds")
EMBEDDING: Final = "it is an embedding"
FILE: Final = Path(__file__).with_suffix(".json")
PAGE: Final = Path(__file__).parents[2] / "docs" / "architectures.md"
MARKS: Final = ("<!-- made by tests/integrations/test_architectures.py -->\n", "<!-- end -->\n")
"""What the table stands between on the page."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One architecture.

    share, body: what part of the Parameters' elements is packed, of all and of those that are of no embedding and no
    head. published: elements of a published size; published_share, published_body: the same shares of it. left: by
    names, whose numbers are stars, why weights stay. breaks: of the graph, beyond those that Dynamo has without us.
    differences: by way, the largest of outputs to the packed model's that runs eagerly, relative to their range.
    effect: the smallest such difference to the unquantized model.
    """

    share: float
    body: float
    published: int
    published_share: float
    published_body: float
    left: Mapping[str, str]
    breaks: int
    differences: Mapping[str, float]
    effect: float


def measured(architecture: Architecture) -> Row:
    """Run the tiny model of an architecture in all three ways, through real code generation."""
    torch.manual_seed(0)
    model, inputs = architecture.model(architecture.tiny_config()), architecture.inputs()
    torch._dynamo.reset()
    plain, own_breaks = _run(torch.compile(model, backend="eager"), inputs)
    recipe = micromix.calibrate(model, [inputs], MicroMixConfig(**OPTIONS), progress=False)
    packed = micromix.quantize_(copy.deepcopy(model), recipe)
    differences, effects, breaks = {}, [], []
    for way in WAYS:
        fast = _compiled(way, copy.deepcopy(model), packed, recipe)
        got, broken = _run(fast, inputs, calls=1 + (way == "one line"))
        used = micromix.recipe_of(fast) if way == "one line" else recipe  # it may take a batch's rows as one sample
        twin = packed if used is recipe else micromix.quantize_(copy.deepcopy(model), used)
        want = _eagerly(twin, inputs)
        spread = float(want.max() - want.min())
        differences[way] = float((got - want).abs().max()) / spread
        effects.append(float((got - plain).abs().max()) / spread)
        breaks.append(broken - own_breaks)
    covered = {_starred(fqn) for fqn in _packed_names(packed) & set(recipe.linears)}
    with torch.device("meta"):
        large = architecture.model(architecture.published_config())
    return Row(
        share=_share(model, covered), body=_share(model, covered, body=True),
        published=sum(parameter.numel() for parameter in large.parameters()),
        published_share=_share(large, covered), published_body=_share(large, covered, body=True),
        left=_left(model, covered, {**recipe.refused, **packed.micromix_refused}), breaks=max(breaks),
        differences=differences, effect=min(effects),
    )  # fmt: skip


def _compiled(way: str, model: nn.Module, packed: nn.Module, recipe: micromix.Recipe) -> Callable[..., Any]:
    torch._dynamo.reset()
    options = {"recipe": {"recipe": recipe}, "one line": {**OPTIONS, "calibration_batches": 1}, "packed": {}}[way]
    return torch.compile(packed if way == "packed" else model, backend="micromix", options=options)


def _run(fast: Callable[..., Any], inputs: Mapping[str, Tensor], calls: int = 1) -> tuple[Tensor, int]:
    """(values of the last call's outputs, how often Dynamo broke the graph for it)."""
    for _ in range(calls):
        counters.clear()
        values = _eagerly(fast, inputs)
    return values, sum(counters["graph_break"].values())


def _eagerly(model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        outputs = model(**inputs)
    found = [value for name in OUTPUTS if (value := getattr(outputs, name, None)) is not None]
    return torch.cat([value.float().flatten() for value in found])


def _packed_names(model: nn.Module) -> set[str]:
    """The names of linears, and of experts' weights, whose packed form a model holds."""
    linears = {name for name, module in model.named_modules() if isinstance(module, MicroMixLinear)}
    holders = {name: module for name, module in model.named_modules() if isinstance(module, MicroMixExperts)}
    return linears | {f"{holder}.{name}" for holder, module in holders.items() for name in module.layouts}


def _share(model: nn.Module, covered: set[str], *, body: bool = False) -> float:
    """What part of a model's elements is of weights that are called as `covered`.

    body: leave out embeddings and the head, which have a vector for each token or place.
    """
    left = _ends(model) if body else set()
    sizes: Counter[bool] = Counter()
    for name, parameter in model.named_parameters():
        if parameter not in left:
            sizes[_starred(name.removesuffix(".weight")) in covered] += parameter.numel()
    return sizes[True] / sizes.total()


def _ends(model: Any) -> set[nn.Parameter]:
    """Embeddings and the head."""
    found = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    return found if head is None else {*found, head.weight}


def _left(model: nn.Module, covered: set[str], refused: Mapping[str, str]) -> dict[str, str]:
    """Why weights of two dimensions or more stay, by name."""
    reasons = {_starred(name): why for name, why in refused.items()}
    left = {}
    for full_name, parameter in model.named_parameters():
        name = _starred(full_name.removesuffix(".weight"))
        if parameter.dim() > 1 and name not in covered:
            module = model.get_submodule(full_name.rpartition(".")[0])
            fallback = "it is a convolution" if is_convolution(module) else "no product reads it"
            left[name] = EMBEDDING if isinstance(module, nn.Embedding) else reasons.get(name, fallback)
    return left


def _starred(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def recorded() -> dict[str, Row]:
    """The rows that were kept, by architecture."""
    return {name: Row(**fields) for name, fields in json.loads(FILE.read_text("utf-8")).items()}


def record(name: str, row: Row) -> None:
    """Keep a row."""
    rows = json.loads(FILE.read_text("utf-8")) if FILE.exists() else {}
    FILE.write_text(json.dumps({**rows, name: asdict(row)}, indent=1) + "\n", "utf-8")


def table(rows: Mapping[str, Row]) -> str:
    """The page's table, and the reasons behind it."""
    lines = [
        "| architecture | parameters | packed | without embeddings, head | tiny: packed | difference | left as it is |",
        "|---|---|---|---|---|---|---|",
    ]
    reasons: dict[str, str] = {}
    for name, row in rows.items():
        left = {_short(one): why for one, why in row.left.items() if why != EMBEDDING}
        reasons |= left
        shares = [f"{100 * share:.1f} %" for share in (row.published_share, row.published_body, row.share)]
        cells = [
            name,
            _size(row.published),
            *shares,
            f"{max(row.differences.values()):.0e}".replace("0e+00", "0"),
            ", ".join(left),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    because: dict[str, list[str]] = {}
    for one, why in sorted(reasons.items()):
        because.setdefault(why, []).append(one)
    listed = [f"- {', '.join(names)}: {why}" for why, names in because.items()]
    return "\n".join([*lines, "", "Why they stay:", "", *listed, ""])


def _size(elements: int) -> str:
    return f"{elements / 1e9:.1f} billion" if elements >= 1e9 else f"{elements / 1e6:.0f} million"


def _short(name: str) -> str:
    """The last two parts of a name, in type for code."""
    parts = [part for part in name.split(".") if part != "*"]
    return f"`{'.'.join(parts[-2:])}`"
