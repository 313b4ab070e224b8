"""Define how tasks are run; kept apart from `tasks`, so that the command's --help does not import torch."""

from typing import NamedTuple


class TaskOptions(NamedTuple):
    """How tasks of lm-eval are run.

    endpoint: address of an OpenAI-compatible server, "http://HOST:PORT"; None computes here
    limit: items of each task; None scores all of them
    few_shot: examples in each prompt; None takes each task's own number
    chat_template: render prompts by the tokenizer's chat template
    seed: of few-shot examples, and of sampling in tasks that sample
    """

    endpoint: str | None = None
    limit: int | None = None
    few_shot: int | None = None
    chat_template: bool = False
    seed: int = 0
