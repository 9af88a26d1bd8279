"""Serve the page from this machine until interrupted."""

import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from isic_vq.locks import HOST, is_running

UPLOADS = f"isic-vq-demo-{HOST}-"  # prefix of temporary folders of uploads, before the server's process id


def remove_old_uploads() -> None:
    """Remove uploads left by killed servers of this host."""
    for folder in Path(gettempdir()).glob(f"{UPLOADS}*"):
        pid = folder.name.removeprefix(UPLOADS).partition("-")[0]
        if pid.isdigit() and not is_running(int(pid), HOST):
            shutil.rmtree(folder, ignore_errors=True)


def check_address(host: str, port: int) -> None:
    """Raise OSError if this user cannot listen at an address, for example because the port is taken; ValueError for a wrong port."""
    if not 1 <= port <= 65535:
        raise ValueError(f"port is {port}: expected 1 to 65535")
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            # A port stays in use for a while after its server has ended.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise OSError(
            f"cannot serve at {host}, port {port} ({error.strerror}): choose another --port or --host"
        ) from error


def serve(
    model: str | None,
    on_ready: Callable[[str], None],
    *,
    index: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    device: str | None = None,
) -> None:
    """Serve a model's page until interrupted; uploads are in a temporary folder that is removed at the end.

    Args:
        model: as for `isic_vq.hub.pretrained.load_model`.
        on_ready: called with the page's address.
        index: code cache of the training images (isic-vq encode): finds the nearest ones.
        host: address to listen at; 0.0.0.0 lets others in.
        port: 1 to 65535.
        share: ask gradio for a public address, too.
        device: as for `load_model`.

    Raises:
        ImportError: gradio is missing.
        OSError: the address cannot be used.
        DataError: the index is damaged, or another tokenizer's.
    """
    from isic_vq.demo.training_index import TrainingIndex
    from isic_vq.hub.pretrained import load_model
    from isic_vq.models.modeling_isic_vq import IsicVQModel

    check_address(host, port)
    loaded = load_model(IsicVQModel, model, device)
    training = None if index is None else TrainingIndex.open(index, loaded.vqvae)
    remove_old_uploads()
    with TemporaryDirectory(prefix=f"{UPLOADS}{os.getpid()}-") as folder:
        # Gradio reads these while it is imported.
        os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False")
        from isic_vq.demo.page import build_demo, launch_settings

        signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that the folder is removed
        page = build_demo(loaded, training)
        _, local, public = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            **launch_settings(),
        )
        on_ready(public or local)
        try:
            page.block_thread()
        finally:
            page.close(verbose=False)
