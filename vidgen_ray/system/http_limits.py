"""HTTP/1.1 protocol that limits the bytes and the seconds until a request reaches the app."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MAX_HEADERS = 100
MAX_HEAD_BYTES = 64 << 10
"""Bytes of the URL and the headers of a request, or of the trailers after a body in chunks."""
HEAD_S = 10.0
"""Seconds within which the headers of a request must arrive, and those of the first one of a connection after it has opened.
Also those in which the rest of a request may arrive after it was answered."""


class LimitedHttp(HttpToolsProtocol):
    """Protocol of uvicorn that refuses long headers with 431, and closes connections on which no request arrives in time.

    The parser keeps headers in memory until the last one has arrived, before any key is checked.
    """

    _held_bytes = 0
    """Bytes received since the end of the last headers, or the last piece of a body."""
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._held_bytes += len(data)
        super().data_received(data)
        if self._held_bytes > MAX_HEAD_BYTES:
            self._refuse()
        elif self._timer is None and (self._held_bytes or not self._is_answering):
            # uvicorn has stopped its own timer.
            self._start_timer()

    @property
    def _is_answering(self) -> bool:
        """Whether a request is in progress."""
        return self.cycle is not None and not self.cycle.response_complete

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) >= MAX_HEADERS:
            # The parser stops, and calls `send_400_response`.
            self._held_bytes = MAX_HEAD_BYTES + 1
            raise ValueError("too many headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._clear()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._held_bytes = 0
        if self._is_answering:
            self._clear()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._clear()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        if self._held_bytes > MAX_HEAD_BYTES:
            self._refuse()
        else:
            super().send_400_response(msg)

    def _unsupported_upgrade_warning(self) -> None:
        """Log nothing: any client can ask for an upgrade, and gets an answer in HTTP/1.1."""

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(HEAD_S, self._end_late)

    def _end_late(self) -> None:
        self._timer = None
        if self._is_answering:
            # A part of the next request must not end this one.
            self._start_timer()
        else:
            self.timeout_keep_alive_handler()

    def _clear(self) -> None:
        self._held_bytes = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self) -> None:
        if self.transport.is_closing():
            return
        message = f"The URL and headers must be at most {MAX_HEAD_BYTES} bytes and {MAX_HEADERS} headers.".encode()
        fields = b"content-type: text/plain\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(message)
        self.transport.write(STATUS_LINE[431] + fields + message)
        self.transport.close()
