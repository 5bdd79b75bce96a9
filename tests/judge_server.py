"""An endpoint that speaks OpenAI's protocol, as far as a judge needs it: a small HTTP server in a thread."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], Any]
"""Status, headers, body (JSON, or text as it is)."""
BETWEEN = ("【採点する応答】\n", "\n\n【採点する応答ここまで】")


def completion(text: str | None, **changes: Any) -> Answer:
    """A reply of the protocol: 100 tokens in, 7 out."""
    body = {
        "id": "1", "object": "chat.completion", "created": 0, "model": "judge-2026",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107},
    }  # fmt: skip
    return 200, {}, body | changes


def refused(status: int, message: str = "no", **headers: str) -> Answer:
    """An error of the protocol. The client waits a thousandth of a second before it asks again."""
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    return status, {"retry-after-ms": "1"} | named, {"error": {"message": message, "type": "t", "code": None}}


def answer_in(request: dict[str, Any]) -> str:
    """The answer that a judge is shown."""
    asked = request["messages"][1]["content"]
    start, end = (asked.index(each) for each in BETWEEN)
    return str(asked[start + len(BETWEEN[0]) : end])


def by_length(request: dict[str, Any], number: int) -> Answer:
    """A rating that depends on nothing but the answer."""
    return completion(f"評価の理由です。\n[[{rating_of(answer_in(request))}]]")


def rating_of(answer: str) -> int:
    return len(answer) % 10 + 1


@dataclass
class Server:
    """Answers each request with `reply(request, its number)`, and keeps what it was asked.

    Attributes:
        most: requests that it had in hand at once, at most.
    """

    url: str
    reply: Callable[[dict[str, Any], int], Answer]
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    now: int = 0
    most: int = 0
    lock: Any = field(default_factory=threading.Lock)


@contextmanager
def serving(reply: Callable[[dict[str, Any], int], Answer] = by_length) -> Iterator[Server]:
    """A server that is there while the context lasts."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                number = len(server.asked)
                server.asked.append(request)
                server.keys.append(self.headers.get("Authorization"))
                server.paths.append(self.path)
                server.now += 1
                server.most = max(server.most, server.now)
            status, headers, body = server.reply(request, number)
            data = (body if isinstance(body, str) else json.dumps(body)).encode()
            with server.lock:
                server.now -= 1
            self.send_response(status)
            kind = "text/html" if isinstance(body, str) else "application/json"
            for key, value in ({"Content-Type": kind, "Content-Length": str(len(data))} | headers).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server = Server(f"http://127.0.0.1:{http.server_address[1]}/v1", reply)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
