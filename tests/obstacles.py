"""Obstacles to writing files."""

import contextlib
import os
import resource
import shutil


@contextlib.contextmanager
def a_full_disk(folder, monkeypatch):
    """Leaves no space: `shutil` says so, and files end at 100 bytes."""
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def a_read_only_folder(folder, monkeypatch):
    """Forbids to write to the folder."""
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may write everywhere
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


OBSTACLES = [
    (a_full_disk, "(No space left on device|File too large)"),
    (a_read_only_folder, "Permission denied"),
]
"""Each with the reason that an error must give, as a regular expression."""
