"""The corpus of hostile input: every case."""

from tests.hostile.case import Case
from tests.hostile.images import IMAGES
from tests.hostile.requests import REQUESTS
from tests.hostile.scripts import LINES, PROFILES, SCRIPTS
from tests.hostile.videos import VIDEOS
from tests.hostile.weights import WEIGHTS

CORPUS: list[Case] = [*LINES, *SCRIPTS, *PROFILES, *IMAGES, *VIDEOS, *WEIGHTS, *REQUESTS]
