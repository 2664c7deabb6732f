"""Limits of input from users and clients, used by the command line, batch runs and the server.

What an operator may change, such as the size of uploads, is a setting of the server instead (`online/settings.py`).
"""

# Images and videos

MAX_PIXELS = 40_000_000
"""Maximum pixels of an image or frame. Checked before the pixels are decoded."""

# Scripts and shots

MAX_LINE = 2**24
"""Maximum number of characters in a line of a text file."""
MAX_YAML_BYTES = 2**24
"""Maximum size of a .yaml script. Parsing takes 70 times the memory of the file and 2 s per megabyte."""
MAX_SHOTS_PER_LINE = 1000
"""Largest number of shots that a line stands for: its variants, its choices and its matrix."""
MAX_TEXT = 10_000
"""Maximum number of characters of a prompt."""
MIN_SIDE_PX, MAX_SIDE_PX = 64, 2048
"""Smallest and largest width and height in pixels that a model draws."""
MIN_FRAMES, MAX_FRAMES = 2, 256
"""Smallest and largest number of frames of a generated clip."""

# HTTP requests

MAX_FORM_FIELDS = 200
FORM_TEXT_BYTES = 2 << 20
"""All text fields of a form together. They are kept in memory, files are not."""
SMALL_FORM_BYTES = 8 << 10
"""Size of a form from an unauthenticated client."""
JSON_DEPTH = 32
"""Levels of a JSON body."""
MAX_RESULTS = 10
"""Results of one request."""
