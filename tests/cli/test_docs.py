"""The documents: the tutorial's code runs, commands have the options they show, quoted messages are ours."""

from __future__ import annotations

import ast
import re
import shlex
from typing import TYPE_CHECKING, Any

import click
import pytest
import typer
from support.documents import PAGES, ROOT, blocks, commands, mentioned

import micromix_compile as micromix
from micromix_compile.cli import app
from micromix_compile.evaluation import zoo

if TYPE_CHECKING:
    from pathlib import Path

PLACEHOLDERS = re.compile(r"\b(?:NAME|DIRECTORY|MODEL|TYPE|X|Y|N)\b|\.\.\.")


@pytest.mark.usefixtures("fresh_compiler")
def test_the_tutorial_runs(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small model in place of the default one."""
    monkeypatch.setattr(zoo, "default_model_dir", lambda: small_model)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for block in blocks("docs/tutorial.md", "python"):
        block.run(namespace)
    assert type(namespace["packed"].model.layers[0].mlp.up_proj).__name__ == "MicroMixLinear"


def test_commands_have_the_options_that_the_documents_show() -> None:
    """Those between words, too. They are parsed, not run."""
    program = typer.main.get_command(app)
    assert isinstance(program, click.Group) or hasattr(program, "commands")
    shown = [(page, one) for page in PAGES for one in (*commands(page), *mentioned(page))]
    parsed = 0
    for page, command in shown:
        words = shlex.split(command.removeprefix(".venv-vllm/bin/"))
        if words[0] == "micromix" and len(words) > 2 and "--verbose" not in words:
            _, name, *arguments = words
            context = program.commands[name].make_context(name, arguments)
            assert not context.args, f"{page}: {command}"
            parsed += 1
    assert parsed > 20


def test_the_policy_and_the_target_of_the_how_to_are_taken(recipe_file: Path) -> None:
    """The policy splits a real recipe; both are taken back."""
    policy, target = blocks("docs/how-to/extend.md", "python")
    namespace: dict[str, Any] = {"micromix": micromix}
    policy.run(namespace)
    try:
        recipe = micromix.assign(micromix.Recipe.load(recipe_file), namespace["config"])
        assert recipe.groups
        assert all(k4 == k8 and k6 == 0 for k4, k6, k8 in (linear.split for linear in recipe.linears.values()))
    finally:
        namespace["remove"]()
    target.run(namespace)
    namespace["remove"]()


def texts_in_code() -> list[str]:
    """Every text in our code, with a line feed where a value is put in."""
    found = []
    for folder in ("micromix_compile", "passes", "lowering"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [str(p.value) if isinstance(p, ast.Constant) else "\n" for p in node.values]
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value.replace("%s", "\n"))
    return found


def test_every_message_of_the_troubleshooting_page_is_one_of_ours() -> None:
    """Its parts between the values, in one text of the code."""
    texts = texts_in_code()
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    messages = [
        message for line in re.findall(r"^### (.*)$", page, re.MULTILINE) for message in re.findall("`(.*?)`", line)
    ]
    assert len(messages) > 15
    for message in messages:
        parts = [re.escape(part) for part in PLACEHOLDERS.split(message) if part.strip()]
        pattern = re.compile("\n(?:[.]\n)?".join(parts))  # a name may be one in another
        assert any(pattern.search(text) for text in texts), message


def test_the_changelog_begins_with_this_version() -> None:
    page = (ROOT / "docs" / "changelog.md").read_text("utf-8")
    assert re.findall(r"^## (.*)$", page, re.MULTILINE)[0] == micromix.__version__


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:")[2]
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert set(re.findall(r"[\w/-]+\.md", navigation)) == pages


def test_names_of_the_package_are_all_in_the_reference() -> None:
    reference = (ROOT / "docs" / "api.md").read_text("utf-8")
    assert [name for name in micromix.__all__ if f".{name}\n" not in reference] == []
