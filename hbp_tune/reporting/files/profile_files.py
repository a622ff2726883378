"""Saved profiles: what was measured, on which machine, with which model and settings; reused and extended by later runs."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hbp_tune.errors import ConfigError
from hbp_tune.planning.costs.measurements import Measurement
from hbp_tune.planning.plans.records import PackingGroup

_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """Measurements of groups.

    Args:
        machine: device, ranks, memory: what times and peaks depend on besides the model.
        model: its shape, and the settings of a step.
        versions: of the software, for people.
        measurements: in the order in which they were taken.
    """

    machine: Mapping[str, Any]
    model: Mapping[str, Any]
    versions: Mapping[str, str]
    measurements: tuple[Measurement, ...] = ()

    def find(self, group: PackingGroup, doc_lens: Sequence[int]) -> Measurement | None:
        """Give the measurement of a group, whatever its name, with these documents; None where there is none."""
        wanted = _key(group, doc_lens)
        return next((one for one in self.measurements if _key(one.group, one.doc_lens) == wanted), None)


def _key(group: PackingGroup, doc_lens: Sequence[int]) -> tuple[object, ...]:
    return (group.pack_len, group.cp_degree, group.ac_layers, group.ac_mode, tuple(doc_lens))


def read_profile(path: Path) -> Profile | None:
    """Read a saved profile; None where there is none.

    Raises:
        ConfigError: the file is not a profile.
    """
    if not path.exists():
        return None
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        measurements = [
            Measurement(
                group=PackingGroup(**one["group"]),
                world_size=one["world_size"],
                doc_lens=tuple(one["doc_lens"]),
                micro_step_s=one["micro_step_s"],
                peak_gib=one["peak_gib"],
            )
            for one in read["measurements"]
        ]
        return Profile(machine=read["machine"], model=read["model"], versions=read["versions"], measurements=tuple(measurements))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a profile of groups: {type(error).__name__}: {error}; remove it, or set profile.file to another path"
        ) from error


def write_profile(path: Path, profile: Profile) -> None:
    """Write a profile aside and rename it, so that a run that is killed leaves what it had.

    Args:
        path: of the file.
        profile: all of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.write_text(json.dumps({"format": _FORMAT} | asdict(profile), indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


def check_same(saved: Profile, now: Profile, path: Path) -> None:
    """Refuse a profile of another machine, or of another model or settings.

    Raises:
        ConfigError: names the first difference.
    """
    for of in ("machine", "model"):
        old, new = getattr(saved, of), getattr(now, of)
        for key in dict.fromkeys([*old, *new]):
            if old.get(key) != new.get(key):
                raise ConfigError(
                    f"{path} was measured with {of}.{key}={old.get(key)}, this run has {new.get(key)}: its times and memory "
                    f"would mislead. Set profile.file to another path, or profile.force=True to measure all anew in its place"
                )
