"""The program `dynalora`, made of the table of commands."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from dynalora.cli.commands import COMMANDS, Command, named
from dynalora.cli.machine import MachineError, of_the_machine
from dynalora.cli.screen import after_imports, complain, console, quiet
from dynalora.common.version import __version__
from dynalora.errors import DynaloraError


class _AsTyped:
    """In the place of typer's conversions, for which it loads pydantic: values stay as they are typed.

    The settings read them, as they read those of a file.
    """

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        return value


def _as_typed(params: list[Any]) -> list[Any]:
    for param in params:
        if hasattr(param, "get_runtime_param"):  # since typer 0.26
            param.get_runtime_param = _AsTyped
    return params


class LateCommand(typer.core.TyperCommand):
    """A command whose flags are read off its settings when somebody asks for them, and not to list the commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its flags and arguments; below its help stand the options of the method that is named."""
        if not self.params:
            whole: Any = _whole(str(self.name))
            self.params, self.callback = whole.params, whole.callback
        return _as_typed(super().get_params(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Show the flags, then the options of the method that is named."""
        super().format_help(ctx, formatter)
        if any(param.name == "method_options" for param in self.params):
            from dynalora.cli.method_help import show_method_options

            show_method_options(sys.argv)


class Program(typer.core.TyperGroup):
    """The commands, in the order of their table."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The flags of the program itself."""
        return _as_typed(super().get_params(ctx))


app = typer.Typer(
    name="dynalora",
    cls=Program,
    no_args_is_help=True,
    rich_markup_mode="rich",
    # A failure that is not the user's shows Python's own traceback, complete and copyable.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Every command takes --config FILE.yaml; flags override the file.",
)


def _whole(name: str) -> Any:
    """A command with its flags, as typer makes it of a function that takes them."""
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command(name)(_callback(name, COMMANDS[name]))
    return typer.main.get_command(alone)


def _callback(name: str, command: Command) -> Callable[..., None]:
    """The function that typer calls with the flags of a command."""
    from dynalora.cli.flags import in_flags, settings_of, signature_of

    def call(config: str | None = None, **flags: Any) -> None:
        try:
            start(None if config is None else Path(config), flags)
        except DynaloraError as error:
            raise DynaloraError(in_flags(str(error), command.settings, sys.argv[2:])) from error

    def start(config: Path | None, flags: dict[str, Any]) -> None:
        try:
            os.getcwd()
        except OSError as error:
            raise MachineError("The current folder does not exist any more; change to one that does.") from error
        spec = settings_of(command.settings, config, flags)
        importlib.import_module("dynalora").register_methods()  # the package has left it to this program
        job = named(command.job)
        after_imports()
        try:
            status = job(spec, console=console())
        except KeyboardInterrupt:
            if further := how_to_continue(spec):
                complain(f"Interrupted; {further}")
            raise typer.Exit(130) from None
        except Exception as error:
            reason = of_the_machine(error)
            if reason is None:
                raise
            further = how_to_continue(spec)
            raise MachineError(f"{reason}{'; then ' + further if further else ''}.") from error
        if isinstance(status, int):
            raise typer.Exit(status)

    def how_to_continue(spec: Any) -> str:
        """What to type to go on with a run that ended early; empty where it cannot be continued."""
        file = Path(getattr(spec, "output", None) or "") / "config.yaml"
        if command.resume is None or not os.path.exists(file):
            return ""
        return f"continue with: dynalora {name} --config {file}{command.resume}"

    call.__signature__ = signature_of(command.settings)  # type: ignore[attr-defined]
    return call


def _help(command: Command) -> str:
    title = "Example" if len(command.examples) == 1 else "Examples"
    examples = "\n".join(f"[cyan]{example}[/cyan]" for example in command.examples)
    return f"{inspect.cleandoc(command.help)}\n\n[bold]{title}[/bold]\n\n{examples}"


def _late() -> None:
    """Stands for a command's function until its flags are asked for."""


for name, command in COMMANDS.items():
    app.command(name, no_args_is_help=not command.idle, help=_help(command), cls=LateCommand)(_late)


def _show_version(shown: bool) -> None:
    if shown:
        typer.echo(f"dynalora {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and stop.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """LoRA adapters that decide for themselves how much rank each layer gets, and on which inputs to act.

    [bold]dynalora demo[/bold] shows it on a small real model in a few minutes;
    [bold]dynalora finetune[/bold] does the same with your model and your data.
    """


def run() -> None:
    """Run the program; an error the user can repair becomes one sentence on standard error and exit code 2."""
    quiet()
    try:
        code = app(standalone_mode=False)
    except DynaloraError as error:
        complain("Error: " + str(error).replace("\n", "\\n"))  # of a name that holds one
        code = 2
    except _USAGE_ERROR as error:
        _complain_of_usage(error)
        code = 2
    except OSError as error:  # such as of a help page that goes to a full disk
        if (reason := of_the_machine(error)) is None:
            raise
        complain(f"Error: {reason}.")
        code = 2
    sys.exit(code if isinstance(code, int) else 0)


_USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
"""Click's `UsageError`, which typer brings itself since 0.26 and does not export."""


def _complain_of_usage(error: Any) -> None:
    """One sentence on flags and arguments that the command line does not have, or that lack a value."""
    if type(error).__name__ == "NoArgsIsHelpError":  # a command alone shows its help
        error.show()
        return
    message = error.format_message()
    if meant := getattr(error, "possibilities", None):
        message = f"{message.partition(' (')[0].partition(' Did you mean')[0].rstrip('. ')} (did you mean {meant[0]}?)"
    named = sys.argv[1] if len(sys.argv) > 1 else ""
    place = (
        error.ctx.command_path if error.ctx is not None else f"dynalora {named if named in COMMANDS else ''}".strip()
    )
    complain(f"Error: {message.rstrip('.')}; see {place} --help.")
