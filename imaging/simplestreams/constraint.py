"""Which images somebody wants: series and architectures of one stream, in one region of a cloud."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from imaging.errors import InvalidArgumentError
from imaging.simplestreams.model import CloudSpec
from imaging.simplestreams.paths import RELEASED_STREAM

ARCHES = ("amd64", "i386", "armhf", "arm64", "ppc64el")
"""What is looked for if nobody says, in this order."""

DISTRO_INFO = Path("/usr/share/distro-info/ubuntu.csv")
"""What the distribution knows about releases, if its package is installed."""

_SERIES = {
    "precise": "12.04",
    "quantal": "12.10",
    "raring": "13.04",
    "saucy": "13.10",
    "trusty": "14.04",
    "utopic": "14.10",
    "vivid": "15.04",
    "centos7": "7",
} | {name: name for name in ("win2012hvr2", "win2012hv", "win2012r2", "win2012", "win7", "win8", "win81")}
"""What the original knew by itself."""

_LATER_SERIES = {"xenial": "16.04", "bionic": "18.04", "focal": "20.04", "jammy": "22.04", "noble": "24.04"}
"""Long-term releases since; others come from the distribution's list."""

_VERSION = re.compile(r"\d{1,3}(\.\d{1,3})*\Z")


@cache
def _listed(path: Path) -> Mapping[str, str]:
    """Series and versions of the distribution's list; none without it."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {row["series"]: row["version"].split()[0] for row in rows if row.get("series") and row.get("version")}


def supported_series(*, compat: bool = False, distro_info: Path = DISTRO_INFO) -> dict[str, str]:
    """Series and their versions, by series."""
    later = {} if compat else _LATER_SERIES
    return dict(sorted({**later, **_listed(distro_info), **_SERIES}.items()))


def series_version(series: str, *, compat: bool = False) -> str:
    """The version of a series; a version stands for itself. InvalidArgumentError for anything else."""
    version = supported_series(compat=compat).get(series)
    if version is None and not compat and _VERSION.match(series):
        version = series
    if version is None:
        raise InvalidArgumentError(f'invalid series "{series}"')
    return version


def product_id(version: str, arch: str, stream: str = "") -> str:
    """The product's name in a catalogue of that stream."""
    part = "" if stream in {"", RELEASED_STREAM} else f".{stream}"
    return f"com.ubuntu.cloud{part}:server:{version}:{arch}"


@dataclass(frozen=True, slots=True)
class ImageConstraint:
    """Empty ``series`` are all that are known, empty ``arches`` the usual ones."""

    region: str = ""
    endpoint: str = ""
    series: Sequence[str] = ()
    arches: Sequence[str] = ()
    stream: str = ""
    compat: bool = False

    @property
    def cloud(self) -> CloudSpec:
        """The cloud it is about; empty for any."""
        return CloudSpec(self.region, self.endpoint)

    def index_ids(self) -> None:
        """Images are not looked up by content id."""
        return

    def product_ids(self) -> list[str]:
        """Products in order of preference: each series, and in it each architecture."""
        series = self.series or list(supported_series(compat=self.compat))
        versions = [series_version(one, compat=self.compat) for one in series]
        return [product_id(version, arch, self.stream) for version in versions for arch in self.arches or ARCHES]

    def __str__(self) -> str:
        """The form error messages have always had."""
        series, arches = " ".join(self.series), " ".join(self.arches)
        return (
            f"&{{LookupParams:{{CloudSpec:{{Region:{self.region} Endpoint:{self.endpoint}}} "
            f"Series:[{series}] Arches:[{arches}] Stream:{self.stream}}}}}"
        )
