"""Score a model on tasks of lm-eval: simulated, unquantized, or behind an endpoint that serves it.

lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) renders prompts, scores answers and gives standard errors.
"""

import importlib.util
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict
from torch import nn

from infoquant_vllm.format import Checkpoint, is_checkpoint
from offline.errors import ToolError, first_line
from offline.evaluate.simulate import load_simulated
from offline.evaluate.task_options import TaskOptions
from offline.model.reference import load_reference
from offline.model.source import Source, read_tokenizer
from offline.text import check_tokens

if TYPE_CHECKING:
    from lm_eval.api.model import LM

TASK_FILES = (".yaml", ".yml")
REQUEST_SECONDS = 10
CONCURRENT_REQUESTS = 8
DEFAULTS = TaskOptions()


class TaskScore(BaseModel):
    """Hold one metric of one task, as lm-eval computes it."""

    model_config = ConfigDict(frozen=True)

    task: str
    metric: str
    value: float
    standard_error: float | None
    items: int


class TaskEvaluation(BaseModel):
    """Hold the scores of one model on some tasks."""

    model_config = ConfigDict(frozen=True)

    model: str
    served: bool
    simulated: bool
    few_shot: int | None
    limit: int | None
    seed: int
    scores: list[TaskScore]


def evaluate_tasks(model: str, tasks: Sequence[str], options: TaskOptions = DEFAULTS) -> TaskEvaluation:
    """Score a model on tasks of lm-eval.

    Args:
        model: an InfoQuant checkpoint, which is simulated, or an unquantized model. With an endpoint only its tokenizer
            is read.
        tasks: names that lm-eval knows, or YAML files of tasks.
        options: how they are run.

    Raises:
        ToolError: if lm-eval is not installed, a task is unknown or cannot be loaded, or the endpoint does not answer.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ToolError("--tasks needs lm-eval: pip install 'infoquant-vllm[eval]'")
    from lm_eval import simple_evaluate

    names, manager = _find_tasks(tasks)
    endpoint, limit, few_shot, chat_template, seed = options
    language_model = _local(model) if endpoint is None else _remote(model, endpoint, seed)
    try:
        found = simple_evaluate(
            language_model,
            tasks=list(names),
            task_manager=manager,
            limit=limit,
            num_fewshot=few_shot,
            apply_chat_template=chat_template,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            bootstrap_iters=0 if limit == 1 else 1000,
            log_samples=False,
        )
    except ToolError:
        raise
    except Exception as error:  # data sets, networks and servers raise errors of many classes
        raise ToolError(f"{', '.join(tasks)}: lm-eval stopped: {first_line(error)}") from error
    return TaskEvaluation(
        model=model,
        served=endpoint is not None,
        simulated=endpoint is None and is_checkpoint(Path(model)),
        few_shot=few_shot,
        limit=limit,
        seed=seed,
        scores=_scores(found or {}),
    )


def _find_tasks(tasks: Sequence[str]) -> tuple[list[str], Any]:
    """Return the tasks' names and the manager that knows them; raise ToolError for an unknown one."""
    from lm_eval.tasks import TaskManager

    files = [Path(task) for task in tasks if task.endswith(TASK_FILES)]
    names = [_task_name(Path(task)) if task.endswith(TASK_FILES) else task for task in tasks]
    manager = TaskManager(
        include_path=[str(folder) for folder in dict.fromkeys(file.parent for file in files)] or None,
        include_defaults=len(files) < len(tasks),  # indexing lm-eval's own tasks takes ten seconds
    )
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ToolError(f"{unknown[0]}: no task of lm-eval has this name; `lm-eval ls tasks` lists them")
    return names, manager


def _task_name(file: Path) -> str:
    try:
        data = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ToolError(f"{file}: not readable as YAML ({error})") from None
    name = data.get("task") if isinstance(data, dict) else None
    if not isinstance(name, str):
        raise ToolError(f"{file}: a mapping with the name of a 'task' was expected, found {name!r:.80}")
    return name


def check_model(model: str) -> None:
    """Open a model that is to run in this process, without loading it; raise ToolError or FormatError if it cannot."""
    Checkpoint(model) if is_checkpoint(Path(model)) else Source.open(model)


def _local(model: str) -> "LM":
    """Load a model into this process; a batch of one, since the simulation takes sequences of one length."""
    from lm_eval.models.huggingface import HFLM

    folder = Path(model)
    if is_checkpoint(folder):
        loaded, tokenizer = load_simulated(folder), read_tokenizer(folder)
    else:
        source = Source.open(model)
        loaded, tokenizer = load_reference(source.folder), source.tokenizer()
    vocab_size = loaded.config.vocab_size

    def check(_: nn.Module, ids: tuple[torch.Tensor]) -> None:
        check_tokens(ids[0].flatten().tolist(), tokenizer, vocab_size, "a text of the tasks")

    loaded.model.embed_tokens.register_forward_pre_hook(check)
    return HFLM(pretrained=loaded, tokenizer=tokenizer, add_bos_token=True)


def _remote(model: str, endpoint: str, seed: int) -> "LM":
    base = endpoint.rstrip("/").removesuffix("/v1")
    served = _served_model(f"{base}/v1/models")
    return completions_client(base, served["id"], model, served.get("max_model_len") or 2048, seed)


def completions_client(url: str, served: str, tokenizer: str, max_tokens: int, seed: int = 0) -> "LM":
    """Return lm-eval's client of a server.

    url: "http://HOST:PORT"
    served: the name that the server gives its model
    tokenizer: folder or hub id of the model's tokenizer
    max_tokens: longest prompt with its answer; lm-eval cuts longer prompts at their start
    seed: of requests that sample
    """
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        model=served,
        base_url=f"{url}/v1/completions",
        tokenizer=tokenizer,
        tokenizer_backend="huggingface",
        add_bos_token=True,  # if the tokenizer does
        max_length=max_tokens,
        num_concurrent=CONCURRENT_REQUESTS,
        seed=seed,
    )


def _served_model(address: str) -> dict[str, Any]:
    """Return what a server says of the first model that it serves."""
    try:
        with urllib.request.urlopen(address, timeout=REQUEST_SECONDS) as answer:
            first = json.load(answer)["data"][0]
    except (urllib.error.URLError, OSError, ValueError, LookupError, TypeError) as error:
        raise ToolError(f"{address}: no OpenAI-compatible server answers there ({first_line(error)})") from None
    if not isinstance(first, dict) or not isinstance(first.get("id"), str):
        raise ToolError(f"{address}: the first model has no id, found {first!r:.80}")
    return first


def _scores(found: dict[str, Any]) -> list[TaskScore]:
    """Read the metrics of lm-eval's results, whose keys are "metric,filter" and "metric_stderr,filter"."""
    scores = []
    for task, figures in found.get("results", {}).items():
        items = found.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in figures.items():
            metric, _, variant = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float) or not variant:
                continue
            error = figures.get(f"{metric}_stderr,{variant}")
            scores.append(
                TaskScore(
                    task=task,
                    metric=metric if variant == "none" else f"{metric} ({variant})",
                    value=value,
                    standard_error=error if isinstance(error, int | float) else None,
                    items=items,
                )
            )
    return scores
