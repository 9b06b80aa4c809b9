"""Servers on loopback that a store's address may lead to."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple


class Answer(NamedTuple):
    status: int
    body: str
    headers: tuple[tuple[str, str], ...] = ()


PAGE = "<html><head><title>Welcome to nginx!</title></head><body>\n" + "<p>hello</p>\n" * 50
ANSWERS = {
    "401": Answer(401, "Unauthorized", (("WWW-Authenticate", 'Basic realm="mlflow"'),)),
    "403": Answer(403, '{"error_code": "PERMISSION_DENIED", "message": "Permission denied"}'),
    "404": Answer(404, "<html>404 page not found</html>"),
    "429": Answer(429, "slow down", (("Retry-After", "3600"),)),
    "500": Answer(500, "Traceback of the server's\nown\n"),
    "502": Answer(502, "<html><h1>502 Bad Gateway</h1></html>"),
    "html": Answer(200, PAGE, (("Content-Type", "text/html"),)),
    "empty": Answer(200, ""),
    "json": Answer(200, '{"experiments": 7}', (("Content-Type", "application/json"),)),
    "list": Answer(200, "[]", (("Content-Type", "application/json"),)),
    "circle": Answer(302, "", (("Location", "/again"),)),
}
SILENT, CLOSING, GARBAGE, CLOSED = "silent", "closing", "garbage", "closed"
FREE = "free"  # nothing listens there; for a server that a case starts itself


@contextmanager
def all_of_them() -> Iterator[dict[str, int]]:
    """The port of each server, by its name."""
    with ExitStack() as stack:
        ports = {name: stack.enter_context(_answering(a)) for name, a in ANSWERS.items()}
        for name, talk in ((SILENT, None), (CLOSING, b""), (GARBAGE, b"\x00\xff220 smtp\r\n" * 9)):
            ports[name] = stack.enter_context(_talking(talk))
        yield {**ports, CLOSED: unused_port()}


def unused_port() -> int:
    with closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


@contextmanager
def _answering(answer: Answer) -> Iterator[int]:
    """A server of HTTP that gives the same answer to everything."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            body = answer.body.encode()
            self.send_response(answer.status)
            for name, value in (*answer.headers, ("Content-Length", str(len(body)))):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = answer

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


@contextmanager
def _talking(words: bytes | None) -> Iterator[int]:
    """A server that says `words` and closes; with None, it says nothing and stays."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        kept: list[socket.socket] = []

        def serve():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                if words is None:
                    kept.append(connection)
                    continue
                with closing(connection):
                    connection.sendall(words)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
