"""Commands that make something: a checkpoint, calibration text, a repository on the hub.

Heavy modules are imported inside the commands, so that --help is quick.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from offline.cli.common import CheckpointFolder, Json, refusals, show


class Device(StrEnum):
    """Where `quantize` computes."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def quantize(
    source: Annotated[str, typer.Argument(help="Folder or hub id of the model to quantize.")],
    output: Annotated[Path, typer.Argument(help="Folder to write; must not exist yet.")],
    preset: Annotated[
        str | None,
        typer.Option(
            help="rtn: no rotation, round to nearest. quarot: random Hadamard rotations, GPTQ. paper: InfoQuant's "
            "rotations per layer and learned clip ratios. fast: one learned rotation, GPTQ. best: fast with inputs in "
            "groups of 32 and distillation. balanced: best with 8-bit inputs to down_proj. w4a8kv4, w4a16kv4: 8-bit, "
            "16-bit inputs to all linears. kv4: the KV cache alone, linears unquantized.  [default: fast]"
        ),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML file to use instead of a preset.")] = None,
    target_bits: Annotated[
        float | None,
        typer.Option(help="Choose the formats of each layer with so many bits per weight; the preset is their base."),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(help="The same with the fewest bytes at so much KL to the source, in nats per token."),
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="The same with the least KL in a memory such as 24GB, with --context."),
    ] = None,
    context: Annotated[
        str | None, typer.Option(metavar="TOKENS", help="Tokens that the KV cache holds then, such as 64k.")
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(
            help="self: text sampled from the model. Otherwise a text file, JSON Lines or a JSON list with 'text' or "
            "chats in 'messages', a .safetensors file of `infoquant sample`, a data set NAME or NAME:CONFIG, or a "
            "mixture of these with shares: self,chat.jsonl=0.3,code.txt."
        ),
    ] = "self",
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same checkpoint.")] = 0,
    max_tp_size: Annotated[
        int | None,
        typer.Option(
            "--max-tp-size",
            min=1,
            max=1024,
            help="Largest tensor-parallel size to serve it with: rotations and scales of o_proj and down_proj stay "
            "within one rank's shard.  [default: the recipe's, 1 in presets]",
        ),
    ] = None,
    device: Annotated[
        Device, typer.Option(help="auto: all visible CUDA devices, or the CPU; cuda: one CUDA device.")
    ] = Device.auto,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print sizes and memory, write nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint written earlier.")] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Keep finished steps in OUTPUT.resume, and continue an interrupted run from it."),
    ] = False,
    shard_size: Annotated[float, typer.Option(min=0.001, help="Largest file of weights, in GB of 10^9 bytes.")] = 5.0,
    log_json: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Append a line of JSON per step: error, memory, time left."),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Verify the result against the source and generate a line; holds both models."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Quantize a model into a checkpoint folder that `vllm serve` loads.

    The output appears whole at the end, or not at all.

    [bold]Examples[/bold]

      infoquant quantize ./model ./model-w4a4kv4

      infoquant quantize ./model ./model-w4a4kv4 --preset quarot --calibration notes.txt

      infoquant quantize ./model ./model-24gb --preset balanced --fit 24GB --context 64k
    """
    if preset is not None and recipe is not None:
        raise typer.BadParameter("give --preset or --recipe, not both", param_hint="--preset")
    with refusals():
        import offline
        from offline.cli.tables import print_report
        from offline.goal import read_budget

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
            budget=read_budget(target_bits, max_kl, fit, context),
        )
        show(report, lambda report: print_report(report, output), as_json)
        if check and not dry_run:
            try:
                _check(output, source, as_json)
            except KeyboardInterrupt as error:
                error.add_note(f"{output} is written, its check was not finished")
                raise


def sample(
    source: Annotated[str, typer.Argument(help="Folder or hub id of the unquantized model.")],
    file: Annotated[Path, typer.Argument(metavar="FILE.safetensors", help="File to write; must not exist yet.")],
    sequences: Annotated[int, typer.Option(min=1, help="Number of sequences.")] = 128,
    length: Annotated[int, typer.Option(min=8, help="Tokens per sequence.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same tokens.")] = 0,
) -> None:
    """Sample calibration text from a model once, for several runs of `quantize --calibration FILE`.

    [bold]Example[/bold]

      infoquant sample ./model tokens.safetensors
    """
    with refusals():
        from offline.model.source import Source
        from offline.progress import console_progress
        from offline.stages.calibrate import calibration_tokens, check_tokens_file, save_tokens

        model = Source.open(source)
        check_tokens_file(file)
        with console_progress() as progress:
            tokens = calibration_tokens(
                "self", model, sequences, length, seed, lambda done, total: progress("sampling", done, total)
            )
        save_tokens(file, tokens)
        print(f"{file}: {sequences} sequences of {length} tokens")


def lora(
    checkpoint: CheckpointFolder,
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of a LoRA adapter of the source.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to write; must not exist yet.")],
    as_json: Json = False,
) -> None:
    """Turn a LoRA adapter, trained on the source, into the basis of a checkpoint, for `vllm serve --lora-modules`.

    [bold]Example[/bold]

      infoquant lora ./model-w4a4kv4 ./adapter ./adapter-w4a4kv4

      vllm serve ./model-w4a4kv4 --enable-lora --lora-modules mine=./adapter-w4a4kv4
    """
    with refusals():
        from offline.lora import turn_adapter

        found = turn_adapter(checkpoint, adapter, output)
        show(
            found,
            lambda turned: print(
                f"{turned.output}: {turned.linears} linears, rank {turned.rank}, {turned.bytes:,} bytes"
            ),
            as_json,
        )


def push(
    checkpoint: CheckpointFolder,
    repository: Annotated[str, typer.Argument(metavar="REPOSITORY", help="ORGANIZATION/NAME on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="Create a new repository as private.")] = False,
    as_json: Json = False,
) -> None:
    """Verify a checkpoint and upload it to the model hub.

    Log in first, with `hf auth login` or HF_TOKEN. A checkpoint that fails `verify` is not uploaded.

    [bold]Example[/bold]

      infoquant push ./model-w4a4kv4 organization/model-w4a4kv4
    """
    with refusals():
        from offline.cli.push import push as upload
        from offline.progress import console_progress

        with console_progress() as progress:
            found = upload(checkpoint, repository, private=private, progress=progress)
        show(found, lambda sent: print(f"{sent.files} files, {sent.bytes:,} bytes: {sent.url}"), as_json)


def _check(checkpoint: Path, source: str, as_json: bool) -> None:
    """Verify a checkpoint against its source and generate a line; exit code 1 where a check fails."""
    from offline.cli.tables import print_verification
    from offline.evaluate.compare_to_source import continuation
    from offline.evaluate.verify import verify
    from offline.progress import console_progress

    with console_progress() as progress:
        found = verify(checkpoint, against=source, progress=progress)
    console = Console(stderr=as_json)
    print_verification(found, console)
    if not found.passed:
        raise typer.Exit(1)
    prompt, generated = continuation(checkpoint)
    console.print(f"> {prompt}\n{generated}", markup=False, highlight=False)
