"""The model for lm-eval's own command line: compiled, in batches, and told apart from what it cannot run."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval"),
    pytest.mark.filterwarnings("ignore"),  # the harness's own
]


def make(directory: Path, **options: Any) -> Any:
    """As lm-eval makes it: by its registered name."""
    from lm_eval.api.registry import get_model

    from micromix_compile.evaluation import lm_eval_model

    found = get_model("micromix")
    assert found is lm_eval_model.MicroMixLM
    return found(pretrained=str(directory), device="cpu", dtype="float32", batch_size=2, **options)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_packed_checkpoint_answers_in_batches_as_it_does_alone(
    packed_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.instance import Instance
    from transformers import AutoModelForCausalLM

    lm = make(packed_model)
    pairs = [("Up and", " down"), ("In", " and out"), ("Left and then", " right")]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    found = [likelihood for likelihood, _ in lm.loglikelihood(requests)]
    alone = AutoModelForCausalLM.from_pretrained(packed_model, dtype=torch.float32)
    for (context, continuation), likelihood in zip(pairs, found, strict=True):
        texts = (context, context + continuation)
        before, whole = (lm.tokenizer(text, return_tensors="pt")["input_ids"] for text in texts)
        with torch.no_grad():
            log_p = alone(whole[:, :-1]).logits.log_softmax(-1)
        expected = log_p[0, before.shape[1] - 1 :].gather(1, whole[0, before.shape[1] :, None]).sum()
        assert likelihood == pytest.approx(expected.item(), rel=1e-3)
    assert lm.model._compiled_call_impl is not None


def test_a_recipe_goes_with_a_model_that_is_not_packed_and_only_with_it(
    small_model: Path, packed_model: Path, recipe_file: Path
) -> None:
    make(small_model, recipe=str(recipe_file))
    with pytest.raises(ValueError, match=r"is not packed and needs recipe=FILE .*, got recipe=None"):
        make(small_model)
    with pytest.raises(ValueError, match="is packed already and takes no recipe, got recipe='r'"):
        make(packed_model, recipe="r")


@pytest.mark.deep
def test_the_command_line_is_lm_evals_own() -> None:
    command = [sys.executable, "-m", "micromix_compile.evaluation.lm_eval_model", "run", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, "--model_args" in result.stdout) == (0, True), result.stderr
