"""The program `dynalora`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from dynalora import __version__
from dynalora.cli import (
    bench,
    compact,
    compare,
    demo,
    evaluate,
    export,
    finetune,
    forgetting,
    gates,
    landscape,
    linear_model,
    recover,
    transfer,
)
from dynalora.cli.shared import complain, quiet
from dynalora.errors import DynaloraError

app = typer.Typer(
    name="dynalora",
    no_args_is_help=True,
    rich_markup_mode="rich",
    # A failure that is not the user's shows Python's own traceback, complete and copyable.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Every command takes --config FILE.yaml; flags override the file.",
)

COMMANDS = (
    demo,
    finetune,
    evaluate,
    compare,
    bench,
    landscape,
    gates,
    forgetting,
    recover,
    transfer,
    linear_model,
    compact,
    export,
)
for command in COMMANDS:
    name = command.__name__.rsplit(".", 1)[-1]
    title = name.replace("_", "-")
    app.command(title, no_args_is_help=title not in ("demo", "bench", "linear-model"))(getattr(command, name))


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dynalora {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and stop.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """LoRA adapters that decide for themselves how much rank each layer gets, and on which inputs to act.

    [bold]dynalora demo[/bold] shows it on a small real model in a few minutes;
    [bold]dynalora finetune[/bold] does the same with your model and your data.
    """


def main() -> None:
    """Run the program; an error the user can repair becomes one sentence on standard error and exit code 2."""
    quiet()
    try:
        app()
    except DynaloraError as error:
        complain(f"Error: {error}")
        sys.exit(2)


if __name__ == "__main__":
    main()
