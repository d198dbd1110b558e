"""The cache of what was compiled: one file each, named by its maker after a hash of all that went into it.

The folder is this user's own: made with mode 0700, or one that nobody else owns or may write to. A file is written to
a temporary name and renamed, so that any number of processes may write at once and none sees half a file, and it ends
with a digest of its content, so that damage is noticed (what follows an ELF file's last section, linkers and loaders
ignore). A cache that cannot be used costs time, never correctness: llmopt warns and keeps the objects in a temporary
folder of this process.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import logging
import os
import shutil
import stat
import tempfile
import threading
import time
from pathlib import Path

log = logging.getLogger(__name__)

_MAGIC = b"\0llmopt1"
_DAY_S = 86400.0

_lock = threading.Lock()  # held while a folder is looked at or made: several threads compile at once


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_after_fork)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest() + _MAGIC


_SEAL_BYTES = len(_digest(b""))


def configured_folder() -> Path:
    """`$LLMOPT_CACHE_DIR`, or llmopt/ in the user's cache directory."""
    configured = os.environ.get("LLMOPT_CACHE_DIR")
    if configured:
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmopt"


def cache_folder() -> Path:
    """The folder that objects are kept in: the configured one, else, with a warning, one of this process's own."""
    folder = configured_folder()
    with _lock:  # `functools.cache` alone lets two threads look, and warn, at once
        usable = _usable(folder)
    return folder if usable else private_folder()


@functools.cache
def _usable(folder: Path) -> bool:
    """Whether objects may be kept in `folder`; it is made where it is missing. Warns once when not."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid != os.getuid():
            raise PermissionError(f"{folder} belongs to another user")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(f"others may write to {folder}; name one of your own, or run chmod go-w on it")
        if os.statvfs(folder).f_flag & os.ST_NOEXEC:
            raise PermissionError(f"{folder} is on a file system from which nothing may be executed")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        log.warning("kernel cache %s is unusable (%s); compiling into a temporary folder", folder, error)
        return False
    return True


_private: dict[int, Path] = {}  # process id -> its temporary folder


def private_folder() -> Path:
    """A temporary folder of this process, made when it is first needed and removed when the process ends."""
    process = os.getpid()
    with _lock:
        if process not in _private:
            folder = Path(tempfile.mkdtemp(prefix="llmopt-"))

            def remove() -> None:
                if os.getpid() == process:  # a forked child leaves its parent's alone
                    shutil.rmtree(folder, ignore_errors=True)

            atexit.register(remove)
            _private[process] = folder
        return _private[process]


def find(name: str) -> Path | None:
    """The cached file of that name if it is whole; one that is not is reported and counts as missing."""
    found = _look_up(name)
    return found[0] if found is not None else None


def read(name: str) -> bytes | None:
    """The content of the cached file of that name if it is whole."""
    found = _look_up(name)
    return found[1] if found is not None else None


def _look_up(name: str) -> tuple[Path, bytes] | None:
    for folder in dict.fromkeys((cache_folder(), *filter(None, [_private.get(os.getpid())]))):
        path = folder / name
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            log.warning("kernel cache entry %s cannot be read (%s); compiling again", path, error)
            continue
        if content[-_SEAL_BYTES:] == _digest(content[:-_SEAL_BYTES]):
            mark_used(path)
            return path, content[:-_SEAL_BYTES]
        log.warning("kernel cache entry %s is damaged; compiling again", path)
    return None


def mark_used(path: Path) -> None:
    """Notes, to the day, that an entry is in use: `llmopt cache prune` goes by a file's time of modification."""
    with contextlib.suppress(OSError):  # read-only, or just removed
        if time.time() - path.stat().st_mtime > _DAY_S:
            os.utime(path)


def keep(name: str, made: Path) -> Path:
    """Puts the file `made` into the cache under `name`; returns and raises as `write`."""
    return write(name, made.read_bytes())


def write(name: str, content: bytes) -> Path:
    """Keeps `content` under `name` and returns the file's path, from which it can be used.

    Raises OSError only when not even the temporary folder takes it.
    """
    sealed = content + _digest(content)
    if not cache_folder().is_dir():  # deleted since it was looked at
        _usable.cache_clear()
    folder = cache_folder()
    try:
        return _publish(folder / name, sealed)
    except OSError as error:
        log.warning("kernel cache %s cannot be written (%s); using a temporary folder", folder, error)
        return _publish(private_folder() / name, sealed)


def _publish(target: Path, content: bytes) -> Path:
    handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=target.suffix)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).replace(target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target
