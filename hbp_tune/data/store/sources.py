"""A run's data sets as they were loaded, and the way from a sample back to its file."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from pyarrow.parquet import ParquetFile

from hbp_tune.config.sources import DatasetSettings
from hbp_tune.data.chats.json_lines import is_json_lines, numbered_lines
from hbp_tune.data.store.rows import BadRow, SampleSource
from hbp_tune.planning.plans.draw import draw_samples
from hbp_tune.reporting.formats import write_count
from hbp_tune.reporting.places import RowPlace
from hbp_tune.reporting.terminal.bad_rows import BadRowList


class Counts(Protocol):
    """What a token store and an estimate both tell of their samples."""

    @property
    def lengths(self) -> NDArray[np.int32]:
        """``int32[num_samples]``, tokens per sample."""

    @property
    def sources(self) -> NDArray[np.int16]:
        """``int16[num_samples]``, the data set of each."""

    @property
    def rows(self) -> NDArray[np.int32]:
        """``int32[num_samples]``, its row there."""

    @property
    def num_targets(self) -> NDArray[np.int32]:
        """``int32[num_samples]``, labels of each that count toward the loss."""

    @property
    def bad_rows(self) -> tuple[BadRow, ...]:
        """The rows that are not samples."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DataSource:
    """One data set, loaded.

    Args:
        settings: what it was loaded by.
        samples: its rows, without those that could not be loaded.
        rows: ``int32[len(samples)]``, each one's row in the data set as it is on disk; None where all were loaded.
        bad_rows: the rows that could not be loaded, with the reason.
    """

    settings: DatasetSettings
    samples: SampleSource
    rows: NDArray[np.int32] | None = None
    bad_rows: Mapping[int, str] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """All rows, good and bad."""
        return len(self.samples) + len(self.bad_rows)

    def places(self, rows: Sequence[int]) -> list[RowPlace]:
        """Say which files some of ``samples``'s rows come from; reads the files, so only for what is reported."""
        return self._places_on_disk(list(rows) if self.rows is None else self.rows[list(rows)].tolist())

    def bad_places(self) -> list[RowPlace]:
        """Say where the rows are that could not be loaded."""
        return self._places_on_disk(list(self.bad_rows))

    def _places_on_disk(self, rows: Sequence[int]) -> list[RowPlace]:
        label = self.settings.label
        found = _find_rows(label, self.settings.files, self.num_rows, rows) if rows else {}
        return [found.get(row) or RowPlace(dataset=label, row=row) for row in rows]


def _find_rows(label: str, files: Sequence[Path], num_rows: int, rows: Iterable[int]) -> dict[int, RowPlace]:
    """Find rows of a data set in its files; none where the files do not hold just these rows (a split, a filter)."""
    wanted = set(rows)
    found: dict[int, RowPlace] = {}
    start = 0
    for file in files:
        stop = start
        if file.name.lower().endswith(".parquet"):
            stop += ParquetFile(file).metadata.num_rows
            inside = (row for row in wanted if start <= row < stop)
            found |= {row: RowPlace(dataset=label, file=str(file), row=row - start) for row in inside}
        elif is_json_lines(file):
            for number, _ in numbered_lines(file):
                if stop in wanted:
                    found[stop] = RowPlace(dataset=label, file=str(file), row=stop - start, line=number)
                stop += 1
        else:
            return {}
        start = stop
    return found if start == num_rows else {}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoadedData:
    """Some data sets with the counts of their samples: sample ids run through all of them.

    Args:
        sources: in order.
        counts: a token store, or an estimate.
    """

    sources: tuple[DataSource, ...]
    counts: Counts

    @property
    def labels(self) -> tuple[str, ...]:
        """The data sets' labels."""
        return tuple(source.settings.label for source in self.sources)

    def draw(self, *, seed: int, epoch: int) -> NDArray[np.int32]:
        """Draw an epoch's sample ids by the data sets' weights; see `draw_samples`."""
        weights = [source.settings.weight for source in self.sources]
        return draw_samples(self.counts.sources, weights, seed=seed, epoch=epoch)

    def places(self, sample_ids: Iterable[int]) -> list[RowPlace]:
        """Say where samples come from, in the order in which they are asked for."""
        return self._places([(int(self.counts.sources[i]), int(self.counts.rows[i])) for i in sample_ids])

    def bad_rows(self) -> BadRowList:
        """Give every bad row, with the reason: those that could not be loaded first."""
        listed = [
            (place, reason)
            for source in self.sources
            for place, reason in zip(source.bad_places(), source.bad_rows.values(), strict=True)
        ]
        places = self._places([(row.source, row.row) for row in self.counts.bad_rows])
        listed += [(place, row.reason) for place, row in zip(places, self.counts.bad_rows, strict=True)]
        return BadRowList(num_rows=sum(source.num_rows for source in self.sources), listed=listed)

    def describe(self) -> list[str]:
        """Say what each data set holds, a line each, and what was done to rows of theirs."""
        lines = []
        for index, source in enumerate(self.sources):
            of_source = self.counts.sources == index
            num_bad = len(source.bad_rows) + sum(row.source == index for row in self.counts.bad_rows)
            lines.append(
                f"Data set {source.settings.label}: {source.num_rows:,} rows, {num_bad:,} of them bad, "
                f"{int(self.counts.lengths[of_source].sum(dtype=np.int64)):,} tokens, "
                f"{int(self.counts.num_targets[of_source].sum(dtype=np.int64)):,} targets; weight {source.settings.weight:g}"
                f"{f'; {decided}' if (decided := getattr(source.samples, 'description', '')) else ''}"
            )
        for note in getattr(self.counts, "notes", ()):  # an estimate has none
            rows = ", ".join(map(str, self._places(note.first)))
            lines.append(f"{write_count(note.num_samples, 'sample')}: {note.text} ({note.count:,} times; first: {rows})")
        return lines

    def _places(self, rows: Sequence[tuple[int, int]]) -> list[RowPlace]:
        places: dict[tuple[int, int], RowPlace] = {}
        for index, source in enumerate(self.sources):
            own = [row for place, row in rows if place == index]
            places |= {(index, row): place for row, place in zip(own, source.places(own), strict=True)}
        return [places[row] for row in rows]
