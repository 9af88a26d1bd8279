"""The command line, `isic-vq COMMAND`.

Commands parse arguments, call the library and print what they wrote. Everything heavy is imported inside
them, so that `isic-vq --help` does not pay for torch. Errors are one line; `--debug` shows the traceback.
"""

from isic_vq.cli import data, judge, publish, train, use
from isic_vq.cli.app import app, main

__all__ = ["app", "data", "judge", "main", "publish", "train", "use"]
