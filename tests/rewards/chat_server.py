"""A chat endpoint on this machine: real HTTP, answers from a function, failures on order."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image


class ChatServer:
    """What was asked, and how it is answered.

    answer: from the text and the images of a question to a text, or to a whole `choices[0]`. failures: what the next
    requests get instead: a status, a status with headers, or bytes as the body. delay: seconds an answer takes.
    """

    def __init__(self, answer: Callable[[str, list[Image.Image]], Any]) -> None:
        self.answer = answer
        self.failures: list[Any] = []
        self.delay = 0.0
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.url = ""

    def reply(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        with self.lock:
            self.paths.append(path)
            self.headers.append(headers)
            self.bodies.append(body)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            failure = self.failures.pop(0) if self.failures else None
        try:
            time.sleep(self.delay)
            if isinstance(failure, bytes):
                return 200, {}, failure
            if failure is not None:
                status, extra = failure if isinstance(failure, tuple) else (failure, {})
                return status, extra, b'{"error": "on order"}'
            found = self.answer(*_question(body))
            choice = found if isinstance(found, dict) else {"message": {"role": "assistant", "content": found}}
            return 200, {}, json.dumps({"choices": [choice]}).encode()
        finally:
            with self.lock:
                self.at_once -= 1


def _question(body: dict[str, Any]) -> tuple[str, list[Image.Image]]:
    content = body["messages"][0]["content"]
    if isinstance(content, str):
        return content, []
    images = []
    for part in content:
        if part["type"] == "image_url":
            kind, _, data = part["image_url"]["url"].partition(",")
            assert kind == "data:image/png;base64"
            images.append(Image.open(io.BytesIO(base64.b64decode(data))))
    return next(part["text"] for part in content if part["type"] == "text"), images


@contextmanager
def serve(answer: Callable[[str, list[Image.Image]], Any]) -> Iterator[ChatServer]:
    """Run a server on a free port; `url` is what a client is given as endpoint."""
    state = ChatServer(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, headers, content = state.reply(self.path, dict(self.headers), body)
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
