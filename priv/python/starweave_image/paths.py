"""Where a process stands and what it may write: the home folder, the working folder, the caches. Standard library only."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

_NOWHERE = "/nonexistent"


def settle() -> None:
    """Give the process a home, a user name and a working folder, which libraries expect when they are imported.

    Some users have neither `HOME` nor an entry in passwd, as in containers. Their home is the cache folder that
    `STARWEAVE_IMAGE_CACHE` names, or else one that is nowhere: then nothing is kept, and nothing else fails of it.
    """
    try:
        user = pwd.getpwuid(os.getuid())
    except KeyError:
        user = None
    if not os.environ.get("HOME"):
        os.environ["HOME"] = user.pw_dir if user else os.environ.get("STARWEAVE_IMAGE_CACHE") or _NOWHERE
    if user is None and not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        os.environ["USER"] = str(os.getuid())
    try:
        os.getcwd()
    except OSError:
        # The working folder was removed, and native libraries that look for files in it would end the process.
        os.chdir("/")


def cache_folder() -> Path:
    """The folder of this package's own files; it may be missing or not writable."""
    if own := os.environ.get("STARWEAVE_IMAGE_CACHE"):
        return Path(own)
    return _user_cache() / "starweave_image"


def measured() -> Path:
    """What was measured of each model and shape on this machine."""
    return cache_folder() / "limits.json"


def checksums() -> Path:
    """What the weights in folders of the user's own had for checksums."""
    return cache_folder() / "checksums.json"


def views() -> Path:
    """Folders, for as long as they are used, of what passed the screening of a model."""
    return cache_folder() / "views"


def converted() -> Path:
    """What OpenVINO made of networks."""
    return cache_folder() / "openvino"


def hub_cache() -> Path:
    """Where huggingface_hub keeps models, by its own rules, without importing that package."""
    home = os.environ.get("HF_HOME") or _user_cache() / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
