"""Commands that examine something: a checkpoint, a model, this installation.

Heavy modules are imported inside the commands, so that --help is quick.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from offline.cli.common import CheckpointFolder, Json, refusals, show
from offline.errors import ToolError
from offline.evaluate.task_options import TaskOptions


def verify(
    checkpoint: CheckpointFolder,
    against: Annotated[str | None, typer.Option(help="The unquantized model that it was made from.")] = None,
    as_json: Json = False,
) -> None:
    """Read and check every tensor of a checkpoint; with its source, compare what both compute.

    Exit code 1 where a check fails.

    [bold]Example[/bold]

      infoquant verify ./model-w4a4kv4 --against ./model
    """
    with refusals():
        from offline.cli.tables import print_verification
        from offline.evaluate import verify as checks
        from offline.progress import console_progress

        with console_progress() as progress:
            found = checks.verify(checkpoint, against=against, progress=progress)
        show(found, print_verification, as_json)
        if not found.passed:
            raise typer.Exit(1)


def inspect(checkpoint: CheckpointFolder, as_json: Json = False) -> None:
    """Describe a checkpoint: schemes, sizes against bfloat16, recipe, and figures of the run that wrote it.

    [bold]Example[/bold]

      infoquant inspect ./model-w4a4kv4 --json
    """
    with refusals():
        from offline.cli.tables import print_inspection
        from offline.evaluate.inspect import inspect_checkpoint

        show(inspect_checkpoint(checkpoint), print_inspection, as_json)


def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint, which is simulated, or an unquantized model.")],
    reference: Annotated[str | None, typer.Option(help="Unquantized model to compare with.")] = None,
    corpus: Annotated[
        str | None,
        typer.Option(help="Text, JSONL or data set; default: text sampled from the reference, or from the model."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to read, in whole windows.")] = 8192,
    window: Annotated[
        int | None, typer.Option(min=2, help="Tokens per window.  [default: 512, or --tokens where fewer]")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Score these tasks instead: names that lm-eval knows, or YAML files, separated by commas."),
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="With --tasks: an OpenAI-compatible server of the model.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="With --tasks: items of each task.  [default: all]")] = None,
    few_shot: Annotated[
        int | None, typer.Option(min=0, help="With --tasks: examples in each prompt.  [default: the task's]")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="With --tasks: render prompts by the chat template.")
    ] = False,
    save: Annotated[
        bool, typer.Option("--save", help="With --tasks: keep the scores in the checkpoint, for its card and report.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure the perplexity of a model; with a reference also KL(reference || model) and top-1 agreement.

    Every figure has its standard error over windows. With --tasks, score tasks of lm-eval instead.

    [bold]Examples[/bold]

      infoquant eval ./model-w4a4kv4 --reference ./model --corpus wiki.txt --tokens 8192

      infoquant eval ./model-w4a4kv4 --reference ./model --tasks arc_easy,gsm8k --limit 200 --save

      infoquant eval ./model-w4a4kv4 --tasks gsm8k --endpoint http://localhost:8000
    """
    if tasks is None and (endpoint or limit or few_shot is not None or chat_template or save):
        raise typer.BadParameter("--endpoint, --limit, --few-shot, --chat-template and --save go with --tasks")
    if tasks is not None:
        _score_tasks(model, reference, tasks, TaskOptions(endpoint, limit, few_shot, chat_template), save, as_json)
        return
    with refusals():
        from offline.cli.tables import print_evaluation
        from offline.evaluate import metrics
        from offline.progress import console_progress

        with console_progress() as progress:
            found = metrics.evaluate(
                model, reference=reference, corpus=corpus, tokens=tokens, window=window, progress=progress
            )
        show(found, print_evaluation, as_json)


def _score_tasks(
    model: str, reference: str | None, tasks: str, options: TaskOptions, save: bool, as_json: bool
) -> None:
    """Score a model and its reference on tasks; `save` keeps the scores in the model's folder."""
    with refusals():
        from infoquant_vllm.format import is_checkpoint
        from offline.cli.tables import print_tasks
        from offline.evaluate.saved_scores import EVALUATION_FILE, dump, save_evaluations
        from offline.evaluate.tasks import check_model, evaluate_tasks
        from offline.output.atomic import check_writable

        if save and not is_checkpoint(Path(model)):
            raise ToolError(f"{model}: --save keeps scores in a checkpoint folder, which this is not")
        if save:
            check_writable(Path(model) / EVALUATION_FILE)
        if reference is not None:
            check_model(reference)
        names = [name.strip() for name in tasks.split(",")]
        found = [evaluate_tasks(model, names, options)]
        if reference is not None:
            found.insert(0, evaluate_tasks(reference, names, options._replace(endpoint=None)))
        if save:
            save_evaluations(Path(model), found)
        if as_json:
            print(dump(found))
        else:
            print_tasks(found)


def report(
    checkpoint: CheckpointFolder,
    source: Annotated[
        str | None, typer.Option(help="The unquantized model that it was made from, for figures before quantizing.")
    ] = None,
    corpus: Annotated[
        str | None, typer.Option(help="Text, JSONL or data set to run on; default: a few passages of the project.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="File to write.  [default: CHECKPOINT-report.html beside it]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a page written earlier.")] = False,
    as_json: Json = False,
) -> None:
    """Write a page with plots: activations, the paper's two criteria, errors and clip ratios by layer, the recipe.

    It is a single HTML file without scripts, which opens anywhere.

    [bold]Example[/bold]

      infoquant report ./model-w4a4kv4 --source ./model
    """
    with refusals():
        from offline.cli.tables import print_page
        from offline.evaluate.page.make import make_page
        from offline.progress import console_progress

        with console_progress() as progress:
            found = make_page(checkpoint, output, source=source, corpus=corpus, overwrite=overwrite, progress=progress)
        show(found, print_page, as_json)


def doctor(as_json: Json = False) -> None:
    """Report installed packages, the kernels that will serve, and how to fix what is missing.

    Exit code 1 where something is not in order.

    [bold]Example[/bold]

      infoquant doctor
    """
    from infoquant_vllm.doctor import examine, print_findings

    found = examine()
    if as_json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        print_findings(found)
    if not all(finding.in_order for finding in found):
        raise typer.Exit(1)
