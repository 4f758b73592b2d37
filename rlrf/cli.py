"""The command line: ``rlrf list | info | eval | train | report | ...``, and plug-in commands.

Exit codes: 0 done, 1 the work failed, 2 wrong usage, 130 interrupted. Every error rlrf raises on
purpose is one line on standard error; ``RLRF_DEBUG=1`` shows the traceback as well.

Further commands come from the entry-point group ``rlrf.commands`` (each a ``typer.Typer``), which
are imported when they are called, not before: ``rlrf --help`` needs no extra.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

import rlrf
from rlrf import _interrupt, _streams
from rlrf._plugin_source import describe_target
from rlrf.commands import show
from rlrf.commands.check import check
from rlrf.commands.eval import eval_
from rlrf.commands.probe import probe
from rlrf.commands.report import report
from rlrf.commands.train import train
from rlrf.commands.view import view
from rlrf.errors import RlrfError, UsageError, describe
from rlrf.plugins import Registry, warn_once

app = typer.Typer(
    name="rlrf",
    help="Reinforcement learning with rich feedback.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
commands = Registry("rlrf.commands", "command")


def main() -> None:
    """Run the command line; the console script ``rlrf``."""
    code = 0
    if _interrupt.IS_COMMAND:
        # The last thing that Python does for us: while it shuts down, a thread that is still in
        # C++ code (a model samples on after an error) aborts the process.
        atexit.register(lambda: os._exit(code))
    _streams.protect(descriptors=_interrupt.IS_COMMAND)
    interrupts = _interrupt.Interrupts()
    try:
        with interrupts:
            code = _run(sys.argv[1:])
    except KeyboardInterrupt:
        code = interrupts.code
        interrupts.say()
        if interrupts.signal is not None:
            sys.stdout.flush()
            os._exit(code)
    if (error := _streams.lost()) is not None and code == 0 and not _interrupt.kept():
        print(f"error: standard output cannot be written: {error.strerror}", file=sys.stderr)
        code = 1
    _streams.restore()
    sys.exit(code)


def _run(arguments: Sequence[str]) -> int:
    """The exit code of a command line; whatever is raised becomes lines on standard error."""
    log = _ToStderr()
    logging.getLogger("rlrf").setLevel(logging.INFO)
    logging.getLogger("rlrf").addHandler(log)
    logging.getLogger("stamina").setLevel(logging.ERROR)  # rlrf.transport says it once
    shown, warnings.showwarning = warnings.showwarning, _show_warning
    try:
        for argument in arguments:
            if not _is_text(argument):
                raise UsageError(f"{argument!r} is not UTF-8 text; rename what it names")
        _add_plugin_commands()
        command = typer.main.get_command(app)
        if "_RLRF_COMPLETE" in os.environ:
            command()  # answers the shell
        _invoke(command, arguments, "rlrf")
        return 0
    except KeyboardInterrupt:
        raise
    except typer.Exit as end:
        return end.exit_code
    except SystemExit as end:  # of a plug-in
        if end.code is None or isinstance(end.code, int):
            return int(end.code or 0)
        print(f"error: {end.code}", file=sys.stderr)
        return 1
    except BaseException as error:  # also what libraries in other languages panic with
        if os.environ.get("RLRF_DEBUG"):
            traceback.print_exc()
        return _say_error(error)
    finally:
        logging.getLogger("rlrf").removeHandler(log)
        warnings.showwarning = shown


def _is_text(argument: str) -> bool:
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def _invoke(command: Any, arguments: Sequence[str], name: str) -> None:
    # Not command(): it takes a broken pipe of the work itself for one of standard output.
    with command.make_context(name, list(arguments)) as context:
        command.invoke(context)


def _say_error(error: BaseException) -> int:
    """Tell an error in a line of its own each, and return the exit code."""
    usage = isinstance(error, UsageError)
    if isinstance(error, _ClickError):  # an unknown option, a value of another type
        usage, told = True, error.format_message()
        context = getattr(error, "ctx", None)
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            return 2
        if context is not None:
            told = f"{told.rstrip()} See: {context.command_path} --help"
    elif isinstance(error, RlrfError):
        told = str(error) or type(error).__name__
    else:
        told = describe(error)
        if isinstance(error, OSError):
            if error.strerror:
                told = f"{error.filename or type(error).__name__}: {error.strerror}"
        else:
            told += "\n(RLRF_DEBUG=1 shows where)"
    for line in told.splitlines():
        if len(line) > _LONGEST_LINE:  # it names what was given, and that may be anything
            line = line[: _LONGEST_LINE // 2] + " ... " + line[-_LONGEST_LINE // 2 :]
        print(line if line.startswith("(") else f"error: {line}", file=sys.stderr)
    return 2 if usage else 1


_LONGEST_LINE = 2000

# What typer, which brings its own click or takes the installed one, raises for wrong usage.
_ClickError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


class _ToStderr(logging.Handler):
    """Prints what the library has to say, above a progress display if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        # Looked up each time: a progress display puts itself in the place of standard error.
        print(self.format(record), file=sys.stderr)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    # Where in the source it was raised is nothing to who reads a command's output.
    told = f"{category.__name__}: {message}" if issubclass(category, FutureWarning) else message
    print(f"warning: {told}", file=sys.stderr)


# --- plug-in commands ---------------------------------------------------------------------


_plugged_in: set[str] = set()
"""The commands that are a plug-in's."""


def _add_plugin_commands() -> None:
    present = {command.name for command in app.registered_commands}
    for name, target, of in commands.items():
        if name in present and name not in _plugged_in:
            warn_once(
                f"the command {name!r} of {of} is left out: rlrf has one of that name. Rename the "
                "entry point, or uninstall that distribution"
            )
        elif name not in present:
            _plugged_in.add(name)
            app.command(
                name,
                help=describe_target(target, of)[0] or f"Commands of the {name!r} plug-in.",
                # All arguments, --help included, are for the command that is loaded below.
                context_settings={
                    "allow_extra_args": True,
                    "ignore_unknown_options": True,
                    "help_option_names": [],
                },
            )(_plugin_command(name))


def _plugin_command(name: str) -> Callable[[typer.Context], None]:
    def call(ctx: typer.Context) -> None:
        plugin = commands.load(name)
        if not isinstance(plugin, typer.Typer):
            raise UsageError(f"command {name!r} is {plugin!r}; a plug-in command is a typer.Typer")
        # A group even with a single command: `rlrf model fetch` must not become `rlrf model`.
        _invoke(typer.main.get_group(plugin), ctx.args, f"rlrf {name}")

    return call


def _version(value: bool) -> None:
    if value:
        print(f"rlrf {rlrf.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


app.command("list")(show.list_)
app.command("info")(show.info)
app.command("eval")(eval_)
app.command("probe")(probe)
app.command("train")(train)
app.command("report")(report)
app.command("view")(view)
app.command("check")(check)
