"""Script formats: read .jsonl, .csv, .txt, .parquet and .yaml files, and folders, as lines of unvalidated fields.

Lines are read lazily, so memory use does not grow with the script. Only .yaml files are read as a whole.
"""

from pathlib import Path

from vidgen_ray.script.csv_format import read_csv
from vidgen_ray.script.folder_format import read_folder
from vidgen_ray.script.lines import Header, Lines, file_error
from vidgen_ray.script.parquet_format import read_parquet
from vidgen_ray.script.text_formats import read_jsonl, read_txt
from vidgen_ray.script.yaml_format import read_yaml

SPREADSHEET = "; save the sheet as .csv"
ADVICE = {".json": "; write one object per line to .jsonl", ".xlsx": SPREADSHEET, ".xls": SPREADSHEET, ".ods": SPREADSHEET}
"""Ending of a file that is not read -> what to do."""


def open_script(path: Path) -> tuple[Header, Lines]:
    """Return the header and the numbered lines of a script. Lines that cannot be parsed are `UnreadableLine`.

    Raises ScriptError if the file cannot be read.
    """
    readers = {
        ".jsonl": read_jsonl,
        ".csv": read_csv,
        ".tsv": read_csv,
        ".txt": read_txt,
        ".parquet": read_parquet,
        ".yaml": read_yaml,
        ".yml": read_yaml,
    }
    reader = read_folder if path.is_dir() else readers.get(path.suffix.lower())
    if reader is None:
        advice = ADVICE.get(path.suffix.lower(), "")
        raise file_error(path, f"file type {path.suffix!r}", f"must be one of {', '.join(sorted(readers))}{advice}")
    try:
        if not path.exists() or not (path.is_file() or path.is_dir()):
            raise file_error(path, str(path), "must be a file or a folder" if path.exists() else "must be an existing file")
        return reader(path)
    except OSError as error:
        raise file_error(path, str(path), f"must be readable ({error.strerror})") from None
