"""Where documents are, in a tree and in a site's storage."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from imaging.errors import BadDataError, InvalidArgumentError

PRODUCT_METADATA_PATH = "streams/v1/com.ubuntu.cloud-released-imagemetadata.json"
IMAGE_CONTENT_ID = "com.ubuntu.cloud:custom"
IMAGE_IDS = "image-ids"
IMAGE_DOWNLOADS = "image-downloads"
STREAMS_VERSION_V1 = "v1"
INDEX_FILE_VERSION = 1
UBUNTU_CLOUD_IMAGES_URL = "http://cloud-images.ubuntu.com"
DEFAULT_BASE_URL = UBUNTU_CLOUD_IMAGES_URL
RELEASED_IMAGES_PATH = "releases"
RELEASED_STREAM = "released"
BASE_IMAGES_PATH = "images"
INDEX_FORMAT = "index:1.0"
PRODUCTS_FORMAT = "products:1.0"
MIRRORS_FORMAT = "mirrors:1.0"
MIRROR_FILE = "streams/v1/cpc-mirrors.json"

_UNSAFE = re.compile(r"^/|^\.{2,3}/|/\.{2,3}/|^\.{2,3}$|/\.{2,3}$|\x00")

_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2}).{0,2}")


def unsigned_index(streams_version: str, index_version: int) -> str:
    """Path of an unsigned index: ``index.json``, ``index2.json``, ..."""
    number = str(index_version) if index_version > 1 else ""
    return f"streams/{streams_version}/index{number}.json"


def mirrors_path(streams_version: str) -> str:
    """Path of the mirror references, without a suffix."""
    return f"streams/{streams_version}/mirrors"


def unsigned_mirror(streams_version: str) -> str:
    """Path of the unsigned mirror references."""
    return f"{mirrors_path(streams_version)}.json"


def index_storage_path() -> str:
    """Where a site's storage keeps its index."""
    return f"{BASE_IMAGES_PATH}/{unsigned_index(STREAMS_VERSION_V1, INDEX_FILE_VERSION)}"


def product_metadata_storage_path() -> str:
    """Where a site's storage keeps its products."""
    return f"{BASE_IMAGES_PATH}/{PRODUCT_METADATA_PATH}"


def signed_path(path: str) -> str:
    """The clearsigned twin of a document's path."""
    return f"{path.removesuffix('.json')}.sjson" if path.endswith(".json") else path


def join_url(base: str, path: str) -> str:
    """``path`` below ``base``; nothing is normalised."""
    return f"{base}{path}" if base.endswith("/") else f"{base}/{path}"


def check_path(path: str) -> str:
    """A path of a document, if it stays within its tree; BadDataError otherwise."""
    if _UNSAFE.search(path):
        raise BadDataError(f"catalogue has a path that leaves its tree: {path[:200]!r}")
    return path


def image_metadata_url(source: str, stream: str = "") -> str:
    """The base URL of a source that is written as a URL or an absolute path; InvalidArgumentError for anything else.

    The well-known public server keeps each stream below a directory of its own; every other URL is taken as it is.
    """
    if not source:
        return ""
    if source == UBUNTU_CLOUD_IMAGES_URL:
        return join_url(source, RELEASED_IMAGES_PATH if stream in {"", RELEASED_STREAM} else stream)
    scheme = _scheme(source)
    if scheme in {"http", "https", "file", "test"}:
        return source
    if not source.startswith("/"):
        raise InvalidArgumentError(f"{source} is not an absolute path")
    url = f"file://{source}"
    return url if url.endswith(f"/{BASE_IMAGES_PATH}") else f"{url}/{BASE_IMAGES_PATH}"


def _scheme(source: str) -> str:
    """The scheme of a URL, empty for a path; InvalidArgumentError for what is neither."""
    escape = _BAD_ESCAPE.search(source)
    why = f'invalid URL escape "{escape[0]}"' if escape else "missing protocol scheme" if source[0] == ":" else ""
    if why:
        raise InvalidArgumentError(f"invalid default images URL {source}: parse {source}: {why}")
    try:
        return urlsplit(source).scheme
    except ValueError as err:
        raise InvalidArgumentError(f"invalid default images URL {source}: parse {source}: {err}") from err
