"""The Hugging Face hub, where it cannot be reached: fail in seconds instead of after transformers' half a minute of retries."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

_TIMEOUT = 5.0  # seconds


def use_cache_without_hub() -> None:
    """Let this process use only the hub's cache on disk if the hub does not answer one request, and warn of it."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT)
    except Exception as err:  # requests' or httpx's, depending on the version of huggingface_hub
        constants.HF_HUB_OFFLINE = True
        logger.warning("%s is not reached (%s): only files in its cache on disk are used", constants.ENDPOINT, err)
