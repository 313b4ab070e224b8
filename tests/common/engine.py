"""vLLM's engine without a server: for tests of numbers, a few seconds a model instead of half a minute.

All models of a test run live one after another in one process, which imports vLLM once.
"""

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

Tokens = list[int]
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several workers share what cores there are
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
DEFAULTS = {
    "dtype": "float32",
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "max_model_len": 512,
    "kv_cache_memory_bytes": 2**26,
    "disable_log_stats": False,
}


@dataclass(frozen=True)
class Answer:
    """What an engine makes of a prompt; log-probabilities in nats.

    prompt: of each of its tokens but the first
    tokens, logprobs: generated greedily
    likeliest: of the prompt's tokens but the first and of the generated ones, by token, as many as were asked for
    cached: how many tokens of the prompt came from the prefix cache
    """

    prompt: list[float]
    tokens: Tokens
    logprobs: list[float]
    likeliest: list[dict[int, float]]
    cached: int


@dataclass(frozen=True)
class Run:
    """The answers to each batch, in order, and the engine's counters after the last."""

    answers: list[list[Answer]]
    counters: dict[str, float]


class EngineError(RuntimeError):
    """What vLLM raised, by name and message: not all of its errors can be sent between processes."""


class Engine:
    """Loads models one at a time in its process."""

    def __init__(self, pool: ProcessPoolExecutor):
        self._pool = pool

    def run(
        self,
        model: Path,
        *batches: list[Tokens],
        max_tokens: int = 1,
        top: int = 0,
        of_prompts: bool = True,
        calls: Sequence[tuple[str, dict[str, Any]]] = (),
        adapters: Sequence[Path | None] = (),
        **options: Any,
    ) -> Run:
        """Answer batches of prompts, one batch at a time.

        max_tokens: to generate, whatever they are
        top: how many of the likeliest tokens to tell at each position
        of_prompts: whether to tell log-probabilities of prompts, for which vLLM reads all of each, cached or not
        calls: methods of vLLM's worker and their arguments, called between the first batch and the second
        adapters: the folder of the LoRA adapter of each prompt in a batch, None for the model alone
        options: of `vllm.LLM`

        Raises EngineError with whatever vLLM raises.
        """
        options = DEFAULTS | {"max_logprobs": top} | options
        sampling = {"max_tokens": max_tokens, "logprobs": top, "prompt_logprobs": top if of_prompts else None}
        return self._pool.submit(run, str(model), batches, sampling, calls, adapters, options).result()

    def pool(self, model: Path, prompts: list[Tokens], task: str, **options: Any) -> list[list[Any]]:
        """Return what a pooling model makes of each prompt for one of vLLM's tasks; raises EngineError as `run`."""
        options = DEFAULTS | {"skip_tokenizer_init": False, "runner": "pooling"} | options
        return self._pool.submit(_pool, str(model), prompts, task, options).result()


@contextmanager
def running_engine(**variables: str) -> Iterator[Engine]:
    """An engine's process with further environment variables, ended with the block."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=prepare, initargs=(variables,)) as pool:
        yield Engine(pool)


def prepare(variables: Mapping[str, str]) -> None:
    """Set the environment of a process that runs vLLM."""
    os.environ.update({**ENVIRONMENT, **variables})


def run(
    model: str,
    batches: tuple[list[Tokens], ...],
    sampling: dict[str, Any],
    calls: Sequence[tuple[str, dict[str, Any]]],
    adapters: Sequence[Path | None],
    options: dict[str, Any],
) -> Run:
    """Answer in this process; see Engine.run."""
    from vllm import SamplingParams

    with _serving(model, options) as llm:
        answers = []
        for number, batch in enumerate(batches):
            params = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **sampling)
            prompts = [{"prompt_token_ids": prompt} for prompt in batch]
            outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=_requests(adapters))
            answers.append([_answer(output) for output in outputs])
            for call in calls if number == 0 else ():
                llm.collective_rpc(call[0], kwargs=call[1])
        counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
        return Run(answers, counters)


def _pool(model: str, prompts: list[Tokens], task: str, options: dict[str, Any]) -> list[list[Any]]:
    with _serving(model, options) as llm:
        outputs = llm.encode([{"prompt_token_ids": prompt} for prompt in prompts], pooling_task=task, use_tqdm=False)
        return [output.outputs.data.tolist() for output in outputs]


@contextmanager
def _serving(model: str, options: dict[str, Any]) -> Iterator[Any]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.freeze()  # vLLM collects garbage seven times, among all that it has imported; a shutdown thaws it
    try:
        llm = LLM(model, **options)
    except Exception as error:
        cleanup_dist_env_and_memory()
        raise EngineError(f"{type(error).__name__}: {error}") from None
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def _requests(adapters: Sequence[Path | None]) -> list[Any] | None:
    """vLLM's requests for adapters, equal ones for equal folders."""
    from vllm.lora.request import LoRARequest

    numbers = {folder: number for number, folder in enumerate(dict.fromkeys(adapters), 1)}
    requests = [None if path is None else LoRARequest(path.name, numbers[path], str(path)) for path in adapters]
    return requests or None


def _answer(output: Any) -> Answer:
    choice = output.outputs[0]
    told = output.prompt_logprobs or [None]
    prompt, generated = output.prompt_token_ids[1 : len(told)], list(choice.token_ids)
    places = [*told[1:], *choice.logprobs]
    taken = [place[token].logprob for token, place in zip([*prompt, *generated], places, strict=True)]
    return Answer(
        taken[: len(prompt)],
        generated,
        taken[len(prompt) :],
        [{token: entry.logprob for token, entry in place.items()} for place in places],
        output.num_cached_tokens or 0,
    )
