"""Locks of outputs, so that two processes never write into one: a file that names host and process."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not a POSIX system: the content of the file decides alone
    fcntl = None  # type: ignore[assignment]

from mmalign.core.errors import UserError
from mmalign.core.files import check_output
from mmalign.core.progress import note

LOCK_NAME = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_held: dict[Path, int] = {}
"""Lock file -> how often this process holds it."""


@contextmanager
def locked_output(path: Path, key: str = "--out", *, folder: bool = True) -> Iterator[None]:
    """Hold an output for this process while the block runs; the same process may hold it more than once.

    `key` is the option or key that the user set; a `folder` holds its lock within it, a file beside it. The operating
    system drops the lock of a process that ends in any way; the file that such a process leaves is named and reused.

    Raises:
        UserError: another process holds it; the message names the process, its host and the lock file. Or the path
            cannot be written to.
    """
    lock = (path / LOCK_NAME if folder else path.with_name(f".{path.name}{LOCK_NAME}")).absolute()
    if lock in _held:
        _held[lock] += 1
        try:
            yield
        finally:
            _held[lock] -= 1
        return
    check_output(path, key, folder=folder)
    made = [folder for folder in lock.parents if not folder.exists()]
    handle = _acquire(lock, f"{key} {path}")
    _held[lock] = 1
    try:
        yield
    finally:
        del _held[lock]
        if fcntl is None:  # a system that removes no open file
            os.close(handle)
        lock.unlink(missing_ok=True)  # while it is held: who waits for it finds that the file is gone, and starts anew
        if fcntl is not None:
            os.close(handle)
        with suppress(OSError):  # a run that failed before it wrote anything leaves no folder
            for one in made:
                one.rmdir()


def _acquire(lock: Path, output: str) -> int:
    """Return the open lock file, held and with this process written into it."""
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # another process, which failed, has just removed its empty folder
        try:
            free, certain = _try_lock(handle)
            owner = _read_owner(handle)
            if free and not _is_same_file(handle, lock):
                os.close(handle)
                continue
            if not free or (owner and not _is_stale(owner, certain)):
                raise UserError(_describe(owner, lock, output))
            if owner:
                note(f"{lock} is left from process {owner['pid']} of this host, which has ended; it is replaced")
            _write_owner(handle)
        except BaseException:
            os.close(handle)
            raise
        return handle


def _try_lock(handle: int) -> tuple[bool, bool]:
    """Return whether no process of this host holds the file, and whether the file system could tell."""
    if fcntl is None:
        return True, False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False, True
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return True, False  # what the file says decides
    return True, True


def _is_same_file(handle: int, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(lock))
    except FileNotFoundError:
        return False


def _read_owner(handle: int) -> dict[str, Any]:
    """Return host, pid and time of the process that wrote the file; nothing for a new or damaged one."""
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        owner = json.loads(os.read(handle, 4096))
    except ValueError:
        return {}
    complete = isinstance(owner, dict) and isinstance(owner.get("pid"), int) and owner["pid"] > 0
    return owner if complete and isinstance(owner.get("host"), str) else {}


def _write_owner(handle: int) -> None:
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started}).encode())


def _is_stale(owner: dict[str, Any], certain: bool) -> bool:
    """Tell whether the process that wrote the file has ended; of another host's this is not known."""
    if owner["host"] != socket.gethostname():
        return False
    if certain or owner["pid"] == os.getpid():
        return True  # the number may have been given anew, here to this process itself
    if os.name != "posix":
        return False  # where signal 0 is no question
    try:
        os.kill(owner["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False  # another user's
    return False


def _describe(owner: dict[str, Any], lock: Path, output: str) -> str:
    who = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
    since = f" since {owner['started']}" if owner.get("started") else ""
    return f"{output}: {who} writes there{since}; wait for it, choose another output, or, if it is gone, remove {lock}"
