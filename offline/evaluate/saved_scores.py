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
        partial.write_text(dump(found), encoding="utf-8")
    card = folder / CARD_FILE
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    with atomic_file(card) as partial:
        partial.write_text(_with_section(text, markdown(found)), encoding="utf-8")


def dump(found: list[TaskEvaluation]) -> str:
    """Return evaluations as JSON."""
    return Evaluations.dump_json(found, indent=1).decode()


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
    """Return the scores as a table in Markdown."""
    heads, rows = score_table(found)
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])


def score_table(found: list[TaskEvaluation]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows: a row per task and metric, a column per model."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for column, evaluation in enumerate(found):
        for score in evaluation.scores:
            cells = rows.setdefault((score.task, score.metric, str(score.items)), [""] * len(found))
            error = "" if score.standard_error is None else f" ± {score.standard_error:.3f}"
            cells[column] = f"{score.value:.3f}{error}"
    heads = ["task", "metric", "items", *(_title(evaluation) for evaluation in found)]
    return heads, [[*key, *cells] for key, cells in rows.items()]


def _title(evaluation: TaskEvaluation) -> str:
    return Path(evaluation.model).name + (", simulated" if evaluation.simulated else ", served" * evaluation.served)


def _with_section(card: str, table: str) -> str:
    section = f"{BEGIN}\n## Evaluation\nBy lm-eval; ± is one standard error.\n\n{table}\n{END}\n"
    before, begin, rest = card.partition(BEGIN)
    _, end, after = rest.partition(f"{END}\n")
    return before + section + after if begin and end else f"{card.rstrip()}\n\n{section}".lstrip()
