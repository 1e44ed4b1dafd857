"""Every Python block of README and the documentation is run, page by page: on tiny models, with what a page presumes.

A block that is added runs here without a further word, with the names of `presumed`. Pages in `ELSEWHERE` have tests of
their own.
"""

from __future__ import annotations

import copy
import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
import torch
from support import documents
from support.experts import model_of_experts
from support.llama import llama
from support.models import make_net
from support.others import write_quantized
from transformers import AutoModelForCausalLM

import micromix_compile as micromix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

ELSEWHERE: Final = {
    "docs/tutorial.md": "tests/cli/test_docs.py::test_the_tutorial_runs",
    "docs/how-to/extend.md": "tests/cli/test_docs.py::test_the_policy_and_the_target_of_the_how_to_are_taken",
}
DEEP: Final = {
    "docs/how-to/export.md": "AOTInductor's C++ takes half a minute; examples/export.py and tests/verbs/test_ahead.py",
}
"""Pages that take long, and what runs the same steps in every run."""
ONE_RANK: Final = {"docs/how-to/shard.md"}
"""Pages for several processes, of which one is enough to run them."""
PAGES: Final = [page for page in documents.PAGES if documents.blocks(page, "python") and page not in ELSEWHERE]
VOCABULARY: Final = 96


@functools.cache
def original() -> nn.Module:
    return llama(torch.bfloat16, num_hidden_layers=1, vocab_size=VOCABULARY, intermediate_size=256)


@functools.cache
def recipe() -> micromix.Recipe:
    """Of `original`, for one rank or two."""
    config = micromix.MicroMixConfig(weight_rounding="nearest", shards=2)
    return micromix.calibrate(original(), [torch.randint(0, VOCABULARY, (2, 16))], config, progress=False)


def presumed(page: str) -> dict[str, object]:
    """The names that pages use without making them."""
    model, x = copy.deepcopy(original()), torch.randint(0, VOCABULARY, (2, 16))
    if page == "docs/how-to/experts.md":
        model = model_of_experts("mixtral")
    if page == "docs/how-to/export.md":  # a function of tensors, packed
        model, x = make_net(layers=1), torch.randn(5, 64)
        micromix.quantize_(model, micromix.calibrate(model, [x], progress=False))
    return {
        "torch": torch, "micromix": micromix, "logging": logging, "AutoModelForCausalLM": AutoModelForCausalLM,
        "model": model, "recipe": recipe(), "batches": [x], "inputs": {"input_ids": x}, "x": x,
        "batch_size": 2, "num_key_value_heads": 2, "head_dim": 32, "DIRECTORY": "original", "path": "saved",
    }  # fmt: skip


FILES: Final[dict[str, Callable[[], object]]] = {
    "DIRECTORY": lambda: original().save_pretrained("original"),
    '("packed"': lambda: micromix.quantize_(copy.deepcopy(original()), recipe()).save_pretrained("packed"),
    '("model.recipe.safetensors"': lambda: recipe().save("model.recipe.safetensors"),
    '"Llama-MXFP4"': lambda: write_quantized(Path("Llama-MXFP4"), "mxfp4"),
}
"""What a page presumes to be on disk, by the words that read it."""


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process alone, as torchrun starts it."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", [pytest.param(page, marks=pytest.mark.deep if page in DEEP else ()) for page in PAGES])
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")  # transformers' own
@pytest.mark.filterwarnings("ignore:No complete tensor found")  # torch's own, of tensors on a CPU
@pytest.mark.filterwarnings("ignore:.*LeafSpec")  # of torch's copy of an exported program
def test_the_python_of_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    found = documents.blocks(page, "python")
    text = "".join(block.text for block in found)
    for words, write in FILES.items():
        if words in text:
            write()
    if page in ONE_RANK:
        request.getfixturevalue("one_rank")
    level, namespace = logging.getLogger("micromix_compile").level, presumed(page)
    try:
        for block in found:
            block.run(namespace)
    finally:
        logging.getLogger("micromix_compile").setLevel(level)


def test_pages_that_are_run_elsewhere_are() -> None:
    for page, place in ELSEWHERE.items():
        assert documents.blocks(page, "python"), f"{page} has nothing to run"
        file, _, name = place.partition("::")
        assert f"\ndef {name}(" in documents.text_of(file)


def test_code_is_fenced_and_its_language_named() -> None:
    """Otherwise nothing would run it."""
    for page in documents.PAGES:
        assert {block.language for block in documents.blocks(page)} <= {"python", "sh"}, page
        assert "```" not in documents.prose(page), f"{page} has a fence that does not begin its line"
        assert "\n\n    " not in documents.prose(page), f"{page} has indented code"
