"""Scorer of another package: how well the frames of a clip show its prompt, by CLIP.

    cd examples
    vidgen models pull hub:openai/clip-vit-base-patch32
    vidgen score OUT --scorer clip_scorer:ClipTextScorer --weights clip_text=hub:openai/clip-vit-base-patch32
    vidgen query OUT "SELECT id, prompt, clip_text_mean FROM clips ORDER BY clip_text_mean LIMIT 10"

Source: Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision, arXiv:2103.00020.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pyarrow
import torch
from transformers import CLIPModel, CLIPProcessor

from vidgen_ray.dataset.scorers import Clip, Column, Scorer
from vidgen_ray.errors import SetupError
from vidgen_ray.stages.instantid import sampled_frames


class ClipTextScorer(Scorer):
    """Cosine similarity of CLIP's embeddings of the prompt and of 5 frames."""

    name: ClassVar[str] = "clip_text"
    version: ClassVar[int] = 1
    cpu_s_per_frame: ClassVar[float] = 0.03
    num_gpus: ClassVar[float] = 0.25
    columns: ClassVar[Mapping[str, Column]] = {
        "clip_text_mean": Column(pyarrow.float64(), "Mean similarity of prompt and frames, -1 to 1."),
        "clip_text_worst": Column(pyarrow.float64(), "Similarity of the frame that shows the prompt least, -1 to 1."),
    }

    def __init__(self, weights: Path | None) -> None:
        if weights is None:
            raise SetupError("pass --weights clip_text=PATH, the folder of a CLIP model")
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = CLIPModel.from_pretrained(weights, local_files_only=True).eval().to(self._device)
        self._processor = CLIPProcessor.from_pretrained(weights, local_files_only=True)

    @torch.inference_mode()
    def score(self, clip: Clip) -> Mapping[str, Any]:
        frames = [clip.frames[index] for index in sampled_frames(len(clip.frames))]
        inputs = self._processor(text=[clip.row["prompt"]], images=frames, return_tensors="pt", padding=True, truncation=True)
        output = self._model(**inputs.to(self._device))
        # CLIPModel returns embeddings of length 1.
        similarities = (output.image_embeds @ output.text_embeds.T)[:, 0].tolist()
        return {"clip_text_mean": sum(similarities) / len(similarities), "clip_text_worst": min(similarities)}
