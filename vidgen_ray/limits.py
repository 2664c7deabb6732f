"""Limits of input from users and clients, used by the command line, batch runs and the server.

What an operator may change, such as the size of uploads, is a setting of the server instead (`online/server_settings.py`).
"""

import re

# Images and videos

MAX_PIXELS = 40_000_000
"""Maximum pixels of an image or frame. Checked before the pixels are decoded."""

MAX_IMAGE_BYTES = 512 * 2**20
"""Maximum size of an image file. It is read as a whole. More than 40 megapixels of 16 bits without compression."""
MAX_CLIP_BYTES = 16 * 2**30
"""Maximum size of the frames of a video that are in memory at once."""
MAX_JPEG_SCANS = 100
"""Maximum number of scans of a JPEG. Each may take as long as all others together, but only a few bytes."""
VIDEO_DECODE_S = 60.0
"""Time in seconds to decode frames of an uploaded video."""
VIDEO_DECODE_BYTES = 4 * 2**30
"""Address space of the process that decodes an uploaded video."""

# Weights

MAX_LORA_BYTES = 8 * 2**30
"""Maximum size of a LoRA. It is read as a whole."""
MAX_LORA_HEADER_BYTES = 2**24
"""Maximum size of a LoRA's header: names and shapes of its tensors."""

# Scripts and shots

CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]|\r(?!\n)")
"""Characters that prompts must not contain: C0 without tab and line breaks."""

DECIMAL_COMMA = re.compile(r"[+-]?[0-9]+,[0-9]+")
"""Number with a comma in place of the decimal point."""
MAX_LINE = 2**24
"""Maximum number of characters in a line of a text file."""
MAX_YAML_BYTES = 2**24
"""Maximum size of a YAML file. Parsing takes 70 times the memory of the file and 2 s per megabyte."""
MAX_NUMBER_CHARACTERS = 100
"""Maximum number of characters of a number in YAML."""
MAX_NESTING = 200
"""Maximum number of levels of lists and mappings in a line. Python's own limit depends on the caller."""
MAX_SHOTS_PER_LINE = 1000
"""Largest number of shots that a line stands for: its variants, its choices and its matrix."""
MAX_TEXT = 10_000
"""Maximum number of characters of a prompt."""
MIN_SIDE_PX, MAX_SIDE_PX = 64, 2048
"""Smallest and largest width and height in pixels that a model draws."""
MIN_FRAMES, MAX_FRAMES = 2, 256
"""Smallest and largest number of frames that a video model generates in one pass."""
MAX_EXTENDED_FRAMES = 1024
"""Largest number of frames of a clip that several passes generate."""

# HTTP requests

MAX_FORM_FIELDS = 200
FORM_TEXT_BYTES = 2 << 20
"""All text fields of a form together. They are kept in memory, files are not."""
URLENCODED_BYTES = 512 << 10
"""An urlencoded form. Its escapes take 75 times as much memory while they are decoded, and a second for 8 MB."""
SMALL_FORM_BYTES = 8 << 10
"""Size of a form from an unauthenticated client, and of an urlencoded form that is decoded at once."""
JSON_DEPTH = 32
"""Levels of a JSON body."""
MAX_RESULTS = 10
"""Results of one request."""
