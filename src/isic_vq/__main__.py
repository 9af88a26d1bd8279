"""The command line, for its script and for launchers that start modules (torchrun, accelerate launch)."""

import os
import signal
import sys
import threading
from typing import Any


def interrupt_again(dropped: Any) -> None:
    """Repeat a Ctrl-C that arrived in a destructor or a weakref callback, where Python drops every error."""
    if dropped.exc_type is KeyboardInterrupt:  # a moment later: in this hook it would be dropped, too
        threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(dropped)


def main() -> None:
    """Run the command line; Ctrl-C ends it in one line from its first import on."""
    sys.unraisablehook = interrupt_again
    try:
        from isic_vq.cli import main as run

        run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201  (typer may not be there yet)
        sys.exit(130)


if __name__ == "__main__":
    main()
