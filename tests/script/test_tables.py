"""Tables as spreadsheets, pandas and data sets write them, and folders of images."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vidgen_ray.errors import ScriptError
from vidgen_ray.media import write_png
from vidgen_ray.script.lines import ScriptSettings
from vidgen_ray.script.read import read_script


def read(path):
    return read_script(ScriptSettings(path))


@pytest.mark.parametrize(
    "text",
    [
        "prompt,seed,metadata.shot\na ball,7,4\n",
        "Prompt;Seed;metadata.shot\r\na ball;7;4\r\n",
        "\ufeffprompt\tSEED\tmetadata.shot\na ball\t7\t4\n",
        " Prompt , Seed , metadata.shot , \n a ball , 7 , 4 , \n,,,\n",
    ],
)
def test_separators_and_spelling_of_the_columns_are_recognised(tmp_path, text):
    (tmp_path / "s.csv").write_text(text)
    script = read(tmp_path / "s.csv")
    assert not script.errors
    assert [(shot.prompt, shot.seed, shot.metadata) for shot in script.shots] == [("a ball", 7, {"shot": 4})]


def test_unknown_columns_are_one_error_for_the_file(tmp_path):
    (tmp_path / "s.csv").write_text("prompt,promt,notes\n" + "a,b,c\n" * 1000)
    with pytest.raises(ScriptError) as raised:
        read(tmp_path / "s.csv")
    assert str(raised.value) == (
        "s.csv: got unknown columns 'promt', 'notes', did you mean prompt?; --map promt=FIELD reads a column as a field, "
        "--keep-columns copies all to metadata"
    )


@pytest.mark.parametrize("text", ["a red ball\na blue ball\n", "prompt|seed\na|1\n", "text,seed\na,1\n"])
def test_table_without_a_prompt_says_what_the_first_row_must_have(tmp_path, text):
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(ScriptError, match=r"must be named after fields, in the first row of a \.csv, one of them prompt"):
        read(tmp_path / "s.csv")


def test_table_of_pandas_may_have_gaps(tmp_path):
    table = pa.table(
        {
            "Prompt": ["a", "b"],
            "seed": pa.array([1.0, float("nan")]),
            "fps": pa.array([6.0, None]),
            "identity_strength": pa.array([0.5, float("nan")]),
            "__index_level_0__": [0, 1],
        }
    )
    pq.write_table(table, tmp_path / "s.parquet")
    script = read(tmp_path / "s.parquet")
    assert not script.errors
    assert [(shot.fps, shot.identity_strength) for shot in script.shots] == [(6, 0.5), (5, 1.0)]
    assert script.shots[0].seed == 1


def test_folder_of_captioned_images_has_a_shot_for_each(tmp_path):
    for name in ("b.png", "a 1.png", "c.png"):
        write_png(tmp_path / name, np.zeros((64, 64, 3), np.uint8))
    (tmp_path / "a 1.txt").write_text("a red\nball\n")
    (tmp_path / "b.txt").write_text("a blue ball")
    script = read(tmp_path)
    assert [(shot.id, shot.prompt, shot.image) for shot in script.shots] == [
        ("a-1", "a red ball", str(tmp_path / "a 1.png")),
        ("b", "a blue ball", str(tmp_path / "b.png")),
    ]
    (error,) = script.errors
    assert (error.line, error.got) == (3, "no caption for c.png")


def test_image_folder_with_metadata_and_a_data_set_of_parquet_files(tmp_path):
    images, tables = tmp_path / "images", tmp_path / "tables"
    images.mkdir()
    (tables / "data").mkdir(parents=True)
    write_png(images / "x.png", np.zeros((64, 64, 3), np.uint8))
    (images / "metadata.jsonl").write_text('{"file_name": "x.png", "text": "a ball", "Seed": 3}\n{"file_name": "y.png"}\n')
    script = read(images)
    assert [(shot.id, shot.prompt, shot.seed) for shot in script.shots] == [("x", "a ball", 3)]
    assert {error.field for error in script.errors} == {"prompt"}
    for number, caption in enumerate(("one", "two")):
        pq.write_table(pa.table({"caption": [caption]}), tables / "data" / f"train-0000{number}.parquet")
    assert [(line.shot.prompt, line.number) for line in read(tables).lines] == [("one", 1), ("two", 2)]


def test_empty_folder_is_an_error(tmp_path):
    with pytest.raises(ScriptError, match="a folder without scripts"):
        read(tmp_path)
