"""Open media files with FFmpeg, never anything that they refer to."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any


def open_media(path: Path, container: str | None = None) -> AbstractContextManager[Any]:
    """Return PyAV's container of a local file, as a context manager. `container`: name of its format. Default: detect it.

    Playlists and other files cannot make it read from the network. Raises FFmpeg's errors, which are OSError or ValueError.
    """
    import av

    return av.open(  # type: ignore[no-any-return]  # PyAV has no types
        str(path.absolute()),  # absolute, so that FFmpeg never treats it as a URL
        format=container,
        options={"protocol_whitelist": "file"},
        metadata_errors="ignore",
    )
