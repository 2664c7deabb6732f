"""Coverage-guided fuzzing of a reader with atheris: `python -m tests.hostile.fuzz image -max_total_time=300`.

The options after the door are those of libFuzzer. Needs the extra `fuzz`. A finding is an exception, a hang or a crash; its
input is written to `crash-...` in the current folder.
"""

import logging
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import atheris

with atheris.instrument_imports(include=["vidgen_ray", "yaml", "PIL"]):
    from tests.hostile.test_fuzz import READERS


def main(door: str, options: list[str]) -> None:
    reader = READERS[door]
    warnings.simplefilter("ignore")
    logging.disable()
    with TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(reader.seeds()):
            (corpus / f"seed-{number}").write_bytes(seed)
        path = Path(folder) / reader.name
        atheris.Setup([sys.argv[0], *options, str(corpus)], lambda content: reader.accepts(path, content))
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
