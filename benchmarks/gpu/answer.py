"""A W4A4KV4 checkpoint of a real model served with torch.compile and CUDA graphs: an answer, and a text scored.

Run on a machine without a GPU too, it writes the rows to compare with. The text is this repository's license: it is the
same everywhere. A row's `nll` is the mean negative log-probability of its tokens, in nats.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.accuracy.scores import score
from benchmarks.common.models import ROOT
from benchmarks.common.server import Server
from benchmarks.demo import QUESTION
from benchmarks.gpu.bench import Bench, parser
from benchmarks.gpu.engines import Engines
from offline.text import text_windows

WINDOWS, WINDOW = 4, 500
SERVER = ("--max-model-len", "2048", "--max-num-batched-tokens", "2048")
CHUNKED = ("--max-model-len", "2048", "--max-num-batched-tokens", "256", "--enforce-eager")
PREFIX, CONTINUATION = 256, 64


def main() -> None:
    """Serve the checkpoint, ask it, and score the text."""
    arguments = parser("answer", __doc__)
    arguments.add_argument("checkpoint", type=Path, help="folder of the checkpoint")
    options = arguments.parse_args()
    bench = Bench.of("answer", options)
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    windows = text_windows(str(ROOT / "LICENSE"), tokenizer, len(tokenizer), WINDOWS, WINDOW, seed=0)
    engines = Engines(bench, options.rows.parent / "logs")

    def whole() -> dict[str, Any]:
        with engines.served("answer", options.checkpoint, *SERVER) as server:
            bench.attempt(lambda: answer(server), what="answer")
            bench.attempt(lambda: nll(server, windows, 1), what="one at a time")
            bench.attempt(lambda: nll(server, windows, WINDOWS), what="batch")
            bench.attempt(lambda: cached_prefix(server, windows[0]), what="cached prefix")
        return {}

    def chunked() -> dict[str, Any]:
        with engines.served("answer-chunked", options.checkpoint, *CHUNKED) as server:
            bench.attempt(lambda: nll(server, windows, WINDOWS), what="chunks")
        return {}

    bench.attempt(whole, what="server")
    bench.attempt(chunked, what="server of chunks")


def answer(server: Server) -> dict[str, Any]:
    """Ask a question."""
    reply = server.client().chat.completions.create(
        model=str(server.model), messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=64
    )
    said = reply.choices[0].message.content
    return {"question": QUESTION, "answer": said, "kernels": server.logged("infoquant: (.+)")}


def nll(server: Server, windows: torch.Tensor, concurrent: int) -> dict[str, Any]:
    """Score the text, so many windows at a time."""
    found = score(server, windows, top=1, concurrent=concurrent).nll
    return {"nll": float(found.mean()), "nll_of_windows": found.mean(1).tolist(), "tokens": found.numel()}


def cached_prefix(server: Server, window: torch.Tensor) -> dict[str, Any]:
    """Continue a prompt twice, the second time from its cached pages, and compare log-probabilities."""
    first, second = (
        server.client()
        .completions.create(
            model=str(server.model),
            prompt=window[:PREFIX].tolist(),
            max_tokens=CONTINUATION,
            temperature=0,
            logprobs=0,
            extra_body={"ignore_eos": True},
        )
        .choices[0]
        for _ in range(2)
    )
    assert first.logprobs is not None
    assert second.logprobs is not None
    pairs = list(zip(first.logprobs.token_logprobs or [], second.logprobs.token_logprobs or [], strict=True))
    return {
        "same_text": first.text == second.text,
        "mean_difference": sum(a - b for a, b in pairs) / len(pairs),
        "hits": server.metric("vllm:prefix_cache_hits_total"),
    }


if __name__ == "__main__":
    main()
