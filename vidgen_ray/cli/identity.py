"""`vidgen identity show`: show the detected faces in photos and the identity features that the models use."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
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

identity = typer.Typer(help="Inspect the identity features of a face.", no_args_is_help=True)


@identity.callback()
def _keep_subcommand() -> None:
    # Without a callback, typer would turn a group with one command into the command itself.
    return


@identity.command()
def show(
    photos: Annotated[list[Path], typer.Argument(metavar="PHOTO...", help="One or more photos of the same person.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Image to write: .png or .jpg.")] = Path("identity.png"),
    profile: ProfileOption = "demo",
    face_index: Annotated[
        int | None,
        typer.Option(
            "--face-index",
            min=0,
            help="Index of the face to use in the first photo, from left to right, from 0. Default: the largest face.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Draw the detected faces, the selected face and its keypoint image at the profile's default size."""
    from vidgen_ray.report.identity_sheet import identity_sheet

    image_format = FORMATS.get(out.suffix.lower())
    if image_format is None:
        raise UsageError(f"--out: got {str(out)!r}, must end in {', '.join(FORMATS)}")
    chosen = load_profile(profile)
    shot = check_shot({"prompt": "a person"}, "vidgen identity", chosen.defaults)
    images = [read_image(photo) for photo in photos]
    with InstantIDStage(chosen.params(InstantIDStage)) as stage:
        detected = stage.detect_faces(images, face_index, [str(photo) for photo in photos])
        face = stage.features(images, face_index)
    sheet = identity_sheet(images, detected, pose_image(face, shot))
    content = io.BytesIO()
    sheet.save(content, image_format, quality=88)
    try:
        write_atomically(out, content.getvalue())
    except OSError as error:
        raise SetupError(f"{out}: cannot be written ({error.strerror})") from None
    if as_json:
        typer.echo(json.dumps(_as_json(photos, images, detected, face, out)))
    else:
        _print(photos, images, detected, face, out)


def _as_json(
    photos: Sequence[Path], images: Sequence[Image], detected: Sequence[DetectedPhoto], face: FaceFeatures, out: Path
) -> dict[str, Any]:
    return {
        "photos": [
            {
                "photo": str(photo),
                "size": [image.shape[1], image.shape[0]],
                "faces": [{"box": f.box, "score": f.score, "chosen": f is detection.chosen} for f in detection.faces],
                "keypoints": detection.chosen.keypoints.tolist(),
            }
            for photo, image, detection in zip(photos, images, detected, strict=True)
        ],
        "embeddings": {name: {"numbers": len(values), "length": _norm(values)} for name, values in face.embeddings.items()},
        "digest": face.digest,
        "drawn": str(out),
    }


def _print(
    photos: Sequence[Path], images: Sequence[Image], detected: Sequence[DetectedPhoto], face: FaceFeatures, out: Path
) -> None:
    from vidgen_ray.cli.plan import stdout_console

    console = stdout_console()
    table = Table("photo", "size", "faces", "selected face", "score", box=None, header_style="dim", pad_edge=False)
    for photo, image, detection in zip(photos, images, detected, strict=True):
        left, top, right, bottom = detection.chosen.box
        table.add_row(
            escape(str(photo)),
            f"{image.shape[1]}x{image.shape[0]}",
            str(len(detection.faces)),
            f"{right - left:.0f}x{bottom - top:.0f} px at {left:.0f}, {top:.0f}",
            f"{detection.chosen.score:.2f}",
        )
    console.print(table)
    for name, values in face.embeddings.items():
        console.print(f"embedding {name}: {len(values)} numbers, norm {_norm(values):g}")
    console.print(f"digest {face.digest[:16]}")
    console.print(f"image: {escape(str(out))}")


def _norm(embedding: Any) -> float:
    return round(float(np.linalg.norm(embedding)), 2)
