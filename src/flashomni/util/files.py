"""Files that appear whole or not at all, places that are tried before the work, and locks."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROBE = 1 << 20  # bytes that must fit where something will be written


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write a file beside its place, then move it there; return its path.

    A new file gets the permissions that the umask leaves, an old one keeps its own; a symbolic
    link stays one, and its target is written. A device or a pipe is written as it is.

    Raises:
        OSError: the disk fails; then an older file is untouched and no other is left.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    mode = _mode(target)
    if mode is not None and not stat.S_ISREG(mode):
        with open(target, "wb") as file:  # a folder is refused here, by its name
            file.write(content)
        return path
    # The name is cut: with the affixes it may be longer than a file's name may be.
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:40]}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o666 & ~_umask() if mode is None else stat.S_IMODE(mode))
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def write_text(path: str | Path, text: str) -> Path:
    """:func:`write_bytes` of UTF-8; half a surrogate pair, which UTF-8 lacks, is written out."""
    return write_bytes(path, text.encode(errors="backslashreplace"))


def check_folder(name: str, path: str | Path) -> None:
    """Try whether files can be written into a folder, which need not exist; leave no trace.

    Args:
        name: of the argument, for the message.
        path: the folder.

    Raises:
        ValueError: they cannot, and why.
    """
    path = Path(path)
    made: list[Path] = []
    try:
        missing = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
        for folder in reversed(missing):
            try:
                folder.mkdir()
            except FileExistsError:  # somebody else made it, or the path goes back over ".."
                continue
            made.append(folder)
        if not path.is_dir():
            raise NotADirectoryError("it is not a folder")
        with tempfile.NamedTemporaryFile(dir=path, prefix=".probe.") as probe:
            probe.write(bytes(PROBE))
            probe.flush()
            os.fsync(probe.fileno())
    except (OSError, ValueError) as error:  # ValueError: a NUL in a path
        raise ValueError(
            f"{name} must be a folder that can be written, got {_why(path, error)}"
        ) from error
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()


def check_file(name: str, path: str | Path) -> None:
    """:func:`check_folder` for one file, which need not exist."""
    path = Path(path)
    try:
        target = Path(os.path.realpath(path))
        mode = _mode(target)
        if mode is not None:
            if stat.S_ISDIR(mode):
                raise IsADirectoryError("it is a folder")
            if not os.access(target, os.W_OK):
                raise PermissionError("it cannot be written")
            if not stat.S_ISREG(mode):
                return
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} must be a file that can be written, got {_why(path, error)}"
        ) from error
    check_folder(f"the folder of {name}", target.parent)


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Be the only one between processes that lock this folder; wait for the others.

    The lock is on the folder itself: it leaves no file, and ends with the process. Where the
    system has no such locks nothing is locked.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network disks cannot lock
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def published(folder: str | Path, names: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Collect files in a folder of its own; they move into ``folder`` together, or none does.

    Two runs that publish into one folder do it one after the other: what lies there is of one
    run. ``names`` are files of earlier runs that go away where this run has none of that name.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(dir=folder, prefix=".run."))
    try:
        yield stage
        with locked(folder):
            new = sorted(path.name for path in stage.iterdir())
            for name in new:
                old = Path(os.path.realpath(folder / name))
                if (folder / name).is_symlink():  # what the link points to may be on another disk
                    write_bytes(old, (stage / name).read_bytes())
                    continue
                if old.exists():
                    os.chmod(stage / name, stat.S_IMODE(old.stat().st_mode))
                os.replace(stage / name, old)
            for name in names.difference(new):
                (folder / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None


def _umask() -> int:
    """The process's umask; the system tells it only in exchange for another."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _why(path: Path, error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{str(path)!r}: {reason}"
