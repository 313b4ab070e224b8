"""Keep task scores with a checkpoint: a JSON file that `infoquant report` reads, and a section of the model card."""

from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from infoquant_vllm.format import FormatError
from offline.errors import ToolError
from offline.evaluate.tasks import TaskEvaluation
from offline.output.atomic import atomic_file

EVALUATION_FILE = "infoquant_evaluation.json"
CARD_FILE = "README.md"
BEGIN, END = "<!-- evaluation begin -->", "<!-- evaluation end -->"

Evaluations = TypeAdapter(list[TaskEvaluation])


def save_evaluations(folder: Path, found: list[TaskEvaluation]) -> None:
    """Write evaluations into a checkpoint folder, in place of older ones, and show them on its model card."""
    with atomic_file(folder / EVALUATION_FILE) as partial:
        partial.write_bytes(Evaluations.dump_json(found, indent=1))
    card = folder / CARD_FILE
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    with atomic_file(card) as partial:
        partial.write_text(_with_section(text, markdown(found)), encoding="utf-8")


def read_evaluations(folder: Path) -> list[TaskEvaluation]:
    """Read the evaluations of a checkpoint folder, none if it has no file of them; raise ToolError for a bad file."""
    file = folder / EVALUATION_FILE
    if not file.is_file():
        return []
    try:
        return Evaluations.validate_json(file.read_bytes())
    except ValidationError as error:
        raise ToolError(str(FormatError.from_validation(str(file), error))) from None


def markdown(found: list[TaskEvaluation]) -> str:
    """Return a table: a row per task and metric, a column per model."""
    models = [_title(evaluation) for evaluation in found]
    rows: dict[tuple[str, str, int], list[str]] = {}
    for column, evaluation in enumerate(found):
        for score in evaluation.scores:
            cells = rows.setdefault((score.task, score.metric, score.items), [""] * len(found))
            error = "" if score.standard_error is None else f" ± {score.standard_error:.3f}"
            cells[column] = f"{score.value:.3f}{error}"
    lines = [f"| {task} | {metric} | {items} | {' | '.join(cells)} |" for (task, metric, items), cells in rows.items()]
    heads = ("task", "metric", "items", *models)
    return "\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *lines])


def _title(evaluation: TaskEvaluation) -> str:
    return Path(evaluation.model).name + (", simulated" if evaluation.simulated else ", served" * evaluation.served)


def _with_section(card: str, table: str) -> str:
    section = f"{BEGIN}\n## Evaluation\nBy lm-eval; ± is one standard error.\n\n{table}\n{END}\n"
    before, begin, rest = card.partition(BEGIN)
    _, end, after = rest.partition(f"{END}\n")
    return before + section + after if begin and end else f"{card.rstrip()}\n\n{section}".lstrip()
