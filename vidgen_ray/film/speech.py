"""Speak narration with a speech synthesiser on this machine."""

from __future__ import annotations

import subprocess
import wave
from collections.abc import Callable
from pathlib import Path

from vidgen_ray.errors import SetupError, UsageError

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
    except ImportError:
        raise SetupError("voice: piper is not installed; pip install 'vidgen-ray[narration]'") from None
    try:
        voice = PiperVoice.load(model)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise SetupError(f"voice: {model} is not a voice of piper, with {model.name}.json beside it ({error})") from None

    def speak(text: str, path: Path) -> None:
        with wave.open(str(path), "wb") as file:
            voice.synthesize_wav(text, file)

    return speak
