"""Write files and folders atomically: readers see the old one or the whole new one."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from offline.errors import ToolError


@contextmanager
def atomic_file(output: Path) -> Iterator[Path]:
    """Yield a path beside `output` to write; the file takes the place of `output` when the block succeeds.

    Raises ToolError where the disk refuses it.
    """
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        yield partial
        partial.replace(output)
    except (OSError, SafetensorError) as error:
        raise ToolError(f"{output}: cannot be written ({error})") from None
    finally:
        with suppress(OSError):  # nothing to remove where the file could not be created
            partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """Yield a folder beside `output` that takes its place when the block succeeds, and is removed when not.

    Until then an older `output` stays. Raises ToolError where the disk refuses it.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    except OSError as error:
        raise ToolError(f"{output}: cannot be written ({error})") from None
    try:
        partial.chmod(0o777 & ~_umask())
        yield partial
        replace_folder(partial, output)
    except (OSError, SafetensorError) as error:
        raise not_written(output, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_folder(partial: Path, output: Path) -> None:
    """Move a finished folder to `output`, in place of an older one."""
    if output.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent))
        output.rename(old / output.name)
        partial.rename(output)
        shutil.rmtree(old)
    else:
        partial.rename(output)
    fsync(output.parent)


def not_written(output: Path, error: Exception, advice: str = "") -> ToolError:
    """Return the error for an output that the disk refused."""
    free = shutil.disk_usage(output.parent).free
    return ToolError(f"{output}: not written, nothing was changed: {error} ({free / 1e6:.0f} MB are free){advice}")


def check_writable(output: Path) -> None:
    """Create the parent folder of `output`; raise ToolError where it takes no files."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=f".{output.name}.partial-", dir=output.parent):
            pass
    except OSError as error:
        raise ToolError(f"{output}: cannot be written ({error.strerror or error}); choose another place") from None


def fsync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
