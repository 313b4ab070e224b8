"""vLLM's executor of one worker of several; see workers.py."""

import os

from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher


class Rank(ExecutorWithExternalLauncher):
    """Meet the others at a port of the model's own.

    vLLM's calls it `env://` for all models, and names by that the shared memory that a process keeps until it ends.
    """

    def _distributed_args(self) -> tuple[str, int, int]:
        rank = int(os.environ["RANK"])
        return f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}", rank, rank
