"""Tasks of lm-evaluation-harness whose data are local: shares that are known beforehand, and errors in one line."""

from __future__ import annotations

import copy
import importlib.util
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import micromix_compile as micromix
from micromix_compile.evaluation import harness, task_data
from micromix_compile.evaluation.harness import (
    HarnessTask,
    TaskSettings,
    compiled_twin,
    load_harness_task,
    main_metric,
    metrics_of,
    run_harness_tasks,
)
from micromix_compile.evaluation.types import Metric

if TYPE_CHECKING:
    from pathlib import Path

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval")
pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore"),  # the harness's own
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: {metric}, aggregation: {aggregation}, higher_is_better: true}}]
"""
GENERATION = "generation_kwargs: {until: [<eos>], do_sample: false, max_gen_toks: 6}\n"
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
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = LlamaConfig(**sizes, **tokens, vocab_size=len(VOCABULARY), max_position_embeddings=64)
    return AutoModelForCausalLM.from_config(config).eval()


def write_task(
    folder: Path, answers: list[Any], *, name: str = "words", kind: str = "multiple_choice", metric: str = "acc"
) -> str:
    rows = [{"question": "abcd"[: i + 1], "choices": [" e", " f"], "answer": a} for i, a in enumerate(answers)]
    (folder / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
    aggregation = "perplexity" if metric == "perplexity" else "mean"
    text = TASK.format(data=folder / f"{name}.json", kind=kind, metric=metric, aggregation=aggregation, name=name)
    if kind == "generate_until":
        text = "".join(line for line in text.splitlines(True) if "doc_to_choice" not in line) + GENERATION
    (folder / f"{name}.yaml").write_text(text)
    return str(folder / f"{name}.yaml")


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


def written(model: Any, tokenizer: PreTrainedTokenizerFast, count: int) -> list[str]:
    """What the model writes after the first questions, one by one."""
    found = []
    for i in range(count):
        ids = tokenizer.encode("abcd"[: i + 1], return_tensors="pt")
        out = model.generate(ids, do_sample=False, max_new_tokens=6)
        found.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return found


@needs_harness
@pytest.mark.parametrize("kind", ["packed", pytest.param("compiled", marks=pytest.mark.deep)])
def test_answers_and_texts_are_the_quantized_models_own(
    model: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, kind: str
) -> None:
    """In batches. Of four items, three are labelled as the quantized model answers, and of the first two, one."""
    config = micromix.MicroMixConfig(policy="mxfp4", weight_rounding="nearest", scale_search=False)
    recipe = micromix.calibrate(model, [torch.randint(0, len(VOCABULARY), (2, 16))], config)
    full = written(model, tokenizer, 4)
    packed = micromix.quantize_(copy.deepcopy(model), recipe)
    answers, texts = preferred(packed, tokenizer, 4), written(packed, tokenizer, 4)
    assert texts != full, "or the test would not see which model wrote"
    answers[1] = 1 - answers[1]
    names = (
        write_task(tmp_path, answers),
        write_task(tmp_path, texts, name="texts", kind="generate_until", metric="exact_match"),
    )
    runs = packed if kind == "packed" else compiled_twin(model, recipe)
    for count, accuracy, batch in ((None, 0.75, 4),) if kind == "compiled" else ((None, 0.75, 3), (2, 0.5, 1)):
        settings = TaskSettings(items=count, batch_size=batch)
        tasks = [load_harness_task(name, tokenizer, settings) for name in names]
        found, generated = run_harness_tasks(runs, tasks)
        assert (found.task, found.items, found.metric) == ("words", count or 4, "acc")
        error = (accuracy * (1 - accuracy) / (found.items - 1)) ** 0.5
        assert found.metrics["acc"] == Metric(value=accuracy, standard_error=pytest.approx(error))
        assert (generated.metric, generated.metrics["exact_match"].value) == ("exact_match", 1.0)
    assert written(model, tokenizer, 4) == full, "the model beside its twin stays as it was"


def test_a_compiled_twin_generates_compiled_and_leaves_the_model_as_it_is(model: Any) -> None:
    config = micromix.MicroMixConfig(policy="mxfp4", weight_rounding="nearest", scale_search=False)
    twin = compiled_twin(model, micromix.calibrate(model, [torch.randint(0, len(VOCABULARY), (2, 16))], config))
    calls: list[int] = []
    twin._compiled_call_impl = lambda *args, **kwargs: calls.append(1) or model(*args, **kwargs)
    written = twin.generate(torch.tensor([[3, 4]]), do_sample=False, max_new_tokens=3, min_new_tokens=3)
    assert (written.shape, len(calls)) == ((1, 5), 3)
    assert twin.lm_head.weight is model.lm_head.weight
    assert model._compiled_call_impl is None
    assert model.generation_config.cache_implementation is None


@needs_harness
def test_unknown_tasks_missing_data_and_other_metrics_are_the_users_errors(
    model: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"lm-eval has no task 'missing.yaml', and it is no \.yaml file"):
        load_harness_task("missing.yaml", tokenizer)
    with pytest.raises(ValueError, match="ai2_arc is a tag of lm-eval; name its tasks: arc_challenge arc_easy"):
        load_harness_task("ai2_arc", tokenizer)
    path = write_task(tmp_path, [" e", " f"], kind="loglikelihood", metric="perplexity")
    task = load_harness_task(path, tokenizer)
    with pytest.raises(ValueError, match=r"lm-eval's task words measures perplexity, .*none of acc, exact_match"):
        run_harness_tasks(model, [task])
    (tmp_path / "words.json").unlink()
    with pytest.raises(OSError, match=r"the data of lm-eval's task .*words.yaml are not on this machine: "):
        load_harness_task(path, tokenizer)


@needs_harness
def test_answers_that_are_kept_are_not_asked_for_again(
    model: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_task(tmp_path, [0, 1, 1, 0])
    few, all_ = (load_harness_task(path, tokenizer, TaskSettings(items=n)) for n in (2, 4))
    run_harness_tasks(model, [few], responses=tmp_path / "kept" / "row")
    asked: list[tuple[int, ...]] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, **rest: asked.append(ids.shape) or forward(ids, **rest))
    (first,) = run_harness_tasks(model, [all_], responses=tmp_path / "kept" / "row")
    assert len(asked) == 2, "one for each new item, for its choices are one token each"
    (second,) = run_harness_tasks(model, [all_], responses=tmp_path / "kept" / "row")
    assert (len(asked), second) == (2, first)


@needs_harness
def test_programs_of_a_model_run_only_where_it_is_allowed(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And then count as passed if the tests pass."""
    monkeypatch.setattr(task_data, "READERS", {"openai/openai_humaneval": lambda _: one_problem()})
    with pytest.raises(ValueError, match=r"task humaneval runs programs that the model wrote; allow it \(--allow"):
        load_harness_task("humaneval", tokenizer, TaskSettings(data="packages"))
    settings = TaskSettings(data="packages", allow_code_execution=True)
    task = load_harness_task("humaneval", tokenizer, settings).loaded
    (document,) = task.test_docs()
    for body, share in (("    return 2 * x", 1.0), ("    return x", 0.0), ("    while True: pass", 0.0)):
        programs = [[document["prompt"] + body]]
        assert task.process_results(document, programs)["pass@1"] == share


def one_problem() -> Any:
    import datasets

    fields = {"prompt": "def f(x):\n", "test": "def check(f):\n    assert f(2) == 4", "entry_point": "f"}
    return datasets.DatasetDict(test=datasets.Dataset.from_list([fields]))


@pytest.mark.parametrize(("items", "leaves", "limit"), [(200, 57, 4), (200, 1, 200), (3, 2, 2), (None, 57, None)])
def test_a_group_shares_out_its_items(
    tokenizer: PreTrainedTokenizerFast, items: int | None, leaves: int, limit: int | None
) -> None:
    names = tuple(map(str, range(leaves)))
    assert HarnessTask("group", None, names, tokenizer, TaskSettings(items=items)).limit == limit


def test_the_first_filter_of_each_metric_counts_with_its_own_error() -> None:
    results = {"alias": "t", "exact_match,strict": 0.1, "acc,strict": 0.2, "acc,loose": 0.3, "acc_stderr,strict": 0.4}
    results["acc_stderr,loose"] = 0.5
    results["exact_match_stderr,strict"] = "N/A"
    metrics = metrics_of(results)
    assert metrics == {"exact_match": Metric(value=0.1), "acc": Metric(value=0.2, standard_error=0.4)}
    assert main_metric("t", metrics) == "acc"
    with pytest.raises(ValueError, match="lm-eval's task t measures bits_per_byte, none of acc, exact_match"):
        main_metric("t", metrics_of({"alias": "t", "bits_per_byte,none": 9.0}))


def test_without_the_harness_the_command_is_named(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"words needs a package: pip install 'micromix-compile\[lm-eval\]'"):
        load_harness_task("words", tokenizer)
