"""An inference server that takes new weights without stopping. Only the standard library, torch and torchload.

    python serve.py model.pth --port 8000 --workers 2

Each worker is a process with a model whose parameters are views of the file, so that all of them share one copy in
memory. When the file is replaced, each loads the new one and exchanges its weights at once, between two requests.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import nn

from torchload import errors, smart_load


def build_model() -> nn.Module:
    """The network that the file is for: put yours here."""
    return nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3))


class Served:
    """A model and the file it follows."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.lock = threading.Lock()  # held for each forward pass, and for the exchange of the weights
        self.loads = 0
        self.problem: str | None = None
        with torch.device("meta"):
            self.model = build_model().eval()
        self.seen = self.stamp()
        self.load()  # a server that starts without good weights had better not start

    def stamp(self) -> tuple[int, int, int] | None:
        """What changes when the file is replaced."""
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns

    def load(self) -> None:
        report = smart_load(self.model, self.path, mmap=True, atomic=self.lock)
        self.loads += 1
        self.problem = None
        print(f"[{os.getpid()}] {str(report).splitlines()[0]}", flush=True)

    def follow(self, stop: threading.Event, seconds: float) -> None:
        """Load the file again whenever it was replaced; a bad one is reported, and the old weights stay."""
        while not stop.wait(seconds):
            stamp = self.stamp()
            if stamp == self.seen or stamp is None:
                continue
            self.seen = stamp
            try:
                self.load()
            except (errors.TorchLoadError, OSError) as error:
                self.problem = str(error)
                print(f"[{os.getpid()}] kept the old weights: {error}", flush=True)

    def predict(self, inputs: list[list[float]]) -> list[list[float]]:
        with self.lock, torch.inference_mode():
            outputs = self.model(torch.tensor(inputs, dtype=torch.float32))  # JSON's numbers may be whole
        result: list[list[float]] = outputs.tolist()
        return result


class Handler(BaseHTTPRequestHandler):
    served: Served

    def do_GET(self) -> None:
        if self.path != "/health":
            return self.answer(404, {"error": "GET /health or POST /predict"})
        self.answer(200, {"pid": os.getpid(), "loads": self.served.loads, "problem": self.served.problem})

    def do_POST(self) -> None:
        try:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            outputs = self.served.predict(json.loads(body)["inputs"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            return self.answer(400, {"error": f"expected {{'inputs': [[4 numbers], …]}}: {error}"})
        self.answer(200, {"outputs": outputs, "pid": os.getpid()})

    def answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Requests aren't logged."""


def work(path: str, listening: socket.socket, seconds: float) -> None:
    """One worker: it answers requests until it is told to stop."""
    Handler.served = Served(path)
    stop = threading.Event()
    threading.Thread(target=Handler.served.follow, args=(stop, seconds), daemon=True).start()
    server = ThreadingHTTPServer(listening.getsockname(), Handler, bind_and_activate=False)
    server.socket.close()
    listening.setblocking(False)  # where another worker was faster, wait for the next one here, not in accept()
    server.socket = listening
    # shutdown() waits for serve_forever, which this very thread runs: another one has to call it.
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops its workers
    server.serve_forever(poll_interval=0.1)
    stop.set()
    server.server_close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a model, and take new weights when its file is replaced.")
    parser.add_argument("path")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any that is free")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--poll", type=float, default=1.0, help="seconds between two looks at the file")
    options = parser.parse_args()

    # All workers accept from one socket; the kernel hands each connection to one of them.
    listening = socket.create_server(("127.0.0.1", options.port), backlog=128)
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=work, args=(options.path, listening, options.poll)) for _ in range(options.workers)
    ]
    for worker in workers:
        worker.start()
    print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        multiprocessing.connection.wait([worker.sentinel for worker in workers])
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join()
    sys.exit(any(worker.exitcode == 1 for worker in workers))  # without good weights


if __name__ == "__main__":
    main()
