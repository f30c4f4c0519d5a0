"""
`autoresearch watch`: the report from a server on this machine, which makes it anew when something changed.

The open page asks for /state every two seconds; when the version there is another than its own, it takes over
what is new. Without a token only this machine can ask, and only by a name of this machine: a page from
elsewhere whose name was made to mean this machine (DNS rebinding) gets nothing.
"""

import hmac
import json
import sys
import time
from collections.abc import Sequence
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from socket import AF_INET6
from threading import Lock
from typing import Any
from urllib.parse import parse_qs, urlsplit

from launcher.report.files import Entry, loop_log_path, read_loop_log
from launcher.report.page import build_page, build_waiting_page
from launcher.report.report import make_report
from launcher.report.text import duration
from launcher.report.timeline import DeviceNow, current_phase, devices_now, last_night
from prepare import UserError

COOKIE = "autoresearch-token"
PHASE_HOURS = 24  # a phase that began longer ago is no phase of a loop that runs


class LiveReport:
    """The page of some ledgers, as it is now."""

    def __init__(self, paths: Sequence[Path], track: str | None = None, platform: str | None = None) -> None:
        """Take the arguments of write_report."""
        self.paths = list(paths)
        self.track = track
        self.platform = platform
        self._lock = Lock()
        self._version = ""  # of the page below
        self._page = b""

    def version(self) -> str:
        """Return a text that changes when the page does: of the files, and of whether the loop lives."""
        night = last_night(read_loop_log())
        stats = [str(night and night.lives)]
        for path in [*self.paths, loop_log_path()]:
            try:
                stat = path.stat()
                stats.append(f"{stat.st_size}.{stat.st_mtime_ns}")
            except OSError:
                stats.append("-")
        return " ".join(stats)

    def page(self) -> bytes:
        """Return the page, made anew where something changed since it was made."""
        with self._lock:
            version = self.version()  # before anything is read: what changes meanwhile is noticed
            if version != self._version:
                self._page = self._make(version)
                self._version = version
            return self._page

    def _make(self, version: str) -> bytes:
        try:
            report = make_report(self.paths, self.track, self.platform, complain=lambda line: None)
        except (UserError, OSError) as error:
            return build_waiting_page(str(error), version)
        return build_page(report, version)

    def state(self) -> dict[str, Any]:
        """Return the version, what the loop and its devices do ("" where none runs), and if it is alive."""
        log = read_loop_log()
        night = last_night(log)
        is_gone = night is not None and night.is_cut_off
        devices = [] if is_gone else [tell_device(device) for device in devices_now(log)]
        return {
            "version": self.version(),
            "phase": "\n".join(filter(None, [tell_phase(current_phase(log), is_gone), *devices])),
            "alive": not is_gone,
        }


def tell_phase(phase: Entry | None, is_gone: bool) -> str:
    """Return a line about the phase of a loop, "" where there is none.

    is_gone: the loop did not end in order, and its process is gone.
    """
    seconds = time.time() - phase.time if phase else 0.0
    if phase is None or not 0 <= seconds < PHASE_HOURS * 3600:
        return ""
    text = phase.data.get("text") or phase.data.get("phase")
    if is_gone:
        return f"the loop is gone: it was killed, or the power was cut. Last, {duration(seconds)} ago: {text}"
    return f"{text}, for {duration(seconds)}"


def tell_device(device: DeviceNow) -> str:
    """Return a line about what a device does."""
    return f"{device.name}: " + device.told(f"{device.doing}, for {duration(time.time() - device.since)}")


class Server(ThreadingHTTPServer):
    """Serves one report."""

    daemon_threads = True

    def __init__(self, host: str, port: int, token: str, report: LiveReport) -> None:
        """Bind the address. token: that a reader must know, "" for none. Raises OSError."""
        if ":" in host:
            self.address_family = AF_INET6
        self.token = token
        self.report = report
        super().__init__((host, port), Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what went wrong, but not that a reader went away."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """Return the address of the page, with the token."""
        host, port = self.server_address[:2]
        name = f"[{host!s}]" if ":" in str(host) else str(host)
        return f"http://{name}:{port}/" + (f"?token={self.token}" if self.token else "")


class Handler(BaseHTTPRequestHandler):
    """Answers a request: the page, its state, or that it is none of the asker's business."""

    server: Server
    server_version = "autoresearch"
    sys_version = ""
    timeout = 30  # seconds that a request may take to arrive

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        given = parse_qs(query).get("token", [""])[0]
        if not self.is_allowed(given):
            self.answer(
                HTTPStatus.FORBIDDEN, b"add ?token=..., as autoresearch watch prints it\n", "text/plain"
            )
        elif given:
            self.enter(given)
        elif path == "/":
            self.answer(HTTPStatus.OK, self.server.report.page(), "text/html; charset=utf-8")
        elif path == "/state":
            state = json.dumps(self.server.report.state())
            self.answer(HTTPStatus.OK, state.encode(), "application/json")
        else:
            self.answer(HTTPStatus.NOT_FOUND, b"there is / and /state\n", "text/plain")

    def is_allowed(self, given: str) -> bool:
        """Return whether the asker knows the token, or where there is none, asks from this machine."""
        if not self.server.token:
            return is_this_machine(self.headers.get("Host", ""))
        known = [given, self.token_of_cookie()]
        return any(hmac.compare_digest(one.encode(), self.server.token.encode()) for one in known)

    def token_of_cookie(self) -> str:
        try:
            cookies = SimpleCookie(self.headers.get("Cookie", ""))
        except CookieError:
            return ""
        return cookies[COOKIE].value if COOKIE in cookies else ""

    def enter(self, token: str) -> None:
        """Move the token from the address into a cookie, so that it stands in no history."""
        cookie = SimpleCookie({COOKIE: token})
        cookie[COOKIE]["httponly"] = True
        cookie[COOKIE]["samesite"] = "Strict"
        cookie[COOKIE]["path"] = "/"
        self.send_response(HTTPStatus.SEE_OTHER)
        self.send_header("Location", "/")
        self.send_header("Set-Cookie", cookie[COOKIE].OutputString())
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing: a page that asks every two seconds would fill the terminal."""


def is_this_machine(host: str) -> bool:
    """Return whether the Host of a request is a name of this machine."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False


def open_server(host: str, port: int, token: str, report: LiveReport) -> Server:
    """Return a server that has its address.

    Raises:
        UserError: another host than this one without a token, or the address cannot be had.
    """
    if not token and not is_this_machine(f"[{host}]" if ":" in host else host):
        raise UserError(f"{host} is seen by other machines: set a --token", 2)
    if token and not (token.isascii() and token.isalnum()):
        raise UserError("a --token is letters and digits", 2)
    try:
        return Server(host, port, token, report)
    except OSError as error:
        raise UserError(
            f"cannot serve on {host} port {port} ({error.strerror}): try another --port"
        ) from None
