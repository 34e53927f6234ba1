"""One process at a time in a folder, by a lock that the system releases when the process ends, even by a kill."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from walt import errors
from walt.atomic import writing
from walt.errors import WaltError

LOCK = "lock"


@contextlib.contextmanager
def locked(folder: str | Path, *, wait: bool = False, say: Callable[[str], None] = errors.say) -> Iterator[None]:
    """Lock the folder, made if need be. While another process has it: WaltError, or with `wait` a line and a wait.

    The lock is flock(2) of `folder`/lock, whose text names process and host. Between machines it holds on NFS, unless
    mounted with nolock or local_lock, and on Lustre with -o flock. Where there are no locks, a line says so, and work
    goes on.
    """
    folder = Path(folder)
    made = not folder.exists()
    with writing(folder):
        file = _take(folder, wait, say)
    try:
        yield
    finally:
        with file, contextlib.suppress(OSError):
            (folder / LOCK).unlink()
            if made:
                folder.rmdir()  # if it is empty


def _take(folder: Path, wait: bool, say: Callable[[str], None]) -> IO[bytes]:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("ab+", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read(200).decode(errors="replace") or "another process"
            if not wait:
                file.close()
                message = f"{folder} is in use by {owner}; wait until it ends, or name another folder"
                raise WaltError(message) from None
            say(f"waiting for {owner}, which is at work in {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            say(f"{folder} has no locks ({error.strerror}); make sure that no other process writes there")
        if _is_at(folder / LOCK, file):
            with contextlib.suppress(OSError):  # it locks on a full disk, too
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            return file
        file.close()


def _is_at(path: Path, file: IO[bytes]) -> bool:
    """Whether path still is this file: the process that had the lock may have removed it."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    return False
