"""How diffusers and transformers speak in this process: no progress bars, no notes that no user can act on."""

import warnings
from functools import lru_cache


@lru_cache(maxsize=1)
def silence_libraries() -> None:
    """Call before the first model is loaded. Idempotent."""
    import diffusers
    import transformers

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    # diffusers' ControlNet for FLUX imports it from where diffusers itself no longer wants it.
    warnings.filterwarnings("ignore", "`FluxPosEmbed` is deprecated", FutureWarning)
