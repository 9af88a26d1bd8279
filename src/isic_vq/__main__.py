"""`python -m isic_vq`: the command line for launchers that start modules (torchrun, accelerate launch)."""

from isic_vq.cli import main

main()
