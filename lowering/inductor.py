"""From a rewritten graph to compiled code: Inductor with our post-grad passes, and a cache key over our sources."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micromix_compile.lowering.torch_private import inductor as torch_inductor
from micromix_compile.targets.target import target_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import fx

    from micromix_compile.targets.target import Target

DEFAULT_OPTIONS: Mapping[str, Any] = {"emulate_precision_casts": True}
"""Round where eager rounds: an ulp of a fused bfloat16 chain would move MXFP4 codes, and so outputs by percents."""

EAGER_OPTIONS: Mapping[str, Any] = {"selective_decompose": True, "pattern_matcher": False}
"""What Inductor's option fallback_by_default, to call all but our operations as eager does, needs for eager's bits."""

POST_GRAD_HOOK = "post_grad_custom_pre_pass"
SOURCE_SUFFIXES = (".py", ".cpp", ".h", ".jinja")


def source_files(root: Path) -> list[Path]:
    """Every source file of the package, kernels included, in a fixed order."""
    walk = os.walk(root, followlinks=True)  # passes, lowering and templates are links in a checkout
    files = (Path(folder) / name for folder, _, names in walk for name in names)
    return sorted(path for path in files if path.suffix in SOURCE_SUFFIXES)


@cache
def fingerprint(root: Path) -> str:
    """SHA-256 over names and bytes of `source_files(root)`: Inductor's caches don't see our code otherwise."""
    digest = hashlib.sha256()
    for path in source_files(root):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


class PostGradPasses(torch_inductor.CustomGraphPass):
    """Our passes on the post-grad graph. Its uuid is what puts our sources into the cache key.

    passes: runs them. settings: what the compiled code depends on beside the graph and our sources, and as "watched"
    whether somebody looks at the passes.
    """

    def __init__(self, passes: Callable[[fx.Graph], object], settings: Mapping[str, Any]) -> None:
        self._passes = passes
        self._is_watched = bool(settings.get("watched"))
        self._settings = json.dumps(settings, sort_keys=True, default=str)

    def __call__(self, graph: fx.Graph) -> None:
        """Run the passes.

        Where Inductor calls every other operation as eager does (its option fallback_by_default), our operations are
        marked as ones to compile, and none takes a norm or an activation into its kernel.
        """
        if torch_inductor.inductor_setting("fallback_by_default"):
            torch_inductor.compile_nodes(node for node in graph.nodes if _is_ours(node))
            return
        self._passes(graph)

    def __deepcopy__(self, memo: dict[int, Any]) -> PostGradPasses:
        """Itself: Inductor copies its options now and then, and passes know a whole model."""
        return self

    def uuid(self) -> str | None:
        """Changes with any source file of the package and with the settings.

        None, with which Inductor leaves its caches alone, where passes are watched: from a cache none would run.
        """
        if self._is_watched:
            return None
        return f"{fingerprint(_package_folder())}-{self._settings}"


def _package_folder() -> Path:
    spec = importlib.util.find_spec("micromix_compile")
    assert spec is not None, "this is a module of it"
    assert spec.origin is not None, "it has an __init__.py"
    return Path(spec.origin).parent


def _is_ours(node: fx.Node) -> bool:
    return getattr(node.target, "namespace", None) == "micromix"


def target_for_us(node: Any) -> Target | None:
    """Who computes what `node` of Inductor's IR holds; None for a graph that did not come through `compile_graph`."""
    return target_of(node.get_device()) if compiles_for_us() else None


def compiles_for_us() -> bool:
    """Whether the graph that Inductor is lowering came through `compile_graph`, whose cache key knows our sources."""
    return isinstance(torch_inductor.inductor_setting(POST_GRAD_HOOK), PostGradPasses)


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any],
    post_grad_passes: Callable[[fx.Graph], object],
    settings: Mapping[str, Any],
) -> Callable[..., Any]:
    """Compile a graph whose linears are micromix ops.

    options: Inductor's own. post_grad_passes: runs passes on Inductor's graph.
    settings: what the compiled code depends on beside the graph, for the cache key.
    """
    from micromix_compile.lowering import folded, mixed_mx_mm, reorder_quantize, weighted_sum  # noqa: F401 - registers

    as_eager = EAGER_OPTIONS if options.get("fallback_by_default") else {}
    patches = {**DEFAULT_OPTIONS, **as_eager, **options, POST_GRAD_HOOK: PostGradPasses(post_grad_passes, settings)}
    return torch_inductor.compile_with_inductor(gm, example_inputs, patches)
