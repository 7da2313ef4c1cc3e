"""A server over the stand-in stack, in this process, for tests."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import toy_text
from ease_common.chat import ChatTemplate
from ease_runtime.engine.mock import MockStack
from ease_runtime.llm import TextEngine
from ease_runtime.server.app import Service, Settings, create_app

LETTERS = "abcdefghijklmnopqrstuv"
TEMPLATE = "{% for m in messages %}{{ m.content }}b{% endfor %}c"


class SlowStack(MockStack):
    """Hashes that take a while a pass."""

    seconds = 0.0

    def run_segment(self, *arguments: Any, **more: Any) -> None:
        time.sleep(self.seconds)
        super().run_segment(*arguments, **more)


def text_engine(num_slots: int = 4, max_positions: int = 64, seconds: float = 0.0) -> TextEngine:
    """Letters over hashes; 0 begins a text, and nothing ends one."""
    stack = SlowStack(vocab_size=1 + len(LETTERS), max_positions=max_positions)
    stack.seconds = seconds
    tokenizer = toy_text.letter_tokenizer(LETTERS)
    return TextEngine(stack, tokenizer, start_id=0, template=ChatTemplate(TEMPLATE), num_slots=num_slots)


class Served:
    """A running server: its address, and what is inside."""

    def __init__(self, server: Any, service: Service) -> None:
        self.server = server
        self.service = service
        self.port: int = server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"


@contextmanager
def served(llm: TextEngine, **settings: Any) -> Iterator[Served]:
    """Serve until the block ends."""
    import uvicorn

    app = create_app(llm, Settings("toy", **settings))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield Served(server, app.state.service)
    finally:
        server.should_exit = True
        thread.join()


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not come true in time"
        time.sleep(0.01)
