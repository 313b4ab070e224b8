"""Launches of a LLaMA-3-8B layer's kernels, each a few times: what a profiler looks at.

`benchmarks/gpu/run.sh --stage profile` runs this under ncu. The first launch of each compiles and is not profiled.
"""

import torch

from benchmarks.gpu.attention import Batch, kv4
from benchmarks.gpu.bench import Bench, parser
from benchmarks.gpu.sites import LLAMA_HEADS, SMALL_HEADS, QuantizedLinear, sites

LINEARS = (("gate_up", 1), ("gate_up", 64), ("down", 64), ("gate_up", 2048), ("down", 2048))
BATCHES = (Batch(64, 1024, 1), Batch(1, 16384, 1), Batch(1, 2048, 2048))
SMALL_LINEARS, SMALL_BATCHES = (("down", 2),), (Batch(2, 40, 1),)


def main() -> None:
    """Launch everything once, then once more where the profiler looks."""
    bench = Bench.of("profile", parser("profile", __doc__).parse_args())
    made = {name: QuantizedLinear(site, bench.device) for name, site in sites(bench.dry_run).items()}
    calls = []
    for name, tokens in SMALL_LINEARS if bench.dry_run else LINEARS:
        x = torch.randn(tokens, made[name].site.features, device=bench.device, dtype=torch.bfloat16)
        calls.append(made[name].calls(x)[0])
    for batch in SMALL_BATCHES if bench.dry_run else BATCHES:
        calls.append(kv4(batch, SMALL_HEADS if bench.dry_run else LLAMA_HEADS, bench.device)[1][0])
    for call in calls:
        call()
    if not bench.dry_run:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    for call in calls:
        call()
    if not bench.dry_run:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    bench.row(launched=len(calls))


if __name__ == "__main__":
    main()
