"""Serve until told to stop: SIGTERM or Ctrl-C lets what runs finish, for a while, and cuts the rest with a
notice.
"""

import contextlib
import signal
from types import FrameType
from typing import Any

from ease_common.errors import RequestError
from ease_common.extras import missing_extra
from ease_runtime.llm import TextEngine
from ease_runtime.server.app import Settings, create_app

MARGIN_SECONDS = 5  # for connections to close after the last answer was cut


def serve(
    llm: TextEngine,
    settings: Settings,
    *,
    host: str,
    port: int,
    grace_seconds: float,
    log_level: str = "info",
) -> None:
    """Serve in this thread. Raises MissingExtraError, and RequestError where the port is taken."""
    app = create_app(llm, settings)
    try:
        import uvicorn
    except ModuleNotFoundError as error:
        raise missing_extra(error) or error from None

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            app.state.service.worker.drain(grace_seconds)
            self.force_exit = self.should_exit and sig == signal.SIGINT  # a second Ctrl-C waits for nothing
            self.should_exit = True

    more: dict[str, Any] = {
        "timeout_graceful_shutdown": int(grace_seconds) + MARGIN_SECONDS,
        "log_level": log_level,
    }
    server = Server(uvicorn.Config(app, host=host, port=port, **more))
    with contextlib.suppress(SystemExit):  # uvicorn has said why
        server.run()
    if not server.started:
        raise RequestError(f"cannot listen on {host}:{port}; is the port taken? choose another: --port")
