"""What was done to rows that their owner should know, counted over all of them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hbp_tune.data.store.rows import Sample

# So many rows are named.
_NAMED = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """One thing that was done to some rows.

    Args:
        text: what.
        count: how often.
        num_samples: to how many samples.
        first: data set and row of the first of them.
    """

    text: str
    count: int
    num_samples: int
    first: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, sample: Sample) -> Iterator["Note"]:
        """Give the notes of one sample."""
        for text, count in sample.notes.items():
            yield cls(text=text, count=count, num_samples=1, first=((sample.source, sample.row),))


def join_notes(notes: Iterable[Note]) -> list[Note]:
    """Count notes of the same text together, in the order in which they first came."""
    joined: dict[str, Note] = {}
    for note in notes:
        before = joined.get(note.text)
        joined[note.text] = (
            note
            if before is None
            else Note(
                text=note.text,
                count=before.count + note.count,
                num_samples=before.num_samples + note.num_samples,
                first=tuple(dict.fromkeys([*before.first, *note.first]))[:_NAMED],
            )
        )
    return list(joined.values())
