"""TCP proxy that loses connections."""

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit


@contextmanager
def cutting_proxy(url: str, cuts: Sequence[int]) -> Iterator[str]:
    """Forward connections to `url` and yield the URL of the proxy.

    The n-th connection is reset after `cuts[n]` bytes of answers. 0 loses a whole answer, when the server has sent it. Further
    connections are not cut.
    """
    upstream = (urlsplit(url).hostname, urlsplit(url).port)
    remaining = list(cuts)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                server = socket.create_connection(upstream)
                limit = remaining.pop(0) if remaining else None
                threading.Thread(target=forward, args=(client, server, None), daemon=True).start()
                threading.Thread(target=forward, args=(server, client, limit), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            # Wakes up accept(), which close() does not.
            listener.shutdown(socket.SHUT_RDWR)


def forward(source: socket.socket, target: socket.socket, limit: int | None) -> None:
    """Copy bytes until either side closes its connection, or until `limit` bytes are copied."""
    with suppress(OSError):
        while data := source.recv(65536):
            if limit is not None and len(data) > limit:
                target.sendall(data[:limit])
                break
            target.sendall(data)
            limit = None if limit is None else limit - len(data)
    for each in (source, target):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
