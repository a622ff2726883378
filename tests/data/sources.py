"""Data sets for tests of data and configurations."""

import json
from pathlib import Path
from typing import Any

CHAT = {"source": "json", "split": "train", "conversation_column": "messages", "conversation_style": "openai"}


class Rows:
    """A data set of given rows; a row that is an exception is raised."""

    def __init__(self, *rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if isinstance(self.rows[index], Exception):
            raise self.rows[index]
        tokens, labels = self.rows[index]
        return {"tokens": tokens, "labels": labels}


def written(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(*turns: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]}
