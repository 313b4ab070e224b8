"""`quantize`: from a source model to a checkpoint folder, one decoder layer in memory at a time."""

import hashlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from infoquant_vllm.format import Checkpoint, FormatError, QuantizationConfigData
from offline.architectures import rules_for
from offline.balance import balance_layer
from offline.calibration import calibration_tokens
from offline.card import model_card
from offline.distill import distill
from offline.errors import ToolError
from offline.fold import fold_ends, fold_layer, stored_dtype
from offline.key_offset import key_offset
from offline.layer import quantize_layer
from offline.learned_clips import learn_clips
from offline.presets import preset_named
from offline.progress import ProgressReport, console_progress
from offline.psot import make_transforms
from offline.recipe import SITES, Distillation, Recipe, load_recipe
from offline.report import Report, Stopwatch, checkpoint_sizes, peak_memory_bytes
from offline.source import Source
from offline.stream import Statistics, Stream
from offline.student import Layer, Student
from offline.transforms import Transforms
from offline.vocabulary import quantize_vocabulary
from offline.writer import Writer, atomic_folder, check_output, check_space


@dataclass
class _Run:
    """What every stage of one run reads, and the timings and errors that they leave."""

    source: Source
    recipe: Recipe
    config: QuantizationConfigData
    seed: int
    device: torch.device
    progress: ProgressReport
    watch: Stopwatch = field(default_factory=Stopwatch)
    errors: dict[str, float] = field(default_factory=dict)


def quantize(
    source: str | Path,
    output: str | Path,
    *,
    preset: str = "fast",
    recipe: Recipe | str | Path | None = None,
    calibration: str = "self",
    seed: int = 0,
    max_tp: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: ProgressReport | None = None,
) -> Report:
    """Quantise a model of a known class into a checkpoint folder that `vllm serve` loads.

    Args:
        source: folder or hub id of the unquantised model.
        output: the folder to make; whole or not there at all, whatever interrupts the run.
        preset: name of a built-in recipe, used where `recipe` is None.
        recipe: a `Recipe`, or the path of a YAML file that holds one.
        calibration: "self", a text or JSONL file, or a data set name (see `calibration_tokens`).
        seed: same seed, source and calibration: same bytes, on the same machine.
        max_tp: how many workers of tensor parallelism may serve the checkpoint; None: what the recipe says, mostly 1.
        device: "cpu", "cuda", or "auto" for CUDA where there is one.
        overwrite: replace an output that this tool wrote earlier.
        dry_run: check everything and compute the sizes, but write nothing.
        progress: called while the run goes on; None draws bars on standard error.

    Returns the run's figures. Raises ToolError, naming what is wrong, before anything is changed.
    """
    chosen = preset_named(preset) if recipe is None else recipe
    chosen = chosen if isinstance(chosen, Recipe) else load_recipe(chosen)
    if max_tp is not None:
        if max_tp < 1:
            raise ToolError(f"max_tp is {max_tp}, expected a number of workers from 1 on")
        chosen = chosen.model_copy(update={"max_tp": max_tp})
    model = Source.open(source)
    check_output(Path(output), model.folder, overwrite)
    try:
        config = chosen.quantization_config(model.shape)
        sizes = checkpoint_sizes(model, config)
    except FormatError as error:
        raise ToolError(f"recipe '{chosen.name}' does not suit {model.folder}: {error}") from None
    figures = Report(
        source=model.folder.name if Path(source).is_dir() else str(source),
        recipe=chosen.name,
        calibration=Path(calibration).name,
        seed=seed,
        dry_run=dry_run,
        **sizes,
    )
    if dry_run:
        return figures
    check_space(Path(output), figures.total_bytes)
    with console_progress() if progress is None else nullcontext(progress) as shown:
        run = _Run(model, chosen, config, seed, _device(device), shown)
        with atomic_folder(Path(output)) as partial:
            return _write_checkpoint(run, partial, figures, calibration, Path(output).name)


def _write_checkpoint(run: _Run, folder: Path, figures: Report, calibration: str, name: str) -> Report:
    tokens = _calibration(run, calibration) if run.recipe.needs_calibration else None
    with run.watch("rotation"):
        transforms = make_transforms(run.source, run.recipe, tokens, run.seed, run.device, run.progress)
    writer = Writer(folder)
    writer.add(quantize_vocabulary(fold_ends(run.source, transforms), run.config, run.source.shape))
    layers = _quantized_layers(run, tokens, transforms)
    if run.recipe.distillation is not None and tokens is not None:
        layers = _distilled(run, run.recipe.distillation, list(layers), tokens, transforms)
    for index, tensors in enumerate(layers):
        writer.add({f"model.layers.{index}.{name}": tensor for name, tensor in tensors.items()})
    writer.finish_tensors()
    figures = figures.model_copy(
        update={
            "calibration_tokens": 0 if tokens is None else tokens.numel(),
            "calibration_sha256": None if tokens is None else hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
            "errors": run.errors,
            "seconds": run.watch.seconds,
            "peak_memory_bytes": peak_memory_bytes(),
        }
    )
    writer.copy_from(run.source.folder)
    writer.write_text("README.md", model_card(name, run.recipe, figures))
    writer.write_text("infoquant_recipe.yaml", run.recipe.dump())
    writer.write_text("infoquant_report.json", figures.model_dump_json(indent=2) + "\n")
    quantization_config = run.config.model_dump(mode="json", exclude_none=True)
    writer.finish(run.source.hf_config | {"quantization_config": quantization_config})
    Checkpoint(folder)  # reads the headers back: every tensor there, of the right shape and type
    return figures


def _calibration(run: _Run, spec: str) -> torch.Tensor:
    size = run.recipe.calibration
    with run.watch("calibration"):
        return calibration_tokens(
            spec,
            run.source,
            size.sequences,
            size.sequence_length,
            run.seed,
            lambda done, total: run.progress("calibration", done, total),
        )


def _quantized_layers(run: _Run, tokens: torch.Tensor | None, transforms: Transforms | None) -> Iterator[Layer]:
    """Every decoder layer's tensors by their names inside it."""
    shape, dtype = run.source.shape, stored_dtype(run.source)
    positions = None if run.recipe.kv_cache is None else run.recipe.kv_cache.key_offset_positions
    stream, learned = None, run.recipe.learned_clips
    if run.recipe.rounding == "gptq":
        assert tokens is not None  # such recipes need calibration
        stream = Stream(run.source, tokens, transforms, run.device)
    for layer in range(shape.num_hidden_layers):
        prefix, hessians, before, keys = f"model.layers.{layer}", None, None, None
        statistics = Statistics()
        state = {name: tensor.to(run.device) for name, tensor in fold_layer(run.source, layer, transforms).items()}
        if stream is not None:
            with run.watch("activations"):
                before = stream.hidden[: learned.sequences].clone() if learned is not None else None
                outputs = () if positions is None else (rules_for(shape).keys,)
                stream.advance(state, [linears[0] for linears in SITES.values()], statistics.observe, outputs)
                hessians = statistics.hessians()
                if run.recipe.balance:
                    balance_layer(state, hessians, statistics, shape)
                if positions is not None:
                    keys = key_offset(statistics, stream, positions, shape)
        with run.watch("weights"):
            inputs = transforms.inputs[layer] if transforms is not None and transforms.inputs else {}
            tensors, errors = quantize_layer(
                state, hessians, statistics.samples(), inputs, keys, run.recipe, shape, dtype
            )
        if stream is not None and learned is not None and before is not None:
            with run.watch("clips"):
                tensors |= learn_clips(tensors, stream, before, learned, run.recipe, shape)
        yield tensors
        run.errors |= {f"{prefix}.{name}": error for name, error in errors.items()}
        mean = sum(errors.values()) / max(len(errors), 1)
        run.progress("layers", layer + 1, shape.num_hidden_layers, f"output error {mean:.4f}" if errors else "")


def _distilled(
    run: _Run, args: Distillation, layers: list[Layer], tokens: torch.Tensor, transforms: Transforms | None
) -> Iterator[Layer]:
    """The layers with what distillation changed."""
    with run.watch("distillation"):
        student = Student(run.source, run.config, layers, transforms)
        distill(student, run.source, tokens, args, run.seed, run.progress)
    for index, tensors in enumerate(layers):
        yield tensors | student.tensors(index)


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise ToolError(f"device is {name!r}, expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ToolError("device is cuda, but torch finds no CUDA device; choose auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
