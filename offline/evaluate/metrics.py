"""Measure perplexity, and KL divergence and top-1 agreement with a reference, with standard errors."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch.nn import functional

from infoquant_vllm.format import Checkpoint, is_checkpoint
from offline.errors import ToolError
from offline.evaluate.routing import RecordedRouting
from offline.evaluate.simulate import load_simulated
from offline.model.architectures import CausalLM
from offline.model.reference import load_reference
from offline.model.source import Source, read_tokenizer
from offline.progress import ProgressReport, silent
from offline.stages.calibrate import calibration_tokens
from offline.text import text_windows

WINDOW = 512


class Figure(BaseModel):
    """A mean over positions with its standard error over windows, since positions of a window are correlated."""

    model_config = ConfigDict(frozen=True)

    mean: float
    standard_error: float | None
    """None where there is only one window."""


class Evaluation(BaseModel):
    """The figures of `evaluate`, in natural logarithms."""

    model_config = ConfigDict(frozen=True)

    model: str
    simulated: bool
    reference: str | None
    text: str
    windows: int
    window: int
    perplexity: Figure
    reference_perplexity: Figure | None = None
    kl: Figure | None = None
    top1_agreement: Figure | None = None
    routing_agreement: Figure | None = None
    """Share of the experts chosen by a mixture's routers that the reference chooses too, over all layers."""


def evaluate(
    model: str,
    *,
    reference: str | None = None,
    corpus: str | None = None,
    tokens: int = 8192,
    window: int | None = None,
    seed: int = 0,
    progress: ProgressReport = silent,
) -> Evaluation:
    """Measure the perplexity of a model and, with a reference, KL(reference || model) and top-1 agreement.

    Args:
        model: an InfoQuant checkpoint, which is simulated, or an unquantized model.
        reference: folder or hub id of an unquantized model with the same tokenizer.
        corpus: see `text_windows`; None samples the text from the reference, or from the model.
        tokens: number of tokens to read, rounded down to whole windows.
        window: tokens per window, each predicted from those before it in the window; None: 512, or `tokens`
            where fewer.
        seed: seed of the windows drawn, or of the text sampled.
        progress: called after every window.
    """
    window = min(WINDOW, tokens) if window is None else window
    if window < 2 or tokens < window:
        raise ToolError(
            f"{tokens} tokens make no window of {window}: ask for at least {max(window, 2)} tokens, "
            "or for a smaller window of at least 2"
        )
    simulated = is_checkpoint(Path(model))
    teacher = None if reference is None else Source.open(reference)
    own = None if simulated else Source.open(model)
    if corpus is None and teacher is None and own is None:
        raise ToolError(f"{model}: nothing to evaluate on; give --corpus FILE, or --reference SOURCE to sample from")
    windows, text = _text(corpus, teacher or own, model, tokens // window, window, seed, progress)
    student = load_simulated(Path(model)) if own is None else load_reference(own.folder)
    _same_vocabulary(student, teacher)
    figures = compare(list(windows), student, None if teacher is None else load_reference(teacher.folder), progress)
    return Evaluation(
        model=model, simulated=simulated, reference=reference, text=text, windows=len(windows), window=window, **figures
    )


@torch.inference_mode()
def compare(
    windows: Sequence[torch.Tensor],
    model: CausalLM,
    reference: CausalLM | None,
    progress: ProgressReport = silent,
) -> dict[str, Figure]:
    """Compute the figures of an `Evaluation` over windows of token ids."""
    columns: dict[str, list[float]] = {}
    with RecordedRouting(model) as ours, RecordedRouting(reference) as chosen:
        for index, ids in enumerate(windows):
            theirs = None if reference is None else _logits(reference, ids)
            values = _window(ids, _logits(model, ids), theirs)
            agreement = ours.agreement(chosen)
            if agreement:
                values["routing_agreement"] = sum(agreement.values()) / len(agreement)
            for name, value in values.items():
                columns.setdefault(name, []).append(value)
            progress("evaluation", index + 1, len(windows))
    figures = {name: _figure(values) for name, values in columns.items()}
    for name in ("perplexity", "reference_perplexity"):
        if name in figures:
            figures[name] = _exponential(figures[name])
    return figures


def _window(ids: torch.Tensor, logits: torch.Tensor, reference: torch.Tensor | None) -> dict[str, float]:
    """Return means over the positions of one window that predict a token of it."""
    ours = logits[:-1].log_softmax(-1)
    values = {"perplexity": functional.nll_loss(ours, ids[1:]).item()}
    if reference is not None:
        theirs = reference[:-1].log_softmax(-1)
        values["reference_perplexity"] = functional.nll_loss(theirs, ids[1:]).item()
        values["kl"] = functional.kl_div(ours, theirs, reduction="batchmean", log_target=True).item()
        values["top1_agreement"] = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    return values


def _logits(model: CausalLM, ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids[None], use_cache=False).logits[0].float()
    if not torch.isfinite(logits).all():
        raise ToolError("the model's logits are not finite; check it with `infoquant verify`")
    return logits


def _figure(values: list[float]) -> Figure:
    column = torch.tensor(values, dtype=torch.float64)
    error = None if len(values) == 1 else (column.std() / math.sqrt(len(values))).item()
    return Figure(mean=column.mean().item(), standard_error=error)


def _exponential(figure: Figure) -> Figure:
    """Return the perplexity for a mean negative log-likelihood, with its error to first order."""
    mean = math.exp(min(figure.mean, 700.0))
    return Figure(mean=mean, standard_error=None if figure.standard_error is None else mean * figure.standard_error)


def _text(
    corpus: str | None,
    source: Source | None,
    model: str,
    count: int,
    window: int,
    seed: int,
    progress: ProgressReport,
) -> tuple[torch.Tensor, str]:
    """Return the windows, and their origin in words."""
    if corpus is not None:
        tokenizer = read_tokenizer(Path(model)) if source is None else source.tokenizer()
        shape = Checkpoint(model).shape if source is None else source.shape
        return text_windows(corpus, tokenizer, shape.vocab_size, count, window, seed), corpus
    assert source is not None  # checked by `evaluate`
    windows = calibration_tokens(
        "self", source, count, window, seed, lambda done, total: progress("sampling", done, total)
    )
    return windows, f"sampled from {source.folder.name}, seed {seed}"


def _same_vocabulary(student: CausalLM, teacher: Source | None) -> None:
    if teacher is not None and teacher.shape.vocab_size != student.config.vocab_size:
        raise ToolError(
            f"{teacher.folder}: vocabulary of {teacher.shape.vocab_size} tokens, the model has "
            f"{student.config.vocab_size}; a reference needs the same tokenizer"
        )
