"""Write the page of a checkpoint: measure, draw, fill in the template."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from transformers import PreTrainedTokenizerBase

from infoquant_vllm.format import Checkpoint
from offline.errors import ToolError
from offline.evaluate.inspect import Inspection, inspect_checkpoint
from offline.evaluate.page.measure import Measurement, clips, measure
from offline.evaluate.page.summary import LABELS, Summary, mean, run_records, site_bits, site_words, summarize
from offline.evaluate.passages import OWN_TEXT, PASSAGES
from offline.evaluate.saved_scores import read_evaluations, score_table
from offline.model.source import Source, read_tokenizer
from offline.output.atomic import atomic_file, check_writable
from offline.output.report import BudgetReport, Report
from offline.progress import ProgressReport, silent
from offline.text import encode_texts, text_windows

WINDOWS, WINDOW = 4, 512  # windows read from a given text, and tokens per window
TEMPLATE = "page.html"
GENERATOR = '<meta name="generator" content="infoquant report">'  # line of the template that identifies our pages
HEAD_BYTES = 1024
MAX_RECIPE_CHARACTERS = 20_000


def make_page(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    source: str | Path | None = None,
    corpus: str | None = None,
    overwrite: bool = False,
    progress: ProgressReport = silent,
) -> Summary:
    """Measure a checkpoint on a text and write its page.

    Args:
        folder: the checkpoint.
        output: file to write; None: CHECKPOINT-report.html beside the checkpoint.
        source: folder or hub id of the model that it was made from, for figures before quantizing.
        corpus: see `text_windows`; None: the project's own passages.
        overwrite: replace a page written earlier.
        progress: called after every window.
    """
    checkpoint_folder = Path(folder).resolve()
    file = checkpoint_folder.with_name(f"{checkpoint_folder.name}-report.html") if output is None else Path(output)
    _check_output(file, overwrite)
    _check_matplotlib()
    inspection = inspect_checkpoint(folder)
    records, checkpoint = run_records(inspection), Checkpoint(folder)
    if checkpoint.shape.experts is not None:
        raise ToolError(f"{folder}: the page shows no mixtures of experts yet; use `infoquant eval` and `verify`")
    opened = None if source is None else Source.open(source)
    windows = _windows(corpus, read_tokenizer(checkpoint.folder), checkpoint.shape.vocab_size)
    found = measure(checkpoint, opened, windows, progress)
    summary = summarize(
        found,
        records,
        checkpoint.shape.num_hidden_layers,
        page=str(file),
        source=None if source is None else str(source),
        text=corpus or OWN_TEXT,
    )
    name = checkpoint_folder.name
    factors = clips(checkpoint)
    context = _texts(name, checkpoint, inspection, records, summary) | _pictures(checkpoint, found, summary, factors)
    budget = None if records is None else records.budget
    context |= {"budget": budget, "pareto": None if budget is None else _pareto(budget)}
    context["scores"] = score_table(evaluations) if (evaluations := read_evaluations(checkpoint_folder)) else None
    context["clips"] = {site: [own.mean(0).tolist() for own in by_layer] for site, by_layer in factors.items()}
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    page = templates.get_template(TEMPLATE).render(context)
    with atomic_file(file) as partial:
        partial.write_bytes(page.encode("utf-8", errors="replace"))
    return summary


def _windows(corpus: str | None, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[torch.Tensor]:
    if corpus is not None:
        return list(text_windows(corpus, tokenizer, vocab_size, WINDOWS, WINDOW, seed=0))
    return encode_texts(PASSAGES, tokenizer, vocab_size, OWN_TEXT)


def _texts(
    name: str, checkpoint: Checkpoint, inspection: Inspection, records: Report | None, summary: Summary
) -> dict[str, Any]:
    """Return the template's variables that are text and numbers."""
    recipe = (
        None
        if inspection.recipe is None
        else yaml.safe_dump(inspection.recipe, sort_keys=False)[:MAX_RECIPE_CHARACTERS]
    )
    sizes = {part: (size.bytes, size.bf16_bytes) for part, size in inspection.sizes.items()}
    views = {"after": summary.after} if summary.before is None else {"before": summary.before, "after": summary.after}
    means = {
        site: {
            view: {figure: mean(getattr(by_site[site], figure)) for figure in ("range", "entropy", "error")}
            for view, by_site in views.items()
        }
        for site in summary.after
    }
    return {
        "name": name,
        "shape": checkpoint.shape,
        "inspection": inspection,
        "records": records,
        "recipe_name": (inspection.recipe or {}).get("name"),
        "recipe": recipe,
        "sizes": {"linear layers": sizes["linears"], "whole checkpoint": sizes["total"]},
        "summary": summary,
        "views": views,
        "means": means,
        "labels": LABELS,
        "schemes": {site: site_words(checkpoint, site) for site in summary.after},
        "bits": {site: sorted(set(site_bits(checkpoint, site))) for site in summary.after},
        "layers": range(checkpoint.shape.num_hidden_layers),
    }


def _pictures(
    checkpoint: Checkpoint, found: Measurement, summary: Summary, factors: dict[str, list[torch.Tensor]]
) -> dict[str, Any]:
    """Return the template's pictures as data URIs."""
    from offline.evaluate.page import plots

    layers = checkpoint.shape.num_hidden_layers
    shown = sorted({0, layers // 2, layers - 1})
    errors = {
        "Inputs and cache: share of their energy": {
            LABELS[site]: [float("nan") if error is None else error for error in figures.error]
            for site, figures in summary.after.items()
        }
    }
    if summary.weight_errors:
        errors["Weights: share of the energy of each linear's output"] = summary.weight_errors
    return {
        "shown": shown,
        "criteria": plots.to_svg(plots.criteria(found)),
        "occupancy": plots.to_svg(plots.occupancy(found)),
        "histograms": {
            site: plots.to_svg(plots.histograms(found, site, shown, site_bits(checkpoint, site)))
            for site in found.after
        },
        "error_maps": plots.to_svg(plots.error_maps(errors)),
        "clip_ratios": plots.to_svg(plots.clip_ratios(factors)) if factors else None,
    }


def _pareto(budget: BudgetReport) -> str:
    from offline.evaluate.page import plots

    return plots.to_svg(plots.pareto(budget))


def _check_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ToolError(
            "the package matplotlib, which draws the plots, is not installed; `pip install 'infoquant-vllm[report]'`"
        )


def _check_output(file: Path, overwrite: bool) -> None:
    """Create the folder; refuse a file that exists, and with `overwrite` replace only a page of this tool."""
    check_writable(file)
    if not file.exists() and not file.is_symlink():
        return
    if not overwrite:
        raise ToolError(f"{file}: exists already; give another --output, or pass --overwrite to replace it")
    if not file.is_file() or file.is_symlink() or GENERATOR.encode() not in _head(file):
        raise ToolError(f"{file}: not a page of this tool, so --overwrite does not replace it")


def _head(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(HEAD_BYTES)
