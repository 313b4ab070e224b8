"""Multiple-choice and last-word tasks from JSONL files, scored over a server as lm-eval scores them."""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers import PreTrainedTokenizerBase

from benchmarks.accuracy.scores import prompt_logprobs
from benchmarks.common.server import Server
from infoquant_vllm.format import FormatError
from offline.errors import ToolError

Metric = Literal["acc", "acc_norm", "greedy"]

PLAIN_ACCURACY = ("sciq", "arc_easy")
"""Tasks whose choices are compared by their sums of log-likelihoods; the others' by sums per byte."""


class Item(BaseModel):
    """One question: which of `choices` continues `context`? Number `label` does."""

    model_config = ConfigDict(frozen=True, strict=True)

    context: str = Field(pattern=r"\S")
    choices: list[str] = Field(min_length=1)
    label: int = Field(ge=0)

    @model_validator(mode="after")
    def _label_is_a_choice(self) -> "Item":
        if self.label >= len(self.choices) or not all(self.choices):
            raise ValueError(f"label {self.label} of {len(self.choices)} choices, none of which may be empty")
        return self


@dataclass(frozen=True)
class Prompt:
    """Token ids of a context and one choice, which starts at `start`."""

    ids: list[int]
    start: int


@dataclass(frozen=True)
class Task:
    """The items that all models answer, and their prompts, one per choice."""

    name: str
    metric: Metric
    items: list[Item]
    prompts: list[list[Prompt]]

    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(prompt.ids) for prompts in self.prompts for prompt in prompts)


@dataclass(frozen=True)
class Answer:
    """What a model says of one item's choices: log-likelihoods in nats, and whether greedy decoding gives it."""

    loglikelihoods: list[float]
    greedy: list[bool]


def read_task(file: Path, tokenizer: PreTrainedTokenizerBase, items: int, seed: int) -> Task:
    """Draw `items` lines (all, where there are fewer) of a JSONL file with the fields of `Item`, in their order.

    The metric is "greedy" (is the one choice what greedy decoding gives?) where every item has one
    choice, "acc" for the tasks named in PLAIN_ACCURACY, else "acc_norm".
    Raises ToolError naming the line that is no item, and where fewer than two items are there.
    """
    lines = [(number, line) for number, line in enumerate(_lines(file), start=1) if line.strip()]
    if len(lines) < 2 or items < 2:
        raise ToolError(f"{file}: {len(lines)} items found, {items} asked for; a standard error needs 2")
    chosen = random.Random(f"{seed} {file.stem}").sample(lines, min(items, len(lines)))
    drawn = [_item(line, f"{file}:{number}") for number, line in sorted(chosen)]
    metric: Metric = "acc" if file.stem in PLAIN_ACCURACY else "acc_norm"
    if all(len(item.choices) == 1 for item in drawn):
        metric = "greedy"
    prompts = [[encode(tokenizer, item.context, choice) for choice in item.choices] for item in drawn]
    return Task(file.stem, metric, drawn, prompts)


def encode(tokenizer: PreTrainedTokenizerBase, context: str, choice: str) -> Prompt:
    """Both encoded together and cut where the context alone would end; its trailing spaces go to the choice.

    So does lm-eval (`TemplateLM._encode_pair`). Raises ToolError where the choice adds no token.
    """
    whole, kept = tokenizer(context + choice).input_ids, tokenizer(context.rstrip()).input_ids
    if len(whole) <= len(kept):
        raise ToolError(f"the choice {choice!r:.80} adds no token to its context, which ends in {context[-40:]!r}")
    return Prompt(whole, len(kept))


def answer(server: Server, tasks: list[Task], concurrent: int) -> dict[str, list[Answer]]:
    """Every task's answers by its name, one per item; `concurrent` requests are in flight at a time."""
    prompts = [prompt for task in tasks for choices in task.prompts for prompt in choices]
    replies = iter(prompt_logprobs(server, [prompt.ids for prompt in prompts], 1, concurrent))
    return {
        task.name: [_answer(choices, [next(replies) for _ in choices]) for choices in task.prompts] for task in tasks
    }


def is_right(item: Item, given: Answer, metric: Metric) -> float:
    """1.0 or 0.0. The first of equally good choices counts as the model's."""
    if metric == "greedy":
        return float(given.greedy[item.label])
    lengths = [len(choice.encode()) if metric == "acc_norm" else 1 for choice in item.choices]
    values = [total / length for total, length in zip(given.loglikelihoods, lengths, strict=True)]
    return float(values.index(max(values)) == item.label)


def bits_per_byte(item: Item, given: Answer) -> float:
    """Bits that the model needs per byte of the right choice."""
    return -given.loglikelihoods[item.label] / math.log(2) / len(item.choices[item.label].encode())


def right(task: Task, answers: list[Answer]) -> torch.Tensor:
    """`is_right` of every item, float64 [items]."""
    pairs = zip(task.items, answers, strict=True)
    return torch.tensor([is_right(item, given, task.metric) for item, given in pairs], dtype=torch.float64)


def bits(task: Task, answers: list[Answer]) -> torch.Tensor:
    """`bits_per_byte` of every item, float64 [items]."""
    pairs = zip(task.items, answers, strict=True)
    return torch.tensor([bits_per_byte(item, given) for item, given in pairs], dtype=torch.float64)


def _answer(prompts: list[Prompt], replies: list[list[dict[int, tuple[float, int]]]]) -> Answer:
    totals, greedy = [], []
    for prompt, reply in zip(prompts, replies, strict=True):
        said = [reply[place - 1][prompt.ids[place]] for place in range(prompt.start, len(prompt.ids))]
        totals.append(sum(logprob for logprob, _ in said))
        greedy.append(all(rank == 1 for _, rank in said))
    return Answer(totals, greedy)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").split("\n")  # strings may hold what splitlines cuts at
    except (OSError, UnicodeDecodeError) as error:
        raise ToolError(f"{file}: not readable as JSONL ({error})") from None


def _item(line: str, place: str) -> Item:
    try:
        return Item.model_validate(json.loads(line))
    except ValidationError as error:
        raise ToolError(str(FormatError.from_validation(place, error))) from None
    except ValueError as error:
        raise ToolError(f"{place}: not JSON ({error})") from None
