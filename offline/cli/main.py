"""The `infoquant` command."""

from importlib import metadata
from typing import Annotated

import typer

from offline.cli import check, make
from offline.signals import raise_on_signals

app = typer.Typer(
    name="infoquant",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="""Quantize Llama, Mistral, Qwen and other models to 4-bit weights, activations and KV cache for vLLM.

    [bold]A first run[/bold]

      infoquant quantize meta-llama/Llama-3.2-1B-Instruct ./llama-w4a4kv4

      infoquant verify ./llama-w4a4kv4 --against meta-llama/Llama-3.2-1B-Instruct

      vllm serve ./llama-w4a4kv4

    Exit code 0: success; 1: an input was refused or a check failed; 2: wrong usage.""",
)
app.command()(make.quantize)
app.command()(make.sample)
app.command()(check.verify)
app.command(name="inspect")(check.inspect)
app.command(name="eval")(check.evaluate)
app.command()(check.report)
app.command()(make.lora)
app.command()(make.push)
app.command()(check.doctor)


def _print_versions(wanted: bool) -> None:
    if wanted:
        for name in ("infoquant-vllm", "vllm"):
            found = [each.version for each in metadata.distributions(name=name)]
            print(name, found[0] if found else "not installed")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_versions, is_eager=True, help="Print the versions of this tool and vLLM."
        ),
    ] = False,
) -> None:
    """Take the options of the command itself; its help is the app's."""


def main() -> None:
    """Run the console script."""
    raise_on_signals()
    app()
