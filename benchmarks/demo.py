"""`make demo`: quantize a real model to W4A4KV4, serve it, ask it something, print what it costs and gains."""

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.accuracy.scores import Scores, score, standard_error
from benchmarks.common.models import DEMO, infoquant, language_reference, quantized, source_model
from benchmarks.common.server import Server, ServerError, started, stop_on_sigterm, wait_until_healthy
from offline.text import text_windows

QUESTION = "What can I do to sleep better?"
WINDOWS, WINDOW = 8, 512
SERVER_ARGUMENTS = ("--enforce-eager", "--max-model-len", "2048")

console = Console(highlight=False)


@dataclass
class Measured:
    """Tokens that fit into the KV cache of one server, and its scores of the windows."""

    kv_tokens: int
    scores: Scores


def main() -> None:
    """Run the demo; with --stay the server stays up until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--stay", action="store_true", help="keep the server running until Ctrl-C")
    stay = parser.parse_args().stay
    stop_on_sigterm()
    try:
        run(stay)
    except ServerError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        console.print("\nStopped.")
        sys.exit(0 if stay else 130)


def run(stay: bool) -> None:
    """Run the steps; announce each one before it runs."""
    step("A real model, bf16: SmolLM2-135M-Instruct, dequantized from the GGUF file in a Python package")
    source = source_model()
    step("Quantize it to 4-bit weights, activations and KV cache")
    checkpoint = quantized("fast", "--preset", "fast")
    step("Verify the checkpoint")
    infoquant("verify", checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(source)
    windows = text_windows(str(language_reference()), tokenizer, len(tokenizer), WINDOWS, WINDOW, seed=0)
    step("Serve the bf16 model, to compare with, while the server of the 4-bit model starts")
    with started(checkpoint, DEMO / "w4a4kv4.log", *SERVER_ARGUMENTS) as server:
        with started(source, DEMO / "bf16.log", *SERVER_ARGUMENTS) as original:
            wait_until_healthy(original)
            reference = measure(original, windows)
        step("Serve the 4-bit model")
        wait_until_healthy(server)
        console.print(f"$ vllm serve {os.path.relpath(checkpoint)} {' '.join(SERVER_ARGUMENTS)}")
        console.print(f"{server.logged(r'infoquant: (.+)')}\n")
        ask(server, QUESTION)
        ours = measure(server, windows)
        console.print(comparison(source, checkpoint, reference, ours))
        console.print(sources(reference, ours))
        if stay:
            announce(server.url, server.model)
            server.process.wait()


def step(title: str) -> None:
    """Announce a step."""
    console.print(f"\n[bold]{title}[/bold]")


def measure(server: Server, windows: torch.Tensor) -> Measured:
    """Read the KV cache's size and score the windows through the API."""
    return Measured(server.kv_tokens(), score(server, windows, top=1))


def ask(server: Server, question: str) -> None:
    """Stream one answer to the terminal."""
    console.print(f"[bold]> {question}[/bold]")
    began, pieces = time.monotonic(), 0
    stream = server.client().chat.completions.create(
        model=str(server.model),
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=96,
        stream=True,
    )
    for chunk in stream:
        text = chunk.choices[0].delta.content if chunk.choices else None
        if text:
            pieces += 1
            print(text, end="", flush=True)
    console.print(f"\n[dim]({pieces} pieces in {time.monotonic() - began:.1f} s)[/dim]\n")


def announce(url: str, model: Path) -> None:
    """Print the server's address and a command to paste, whose lines are not wrapped at the terminal's width."""
    body = {"model": str(model), "messages": [{"role": "user", "content": QUESTION}]}
    console.print(f"The server is up at {url}/v1 until Ctrl-C. For example:")
    console.print(f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\", soft_wrap=True)
    console.print(f"  -d '{json.dumps(body)}'", soft_wrap=True, markup=False)


def comparison(source: Path, checkpoint: Path, reference: Measured, ours: Measured) -> Table:
    """Tabulate what the 4-bit model costs and gains."""
    report = json.loads((checkpoint / "infoquant_report.json").read_text())
    table = Table(title="SmolLM2-135M-Instruct served by vLLM")
    for heading in ("", "bf16", "W4A4KV4", "ratio"):
        table.add_column(heading, justify="left" if not heading else "right")
    rows = [
        ("linear layers, MB", report["source_linear_bytes"] / 1e6, report["linear_bytes"] / 1e6, ".1f"),
        ("whole checkpoint, MB", _weights_bytes(source) / 1e6, _weights_bytes(checkpoint) / 1e6, ".1f"),
        ("KV-cache tokens in 1 GiB", reference.kv_tokens, ours.kv_tokens, ",d"),
        ("perplexity", reference.scores.perplexity(), ours.scores.perplexity(), ".2f"),
    ]
    for label, before, after, spec in rows:
        table.add_row(label, format(before, spec), format(after, spec), f"{after / before:.3f}")
    return table


def sources(reference: Measured, ours: Measured) -> str:
    """Say where the table's figures come from."""
    loss = standard_error(ours.scores.nll - reference.scores.nll)
    return (
        "Linear layers: from the quantizer's report. Whole checkpoint: the safetensors files.\n"
        "KV-cache tokens: from the logs of the two servers.\n"
        f"Perplexity: {ours.scores.nll.numel():,} tokens of Python's language reference in windows of {WINDOW}, from\n"
        f"the two servers' prompt log-probabilities (standard error of the log of the ratio: {loss:.3f}).\n"
    )


def _weights_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
