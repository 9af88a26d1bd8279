"""The command line, for its script and for launchers that start modules (torchrun, accelerate launch)."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C ends it in one line from its first import on."""
    try:
        from isic_vq.cli import main as run

        run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201  (typer may not be there yet)
        sys.exit(130)


if __name__ == "__main__":
    main()
