"""`vidgen identity show`: which face is found in photos of a person, and what the models get of it."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vidgen_ray.atomic_files import write_atomically
from vidgen_ray.cli.options import JsonOption, ProfileOption
from vidgen_ray.errors import SetupError, UsageError
from vidgen_ray.media import read_image
from vidgen_ray.profile import load_profile
from vidgen_ray.script.reader import check_shot
from vidgen_ray.stages.base import FaceFeatures, Image
from vidgen_ray.stages.identity.pose import pose_image
from vidgen_ray.stages.instantid import DetectedPhoto, InstantIDStage

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}

identity = typer.Typer(help="The person of a shot.", no_args_is_help=True)


@identity.callback()
def _keeps_its_name() -> None:
    # With one command alone typer would leave out the word `show`.
    return


@identity.command()
def show(
    photos: Annotated[list[Path], typer.Argument(metavar="PHOTO...", help="One photo of a person, or several.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture to draw: .png or .jpg.")] = Path("identity.png"),
    profile: ProfileOption = "demo",
    face_index: Annotated[
        int | None,
        typer.Option("--face-index", min=0, help="Which face of the first photo counts, from the left; else the largest."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Draw the faces that are found, the one that counts, and the keypoint picture at the profile's default size."""
    from vidgen_ray.report.identity_sheet import identity_sheet

    kind = FORMATS.get(out.suffix.lower())
    if kind is None:
        raise UsageError(f"--out: got {str(out)!r}, must end in {', '.join(FORMATS)}")
    chosen = load_profile(profile)
    shot = check_shot({"prompt": "a person"}, "vidgen identity", chosen.defaults)
    pictures = [read_image(photo) for photo in photos]
    with InstantIDStage(chosen.params(InstantIDStage)) as stage:
        seen = stage.detect_faces(pictures, face_index)
        face = stage.features(pictures, face_index)
    sheet = identity_sheet(pictures, seen, pose_image(face, shot))
    content = io.BytesIO()
    sheet.save(content, kind, quality=88)
    try:
        write_atomically(out, content.getvalue())
    except OSError as error:
        raise SetupError(f"{out}: cannot be written ({error.strerror})") from None
    if as_json:
        typer.echo(json.dumps(_as_json(photos, pictures, seen, face, out)))
    else:
        _print(photos, pictures, seen, face, out)


def _as_json(
    photos: Sequence[Path], pictures: Sequence[Image], seen: Sequence[DetectedPhoto], face: FaceFeatures, out: Path
) -> dict[str, Any]:
    return {
        "photos": [
            {
                "photo": str(photo),
                "size": [picture.shape[1], picture.shape[0]],
                "faces": [{"box": one.box, "score": one.score, "chosen": one is found.chosen} for one in found.faces],
                "keypoints": found.chosen.keypoints.tolist(),
            }
            for photo, picture, found in zip(photos, pictures, seen, strict=True)
        ],
        "embeddings": {name: {"numbers": len(values), "length": _length(values)} for name, values in face.embeddings.items()},
        "digest": face.digest,
        "drawn": str(out),
    }


def _print(
    photos: Sequence[Path], pictures: Sequence[Image], seen: Sequence[DetectedPhoto], face: FaceFeatures, out: Path
) -> None:
    from vidgen_ray.cli.plan import PLAIN_WIDTH

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PLAIN_WIDTH)
    table = Table("photo", "size", "faces", "the face that counts", "score", box=None, header_style="dim", pad_edge=False)
    for photo, picture, found in zip(photos, pictures, seen, strict=True):
        left, top, right, bottom = found.chosen.box
        table.add_row(
            escape(str(photo)),
            f"{picture.shape[1]}x{picture.shape[0]}",
            str(len(found.faces)),
            f"{right - left:.0f}x{bottom - top:.0f} px at {left:.0f}, {top:.0f}",
            f"{found.chosen.score:.2f}",
        )
    console.print(table)
    for name, values in face.embeddings.items():
        console.print(f"embedding {name}: {len(values)} numbers of length {_length(values):g}")
    console.print(f"digest {face.digest[:16]}")
    console.print(f"drawn: {escape(str(out))}")


def _length(embedding: Any) -> float:
    return round(float(np.linalg.norm(embedding)), 2)
