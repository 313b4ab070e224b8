"""Options, output and exit codes that commands share."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console

from offline.errors import ToolError
from offline.signals import describe_end, interruption_behind

if TYPE_CHECKING:
    from pydantic import BaseModel

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on standard output.")]
CheckpointFolder = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder that `quantize` wrote.")]
Result = TypeVar("Result", bound="BaseModel")


def show(result: Result, print_tables: Callable[[Result], None], as_json: bool) -> None:
    """Print a result on standard output."""
    if as_json:
        print(result.model_dump_json(indent=2))
    else:
        print_tables(result)


@contextmanager
def refusals() -> Iterator[None]:
    """Turn refused input into one message on standard error and exit code 1."""
    try:
        from infoquant_vllm.format import FormatError

        yield
    except ModuleNotFoundError as error:
        raise _exit(f"error: {error}; `infoquant doctor` says what is missing", 1) from None
    except (ToolError, FormatError) as error:
        raise _exit(f"error: {error}", 1) from None
    except KeyboardInterrupt as error:
        raise _exit(*describe_end(error)) from None
    except Exception as error:
        interruption = interruption_behind(error)
        if interruption is None:
            raise
        raise _exit(*describe_end(interruption)) from None


def _exit(message: str, code: int) -> typer.Exit:
    Console(stderr=True).print(message, style="bold red", markup=False, highlight=False, soft_wrap=True)
    return typer.Exit(code)
