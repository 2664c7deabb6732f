"""Write examples/sea.ogg, the music of the demo film: chords of sine tones over filtered noise, 32 seconds.

python -m training.music
"""

from pathlib import Path

import av
import numpy as np

RATE_HZ = 48_000
CHORD_S = 4.0
CHORDS_HZ = (
    (220.0, 261.63, 329.63, 440.0),
    (174.61, 220.0, 261.63, 349.23),
    (130.81, 196.0, 261.63, 329.63),
    (196.0, 246.94, 293.66, 392.0),
)
REPEATS = 2
BIT_RATE = 48_000
OUT = Path(__file__).parent.parent / "examples" / "sea.ogg"


def chord(notes_hz: tuple[float, ...]) -> np.ndarray:
    """Return a chord that is played note after note and fades, float64 in -1 to 1."""
    t = np.arange(int(CHORD_S * RATE_HZ)) / RATE_HZ
    sound = np.zeros_like(t)
    for number, hz in enumerate(notes_hz):
        since = np.maximum(t - 0.5 * number, 0)
        envelope = np.minimum(since / 0.03, 1) * np.exp(-1.1 * since)
        sound += envelope * (np.sin(2 * np.pi * hz * since) + 0.3 * np.sin(4 * np.pi * hz * since))
    return sound / (1.3 * len(notes_hz))


def waves(samples: int) -> np.ndarray:
    """Return noise that swells and falls like waves at a beach."""
    noise = np.random.default_rng(0).standard_normal(samples)
    smooth = np.convolve(noise, np.ones(24) / 24, "same")
    t = np.arange(samples) / RATE_HZ
    return smooth * (0.5 + 0.5 * np.sin(2 * np.pi * t / 6.4)) ** 2


def main() -> None:
    tune = np.concatenate([chord(notes) for _ in range(REPEATS) for notes in CHORDS_HZ])
    sound = 0.5 * tune + 0.12 * waves(len(tune))
    pcm = (np.clip(sound, -1, 1) * 32767).astype(np.int16)[None]
    with av.open(str(OUT), "w") as file:
        stream = file.add_stream("libopus", rate=RATE_HZ, layout="mono", bit_rate=BIT_RATE)
        frame = av.AudioFrame.from_ndarray(pcm, format="s16", layout="mono")
        frame.sample_rate = RATE_HZ
        for packet in (*stream.encode(frame), *stream.encode(None)):
            file.mux(packet)


if __name__ == "__main__":
    main()
