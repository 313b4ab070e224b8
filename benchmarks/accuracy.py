"""How far served checkpoints are from the served bf16 model: perplexity, KL divergence, top-1 agreement.

Every model is served by `vllm serve` in turn and scores the same tokens through the OpenAI API. The
KL divergence counts the likeliest tokens of both models one by one and the rest as one (see
`benchmarks.scores.kl_divergence`): a lower bound; `infoquant eval` gives that of the simulation over
the whole vocabulary.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.provenance import provenance, write_rows
from benchmarks.scores import Scores, kl_divergence, same_first, score, standard_error
from benchmarks.server import serve, stop_on_sigterm
from offline.text import text_windows


def main() -> None:
    """Measure, print a table and write --json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("reference", type=Path, help="folder of the unquantised model")
    parser.add_argument("checkpoints", type=Path, nargs="+", help="folders of InfoQuant checkpoints")
    parser.add_argument("--text", required=True, help="text or JSONL file to measure on, never calibrated on")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--top", type=int, default=256, help="how many of the likeliest tokens the KL counts singly")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of windows")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_args()
    stop_on_sigterm()
    tokenizer = AutoTokenizer.from_pretrained(options.reference)
    windows = text_windows(options.text, tokenizer, options.tokens // options.window, options.window, options.seed)
    reference = served_scores(options.reference, windows, options.top)
    common = {"text": Path(options.text).name, "tokens": windows.numel(), "window": options.window, "top": options.top}
    rows = []
    for folder in [options.reference, *options.checkpoints]:
        scores = reference if folder == options.reference else served_scores(folder, windows, options.top)
        rows.append({"model": folder.name, **figures(reference, scores), **common, **provenance(options.seed)})
    Console().print(table(rows))
    if options.json:
        write_rows(rows, options.json)


def served_scores(folder: Path, windows: torch.Tensor, top: int) -> Scores:
    """Serve a model, score the windows (int64 [windows, tokens]), stop it."""
    limits = ("--max-model-len", str(windows.shape[1] + 1), "--max-logprobs", str(top))
    with (
        tempfile.TemporaryDirectory() as scratch,
        serve(folder, Path(scratch) / "server.log", "--enforce-eager", *limits) as server,
    ):
        return score(server, windows, top)


def figures(reference: Scores, scores: Scores) -> dict[str, float]:
    """Perplexity, KL(reference || model) in nats and top-1 agreement, with standard errors over windows."""
    kl, same = kl_divergence(reference, scores), same_first(reference, scores)
    perplexity = scores.perplexity()
    return {
        "perplexity": perplexity,
        "perplexity_se": perplexity * standard_error(scores.nll),
        "kl": float(kl.mean()),
        "kl_se": standard_error(kl),
        "top1": float(same.mean()),
        "top1_se": standard_error(same),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for a terminal."""
    printed = Table(title=f"{rows[0]['text']}, {rows[0]['tokens']:,} tokens in windows of {rows[0]['window']}")
    for heading in ("served model", "perplexity", "KL to the first", "top-1 agreement"):
        printed.add_column(heading)
    for row in rows:
        pairs = [f"{row[name]:.3f} ± {row[f'{name}_se']:.3f}" for name in ("perplexity", "kl", "top1")]
        printed.add_row(row["model"], *pairs)
    return printed


if __name__ == "__main__":
    main()
