"""How a command ends: errors in words on standard error, and the exit code that goes with each."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import typer

from pipeline.common import stopping
from pipeline.common.showing import about_path, without_credentials
from pipeline.errors import ShardeditError
from pipeline.looking.printing import say_error

BROKEN_PIPE = 141  # what shells make of a command that wrote to a closed pipe


@contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Errors of ours print as themselves, in a few lines; others name a file with the traceback. Then the exit code."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # here, where a pipe that was closed can be told from a fault
    except ShardeditError as error:
        if debug:
            sys.stderr.write(shown_traceback())
        say_error(f"{type(error).__name__}: {error}")
        raise typer.Exit(error.exit_code) from error
    except stopping.Stopped as error:
        with suppress(OSError):  # the terminal may have gone
            say_error(stopping.last_words(error))
        raise typer.Exit(error.exit_code) from error
    except typer.Exit:
        raise
    except BrokenPipeError as error:  # `shardedit status ... | head`: whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
        raise typer.Exit(BROKEN_PIPE) from error
    except Exception as error:
        text = shown_traceback()
        if debug:
            sys.stderr.write(text)
        say_error(f"{type(error).__name__}: {first_line(error)}\n{whose_fault(error)}")
        if not debug:
            say_error(kept(text))
        raise typer.Exit(1) from error


def whose_fault(error: Exception) -> str:
    """Whose fault an error is that nobody foresaw: a path that the system refuses is not ours."""
    if isinstance(error, OSError) and (reason := about_path(error)) is not None:
        where = error.filename or f"a folder that is written to, which may be {tempfile.gettempdir()}"
        return f"{where}: {reason}. Check the path, its permissions and its space."
    return "This is a fault of shardedit, not of your data or recipe."


def shown_traceback() -> str:
    """The traceback of the error at hand; addresses in it carry no credentials."""
    return without_credentials(traceback.format_exc())


def first_line(error: BaseException) -> str:
    """An error's message without what libraries append to it."""
    return next(iter(str(error).strip().splitlines()), "")[:500]


def kept(text: str) -> str:
    """Write a traceback to a file of its own, readable by this user alone; says where."""
    try:
        handle, path = tempfile.mkstemp(prefix="shardedit-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError:  # a full disk may be what went wrong in the first place
        return "Add --debug for the full traceback."
    return f"The full traceback is in {path} (or add --debug)."
