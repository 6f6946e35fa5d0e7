"""What both commands share: exit codes, errors on stderr, commands that are imported when used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import click

from vswitch.errors import VswitchError

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_NOT_FOUND = 4
EXIT_EXISTS = 5
EXIT_INTERRUPTED = 130

_EXIT_CODES = {
    "unreachable": EXIT_UNREACHABLE,
    "disconnected": EXIT_UNREACHABLE,
    "timeout": EXIT_UNREACHABLE,
    "permission-denied": EXIT_UNREACHABLE,
    "busy": EXIT_UNREACHABLE,
    "not-found": EXIT_NOT_FOUND,
    "exists": EXIT_EXISTS,
}


def exit_code(error: VswitchError) -> int:
    """The exit code of a command that ended with `error`."""
    return _EXIT_CODES.get(error.code, EXIT_ERROR)


def report(program: str, error: VswitchError, *, as_json: bool = False) -> int:
    """Write an error to stderr, for people or as a line of JSON; returns the exit code."""
    text = f"{program}: {error}\n"
    sys.stderr.write(_json(error.code, error.message, error.hint) if as_json else text)
    return exit_code(error)


def _report_usage(error: click.ClickException, *, as_json: bool) -> int:
    if as_json:
        command = None if not isinstance(error, click.UsageError) else error.ctx
        hint = "" if command is None else f"{command.command_path} --help"
        sys.stderr.write(_json("usage", error.format_message(), hint))
    else:
        error.show()
    return error.exit_code


def to_json(value: object) -> str:
    """A line of JSON, without its end."""
    import json  # who wants none waits for nothing

    return json.dumps(value)


def _json(code: str, message: str, hint: str) -> str:
    return to_json({"error": {"code": code, "message": message, "hint": hint}}) + "\n"


def wants_json(words: Sequence[str]) -> bool:
    """Whether a command line asks for JSON: known before it is understood, or if it never is."""
    end = words.index("--") if "--" in words else len(words)
    return "--json" in words[:end]


class LazyCommand(NamedTuple):
    """A command that is imported when it runs: `module:attribute`, and its line of help.

    Without a line the module is imported for `--help`, too.
    """

    target: str
    short_help: str = ""


class LazyGroup(click.Group):
    """A group whose heavy commands are named here and imported on use.

    `--help` lists those without importing them that have a line for it.
    """

    def __init__(
        self, *args: Any, lazy: Mapping[str, LazyCommand] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.lazy = dict(lazy or {})

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, sorted."""
        return sorted([*super().list_commands(ctx), *self.lazy])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now if it is a lazy one."""
        if cmd_name not in self.lazy:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = self.lazy[cmd_name].target.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands in `--help`."""
        rows = []
        for name in self.list_commands(ctx):
            if name in self.lazy and self.lazy[name].short_help:
                rows.append((name, self.lazy[name].short_help))
            elif (command := self.get_command(ctx, name)) is not None and not command.hidden:
                rows.append((name, command.get_short_help_str(limit=70)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def run_program(
    program: str,
    command: click.Command,
    *,
    obj: object = None,
) -> NoReturn:
    """Run a command line and exit: errors become text, or JSON where it is asked for, and a code.

    `obj` is what the commands find in their context.
    """
    code: object = EXIT_OK
    as_json = wants_json(sys.argv[1:])
    try:
        code = command.main(prog_name=program, standalone_mode=False, obj=obj)
    except VswitchError as exc:
        code = report(program, exc, as_json=as_json)
    except click.ClickException as exc:
        code = _report_usage(exc, as_json=as_json)
    except (click.Abort, KeyboardInterrupt):
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        # `vswitchctl events | head`: the reader has what it wanted. Python must not try to flush.
        sys.stdout = None
        code = EXIT_OK
    raise SystemExit(code if isinstance(code, int) else EXIT_OK)


def completion_script(program: str, command: click.Command, shell: str) -> str:
    """What a shell has to evaluate to complete the words of a command line."""
    from click.shell_completion import get_completion_class

    variable = f"_{program.upper()}_COMPLETE"
    completion = get_completion_class(shell)
    assert completion is not None
    return completion(command, {}, program, variable).source()
