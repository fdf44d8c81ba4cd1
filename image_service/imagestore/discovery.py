"""Where an app container of a name is: its name begins with a host, and a page there says by which template its images are addressed.

``https://NAME?ac-discovery=1`` is asked, then the same with the last part of the name taken away, until a page has a fitting tag::

    <meta name="ac-discovery" content="PREFIX https://.../{name}-{version}-{os}-{arch}.{ext}">

A template with a label nobody gave is passed over. Without a version the ``latest`` is meant, without a system the one this program
runs on.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from html.parser import HTMLParser

import requests
import urllib3

from imaging.aci import AppName
from imaging.errors import NotFoundError, UnavailableError

TIMEOUT_S = (10.0, 60.0)
"""To connect, and to wait for the next byte."""

PAGE_MAX_BYTES = 1 << 20
"""A page with tags has some kilobytes; what is beyond this is not read."""

ARCHITECTURES = {"x86_64": "amd64", "i686": "i386"}
"""What machines call themselves, where images say something else."""

_HOLE = re.compile(r"\{([^{}]*)\}")


class _Tags(HTMLParser):
    """The tags of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep ``meta`` tags of the right name: a prefix and a template each."""
        given = dict(attrs)
        parts = (given.get("content") or "").split()
        if tag == "meta" and given.get("name") == "ac-discovery" and len(parts) == 2:
            self.found.append((parts[0], parts[1]))


def find_image_urls(app: AppName, session: requests.Session) -> list[str]:
    """Addresses of the image, in the order of the page; NotFoundError, UnavailableError."""
    failure: UnavailableError | None = None
    for name in _ancestors(app.name):
        try:
            page = _read(f"https://{name}?ac-discovery=1", session)
        except UnavailableError as err:
            failure = failure or err
            continue
        templates = [template for prefix, template in _find_tags(page) if _covers(prefix, app.name)]
        urls = [url for url in (_fill(template, app) for template in templates) if url is not None]
        if urls:
            return urls
    if failure is not None:
        raise failure
    raise NotFoundError(f"no page of {app.name.split('/')[0]} says where images of {app.name} are")


def _find_tags(page: str) -> list[tuple[str, str]]:
    """Prefixes and templates, as far as the page can be parsed."""
    tags = _Tags()
    with suppress(AssertionError):  # how the parser tells of a declaration it cannot make sense of
        tags.feed(page)
    return tags.found


def _ancestors(name: str) -> Iterator[str]:
    parts = name.split("/")
    return ("/".join(parts[:count]) for count in range(len(parts), 0, -1))


def _covers(prefix: str, name: str) -> bool:
    """Whether a prefix is the name or ends at one of its slashes."""
    return name == prefix or name.startswith(prefix.rstrip("/") + "/")


def _read(url: str, session: requests.Session) -> str:
    """A page; what is none is an empty one. Only https counts, also where it leads to."""
    try:
        with session.get(url, stream=True, timeout=TIMEOUT_S) as answer:
            if answer.status_code != requests.codes.ok or not answer.url.startswith("https://"):
                return ""
            return answer.raw.read(PAGE_MAX_BYTES, decode_content=True).decode("utf-8", "replace")
    except (requests.RequestException, urllib3.exceptions.HTTPError) as err:
        raise UnavailableError(f"cannot ask where images are: {url[:300]}") from err


def default_labels() -> Mapping[str, str]:
    """What is meant by an image nobody said more of."""
    machine = platform.machine()
    return {"version": "latest", "os": "linux", "arch": ARCHITECTURES.get(machine, machine)}


def _fill(template: str, app: AppName) -> str | None:
    """The address; None if the template asks for what is not known, or is not secure."""
    values = {**default_labels(), **app.labels, "name": app.name, "ext": "aci"}
    if not template.startswith("https://") or not set(_HOLE.findall(template)) <= values.keys():
        return None
    return _HOLE.sub(lambda hole: values[hole[1]], template)
