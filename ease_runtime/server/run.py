"""Serve until told to stop: SIGTERM or Ctrl-C lets what runs finish, for a while, and cuts the rest with a
notice.
"""

import contextlib
import signal
import sys
from types import FrameType
from typing import Any

from ease_common.errors import RequestError
from ease_common.extras import missing_extra
from ease_runtime.llm import TextEngine
from ease_runtime.server.app import Settings, create_app

MOST_FILES = 65536  # that the server asks the system for; a connection is one
FILES_APART = 128  # that are no connections: libraries, the bundle, logs
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
        "limit_concurrency": most_connections(),
        "timeout_graceful_shutdown": int(grace_seconds) + MARGIN_SECONDS,
        "log_level": log_level,
    }
    server = Server(uvicorn.Config(app, host=host, port=port, **more))
    with contextlib.suppress(SystemExit):  # uvicorn has said why
        server.run()
    if not server.started:
        raise RequestError(f"cannot listen on {host}:{port}; is the port taken? choose another: --port")


def most_connections() -> int | None:
    """Connections that the limit of open files leaves room for, after raising it; more get 503. None where
    the system has no such limit.
    """
    if sys.platform == "win32":
        return None
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):  # it may be forbidden
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    allowed = MOST_FILES if soft == resource.RLIM_INFINITY else min(soft, MOST_FILES)
    return max(8, allowed - FILES_APART)
