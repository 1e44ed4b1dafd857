"""Tasks of lm-evaluation-harness whose data are local: shares that are known beforehand, and errors in one line."""

from __future__ import annotations

import importlib.util
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import micromix_compile as micromix
from micromix_compile.evaluation import harness
from micromix_compile.evaluation.harness import load_harness_task, run_harness_task, share_of_right_items

if TYPE_CHECKING:
    from pathlib import Path

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval")
pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore"),  # the harness's own
]
TASK = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: {metric}, aggregation: {aggregation}, higher_is_better: true}}]
"""
VOCABULARY = ("<unk>", "<eos>", *"abcdefgh")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")


@pytest.fixture
def model() -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=len(VOCABULARY), max_position_embeddings=64)
    return AutoModelForCausalLM.from_config(config).eval()


def write_task(folder: Path, answers: list[Any], *, kind: str = "multiple_choice", metric: str = "acc") -> str:
    rows = [{"question": "abcd"[: i + 1], "choices": [" e", " f"], "answer": a} for i, a in enumerate(answers)]
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    aggregation = "mean" if metric == "acc" else "perplexity"
    text = TASK.format(data=folder / "rows.json", kind=kind, metric=metric, aggregation=aggregation)
    (folder / "words.yaml").write_text(text)
    return str(folder / "words.yaml")


def preferred(model: Any, tokenizer: PreTrainedTokenizerFast, count: int) -> list[int]:
    """What the model answers to the first questions, computed here."""
    found = []
    for i in range(count):
        ids = [tokenizer.encode("abcd"[: i + 1] + choice, return_tensors="pt") for choice in (" e", " f")]
        with torch.no_grad():
            likelihoods = [
                model(x[:, :-1]).logits.log_softmax(-1)[0, -2:].gather(1, x[0, -2:, None]).sum() for x in ids
            ]
        found.append(int(likelihoods[1] > likelihoods[0]))
    return found


@needs_harness
@pytest.mark.parametrize("kind", ["packed", "compiled"])
def test_the_share_is_that_of_the_models_own_preferences(
    model: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, kind: str
) -> None:
    """Of four items, three are labelled as the quantized model answers, and of the first two, one."""
    config = micromix.MicroMixConfig(policy="mxfp4", weight_rounding="nearest", scale_search=False)
    recipe = micromix.calibrate(model, [torch.randint(0, len(VOCABULARY), (2, 16))], config)
    fast = (
        micromix.quantize_(model, recipe)
        if kind == "packed"
        else torch.compile(model, backend="micromix", options={"recipe": recipe})
    )
    answers = preferred(fast, tokenizer, 4)
    answers[1] = 1 - answers[1]
    path = write_task(tmp_path, answers)
    for count, accuracy in ((None, 0.75), (2, 0.5)):
        result = run_harness_task(fast, load_harness_task(path, tokenizer, count))
        assert (result.task, result.items, result.accuracy) == ("words", count or 4, accuracy)


@needs_harness
def test_unknown_tasks_missing_data_and_other_metrics_are_the_users_errors(
    model: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"lm-eval has no task 'missing.yaml', and it is no \.yaml file"):
        load_harness_task("missing.yaml", tokenizer)
    path = write_task(tmp_path, [" e", " f"], kind="loglikelihood", metric="perplexity")
    task = load_harness_task(path, tokenizer)
    with pytest.raises(ValueError, match=r"lm-eval's task words measures perplexity, .*, none of acc, exact_match"):
        run_harness_task(model, task)
    (tmp_path / "rows.json").unlink()
    with pytest.raises(OSError, match=r"the data of lm-eval's task .*words.yaml are not on this machine: "):
        load_harness_task(path, tokenizer)


def test_the_first_filter_of_the_preferred_metric_counts() -> None:
    results = {"alias": "t", "exact_match,strict": 0.1, "acc,strict": 0.2, "acc,loose": 0.3, "acc_stderr,strict": 0.4}
    assert share_of_right_items("t", results) == 0.2
    with pytest.raises(ValueError, match="lm-eval's task t measures word_perplexity, none of acc, exact_match"):
        share_of_right_items("t", {"alias": "t", "word_perplexity,none": 9.0})


def test_without_the_harness_the_command_is_named(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"words needs a package: pip install 'micromix-compile\[lm-eval\]'"):
        load_harness_task("words", tokenizer)
