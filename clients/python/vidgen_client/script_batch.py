"""Render the shots of a script as a batch, and download clips and manifest: `vidgen render --to`."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from vidgen_client.async_client import IMAGE_FIELDS, AsyncClient
from vidgen_client.errors import ClientError
from vidgen_client.models import Batch

ENDPOINT = "/v1/shots"
_WINDOW = "365d"
"""Completion window: a script has no deadline."""
MANIFEST, ERRORS, STATE = "manifest.jsonl", "errors.jsonl", ".batch.json"
DOWNLOADS = 4
"""Downloads at the same time."""
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")


async def render_to(
    client: AsyncClient, shots: Iterable[Mapping[str, Any]], folder: Path, on_progress: Callable[[Batch], object]
) -> tuple[int, int]:
    """Render shots that are not in the manifest of a folder yet. Return the numbers of new clips and of failed lines.

    `shots`: fields of script lines, each with its `id`. Resumes the batch of an earlier call that did not end. `on_progress` is
    called with its state. Raises ClientError and OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state, manifest = folder / STATE, folder / MANIFEST
    rows = {row["id"]: row for row in _rows(manifest)}
    if state.exists():
        known = json.loads(state.read_text(encoding="utf-8"))
    else:
        content, digests = await _requests(client, shots, rows)
        if not digests:
            return 0, 0
        known = {"file": (await client.upload_batch(content)).id, "key": uuid4().hex, "digests": digests}
        # Before the batch is created: the same key then finds it.
        _write(state, json.dumps(known))
    batch = await client.create_batch(known["file"], endpoint=ENDPOINT, completion_window=_WINDOW, idempotency_key=known["key"])
    batch = await client.wait_for_batch(batch, on_progress=on_progress)
    if batch.status == "failed":
        state.unlink()
        raise ClientError(f"{batch.id} failed: {batch.errors}")
    output, errors = await client.batch_results(batch)
    slots = asyncio.Semaphore(DOWNLOADS)

    async def fetch(row: Mapping[str, Any]) -> None:
        video = row["response"]["body"]
        file = f"{row['custom_id']}{'.png' if video['num_frames'] == 1 else '.mp4'}"
        async with slots:
            await client.download_video(video["id"], folder / file)
        line = {"id": row["custom_id"], "file": file, "request": known["digests"].get(row["custom_id"]), "video": video}
        with manifest.open("a", encoding="utf-8") as target:
            target.write(json.dumps(line) + "\n")

    new = [row for row in output if rows.get(row["custom_id"], {}).get("video", {}).get("id") != row["response"]["body"]["id"]]
    await asyncio.gather(*map(fetch, new))
    # A line that was rendered again has two rows, of which the last one counts.
    _write(manifest, "".join(json.dumps(row) + "\n" for row in {row["id"]: row for row in _rows(manifest)}.values()))
    _write(folder / ERRORS, "".join(json.dumps(row) + "\n" for row in errors))
    state.unlink()
    return len(new), len(errors)


async def _requests(
    client: AsyncClient, shots: Iterable[Mapping[str, Any]], rows: Mapping[str, Mapping[str, Any]]
) -> tuple[bytes, dict[str, str]]:
    """Return the input file of the shots that are not in the manifest with the same fields, and the digest of each request."""
    lines, digests, uploads = list[str](), dict[str, str](), dict[str, str]()

    async def uploaded(path: str) -> str:
        if path not in uploads:
            uploads[path] = (await client.upload_image(path)).id
        return uploads[path]

    for shot in shots:
        name = str(shot["id"])
        if not NAME.fullmatch(name):
            raise ClientError(f"id: got {name!r}, must be a file name of letters, digits, - and _")
        body = {field: value for field, value in shot.items() if field not in ("id", "variants")}
        for field in IMAGE_FIELDS:
            if value := body.get(field):
                body[field] = await uploaded(value) if isinstance(value, str) else [await uploaded(each) for each in value]
        line = json.dumps({"custom_id": name, "method": "POST", "url": ENDPOINT, "body": body}, sort_keys=True)
        digest = hashlib.sha256(line.encode()).hexdigest()
        if rows.get(name, {}).get("request") != digest:
            lines.append(line)
            digests[name] = digest
    return "\n".join(lines).encode(), digests


def _rows(manifest: Path) -> list[dict[str, Any]]:
    """Return the rows of a manifest. The last one of a stopped program may be incomplete."""
    rows = []
    for line in manifest.read_text(encoding="utf-8").splitlines() if manifest.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
