"""The model `micromix` for lm-eval's own command line, which has no way to find models of other packages by itself.

    python -m micromix_compile.evaluation.lm_eval_model run --model micromix \
        --model_args pretrained=DIRECTORY,recipe=FILE --tasks arc_easy --batch_size 16

is that command line with the model registered. In a program, importing this module registers it.
"""

from __future__ import annotations

from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from micromix_compile.evaluation.harness import compile_in_place
from micromix_compile.linear.packed import MicroMixLinear


@register_model("micromix")
class MicroMixLM(HFLM):  # type: ignore[misc]
    """A causal model that runs compiled by the backend micromix, in any batch size.

    pretrained: a packed checkpoint, or any other model together with `recipe`, the path of a recipe of that model.
    The other arguments are those of lm-eval's model `hf`.

    Raises ValueError where a model that isn't packed has no recipe, or a packed one has one.
    """

    def __init__(self, pretrained: str, recipe: str | None = None, **options: Any) -> None:
        super().__init__(pretrained=pretrained, **options)
        packed = any(isinstance(module, MicroMixLinear) for module in self.model.modules())
        if packed != (recipe is None):
            fact = "is packed already" if packed else "is not packed"
            wanted = "takes no recipe" if packed else "needs recipe=FILE (micromix calibrate --out FILE)"
            raise ValueError(f"{pretrained} {fact} and {wanted}, got recipe={recipe!r}")
        compile_in_place(self.model, recipe)


if __name__ == "__main__":
    cli_evaluate()
