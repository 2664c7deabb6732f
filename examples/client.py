"""Render prompts on a server, all at once, and download the clips.

    vidgen serve --profile demo
    python examples/client.py "a red boat by the sea" "a red boat in the snow" --seconds 2 --out clips

VIDGEN_URL and VIDGEN_API_KEY select another server. See docs/client.md.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from vidgen_client import AsyncClient, JobFailed, Video


def print_progress(video: Video) -> None:
    stage = f", {video.stage} {video.step}/{video.steps}" if video.stage else ""
    print(f"{video.id} {video.status} {video.progress}%{stage}")


async def render(client: AsyncClient, prompt: str, seconds: float, photo: Path | None, out: Path) -> Path | None:
    """Return the path of the clip, or `None` if its job failed."""
    video = await client.create_video(prompt, seconds=seconds, face_image=photo)
    try:
        video = await client.wait_for_video(video, on_progress=print_progress)
    except JobFailed as error:
        print(f"{prompt!r}: {error}")
        return None
    return await client.download_video(video, out)


async def main() -> int:
    parser = argparse.ArgumentParser(description="Render prompts on a vidgen-ray server.")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument("--seconds", type=float, default=2, help="Length of each clip. Default: 2.")
    parser.add_argument("--photo", type=Path, help="Photo of the person in all clips.")
    parser.add_argument("--out", type=Path, default=Path("clips"), help="Folder for the clips. Default: clips.")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    async with AsyncClient() as client:
        clips = await asyncio.gather(
            *(render(client, prompt, options.seconds, options.photo, options.out) for prompt in options.prompts)
        )
    for clip in clips:
        print(clip or "failed")
    return 0 if all(clips) else 1


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main()))
