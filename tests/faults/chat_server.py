"""A chat server for the fault `server`: what it says follows from the question alone, and it keeps what it answered.

python chat_server.py PORT LOG
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAUSE_S = 0.05


def said(question: bytes) -> dict[str, Any]:
    """A verdict whose probability is a digest's."""
    p = 0.05 + 0.9 * hashlib.sha256(question).digest()[0] / 255
    likely = sorted({"A": p, "B": 1 - p}.items(), key=lambda pair: -pair[1])
    tops = [{"token": token, "logprob": math.log(q), "bytes": None} for token, q in likely]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": tops[0]["token"]},
        "finish_reason": "stop",
        "logprobs": {"content": [{**tops[0], "top_logprobs": tops}]},
    }
    usage = {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11}
    return {"id": "c", "object": "chat.completion", "model": "m", "choices": [choice], "usage": usage}


class Handler(BaseHTTPRequestHandler):
    """Answers a question after a short pause, and writes its digest down."""

    protocol_version = "HTTP/1.1"
    log: Path

    def do_GET(self) -> None:
        self._send({"object": "list", "data": [{"id": "m", "object": "model", "created": 0, "owned_by": "x"}]})

    def do_POST(self) -> None:
        messages = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
        question = json.dumps(messages, sort_keys=True).encode()
        time.sleep(PAUSE_S)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(hashlib.sha256(question).hexdigest() + "\n")
        self._send(said(question))

    def _send(self, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


if __name__ == "__main__":
    Handler.log = Path(sys.argv[2])
    with ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler) as server:
        print("up", flush=True)
        server.serve_forever()
