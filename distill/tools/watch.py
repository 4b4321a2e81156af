"""Serve a run's report as a page while the run grows: `distill watch RUN` and `distill run --live`.

The page is one file without anything from another host. It asks this server every second or two for the state of the run
(`run.live`), and for the report when that has changed; the report is written into a temporary folder by the same code that
leaves report.html behind at the end. Nothing is written into the run's folder.

Only this machine is served (127.0.0.1), and only under its own name: a request with another Host is refused, so that a foreign page
cannot reach the server by a name that it has pointed here (DNS rebinding). Nothing else protects it: other users of the
machine can open the page.
"""

from __future__ import annotations

import http.server
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jinja2

from distill import run_folder
from distill.errors import MachineError, UserError
from distill.run.live import Looker, RunNow

HOST = "127.0.0.1"
HOSTS = (HOST, "localhost")
"""The names under which the page is served."""
MIN_EVERY = 3.0
"""Seconds between two reports, at least."""
SHARE = 0.05
"""The share of one core's time that reports may take."""
LINGER = 6.0
"""Seconds that the server stays after the run has ended, so that open pages get the last report."""
LOOK_EVERY = 0.5


class Page:
    """What the server serves: the state of the run, and its latest report, which a thread of its own writes (`keep_fresh`)."""

    def __init__(self, run: Path, scratch: Path) -> None:
        self.run, self.scratch = run, scratch
        self._looker = Looker(run)
        self._mark: tuple[object, ...] = ()
        self._next = 0.0
        self._html = b""
        self._fault = ""
        self.served_last = False
        """Whether a page was given the state after the end."""

    def state(self) -> dict[str, Any]:
        """Return the state for the page. report: changes with the report. ended: nothing will change any more."""
        now = self._looker.now()
        ended = is_ended(self.run, now)
        if ended:
            self._html = (self.run / "report.html").read_bytes()
            self.served_last = True
        html = self._html
        version = f"{len(html)}-{hash(html)}" if html else ""
        return {**asdict(now), "fault": now.fault or self._fault, "report": version, "ended": ended}

    def report(self) -> bytes:
        """Return the latest report as HTML; empty if there is none yet."""
        return self._html

    def keep_fresh(self) -> None:
        """Write the report again whenever the run has changed and the last report is old enough; never returns."""
        from distill.reports import pages
        from distill.run.collect import collect_run

        looker = Looker(self.run)
        while True:
            mark = _mark(self.run)
            is_due = mark != self._mark and time.monotonic() >= self._next and run_folder.is_run(self.run)
            if is_due and not is_ended(self.run, looker.now()):
                began = time.thread_time()
                try:
                    written = pages.write_report(collect_run(self.run), self.scratch)
                    self._html, self._fault = written["report.html"].read_bytes(), ""
                except (UserError, OSError) as error:
                    self._fault = f"the report cannot be made now: {error}"
                self._mark = mark
                self._next = time.monotonic() + max(MIN_EVERY, (time.thread_time() - began) / SHARE)
            time.sleep(LOOK_EVERY)


def is_ended(run: Path, now: RunNow) -> bool:
    """Return whether all stages are done and the last report is written."""
    report = run / "report.json"
    if now.status != "done" or not report.is_file() or not (run / "report.html").is_file():
        return False
    stages = [run / stage.name / run_folder.FILE for stage in now.stages]
    return report.stat().st_mtime >= max(each.stat().st_mtime for each in stages)


def _mark(run: Path) -> tuple[object, ...]:
    """Return what changes whenever a report may change: the recipe, and each stage's state and metrics."""
    found = []
    for pattern in (run_folder.RESOLVED, f"*/{run_folder.FILE}", f"*/{run_folder.LOGGED}"):
        for file in sorted(run.glob(pattern)):
            try:
                stat = file.stat()
            except OSError:
                continue
            found.append((file.name, str(file), stat.st_mtime_ns, stat.st_size))
    return tuple(found)


def handler(page: Page, name: str) -> type[http.server.BaseHTTPRequestHandler]:
    """Return the handler of the server's requests: GET of /, /state and /report."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("distill.tools"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    template = environment.get_template("live.html.jinja")

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30

        def do_GET(self) -> None:
            """Answer a request."""
            if urlsplit(f"//{self.headers.get('Host', '')}").hostname not in HOSTS:
                self._answer(403, b"this page is served under localhost and 127.0.0.1 only\n", "text/plain")
                return
            path = urlsplit(self.path).path
            if path == "/":
                nonce = secrets.token_urlsafe(16)
                self._answer(200, template.render(name=name, nonce=nonce).encode(), "text/html", nonce)
            elif path == "/state":
                self._answer(200, json.dumps(page.state()).encode(), "application/json")
            elif path == "/report":
                html = page.report()
                self._answer(200 if html else 404, html, "text/html")
            else:
                self._answer(404, b"not found\n", "text/plain")

        def _answer(self, status: int, body: bytes, kind: str, nonce: str = "") -> None:
            script = f"script-src 'nonce-{nonce}'; connect-src 'self'; " if nonce else ""
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Cross-Origin-Resource-Policy", "same-origin")
            self.send_header(
                "Content-Security-Policy",
                f"default-src 'none'; {script}style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'",
            )
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Requests are not logged: the terminal belongs to the run."""

    return Handler


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that closes its connection early is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def listen(port: int) -> socket.socket:
    """Return a listening socket on this machine. port: 0 = a free one. Raises MachineError if the port is in use."""
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((HOST, port))
        found.listen(16)
    except OSError as error:
        found.close()
        raise MachineError(
            f"--port {port}: {error.strerror}. Choose another port, or leave --port out for a free one."
        ) from None
    return found


def address(listening: socket.socket) -> str:
    """The address of the page."""
    return f"http://{HOST}:{listening.getsockname()[1]}/"


def serve(run: Path, listening: socket.socket, *, parent: int | None = None) -> None:
    """Serve the page until the run has ended, or (parent: the process id of `distill run`) that process has.

    Open pages get the last report: they have LINGER seconds to ask for it.
    """
    with tempfile.TemporaryDirectory(prefix="distill-watch-", ignore_cleanup_errors=True) as scratch:
        page = Page(run, Path(scratch))
        server = _Server(listening.getsockname()[:2], handler(page, run.resolve().name), bind_and_activate=False)
        server.socket.close()
        server.socket = listening
        server.server_name, server.server_port = HOST, listening.getsockname()[1]
        threading.Thread(target=page.keep_fresh, daemon=True).start()
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": LOOK_EVERY}, daemon=True).start()
        looker = Looker(run)
        try:
            while not (os.getppid() != parent if parent is not None else is_ended(run, looker.now())):
                time.sleep(LOOK_EVERY)
            deadline = time.monotonic() + LINGER
            while time.monotonic() < deadline and not page.served_last:
                time.sleep(LOOK_EVERY)
            time.sleep(LOOK_EVERY)  # the report is asked for after the state
        finally:
            server.shutdown()
            server.server_close()


def beside(run: Path, port: int) -> str:
    """Start a process that serves the page of a run while this process lives; return the address. Raises MachineError."""
    listening = listen(port)
    with listening:
        os.set_inheritable(listening.fileno(), True)
        command = [sys.executable, "-m", "distill.tools.watch", str(run), str(listening.fileno()), str(os.getpid())]
        # A session of its own: Ctrl-C ends the run, and the page shows that.
        subprocess.Popen(
            command, pass_fds=[listening.fileno()], start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        return address(listening)


if __name__ == "__main__":
    os.nice(10)
    _run, _descriptor, _parent = sys.argv[1:]
    serve(Path(_run), socket.socket(fileno=int(_descriptor)), parent=int(_parent))
