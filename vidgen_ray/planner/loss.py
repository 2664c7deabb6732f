"""Loss by speed options: how far what a stage makes with an option is from what it makes without, and the limit of each option.

Options that change more than the rounding are compared by three images or clips, not by a call of a network. PSNR and SSIM say
how close they are, not which is better: denoising may lead to another image of the same quality. Hence the limits are low
enough for that, and high enough to reject another content.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from vidgen_ray.errors import FrozenModel, SetupError, StageError
from vidgen_ray.profile import Profile
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import FaceFeatures, Frames, Image, Item
from vidgen_ray.stages.instantid import SAME_PERSON, ClipLikenessStage, InstantIDStage, sampled_frames
from vidgen_ray.stages.speed import is_eight_bit_attention

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

COMPARED_SHOTS = 3
"""Shots that are compared."""
EQUAL_DB = 99.0
"""PSNR that stands for equal pixels."""


class LossLimit(FrozenModel):
    """Largest loss with which an option is used, in the worst of the shots."""

    psnr_db: float
    """Lowest peak signal-to-noise ratio."""
    ssim: float
    """Lowest structural similarity, 0 to 1."""
    likeness: float = 0.03
    """Largest loss of likeness. The mean over a clip varies by about 0.02 with the rounding. *Assumed.*"""


DEFAULT_LIMIT = LossLimit(psnr_db=28, ssim=0.85)
"""Limit of options without one of their own. FLUX.1-dev on 200 prompts keeps its CLIP score within 0.3 % and ImageReward within
3.5 % at a mean of 31.5 to 33.8 dB (cache-dit, bench/README.md). A video model has LPIPS of 0.013 at 36 dB, 0.12 at 24 and 0.32
at 18 (vllm-omni #5840). The worst of three shots is some dB below the mean."""
LIMITS: Mapping[str, LossLimit] = {
    # Rounding to 3 bits in each layer moves all details a little, but keeps the composition.
    "quantize": LossLimit(psnr_db=24, ssim=0.8),
    # Changes the last steps only, which draw details.
    "guidance_interval": DEFAULT_LIMIT,
    # Rounds in each layer, as `quantize`. Of the backends, only those in 8 bits.
    "attention_backend": LossLimit(psnr_db=24, ssim=0.8),
    # Its figures are those of such a cache.
    "first_block_cache": DEFAULT_LIMIT,
}
"""Option that changes more than the rounding -> its limit."""


def limit_of(option: str, value: JsonValue) -> LossLimit | None:
    """Return the limit of a value of an option. `None` if it changes no more than the rounding."""
    is_off = value in (None, False, "none")
    is_exact = option == "attention_backend" and not is_eight_bit_attention(value)
    return None if is_off or is_exact else LIMITS.get(option)


class Loss(FrozenModel):
    """Difference of what a stage makes with an option from what it makes without, in the worst shot."""

    psnr_db: float
    """Lowest peak signal-to-noise ratio of a shot."""
    ssim: float
    """Lowest structural similarity of a shot."""
    likeness: float | None = None
    """Largest loss of likeness of a shot. `None` if no shot shows the face of the photo, or there are no face models."""

    def above(self, limit: LossLimit) -> str:
        """Return what is above the limit. Empty if nothing is."""
        # Also for NaN.
        if not self.psnr_db >= limit.psnr_db:
            return f"loses too much: PSNR {self.psnr_db:.1f} dB, at least {limit.psnr_db:g} is allowed"
        if not self.ssim >= limit.ssim:
            return f"loses too much: SSIM {self.ssim:.2f}, at least {limit.ssim:g} is allowed"
        if self.likeness is not None and not self.likeness <= limit.likeness:
            return f"loses too much: likeness {-self.likeness:+.3f}, a loss of at most {limit.likeness:g} is allowed"
        return ""

    def __str__(self) -> str:
        likeness = "" if self.likeness is None else f", likeness {-self.likeness:+.3f}"
        return f"PSNR {self.psnr_db:.1f} dB, SSIM {self.ssim:.3f}{likeness} in the worst of {COMPARED_SHOTS} shots"


def loss_of(plain: Sequence[Frames], tried: Sequence[Frames], likeness: Iterable[float | None] = ()) -> Loss:
    """Return the loss of clips (T, H, W, 3) that were made with an option, compared with those without.

    `likeness`: that of the clips without the option and then of those with it. Empty without face models.
    """
    pairs = list(zip(plain, tried, strict=True))
    known = list(likeness)
    lost = [_lost_likeness(*each) for each in zip(known[: len(pairs)], known[len(pairs) :], strict=True)]
    return Loss(
        psnr_db=min(psnr_of(before, after) for before, after in pairs),
        ssim=min(ssim_of(before, after) for before, after in pairs),
        likeness=max((each for each in lost if each is not None), default=None),
    )


def _lost_likeness(before: float | None, after: float | None) -> float | None:
    """Return the lost likeness of a shot. `None` if it does not show the person without the option either."""
    if before is None or before < SAME_PERSON:
        return None
    return before - (after or 0.0)


def psnr_of(plain: NDArray[np.uint8], tried: NDArray[np.uint8]) -> float:
    """Return the peak signal-to-noise ratio of all pixels in dB."""
    import numpy as np

    error = float(np.mean((plain.astype(np.float32) - tried) ** 2))
    return min(EQUAL_DB, 10 * float(np.log10(255**2 / error))) if error else EQUAL_DB


def ssim_of(plain: Frames, tried: Frames) -> float:
    """Return the mean structural similarity of evenly spaced frames."""
    import numpy as np
    from skimage.metrics import structural_similarity

    similarities = [
        structural_similarity(plain[n], tried[n], channel_axis=-1)  # type: ignore[no-untyped-call]  # scikit-image is untyped
        for n in sampled_frames(len(plain))
    ]
    return float(np.mean(similarities))


def example_shots(shots: Sequence[Shot]) -> list[Shot]:
    """Return COMPARED_SHOTS shots with different seeds: the first ones, repeated if there are fewer."""
    repeated = islice(cycle(shots), COMPARED_SHOTS)
    return [shot.model_copy(update={"seed": number}) for number, shot in enumerate(repeated)]


def example_pictures() -> list[Image]:
    """Return as many photos as there are shots. The first one shows a face."""
    from skimage import data

    return [getattr(data, name)() for name in ("astronaut", "coffee", "chelsea")]


def with_picture(item: Item, picture: Image, face: FaceFeatures | None) -> Item:
    """Return the item with a photo in place of invented images, and with the features of a real face, if there are any."""
    from vidgen_ray.media.images import cover_crop

    image = cover_crop(picture, item.shot.width, item.shot.height)
    found: dict[str, Any] = {"image": image, "last_image": image, "photos": (picture,), "face": face}
    replaced = {name: found[name] for name in item.artefacts if found.get(name) is not None}
    return Item(item.shot, {**item.artefacts, **replaced})  # type: ignore[typeddict-item]


def example_face(profile: Profile) -> FaceFeatures | None:
    """Return the features of the face in the first picture. `None` without face models on this machine that find it."""
    try:
        with InstantIDStage(profile.params(InstantIDStage)) as faces:
            return faces.features(example_pictures()[:1])
    except (SetupError, StageError):
        return None


def likenesses(profile: Profile, face: FaceFeatures, clips: Iterable[Frames]) -> list[float | None]:
    """Return the mean likeness of each clip to this face. `None` if it shows none."""
    with ClipLikenessStage(profile.params(ClipLikenessStage)) as stage:
        items = [Item(Shot(prompt="face"), {"face": face, "frames": frames}) for frames in clips]
        return [stage(item)["clip_likeness"].mean for item in items]


def as_clip(result: NDArray[np.uint8]) -> Frames:
    """Return an image or a clip as frames (T, H, W, 3)."""
    return result if result.ndim == 4 else result[None]
