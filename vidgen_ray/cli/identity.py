"""`vidgen identity`: show the faces in photos and the features that the models use; remove a person from output folders."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.markup import escape
from rich.table import Table

from vidgen_ray.cli.options import JsonOption, ProfileOption, check_out
from vidgen_ray.errors import SetupError, UsageError
from vidgen_ray.media import read_image
from vidgen_ray.outputs.cleanup import Person, RemovalReport, photos_of_character, remove_person
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import manifest_files
from vidgen_ray.profile import load_profile
from vidgen_ray.script.read import check_shot
from vidgen_ray.stages.base import FaceFeatures, Image
from vidgen_ray.stages.identity import pose_image
from vidgen_ray.stages.instantid import DetectedPhoto, InstantIDStage
from vidgen_ray.system.cache_dir import sha256_of
from vidgen_ray.system.files import write_atomically

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}

identity = typer.Typer(help="Inspect the identity features of a face, or remove a person.", no_args_is_help=True)


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
    from vidgen_ray.report.sheets import identity_sheet

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


@identity.command()
def remove(
    person: Annotated[
        str, typer.Argument(metavar="PHOTO_OR_CHARACTER", help="Photo of the person, or name of a character of a script.")
    ],
    outs: Annotated[list[str], typer.Argument(metavar="OUT...", help="Output folders, or their URLs.")],
    with_shots: Annotated[
        bool, typer.Option("--outputs", help="Also delete the images and clips that were made with the person.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be removed, without removing it.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete a person's face features, cached results and stored photos, and list what was made with them.

    Photos of your own folders are kept.
    """
    from vidgen_ray.report.gallery_page import write_gallery

    folders = [OutputFolder(check_out(out)) for out in outs]
    for outputs in folders:
        if not (outputs.storage.folders("") or outputs.storage.files("")):
            raise SetupError(f"output folder {outputs.url}: does not exist or is empty")
    if Path(person).is_file():
        found = Person(frozenset({sha256_of(Path(person))}))
    else:
        # The photos of one folder may have been used in the others, under another name.
        found = Person(frozenset[str]().union(*(photos_of_character(outputs, person) for outputs in folders)), person)
        if not found.photos:
            raise UsageError(
                f"got {person!r}, must be an existing photo, or the character of a shot with a face in these folders"
            )
    reports = []
    for out, outputs in zip(outs, folders, strict=True):
        report = remove_person(outputs, found, with_shots=with_shots, dry_run=dry_run)
        reports.append({"out": outputs.url, "dry_run": dry_run, **asdict(report)})
        if report.shots and with_shots and not dry_run and manifest_files(outputs.storage):
            write_gallery(out)
        if not as_json:
            _print_removal(outputs, report, dry_run=dry_run)
    if as_json:
        typer.echo(json.dumps(reports))


def _print_removal(outputs: OutputFolder, report: RemovalReport, *, dry_run: bool) -> None:
    verb = "would remove" if dry_run else "removed"
    parts = f"{report.cached_steps} cache entries, {report.features} files with features, {len(report.photos)} stored photos"
    typer.echo(f"{outputs.url}: {verb} {parts}")
    kept = verb if report.shots_removed else "kept"
    typer.echo(f"{len(report.shots)} shots made with this person{f', {kept}:' if report.shots else ''}")
    for shot_id in report.shots:
        typer.echo(f"  {outputs.place(shot_id, '') if not report.shots_removed else shot_id}")


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
