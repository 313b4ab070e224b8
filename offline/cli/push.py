"""Upload a checkpoint to a model hub once it passes its checks."""

from pathlib import Path

from huggingface_hub import HfApi
from pydantic import BaseModel, ConfigDict

from offline.errors import ToolError, first_line
from offline.evaluate.verify import verify
from offline.model.source import HUB_ID
from offline.progress import ProgressReport, silent

MESSAGE = "Checkpoint by infoquant"


class Pushed(BaseModel):
    """An uploaded checkpoint."""

    model_config = ConfigDict(frozen=True)

    repository: str
    url: str
    files: int
    bytes: int


def push(
    folder: str | Path,
    repository: str,
    *,
    private: bool = False,
    api: HfApi | None = None,
    progress: ProgressReport = silent,
) -> Pushed:
    """Upload a checkpoint folder to a model repository, which is created where it does not exist.

    Args:
        folder: folder that `quantize` wrote; all files are uploaded but hidden ones.
        repository: ORGANIZATION/NAME.
        private: create a new repository as private.
        api: hub client; None uses the token and address that huggingface_hub is configured with.
        progress: called for every check.

    Raises ToolError where `verify` fails, before anything is uploaded, and where the hub refuses.
    """
    if not HUB_ID.match(repository):
        raise ToolError(f"{repository!r}: expected a repository like organization/model")
    found = verify(folder, progress=progress)
    failed = next((check for check in found.checks if not check.passed), None)
    if failed is not None:
        raise ToolError(f"{folder}: not uploaded, its check '{failed.name}' failed: {failed.detail}")
    files = {file.relative_to(folder).as_posix(): file for file in Path(folder).rglob("*") if file.is_file()}
    files = {name: file for name, file in files.items() if not any(part.startswith(".") for part in Path(name).parts)}
    hub = HfApi() if api is None else api
    try:
        hub.create_repo(repository, repo_type="model", private=private, exist_ok=True)
        sent = hub.upload_folder(
            repo_id=repository,
            repo_type="model",
            folder_path=folder,
            allow_patterns=sorted(files),
            commit_message=MESSAGE,
        )
    except Exception as error:  # network, authorisation and quotas, each with a class of its own
        reason = first_line(error)
        raise ToolError(f"{repository}: the hub refused {folder} ({reason}); see `hf auth login`") from None
    return Pushed(
        repository=repository,
        url=str(sent.commit_url),
        files=len(files),
        bytes=sum(file.stat().st_size for file in files.values()),
    )
