"""What the user did wrong ends in one line on standard error instead of a traceback."""

from __future__ import annotations

import logging
from typing import Any, Final

import typer
from typer.core import TyperCommand

from micromix_compile.evaluation.types import NothingQuantizedError

logger = logging.getLogger("micromix_compile")

USER_ERRORS: Final = (ValueError, OSError, ModuleNotFoundError, NothingQuantizedError)


class UsageError(Exception):
    """An option's value is wrong, or options contradict each other."""


class Command(TyperCommand):
    """A command whose user errors are one line."""

    def invoke(self, ctx: Any) -> Any:
        """Run it. Errors that aren't the user's keep their traceback."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            code, message = exit_of(error)
            if message is None:
                raise
            logger.debug("where the error came from", exc_info=True)
            typer.echo(f"micromix {self.name}: {message}", err=True)
            raise typer.Exit(code) from None


def exit_of(error: Exception) -> tuple[int, str | None]:
    """(exit code, line to print); no line for errors that aren't the user's."""
    from micromix_compile.calibration.memory import is_out_of_memory
    from micromix_compile.lowering.torch_private.dynamo import cause_of

    error = cause_of(error)
    if isinstance(error, UsageError):
        return 2, str(error)
    if isinstance(error, USER_ERRORS) or is_out_of_memory(error):
        return 1, " ".join(str(error).split()) or type(error).__name__
    return 1, None
