"""What an Elixir application starts: `python run.py COMMAND …` is the command `starweave-image` of this folder.

A script, and not `-m`, which puts the working folder first on the import path: there the files are the application's,
and one called `queue.py` would be run. Python has `-P` against that since 3.11 only.
"""

import os
import sys
from importlib.machinery import SOURCE_SUFFIXES, FileFinder, SourceFileLoader
from typing import Any

FOLDER = os.path.dirname(os.path.abspath(__file__))


class Loader(SourceFileLoader):
    def set_data(self, path: Any, data: Any, *, _mode: int = 0o666) -> None:
        """Keeps no compiled files: this folder belongs to a release, and to compile what is in it takes 0.1 s."""


def find(folder: str) -> FileFinder:
    if folder != FOLDER and not folder.startswith(FOLDER + os.sep):
        raise ImportError
    return FileFinder(folder, (Loader, SOURCE_SUFFIXES))


if __name__ == "__main__":
    sys.path_hooks.insert(0, find)
    sys.path_importer_cache.pop(FOLDER, None)
    if sys.path[:1] != [FOLDER]:
        sys.path.insert(0, FOLDER)
    # For what libraries start with `-m` and `-c`.
    os.environ["PYTHONSAFEPATH"] = "1"
    from starweave_image.__main__ import main

    main()
