"""A Python that has imported MONAI once and forks for every command: nine tenths of a smoke run are imports.

A line of JSON on stdin is a command as ``python`` takes it, ``-m monai.bundle run ...`` or ``tools/demo.py ...``; the
answer is a line with its exit status. A fork begins as a fresh interpreter does, with a folder, path, arguments and
output of its own. It shares its siblings' hash seed, though, and never proves that imports work, so the documented
commands run for real as well: in `test_bundles`, and from the packaged zips in ``.ci/run``.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import sys

PRELOADED = ("monai.bundle", "matplotlib.pyplot", "sklearn.gaussian_process", "torch.utils.tensorboard")


def become(command: list[str], cwd: str, output: str, seconds: int) -> None:
    """Be the command, from its first line to its last; an error or `SystemExit` ends the fork as it ends a process."""
    signal.alarm(seconds)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(output, os.O_WRONLY), 1)
    os.dup2(1, 2)
    os.chdir(cwd)
    if command[0] == "-m":
        sys.path[0], sys.argv = cwd, command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = os.path.dirname(os.path.abspath(command[0])), command
        runpy.run_path(command[0], run_name="__main__")


def main() -> None:
    """Serve until stdin ends."""
    for module in PRELOADED:
        importlib.import_module(module)
    gc.freeze()  # collections in a fork leave alone, and so shared, what was there before
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return become(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
