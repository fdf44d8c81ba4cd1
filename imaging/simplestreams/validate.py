"""Whether a site's catalogue has the images a deployment needs."""

from __future__ import annotations

from collections.abc import Sequence

from imaging.errors import InvalidArgumentError, NotFoundError
from imaging.simplestreams.constraint import ImageConstraint
from imaging.simplestreams.model import ResolveInfo
from imaging.simplestreams.reader import Lookup, fetch
from imaging.simplestreams.sources import DataSource


def validate_image_metadata(
    sources: Sequence[DataSource], constraint: ImageConstraint, lookup: Lookup | None = None
) -> tuple[list[str], ResolveInfo | None]:
    """Ids of the images found, sorted, and where; NotFoundError if there are none, InvalidArgumentError if something was not said."""
    required = {
        "series": constraint.series,
        "region": constraint.region,
        "endpoint": constraint.endpoint,
        "arches": constraint.arches,
        "sources": sources,
    }
    for name, value in required.items():
        if not value:
            raise InvalidArgumentError(f"required parameter {name} not specified")
    images, info = fetch(sources, constraint, lookup)
    if not images:
        raise NotFoundError(f"no matching images found for constraint {constraint}")
    return sorted((image.id for image in images), key=str.encode), info
