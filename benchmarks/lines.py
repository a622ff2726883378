"""Results as JSON lines."""

import json
import os
from typing import Any


def say(line: dict[str, Any]) -> None:
    """Print a line, on rank 0 alone where torchrun started ranks."""
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(line), flush=True)
