"""An HTTP server that a bad client can't hold up: http.server's, with limits and deadlines. [O]

    class Handler(web.Handler):
        def check(self): ...            # the head has been read: raise Refused, or go on
        def answer(self, body): ...     # the whole request: self.send(...), or parts of a stream
        def refuse(self, error): ...    # how a Refused looks to the client

    server = web.Server(("127.0.0.1", 8000), Handler, web.WebLimits())
    server.serve_forever()

http.server parses requests and gives each connection a thread; it knows no limits. Here
- a request has to arrive within `seconds`, however slowly its bytes come, and its head and body
  have a size at most;
- a client has to take each part of an answer within `seconds`;
- there are at most `connections`. If all are taken, a new client gets the place of the one that has
  been busy with sending its request for longest, since that one may never say a word;
- a page of another website, which a browser lets send requests to any address, is refused by the
  Origin header. So is one whose own name leads to this machine (DNS rebinding), by the Host header.
"""
import base64
import contextlib
import hashlib
import io
import re
import socket
import socketserver
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

REASONS = {413: "Content Too Large", 529: "Overloaded"}     # http.server knows the other ones


class Refused(Exception):
    """A request that is answered with this HTTP status instead."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


class ClientLeft(Exception):
    """The client has closed the connection, or does not take what it is sent."""


@dataclass(frozen=True)
class WebLimits:
    """What a client may take at most. hosts: the names by which this server may be called; empty:
    any name."""
    connections: int = 128
    seconds: float = 30.0       # for a request to arrive, and for a part of an answer to be taken
    head: int = 2 ** 15         # bytes of the request line and the headers
    body: int = 2 ** 24         # bytes
    hosts: tuple[str, ...] = ()


def place_of(error: BaseException) -> str:
    """What kind of error it is and where it was raised: "KeyError in web.py, line 12"."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(frame.filename).name}, line {frame.lineno}"


def page_policy(page: bytes) -> str:
    """The Content-Security-Policy of a page with one script and one style: a browser runs these
    two and nothing else, loads nothing from elsewhere, and sends only to the page's own server."""
    def digest(tag: bytes) -> str:
        inside = re.search(b"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)[1]
        return f"'sha256-{base64.b64encode(hashlib.sha256(inside).digest()).decode()}'"
    return (f"default-src 'none'; script-src {digest(b'script')}; style-src {digest(b'style')}; "
            "img-src data:; connect-src 'self'; form-action 'none'; base-uri 'none'; "
            "frame-ancestors 'none'")


# ---- a connection -------------------------------------------------------------------------------

class TimedReader(io.RawIOBase):
    """What a client sends, up to a deadline and a number of bytes."""

    def __init__(self, connection: socket.socket):
        self.connection = connection

    def allow(self, seconds: float, size: int):
        """From now on, at most `size` bytes within `seconds`."""
        self.deadline, self.left = time.monotonic() + seconds, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        """Read some bytes; 0 at the end. Raises TimeoutError, or Refused where it is too much."""
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        if self.left <= 0:
            raise Refused(431, "the headers are too long")
        self.connection.settimeout(seconds)
        count = self.connection.recv_into(memoryview(buffer)[:self.left])
        self.left -= count
        return count


class TimedWriter(io.BytesIO):
    """Collects what is to be sent; `flush` sends it, for which the client has some seconds."""

    def __init__(self, connection: socket.socket, seconds: float):
        super().__init__()
        self.connection, self.seconds = connection, seconds

    def flush(self):
        data = self.getvalue()
        self.seek(0)
        self.truncate()
        if not data:
            return
        try:
            self.connection.settimeout(self.seconds)
            self.connection.sendall(data)       # its timeout is for all of the data together
        except OSError:
            raise ClientLeft from None


class Handler(BaseHTTPRequestHandler):
    """A connection, which may send several requests, one after the other."""
    protocol_version = "HTTP/1.1"           # connections are kept open
    default_request_version = "HTTP/1.0"    # of a request that names no version

    # ---- for the class that answers --------------------------------------------------------

    def check(self):
        """Called when the head of a request has been read. Raises Refused before the body is."""

    def answer(self, body: bytes):
        """Answer a request: self.command, self.path, self.headers."""
        raise Refused(404, "there is nothing here")

    def refuse(self, error: Refused):
        """Answer a request that was refused. self.path is empty where no line could be read."""
        self.send(error.status, f"{error.message}\n".encode(), "text/plain")

    def note(self, seconds: float):
        """Called at the end of a request. self.status: of the answer, 0 if it had none; self.left:
        the client has not waited for all of it."""

    def send(self, status: int, body: bytes, kind: str = "application/json", **headers):
        """A whole answer. headers: more of them, with _ for -."""
        self._send_head(status, kind, Content_Length=len(body), **headers)
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()

    def begin_parts(self, status: int, kind: str, **headers):
        """Begin an answer whose length nobody knows yet; its head goes out with the first part.
        A client of HTTP/1.0 learns from the end of the connection that it is complete."""
        self.chunked = self.request_version != "HTTP/1.0"
        if self.chunked:
            headers["Transfer_Encoding"] = "chunked"
        else:
            self.close_connection = True
        self._send_head(status, kind, **headers)

    def send_part(self, data: bytes):
        """Send a part at once. Raises ClientLeft."""
        if data and self.chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self.wfile.write(data)
        self.wfile.flush()

    def end_parts(self):
        if self.chunked:
            self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()

    def client_left(self) -> bool:
        """Whether the client has closed the connection, or at least its own side of it."""
        try:
            self.connection.settimeout(0)
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False                # it is there, and silent
        except OSError:
            return True

    def _send_head(self, status: int, kind: str, **headers):
        self.status = status
        self.send_response(status, REASONS.get(status))
        self.send_header("Content-Type", kind)
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    # ---- a request --------------------------------------------------------------------------

    def setup(self):
        self.connection, limits = self.request, self.server.limits
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        # The system would hold megabytes for a client that doesn't read, who seems to read then.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 ** 16)
        self.input = TimedReader(self.connection)
        self.rfile = io.BufferedReader(self.input)
        self.wfile = TimedWriter(self.connection, limits.seconds)

    def handle_one_request(self):
        """Read a request and answer it. Sets close_connection where no other can follow."""
        self.command, self.path, self.headers, self.requestline = "", "", None, ""
        self.request_version = self.default_request_version
        self.status, self.began = 0, time.monotonic()   # status: once the head has been written
        self.close_connection, self.unread, self.left = True, True, False
        try:
            if self.server.begin_reading(self.connection) and self._receive_head():
                self.check_origin()
                self.check()
                body = self._receive_body()
                self.close_connection = self.close_connection or self.server.closing
                self.answer(body)
                self.wfile.flush()
        except Refused as error:
            self.close_connection = self.close_connection or self.unread
            with contextlib.suppress(ClientLeft):
                self.refuse(error)
        except (ClientLeft, ConnectionError):
            self.close_connection = self.left = True
        except Exception as error:
            self._report(error)
        if self.path:
            self.note(time.monotonic() - self.began)

    def _report(self, error: Exception):
        """A mistake of ours: one line for whoever runs the server, a 500 for the client. The text
        of an error may hold what the client has sent, which is never printed."""
        self.close_connection = True
        self.server.say(f"{self.command or 'a request'} failed: {place_of(error)}")
        with contextlib.suppress(ClientLeft):
            if not self.status:
                self.refuse(Refused(500, "the server has failed"))

    def _receive_head(self) -> bool:
        """Read request line and headers; False where the client sends nothing more."""
        limits = self.server.limits
        self.input.allow(limits.seconds, limits.head)
        try:
            if not self.rfile.peek(1):
                return False
        except TimeoutError:            # it never spoke, or keeps a connection that it no longer
            return False                # needs
        self.input.allow(limits.seconds, self.input.left)
        self.began = time.monotonic()
        with self._in_time():
            line = self.rfile.readline()
            if line in (b"\r\n", b"\n"):        # some clients end a body with an empty line
                line = self.rfile.readline()
            self.raw_requestline = line
            if not (line and self.parse_request()):
                return False
        length = self.headers.get("Content-Length", "0")
        self.unread = length != "0" or "Transfer-Encoding" in self.headers
        return True

    def check_origin(self):
        """Refuse what a browser sends for a page that is not ours."""
        hosts = self.headers.get_all("Host") or []
        if len(hosts) > 1 or not hosts and self.request_version != "HTTP/1.0":
            raise Refused(400, "a request needs one Host header")
        host, allowed = (hosts or [""])[0].strip(), self.server.limits.hosts
        try:
            name = urlsplit(f"//{host}").hostname
            origin = self.headers.get("Origin")
            origin = host if origin is None else urlsplit(origin).netloc
        except ValueError:
            raise Refused(400, "the Host or the Origin header is damaged") from None
        if host and allowed and name not in allowed:
            raise Refused(403, f"this server is not called {name!r}: take {allowed[0]}")
        if origin != host:
            raise Refused(403, "pages of other websites may not use this server")

    def _receive_body(self) -> bytes:
        """Read the body, once it is known that it isn't too long."""
        limits, lengths = self.server.limits, self.headers.get_all("Content-Length") or ["0"]
        if "Transfer-Encoding" in self.headers:
            raise Refused(411, "send the body in one piece, with a Content-Length")
        length = lengths[0].strip()
        if len(lengths) > 1 or not (length.isascii() and length.isdecimal()):
            raise Refused(400, "the Content-Length is no number")
        if len(length) > 15 or int(length) > limits.body:
            raise Refused(413, f"the body is too long: {limits.body:,} bytes at most")
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.wfile.flush()
        self.input.allow(limits.seconds, int(length))
        with self._in_time():
            body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ClientLeft
        self.unread = False
        self.server.end_reading(self.connection)
        return body

    @contextlib.contextmanager
    def _in_time(self):
        try:
            yield
        except TimeoutError:
            self.close_connection = True
            raise Refused(408, "the request took too long to arrive") from None

    def finish(self):
        """End the connection. A socket that is closed with input left resets the connection, and
        the client would lose the answer; so read on for a moment if it is still sending."""
        self.rfile.close()
        until = time.monotonic() + min(2, self.server.limits.seconds)
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while self.status and self.unread and (left := until - time.monotonic()) > 0:
                self.connection.settimeout(left)
                if not self.connection.recv(2 ** 16):
                    break

    # ---- what http.server calls -------------------------------------------------------------

    def send_error(self, code, message=None, explain=None):
        raise Refused(int(code), message or explain or "no such request")

    def handle_expect_100(self) -> bool:
        return True                     # _receive_body says it, if it wants the body

    def log_message(self, *args):
        """Nothing: the class that answers knows more to say."""

    def version_string(self) -> str:
        return "nanoGLM-V"


# ---- the server ---------------------------------------------------------------------------------

class Server(ThreadingHTTPServer):
    """Accepts connections. say(line) prints what whoever runs the server should know."""
    request_queue_size = 128            # connections that the system holds until they are accepted

    def __init__(self, address: tuple[str, int], handler, limits: WebLimits, say=print):
        self.limits, self.say = limits, say
        self.changed = threading.Condition()    # guards these:
        self.closing = False
        self.open = set()               # connections that have a place
        self.reading: dict = {}         # those of them whose request is incomplete, oldest first
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def server_bind(self):
        """Bind, without the look-up of this machine's name that http.server makes, which takes
        seconds where there is no network."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def begin_reading(self, connection) -> bool:
        """A connection waits for a request; False where it should end instead."""
        with self.changed:
            if self.closing or connection not in self.open:
                return False
            self.reading.pop(connection, None)
            self.reading[connection] = True
            return True

    def end_reading(self, connection):
        with self.changed:
            self.reading.pop(connection, None)

    def process_request(self, request, client_address):
        """Give a new connection a place and a thread, or refuse it at once."""
        with self.changed:
            if len(self.open) >= self.limits.connections and self.reading:
                oldest = next(iter(self.reading))
                del self.reading[oldest]
                self.open.discard(oldest)
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)       # its thread wakes up and ends
            accepted = len(self.open) < self.limits.connections
            if accepted:
                self.open.add(request)
        if accepted:
            return super().process_request(request, client_address)
        with contextlib.suppress(OSError):
            request.settimeout(0)
            request.send(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\n"
                         b"Content-Length: 0\r\nConnection: close\r\n\r\n")
        self.shutdown_request(request)

    def shutdown_request(self, request):
        with self.changed:
            self.open.discard(request)
            self.reading.pop(request, None)
            self.changed.notify_all()
        super().shutdown_request(request)

    def close_idle(self):
        """Close the connections that wait for a request, the others after their answers."""
        with self.changed:
            self.closing = True
            for connection in self.reading:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def wait_until_closed(self, seconds: float):
        with self.changed:
            self.changed.wait_for(lambda: not self.open, seconds)

    def handle_error(self, request, client_address):
        """What the thread of a connection could not handle: one line."""
        error = sys.exception()
        if not isinstance(error, OSError):      # a client that has left already
            self.say(f"a connection has failed: {place_of(error)}")
