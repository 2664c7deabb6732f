"""Read data sets with the libraries that people use, and decode each clip."""

import os
from pathlib import Path

import datasets
import litdata
import mlcroissant
import webdataset
from torchcodec.decoders import VideoDecoder

FILES, ROOT = Path(os.environ["FILES"]), Path(os.environ["ROOT"])
people = ROOT / "examples" / "people"


def check(name, read, expected):
    try:
        if (found := read()) != expected:
            print(f"DIFFERENCE {name}: {found} clips, not {expected}")
    except Exception as error:
        print(f"DIFFERENCE {name}: {type(error).__name__} {' '.join(str(error).split())[:200]}")


def hub(folder, frames):
    """Return the number of clips that `datasets` loads and decodes to `frames` frames."""
    loaded = datasets.load_dataset(str(folder), cache_dir=str(FILES / "cache"))
    clips = (row.get("video") or row["mp4"] for rows in loaded.values() for row in rows)
    return sum(len([*clip]) == frames for clip in clips)


def shards(folder):
    tars = sorted(map(str, folder.glob("*.tar")))
    samples = webdataset.WebDataset(tars, shardshuffle=False).decode()
    return sum(VideoDecoder(sample["mp4"]).metadata.num_frames == 8 and bool(sample["txt"]) for sample in samples)


def croissant(folder):
    data = mlcroissant.Dataset(folder / "croissant.json")
    assert not data.metadata.ctx.issues.errors, data.metadata.ctx.issues.report()
    (records,) = [each for each in data.metadata.record_sets if each.name == "clips"] or data.metadata.record_sets[:1]
    return sum(1 for _ in data.records(records.uuid))


def lightning(folder):
    count = 0
    for split in sorted({path.name.split("-")[0] for path in folder.glob("*.parquet")}):
        part = FILES / f"litdata-{split}"
        part.mkdir()
        for path in folder.glob(f"{split}-*.parquet"):
            (part / path.name).symlink_to(path)
        litdata.index_parquet_dataset(str(part))
        loader = litdata.streaming.item_loader.ParquetLoader()
        count += sum(1 for _ in litdata.StreamingDataset(str(part), item_loader=loader))
    return count


check("datasets, examples/people", lambda: hub(people, 8), 24)
for kind in ("videofolder", "parquet", "webdataset"):
    check(f"datasets, {kind}", lambda kind=kind: hub(FILES / kind, 8), 6)
    check(f"mlcroissant, {kind}", lambda kind=kind: croissant(FILES / kind), 6)
check("mlcroissant, examples/people", lambda: croissant(people), 24)
check("webdataset", lambda: shards(FILES / "webdataset"), 6)
check("litdata, parquet", lambda: lightning(FILES / "parquet"), 6)
print("SUMMARY 10 reads")
