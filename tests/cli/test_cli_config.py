"""The options that come from the config: every command that takes one takes all, as the config describes them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import typer
from support.command_line import run
from typer.main import get_command

from micromix_compile.cli import app
from micromix_compile.cli.errors import UsageError
from micromix_compile.cli.options import CONFIG_OPTIONS, changed, takes_config
from micromix_compile.config import MicroMixConfig, Option

COMMANDS = ("calibrate", "quantize", "eval", "generate")


def test_commands_take_what_decides_numbers_but_for_the_seed() -> None:
    others = {
        "strict",
        "exact",
        "keep_expanded",
        "seed",
        "calibration_batches",
        "calibration_tokens",
        "dump",
        "dump_dir",
    }
    assert list(CONFIG_OPTIONS) == [name for name in MicroMixConfig.option_names() if name not in others]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_takes_every_option_with_its_help_and_choices_and_without_a_default(command: str) -> None:
    params = {param.name: param for param in get_command(app).commands[command].params}  # type: ignore[attr-defined]
    assert list(params)[-len(CONFIG_OPTIONS) :] == list(CONFIG_OPTIONS)
    for name, option in CONFIG_OPTIONS.items():
        choices = f": {' | '.join(map(str, option.choices))}" if option.choices else ""
        assert params[name].help == f"{option.help_text}{choices}."
        assert params[name].default is None
        assert params[name].opts == [f"--{name.replace('_', '-')}"]


def test_every_option_with_few_values_refuses_others_with_all_of_them() -> None:
    for name, option in CONFIG_OPTIONS.items():
        if option.choices:
            result = run("calibrate", "--out", "r", f"--{name.replace('_', '-')}", "99")
            assert result.exit_code == 2
            assert f"{name} must be one of {', '.join(map(str, option.choices))}, got " in result.stderr


VALUES: dict[str, Any] = {
    "policy": "mxfp8",
    "target_bits": 6.0,
    "target_kind": "stored",
    "lam": 2.0,
    "fp6": "e3m2",
    "weights": "mxfp4",
    "activations": "fp8",
    "rotate": "all",
    "scale_rounding": "even",
    "weight_rounding": "nearest",
    "scale_search": False,
    "uniform_order": "model",
    "granularity": 64,
    "skip": ["*a", "*b"],
    "convolutions": True,
    "shards": 4,
    "row_parallel": ["*o", "*down"],
}


def test_a_command_gets_the_options_that_were_given_and_no_others() -> None:
    got: list[dict[str, Any]] = []

    @takes_config
    def command(changes: dict[str, Any]) -> None:
        got.append(changes)

    alone = typer.Typer()
    alone.command()(command)
    run_alone = get_command(alone)
    run_alone([], standalone_mode=False)
    for name, value in VALUES.items():
        flag = f"--{name.replace('_', '-')}"
        given = [flag, str(value)]
        if isinstance(value, bool):
            given = [flag if value else flag.replace("--", "--no-")]
        if isinstance(value, list):
            given = [part for one in value for part in (flag, one)]
        run_alone(given, standalone_mode=False)
    assert got == [{}, *({name: value} for name, value in VALUES.items())]
    assert list(VALUES) == list(CONFIG_OPTIONS)


def test_options_change_the_config_of_a_recipe_only_where_they_were_given() -> None:
    base = MicroMixConfig(lam=2.0, skip=("x",))
    assert changed(base, {}) == base
    assert changed(base, {"fp6": "e3m2"}) == dataclasses.replace(base, fp6="e3m2")
    with pytest.raises(UsageError, match="lam must be a positive finite number, got 0"):
        changed(base, {"lam": 0})


def test_every_field_of_the_config_says_what_it_accepts() -> None:
    for field in dataclasses.fields(MicroMixConfig):
        option = Option.of(field)
        assert callable(option.check)
        assert not option.help_text.endswith("."), "commands add it"
        assert not option.choices or field.default in option.choices
