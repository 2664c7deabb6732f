"""Sound of a film: narration, music and the sound of clips, mixed by FFmpeg filters."""

from __future__ import annotations

import math
import subprocess
import wave
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.codec.context import Flags
from av.filter import Graph

from vidgen_ray.errors import SetupError, UsageError, import_problem, install_command
from vidgen_ray.film.film_settings import FilmSettings
from vidgen_ray.film.picture import OpenFile
from vidgen_ray.film.pieces import content_key
from vidgen_ray.film.timeline import SAMPLE_RATE, FilmTimeline, TimelineItem, open_sound
from vidgen_ray.media.filters import add_chain, filtered
from vidgen_ray.media.media_file import wrap_errors
from vidgen_ray.system.cache_dir import digest
from vidgen_ray.system.files import new_file

Speak = Callable[[str, Path], None]
"""Writes the spoken text as a WAV file."""
ENGINES = "espeak-ng:LANGUAGE, such as espeak-ng:en, or piper:VOICE.onnx"


def speaker(voice: str) -> Speak:
    """Return the function that speaks with a voice: `espeak-ng:LANGUAGE` or `piper:VOICE.onnx`.

    Raises UsageError for another engine, SetupError if the engine or the voice is not on this machine.
    """
    engine, _, name = voice.partition(":")
    if engine == "espeak-ng":
        return _espeak(name or "en")
    if engine == "piper" and name:
        return _piper(Path(name))
    raise UsageError(f"voice: got {voice!r}, must be {ENGINES}")


def _espeak(language: str) -> Speak:
    def speak(text: str, path: Path) -> None:
        command = ["espeak-ng", "-v", language, "-w", str(path), "--stdin"]
        try:
            done = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
        except FileNotFoundError:
            raise SetupError("voice: espeak-ng is not installed; install the package espeak-ng of the system") from None
        if done.returncode:
            reason = " ".join(done.stderr.decode(errors="replace").split())
            raise SetupError(f"voice: espeak-ng cannot speak {language!r}: {reason}")

    return speak


def _piper(model: Path) -> Speak:
    if not model.is_file():
        raise SetupError(f"voice: must be an existing .onnx file of piper (looked for {model.absolute()})")
    try:
        from piper import PiperVoice
    except ImportError as error:
        raise SetupError(f"voice: {import_problem(error)}; {install_command('narration')}") from None
    try:
        voice = PiperVoice.load(model)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise SetupError(f"voice: {model} is not a voice of piper with its {model.name}.json ({error})") from None

    def speak(text: str, path: Path) -> None:
        with wave.open(str(path), "wb") as file:
            voice.synthesize_wav(text, file)

    return speak


SOUND_FORMAT = 1
"""Part of the key. Increase it when the same settings give other sound."""
_FORMAT = f"sample_fmts=fltp:sample_rates={SAMPLE_RATE}:channel_layouts=stereo"
INPUT: dict[str, Any] = {
    "sample_rate": SAMPLE_RATE,
    "format": "fltp",
    "layout": "stereo",
    "time_base": Fraction(1, SAMPLE_RATE),
}
"""Options of a graph's input that gets sound in this format."""
BLOCK_SAMPLES = 4800
AAC_FRAME_SAMPLES = 1024
AAC_BITS_PER_SECOND = 192_000
TRUE_PEAK_DB = -1.5
MAX_LOUDNESS_RANGE_LU = 50
"""loudnorm's largest. With a smaller one it would compress the dynamics instead of only changing the gain."""
INTEGRATED = "lavfi.r128.I"
"""Metadata of frames in which ebur128 reports the integrated loudness so far."""
SILENCE_LUFS = -69.0
"""ebur128 reports -70 for silence."""
MUSIC_FADE_S = 2.0
DUCKING = "threshold=0.02:ratio=8:attack=20:release=600"
"""Lower the music when the narration is above -34 dB, by up to 8:1, within 20 ms, and raise it again within 600 ms."""


class Placement(NamedTuple):
    """Sound from one file at a place of the film."""

    start: int
    """First sample in the film. The same for `stop`, which is exclusive."""
    stop: int
    filters: tuple[str, ...]
    path: str
    open_file: OpenFile
    sha256: str
    repeat: bool = False
    """Start the file again when it ends, until `stop`."""


class Tracks(NamedTuple):
    """Sound of a film, as placements that do not overlap within a track."""

    clips: tuple[tuple[Placement, ...], ...]
    """One track, or two in turns if there are cross-fades."""
    narration: tuple[Placement, ...]
    music: tuple[Placement, ...]

    def __bool__(self) -> bool:
        return any((*self.clips, self.narration, self.music))


def plan_tracks(timeline: FilmTimeline, settings: FilmSettings, open_clip: OpenFile, narration_s: float | None) -> Tracks:
    """Place all sound of the film. `narration_s` are the seconds of the narration file, if there is one."""
    with_fades = any(item.fade_in for item in timeline.items)
    turns = [timeline.items[::2], timeline.items[1::2]] if with_fades else [timeline.items]
    clips = [
        tuple(
            _clip_sound(item, timeline, open_clip)
            for item in items
            if item.source.clip is not None and item.source.clip.has_sound
        )
        for items in turns
    ]
    narration = [
        _file(item.source.speech, timeline.sample_at(item.start), timeline.sample_at(item.stop), ())
        for item in timeline.items
        if item.source.speech is not None
    ]
    if settings.narration is not None and narration_s is not None:
        stop = min(timeline.samples, math.ceil(narration_s * SAMPLE_RATE))
        narration.append(_file(str(settings.narration), 0, stop, ()))
    music = []
    if settings.music is not None:
        fade = min(round(MUSIC_FADE_S * SAMPLE_RATE), timeline.samples // 2)
        filters = f"volume={settings.music_db}dB", f"afade=out:ss={timeline.samples - fade}:ns={fade}"
        music.append(_file(str(settings.music), 0, timeline.samples, filters)._replace(repeat=True))
    return Tracks(tuple(clip for clip in clips if clip), tuple(narration), tuple(music))


def sound_key(tracks: Tracks, timeline: FilmTimeline, settings: FilmSettings) -> str:
    """Return the key of the sound: equal keys have equal samples."""
    placed = [
        [(p.start, p.stop, p.filters, p.sha256, p.repeat) for p in track]
        for track in (*tracks.clips, tracks.narration, tracks.music)
    ]
    return content_key(
        {
            "format": SOUND_FORMAT,
            "ffmpeg": av.library_versions,
            "samples": timeline.samples,
            "loudness_lufs": settings.loudness_lufs,
            "has_narration": bool(tracks.narration),
            "has_music": bool(tracks.music),
            "tracks": placed,
        }
    )


def write_sound(path: Path, tracks: Tracks, timeline: FilmTimeline, settings: FilmSettings) -> None:
    """Mix the tracks, bring them to the loudness of the settings, and write them as AAC in MP4. Raises MediaError.

    The tracks are mixed twice: to measure the loudness, and to write them with one gain. If the peaks would then be too high,
    loudnorm also limits them.
    """
    filters = [*_normalisation(tracks, timeline, settings.loudness_lufs), *_exact_length(timeline.samples)]
    filters.append(f"asetnsamples={AAC_FRAME_SAMPLES}:p=0")
    with (
        wrap_errors(f"{path}: cannot be written"),
        new_file(path) as tmp,
        av.open(str(tmp.absolute()), "w", "mp4", options={"fflags": "+bitexact"}) as output,
    ):
        stream = output.add_stream("aac", rate=SAMPLE_RATE, layout="stereo")
        stream.bit_rate = AAC_BITS_PER_SECOND
        stream.codec_context.flags |= Flags.bitexact
        # loudnorm leaves gaps in the times of its frames, though not in their samples.
        for frame in _numbered(_mix(tracks, timeline, filters)):
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def write_stem(path: Path, tracks: Tracks, timeline: FilmTimeline) -> None:
    """Mix tracks as they are, and write them as 24-bit WAV, as long as the film. Raises MediaError."""
    filters = [*_exact_length(timeline.samples), "aformat=sample_fmts=s32"]
    with wrap_errors(f"{path}: cannot be written"), new_file(path) as tmp, av.open(str(tmp), "w", "wav") as output:
        stream = output.add_stream("pcm_s24le", rate=SAMPLE_RATE, layout="stereo")
        for frame in _numbered(_mix(tracks, timeline, filters)):
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def _normalisation(tracks: Tracks, timeline: FilmTimeline, target_lufs: float) -> list[str]:
    """Measure the loudness of the mix. Return the filters that bring it to the target, none if it is silent."""
    metadata: dict[str, str] = {}
    for frame in _mix(tracks, timeline, ["ebur128=metadata=1:peak=true"]):
        # The last frame may be too short for a measurement of its own.
        metadata = frame.metadata if INTEGRATED in frame.metadata else metadata
    if not metadata or (integrated_lufs := float(metadata[INTEGRATED])) < SILENCE_LUFS:
        return []
    true_peak_db = 20 * math.log10(max(float(metadata["lavfi.r128.true_peak"]), 1e-4))
    known = (
        f"measured_I={integrated_lufs}:measured_TP={true_peak_db:.2f}"
        # loudnorm takes a range of 0 for not measured, and then ignores the other values.
        f":measured_LRA={max(0.1, float(metadata['lavfi.r128.LRA']))}:measured_thresh={integrated_lufs - 10:.2f}"
    )
    target = f"I={target_lufs}:TP={TRUE_PEAK_DB}:LRA={MAX_LOUDNESS_RANGE_LU}"
    return [f"loudnorm={target}:{known}:linear=true", f"aresample={SAMPLE_RATE}", f"aformat={_FORMAT}"]


def _exact_length(samples: int) -> list[str]:
    return ["apad", f"atrim=end_sample={samples}"]


def _clip_sound(item: TimelineItem, timeline: FilmTimeline, open_clip: OpenFile) -> Placement:
    start, stop = timeline.sample_at(item.start), timeline.sample_at(item.stop)
    filters = []
    if item.stretch != 1:
        filters.append(f"atempo={float(1 / item.stretch):.6f}")
    if item.fade_in:
        filters.append(f"afade=in:ss=0:ns={timeline.sample_at(item.start + item.fade_in) - start}:curve=qsin")
    if item.fade_out:
        fade = stop - timeline.sample_at(item.stop - item.fade_out)
        filters.append(f"afade=out:ss={stop - start - fade}:ns={fade}:curve=qsin")
    assert item.source.path is not None
    return Placement(start, stop, tuple(filters), item.source.path, open_clip, item.source.sha256)


def _file(path: str, start: int, stop: int, filters: tuple[str, ...]) -> Placement:
    return Placement(start, stop, filters, path, lambda path: nullcontext(Path(path)), digest(Path(path)))


def _mix(tracks: Tracks, timeline: FilmTimeline, filters: Sequence[str]) -> Iterator[Any]:
    """Yield the mixed sound after further filters. All tracks are read in step, so that no filter collects samples."""
    graph = Graph()
    inputs: list[Any] = []
    readers: list[Iterator[Any]] = []

    def add_input(track: Sequence[Placement]) -> Any:
        source = graph.add_abuffer(**INPUT)
        inputs.append(source)
        blocks = [f"asetnsamples={BLOCK_SAMPLES}:p=0"]
        readers.append(_through(_numbered(_unblocked(track, timeline.samples)), blocks, **INPUT))
        return source

    mixed = [(add_input(track), 0) for track in tracks.clips]
    music = (add_input(tracks.music), 0) if tracks.music else None
    if tracks.narration:
        narration = add_input(tracks.narration)
        if music is None:
            mixed.append((narration, 0))
        else:
            split = add_chain(graph, narration, ["asplit=2"])
            ducked = graph.add("sidechaincompress", DUCKING)
            music[0].link_to(ducked, 0, 0)
            split.link_to(ducked, 1, 1)
            mixed.append((split, 0))
            music = ducked, 0
    if music is not None:
        mixed.append(music)
    # amix waits for all its inputs; all tracks are as long as the film.
    mixer = graph.add("amix", f"inputs={len(mixed)}:normalize=0")
    for number, (node, output) in enumerate(mixed):
        node.link_to(mixer, output, number)
    sink = add_chain(graph, mixer, [f"aformat={_FORMAT}", *filters, "abuffersink"])
    graph.configure()
    yield from filtered(zip(*readers, strict=True), inputs, sink)


def _through(frames: Iterable[Any], filters: Sequence[str], **options: Any) -> Iterator[Any]:
    """Yield sound after filters. `options` describe it before them."""
    graph = Graph()
    source = graph.add_abuffer(**options)
    sink = add_chain(graph, source, [*filters, "abuffersink"])
    graph.configure()
    yield from filtered(zip(frames, strict=True), [source], sink)


def _numbered(frames: Iterator[Any]) -> Iterator[Any]:
    position = 0
    for frame in frames:
        frame.pts, frame.time_base = position, Fraction(1, SAMPLE_RATE)
        position += frame.samples
        yield frame


def _unblocked(placements: Sequence[Placement], samples: int) -> Iterator[Any]:
    """Yield the sound of a track, with silence between placements."""
    position = 0
    for placement in placements:
        yield from _silence(placement.start - position)
        yield from _placed(placement)
        position = placement.stop
    yield from _silence(samples - position)


def _silence(samples: int) -> Iterator[Any]:
    while samples > 0:
        frame = av.AudioFrame.from_ndarray(
            np.zeros((2, min(samples, BLOCK_SAMPLES)), np.float32), format="fltp", layout="stereo"
        )
        frame.sample_rate = SAMPLE_RATE
        samples -= frame.samples
        yield frame


def _placed(placement: Placement) -> Iterator[Any]:
    """Yield exactly the samples of a placement: the sound of its file, cut or followed by silence."""
    with wrap_errors(f"{placement.path}: the sound cannot be read"), placement.open_file(placement.path) as path:
        frames = _repeated(path) if placement.repeat else _converted(path)
        # The length is fixed before the filters, since a fade at the end needs it.
        tempo = [text for text in placement.filters if text.startswith("atempo")]
        rest = [text for text in placement.filters if not text.startswith("atempo")]
        length = _exact_length(placement.stop - placement.start)
        yield from _through(_numbered(frames), [*tempo, *length, *rest, f"aformat={_FORMAT}"], **INPUT)


def _repeated(path: Path) -> Iterator[Any]:
    while True:
        yield from _converted(path)


def _converted(path: Path) -> Iterator[Any]:
    """Yield the sound of a file as 48 kHz stereo. Sound that starts late is preceded by silence, gaps are filled."""
    with open_sound(path) as (opened, stream):
        filters = [f"aresample={SAMPLE_RATE}:async=1:first_pts=0", f"aformat={_FORMAT}"]
        yield from _through(opened.decode(stream), filters, template=stream)
