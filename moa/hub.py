"""Repositories on the Hub, as folders on this machine."""

from pathlib import Path
from typing import Any

from moa.errors import first_line


def download(repository: str, what: str, **options: Any) -> Path:
    """The copy of a repository on this machine, fetched where it is not here yet.

    Args:
        what: is looked for in it, to say so where it cannot be had.
        options: of `huggingface_hub.snapshot_download`.

    Raises:
        FileNotFoundError: no such repository, or none that this machine may or can reach.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, **options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"there is no {what} folder {repository} here, and it could not be downloaded from the Hub either "
            f"({first_line(error)}): check the name, your token and the network"
        ) from error
