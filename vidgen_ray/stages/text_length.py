"""Texts that a text encoder cuts: how many tokens a stage reads of the prompt, without its weights."""

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Stage, StageParams

TOKENIZER = "tokenizer.json"
CACHED_TEXTS = 4096


class CutText(BaseModel):
    """A text of a shot that is longer than a stage reads."""

    model_config = ConfigDict(frozen=True)

    stage: str
    label: str
    """Name of the stage, shown to people."""
    read: int
    """Tokens that the stage reads."""
    tokens: int
    """Tokens of the whole text."""

    def __str__(self) -> str:
        name = self.label if self.label.lower() == self.stage else f"{self.label} ({self.stage})"
        return f"{name} reads the first {self.read} of {self.tokens} tokens"


def cut_texts(stages: Iterable[type[Stage[Any]]], params: Mapping[str, StageParams], shot: Shot) -> tuple[CutText, ...]:
    """Return the texts of the shot that these stages cut. Of stages with the same text encoder, only the first is named."""
    found: dict[object, CutText] = {}
    for stage in stages:
        for read in stage.texts(params[stage.name], shot):
            # A token is at least one byte. Two more mark the begin and the end.
            if len(read.text.encode("utf-8", "replace")) + 2 <= read.tokens:
                continue
            tokens = _count(read.tokenizer, read.text)
            if tokens > read.tokens:
                cut = CutText(stage=stage.name, label=stage.label, read=read.tokens, tokens=tokens)
                found.setdefault(read, cut)
    return tuple(found.values())


@lru_cache(CACHED_TEXTS)
def _count(folder: Path, text: str) -> int:
    return _counter(folder)(text)


@lru_cache
def _counter(folder: Path) -> Callable[[str], int]:
    """Return what counts the tokens of a text, with those that mark its begin and its end. It returns 0 without a tokenizer."""
    try:
        if (file := folder / TOKENIZER).exists():
            # Without transformers, whose import takes seconds.
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(file))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            return lambda text: len(tokenizer.encode(text).ids)
        if folder.is_dir():
            from transformers import AutoTokenizer

            other = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            return lambda text: len(other(text, truncation=False)["input_ids"])
    # Damaged tokenizers raise any exception. They are found when the weights are loaded.
    except Exception:
        pass
    return lambda text: 0
