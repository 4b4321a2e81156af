"""The Hugging Face hub: is it there at all? Found out in seconds, not after the libraries' own retries."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

CONNECT_SECONDS = 5.0


def reachable() -> bool:
    """Whether the hub (or the mirror that HF_ENDPOINT names) answers."""
    import huggingface_hub.constants as constants

    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=CONNECT_SECONDS).close()
    except urllib.error.HTTPError:
        return True  # it answered
    except OSError:
        return False
    return True


@contextmanager
def offline_unless_reachable() -> Iterator[None]:
    """Without a hub, datasets tries for half a minute; told to be offline, it looks in the cache at once."""
    import datasets.config
    import huggingface_hub.constants as constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if not reachable():
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
