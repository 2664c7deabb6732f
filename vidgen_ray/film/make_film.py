"""make_film: from an output folder and FilmSettings to a video with caption files (SubRip and WebVTT)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import NamedTuple

from vidgen_ray.errors import UsageError
from vidgen_ray.film.edit_files import EditCaption, check_edit, edit_media, write_edit
from vidgen_ray.film.film_settings import ChosenShot, FilmSettings, ShotCandidate, choose_shots, manifest_candidates
from vidgen_ray.film.picture import check_texts
from vidgen_ray.film.pieces import content_key, keep_only, plan_pieces, render_pieces, write_film
from vidgen_ray.film.sound import plan_tracks, sound_key, speaker, write_sound
from vidgen_ray.film.timeline import FilmTimeline, build_timeline, probe_clip, sound_seconds
from vidgen_ray.media.encode import Mp4Settings
from vidgen_ray.outputs.folder import OutputFolder, setting_of_last_run
from vidgen_ray.profile import DEFAULT_PROVENANCE, Detail, ProvenanceSettings
from vidgen_ray.provenance.record import FoundProvenance, InputFile, joined_record, metadata_of
from vidgen_ray.provenance.signing import Ingredient, check_signing, sign_file
from vidgen_ray.system.cache_dir import digest
from vidgen_ray.system.files import abandoned, new_file, remove, write_atomically
from vidgen_ray.system.quantities import count


class Cue(NamedTuple):
    """A caption and when it is shown, in milliseconds."""

    start_ms: int
    stop_ms: int
    text: str
    shot: str
    """Name of its shot."""

    @property
    def letters_per_s(self) -> float:
        return 1000 * len("".join(self.text.split())) / max(1, self.stop_ms - self.start_ms)


def cues(timeline: FilmTimeline) -> list[Cue]:
    """Return the captions of the shots in order. During a cross-fade there is none."""
    found = []
    for item in timeline.items:
        # A blank line would end the caption in both formats.
        lines = [line.strip() for line in (item.source.settings.caption or "").splitlines()]
        if text := "\n".join(line for line in lines if line):
            start, stop = item.start + item.fade_in, item.stop - item.fade_out
            start_ms, stop_ms = (round(frame * 1000 / timeline.fps) for frame in (start, stop))
            found.append(Cue(start_ms, stop_ms, text, item.source.name))
    return found


def srt(captions: Sequence[Cue]) -> str:
    """Return the captions as SubRip."""
    blocks = [
        f"{number}\n{_time(cue.start_ms, ',')} --> {_time(cue.stop_ms, ',')}\n{cue.text}\n"
        for number, cue in enumerate(captions, 1)
    ]
    return "\n".join(blocks)


def vtt(captions: Sequence[Cue]) -> str:
    """Return the captions as WebVTT."""
    blocks = [
        f"{_time(cue.start_ms, '.')} --> {_time(cue.stop_ms, '.')}\n{escape(cue.text, quote=False)}\n" for cue in captions
    ]
    return "\n".join(["WEBVTT\n", *blocks])


def _time(time_ms: int, separator: str) -> str:
    seconds, milliseconds = divmod(time_ms, 1000)
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}{separator}{milliseconds:03}"


MAX_LETTERS_PER_S = 20
"""Letters per second that viewers can read, as subtitle editors have it."""
MAX_NAMES = 5
"""Shots that a note names."""
SUFFIX = ".mp4"
_Progress = Callable[[str, int, int], None]
"""Called with the activity, and how many of how many steps of it are done."""


@dataclass(frozen=True, slots=True)
class FilmReport:
    """Result of `make_film`: the film and how its pieces were made."""

    film: str
    """Path of the film."""
    seconds: float
    size: str
    """WIDTHxHEIGHT in pixels."""
    fps: float
    shots: int
    """Shots in the film, without title cards."""
    copied: int
    """Pieces of the film whose packets were copied from the clips."""
    reused: int
    """Pieces rendered by an earlier call."""
    rendered: int
    captions: tuple[str, ...]
    """Paths of the caption files."""
    timeline: str | None
    """Path of the edit."""
    notes: tuple[str, ...]
    """Hints for the user, such as a narration that was cut."""
    metadata: Detail
    """Settings of the marking as AI-generated."""


def make_film(
    outputs: OutputFolder,
    settings: FilmSettings,
    path: Path,
    *,
    candidates: Sequence[ShotCandidate] | None = None,
    ids: Sequence[str] | None = None,
    skip_missing: bool = False,
    provenance: ProvenanceSettings | None = None,
    on_progress: _Progress = lambda activity, done, total: None,
) -> FilmReport:
    """Make a film of finished shots at `path`, with caption files of the same name in the same folder.

    `provenance`: how the film is marked as AI-generated. Default: as the files of the last run in the folder.
    `candidates` are the shots in order, by default those of the manifest. `ids` chooses some of them, in another order.
    Rendered pieces stay in a folder beside the film, so that the next call renders only what has changed.
    Raises MissingShots, UsageError, ScriptError for settings in the metadata of a shot, SetupError if the narration cannot be
    spoken, and MediaError if a file cannot be read or written.
    """
    if path.suffix.lower() != SUFFIX:
        raise UsageError(f"film: got {str(path)!r}, must end in {SUFFIX}")
    marking = provenance or setting_of_last_run(outputs, ProvenanceSettings, "profile", "provenance") or DEFAULT_PROVENANCE
    check_signing(marking)
    check_edit(settings, outputs.storage.local)
    if candidates is None:
        candidates = manifest_candidates(outputs.storage)
    if settings.encode is None:
        encode = setting_of_last_run(outputs, Mp4Settings, "profile", "encode") or Mp4Settings()
        settings = settings.model_copy(update={"encode": encode})
    chosen = choose_shots(outputs, settings, candidates, ids, skip_missing=skip_missing)
    local = outputs.storage.local
    clips = [local / shot.path for shot in chosen if local is not None and shot.path is not None]
    if path.resolve() in {
        Path(source).resolve() for source in (settings.music, settings.narration, *clips) if source is not None
    }:
        raise UsageError(f"film: got {str(path)!r}, would replace a source")
    folder = path.with_name(f"{path.stem}.pieces")
    for left in (*abandoned(path.parent), *abandoned(edit_media(path))):
        remove(left)
    sources, inputs = _sources(outputs, chosen, on_progress)
    sources, spoken = _with_speech(sources, settings, folder, on_progress)
    timeline = build_timeline(sources, settings)
    check_texts(timeline, settings)
    narration_s = sound_seconds(settings.narration) if settings.narration else None
    if settings.music:
        sound_seconds(settings.music)

    open_clip = outputs.storage.local_copy
    pieces = plan_pieces(timeline, settings, folder)
    rendered = render_pieces(
        pieces, timeline, settings, folder, open_clip, lambda done: on_progress("Rendering", done, len(pieces))
    )
    tracks = plan_tracks(timeline, settings, open_clip, narration_s)
    sound = folder / f"{sound_key(tracks, timeline, settings)}.m4a" if tracks else None
    if sound is not None and not sound.exists():
        on_progress("Mixing the sound", 0, 1)
        write_sound(sound, tracks, timeline, settings)
    on_progress("Joining", 0, 1)
    record = joined_record([*inputs.values()], "film", marking)
    metadata = metadata_of(record)

    def sign(film: Path) -> None:
        if record is not None and marking.signing_key is not None:
            with ExitStack() as stack:
                shown = [shot for shot in chosen if shot.path is not None]
                files = {shot.name: stack.enter_context(open_clip(str(shot.path))) for shot in shown}
                sign_file(film, record, marking.signing_key, [Ingredient(file, name) for name, file in files.items()])

    write_film(path, pieces, timeline, folder, open_clip, sound, settings.title, metadata, sign)
    captions = _write_captions(path, timeline, settings)
    edit, notes = None, _notes(timeline, settings, narration_s)
    if settings.timeline is not None and outputs.storage.local is not None:
        on_progress("Writing the timeline", 0, 1)
        shown = [] if settings.captions == "none" else cues(timeline)
        frames = [tuple(round(ms * timeline.fps / 1000) for ms in (cue.start_ms, cue.stop_ms)) for cue in shown]
        edit_captions = [EditCaption(start, stop - start, cue.text) for cue, (start, stop) in zip(shown, frames, strict=True)]
        edit, of_edit = write_edit(
            path,
            timeline,
            settings,
            tracks,
            edit_captions,
            outputs.storage.local,
            open_clip,
            lambda source: metadata_of(None if source is None else joined_record([inputs[source]], "film", marking)),
        )
        notes += of_edit
    keys = {piece.key for piece in pieces if piece.key is not None}
    keep_only(folder, {f"{key}{SUFFIX}" for key in keys} | spoken | ({sound.name} if sound else set()))
    copied = sum(piece.key is None for piece in pieces)
    return FilmReport(
        film=str(path),
        seconds=round(timeline.seconds, 3),
        size=str(timeline.size),
        fps=round(float(timeline.fps), 3),
        shots=sum(shot.path is not None for shot in chosen),
        copied=copied,
        reused=len(pieces) - copied - rendered,
        rendered=rendered,
        captions=captions,
        timeline=None if edit is None else str(edit),
        notes=tuple(notes),
        metadata=marking.metadata,
    )


def _sources(
    outputs: OutputFolder, chosen: Sequence[ChosenShot], on_progress: _Progress
) -> tuple[list[ChosenShot], dict[str, InputFile]]:
    """Return the sources of the film, and path -> what the metadata of a clip or image says."""
    sources, inputs = [], dict[str, InputFile]()
    for number, shot in enumerate(chosen):
        on_progress("Reading clips", number, len(chosen))
        clip = None
        if shot.path is not None:
            with outputs.storage.local_copy(shot.path) as path:
                clip = probe_clip(path) if shot.is_clip else None
                source = InputFile.read(path, shot.sha256)
            if shot.is_clip and source.found.source_type is None:
                # A clip of a run without provenance. Every clip of a shot is generated.
                source = InputFile(shot.sha256, FoundProvenance(None, "trainedAlgorithmicMedia"))
            inputs[shot.path] = source
        sources.append(shot._replace(clip=clip))
    return sources, inputs


def _with_speech(
    sources: Sequence[ChosenShot], settings: FilmSettings, folder: Path, on_progress: _Progress
) -> tuple[list[ChosenShot], set[str]]:
    """Speak the narration of the shots, if the film has a voice. Return also the names of the sound files in the folder."""
    if settings.voice is None or not any(source.settings.narration for source in sources):
        return list(sources), set()
    speak = speaker(settings.voice)
    model = Path(settings.voice.partition(":")[2])
    voice = [settings.voice, digest(model) if model.is_file() else None]
    spoken, names = [], set()
    for number, source in enumerate(sources):
        on_progress("Speaking the narration", number, len(sources))
        text = source.settings.narration
        if text is not None:
            name = f"{content_key({'voice': voice, 'text': text})}.wav"
            path = folder / name
            if not path.exists():
                with new_file(path) as tmp:
                    speak(text, tmp)
            names.add(name)
            source = source._replace(speech=str(path), speech_s=sound_seconds(path))
        spoken.append(source)
    return spoken, names


def _write_captions(path: Path, timeline: FilmTimeline, settings: FilmSettings) -> tuple[str, ...]:
    """Write the caption files. Those of an earlier film are deleted if there are no captions any more."""
    # Players load such files by their name, and would show a burnt-in caption twice.
    found = cues(timeline) if settings.captions == "file" else []
    written = []
    for suffix, text in ((".srt", srt(found)), (".vtt", vtt(found))):
        file = path.with_suffix(suffix)
        if found:
            write_atomically(file, text)
            written.append(str(file))
        else:
            file.unlink(missing_ok=True)
    return tuple(written)


def _notes(timeline: FilmTimeline, settings: FilmSettings, narration_s: float | None) -> list[str]:
    notes = []
    shown = [] if settings.captions == "none" else cues(timeline)
    if fast := [cue for cue in shown if cue.letters_per_s > MAX_LETTERS_PER_S]:
        worst = max(fast, key=lambda cue: cue.letters_per_s)
        seconds, rate = (worst.stop_ms - worst.start_ms) / 1000, f"{worst.letters_per_s:.0f} letters per second"
        limit = f"more than {MAX_LETTERS_PER_S} letters per second"
        names = ", ".join(cue.shot for cue in fast[:MAX_NAMES]) + (", ..." if len(fast) > MAX_NAMES else "")
        advice = "shorten them, or set duration_s, or transition: cut"
        notes.append(
            f"captions too short to read ({limit}): {names}; {worst.shot} is shown for {seconds:.1f} s, {rate}; {advice}"
        )
    if narration_s is not None and narration_s > timeline.seconds + 0.1:
        notes.append(f"{settings.narration}: is {narration_s:.1f} s long, the film {timeline.seconds:.1f} s; the rest is cut")
    if settings.captions == "burn" and not shown:
        notes.append("no shot has a caption; set `caption` in the metadata of the shots, or in a film file")
    silent = sum(item.source.settings.narration is not None for item in timeline.items)
    if silent and settings.voice is None:
        shots = f"{count(silent, 'shot')} {'has' if silent == 1 else 'have'}"
        notes.append(f"{shots} a narration, but the film has no voice; set one with --voice")
    return notes
