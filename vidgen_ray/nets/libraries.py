"""Log settings for diffusers and transformers."""

import warnings
from functools import lru_cache


@lru_cache(maxsize=1)
def silence_libraries() -> None:
    """Turn off progress bars and warnings. Call before the first model is loaded. Idempotent."""
    import diffusers
    import transformers

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    # diffusers' own ControlNet for FLUX imports FluxPosEmbed from the deprecated module.
    warnings.filterwarnings("ignore", "`FluxPosEmbed` is deprecated", FutureWarning)
