"""Sotto's entry point: the web page, and the command line. Composes the parts; the work is done in the packages.

python app.py                     the page on http://127.0.0.1:7860
python app.py transcribe FILES    text on standard output; see python app.py --help
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import cli
from errors import OptionError, PortTakenError
from settings import Settings
from startup import keep_libraries

ROOT = Path(__file__).resolve().parent
EXAMPLES = ROOT / "examples"

CLOSE_LIMIT_S = 5.0

logger = logging.getLogger("app")


def serve(settings: Settings) -> int:
    """Serve the page until interrupted. The model is loaded while the page is already reachable."""
    listener = open_port(settings)
    with listener:
        from model_loader.device import preflight
        from model_loader.weights import ask_hub_ahead

        found, mirror = preflight(settings.device), settings.hub_mirror or None
        for line in found.lines:
            print(line, flush=True)
        if not settings.offline:
            ask_hub_ahead(settings.model, found.device, mirror=mirror, cache_dir=settings.cache_dir)
        transcriber = cli.build_transcriber(settings)
        app = build_app(transcriber, settings)
        keep_libraries()
        threading.Thread(target=transcriber.prepare, kwargs={"warm_up": settings.warm_up}, daemon=True).start()
        print(f"Sotto is at {page_address(settings, listener)}  (stop: Ctrl-C)", flush=True)
        # uvicorn hands both signals on after its own shutdown; both are an ordinary end here.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            _run_server(app, settings, listener)
        except KeyboardInterrupt:
            logger.info("event=interrupted")
        finally:
            # Closing waits for whoever uses or loads an engine; leaving must not. The system frees the rest.
            closer = threading.Thread(target=transcriber.close, daemon=True)
            closer.start()
            closer.join(CLOSE_LIMIT_S)
    return 0


def build_app(transcriber: Any, settings: Settings) -> Any:
    """The HTTP application: /health, and the page over everything else."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    from fastapi import FastAPI

    from ui import gradio
    from ui.blocks import build_ui, page_options
    from ui.recording import load_examples

    app = FastAPI(title="Sotto", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    def health() -> dict[str, str]:
        """200 as soon as the process serves; `phase` says whether the model is ready."""
        status = transcriber.status()
        return {"phase": status.phase, "message": status.message, "model": status.model}

    return gradio.mount_gradio_app(
        app,
        build_ui(transcriber, load_examples(EXAMPLES), kept=settings.work_dir / "comparisons"),
        path="",
        server_name=settings.server_name,
        server_port=settings.server_port,
        root_path=settings.root_path or None,
        **page_options(examples_folder=EXAMPLES, max_upload_mb=settings.max_upload_mb),
    )


def open_port(settings: Settings) -> socket.socket:
    """A listening socket. Raises PortTakenError, OptionError (an address this machine does not have)."""
    host, port = settings.server_name, settings.server_port
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise OptionError(
            f"--server-name {host} is not an address of this machine; try 127.0.0.1 or 0.0.0.0."
        ) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortTakenError(
                f"Port {port} on {host} is taken by another program; choose another one with --server-port "
                f"{port + 1 if port < 65535 else 7860}, or stop that program."
            ) from error
        raise OptionError(
            f"{host}:{port} cannot be listened on ({error.strerror}); choose another address or port."
        ) from error
    return listener


def page_address(settings: Settings, listener: socket.socket) -> str:
    """What to type into a browser on this machine."""
    scheme = "https" if settings.ssl_certfile else "http"
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.server_name, settings.server_name)
    return f"{scheme}://{host}:{listener.getsockname()[1]}{settings.root_path}"


def _run_server(app: Any, settings: Settings, listener: socket.socket) -> None:
    import uvicorn

    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=settings.log_level == "debug",  # the page asks for its memory panel every second
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=str(settings.ssl_keyfile) if settings.ssl_keyfile else None,
        # An open page keeps a connection; waiting for it would hang Ctrl-C.
        timeout_graceful_shutdown=3,
    )
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    sys.exit(cli.main(sys.argv[1:], serve=serve, examples=EXAMPLES))
