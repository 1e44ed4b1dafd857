"""The page: one HTML file that asks for nothing else, filled in from a template."""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from micromix_compile.evaluation.machine import hardware, versions
from micromix_compile.passes import CONVERT_PASSES, POST_GRAD_PASSES, name_of
from micromix_compile.report.facts import BF16_BYTES
from micromix_compile.report.machines import instructions
from micromix_compile.report.pictures import COLOURS, INK, LINES
from micromix_compile.report.series import without_numbers
from micromix_compile.targets.described import SEGMENTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from micromix_compile.report.facts import Facts
    from micromix_compile.report.machines import Machine
    from micromix_compile.report.measured import Measured
    from micromix_compile.report.pictures import Picture

ACTIVATIONS: Final = {
    "same": "each channel in the format of its weight",
    "fp8": "E4M3, one scale a row",
    "mxfp6": "MXFP6, and MXFP8 where the weight is that",
}

PASSES: Final = {
    "open_attention": "opens fused attention of torch.nn, so that the linears in it are seen",
    "find_linears": "finds the products with a weight",
    "rewrite_linears": "makes a linear a reorder-and-quantize and a product of MX operands",
    "share_activations": "lets linears that read one activation share its quantize",
    "fold_products": "has products of bfloat16 models take folded operands, on Hopper",
    "fuse_rms_norm": "puts an RMSNorm into the quantize behind it",
    "fuse_residual": "puts a residual sum into the norm and the quantize behind it",
    "fuse_silu_mul": "puts SiLU times up into the quantize behind it",
    "sum_experts": "sums what experts made of each token in one kernel",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """All that a page shows. measured: None without the unquantized model."""

    facts: Facts
    machines: Sequence[Machine]
    pictures: Sequence[Picture]
    measured: Measured | None = None

    def html(self) -> str:
        """The page. Numbers stand in it as they are in `data-value`, and rounded for people."""
        environment = Environment(
            loader=PackageLoader("micromix_compile.report", "."),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters |= {"number": number, "bytes": size, "percent": percent, "breakable": breakable}
        environment.globals |= {"products": self._products, "of_section": self._of_section}
        return environment.get_template("page.html.jinja").render(**self._values())

    def _values(self) -> dict[str, Any]:
        facts = self.facts
        others, other_bytes = facts.left_alone or (0, 0)
        return {
            "facts": facts,
            "measured": self.measured,
            "machines": self.machines,
            "segments": SEGMENTS,
            "colours": COLOURS,
            "lines": LINES,
            "ink": INK,
            "activations": ACTIVATIONS[facts.config.activations],
            "rotated_groups": sum(group.rotated > 0 for group in facts.groups),
            "whole_bytes": facts.stored_bytes + other_bytes,
            "bf16_linears": BF16_BYTES * facts.parameters,
            "bf16_whole": BF16_BYTES * (facts.parameters + others),
            "bytes_by_part": facts.bytes_by_part,
            "has_experts": any(linear.experts is not None for linear in facts.linears),
            "stays": self._stays(),
            "by_name": {group.name: group for group in facts.groups},
            "options": facts.config.to_file(),
            "passes": [(name_of(one), _summary(one)) for one in (*CONVERT_PASSES, *POST_GRAD_PASSES)],
            "versions": versions(),
            "hardware": hardware(),
        }

    def _stays(self) -> Counter[tuple[str, str]]:
        """What is left alone: (name, why) -> how many; names that differ by the number of their layer are one."""
        found = {**self.facts.refused, **(self.measured.refused if self.measured is not None else {})}
        patterns = Counter((without_numbers(name), why) for name, why in found.items())
        names = {(without_numbers(name), why): name for name, why in found.items()}
        return Counter({(names[key] if count == 1 else key[0], key[1]): count for key, count in patterns.items()})

    def _products(self, machine: Machine, linear: Any) -> str:
        """With how few rows what multiplies it, and what does with more."""
        *few, most = machine.products(linear, self.facts)
        return ", then ".join([*(f"{instructions(one)} {one.rows} rows" for one in few), instructions(most)])

    def _of_section(self, section: str) -> list[Picture]:
        return [picture for picture in self.pictures if picture.section == section]


def number(value: float | None, digits: int = 2) -> str:
    """A number for people; nothing for None."""
    if value is None:
        return ""
    return f"{value:.{digits}f}" if value == 0 or abs(value) >= 10**-digits else f"{value:.1e}"


def size(count: int) -> str:
    """Bytes for people."""
    if count >= 2**30:
        return f"{count / 2**30:,.2f} GiB"
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 / 10 else f"{count / 2**10:,.1f} KiB"


def percent(share: float) -> str:
    """A share for people, which is not zero unless there is none."""
    return "under 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def breakable(name: str) -> Markup:
    """A name that may be broken behind its dots."""
    return Markup(".<wbr>").join(name.split("."))


def _summary(graph_pass: Any) -> str:
    """What a pass does, of one from outside the first line of what it says itself."""
    return PASSES.get(name_of(graph_pass)) or (inspect.getdoc(graph_pass) or "").partition("\n")[0]
