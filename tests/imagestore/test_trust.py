"""Signatures of app containers, finding them by name, and what they are laid over."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from click.testing import CliRunner, Result
from requests.adapters import HTTPAdapter

from image_service.cli import cli
from image_service.imagestore.discovery import default_labels, find_image_urls
from image_service.imagestore.fetching import Downloader, PullPolicy, signature_url
from image_service.imagestore.steps import chain
from image_service.imagestore.store import ImageStore
from imaging.aci import AppName, parse_app_string
from imaging.errors import BadDataError, InvalidArgumentError, MistifyError, NotFoundError, UnavailableError
from imaging.simplestreams.signing import Signer, Verifier
from tests.imagestore.images import aci, files, files_of, key_of, put
from tests.simplestreams.catalogues import key

PATH = "/app.aci"
IMAGE = aci(labels={"version": "1.0"})
PACKED = gzip.compress(IMAGE)


class Site(ThreadingHTTPServer):
    """Answers by path, each list of them in turn; the last one stays."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: dict[str, list[tuple[int, bytes]]] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def sign(self, path: str, data: bytes, name: str = "catalogue") -> bytes:
        """Offer a file with its signature."""
        with Signer(key(name).private) as signer:
            signature = signer.detach_sign(data)
        self.answers |= {path: [(200, data)], f"{path}.asc": [(200, signature)]}
        return signature


class _Handler(BaseHTTPRequestHandler):
    server: Site
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        answers = self.server.answers.get(self.path, [(404, b"")])
        status, body = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def _running() -> Iterator[Site]:
    with Site() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(30)


@pytest.fixture
def site() -> Iterator[Site]:
    with _running() as server:
        yield server


@pytest.fixture
def downloader(store: ImageStore) -> Iterator[Downloader]:
    made = Downloader(store, verifier=Verifier(key().public))
    yield made
    made.close()


def _failure(downloader: Downloader, url: str) -> MistifyError:
    with pytest.raises(MistifyError) as caught:
        downloader.fetch(url)
    return caught.value


# -- signatures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "signature"),
    [
        ("https://example.com/app.aci", "https://example.com/app.aci.asc"),
        ("https://example.com/a/b.aci?token=x", "https://example.com/a/b.aci.asc?token=x"),
    ],
)
def test_signature_is_beside_the_image(url: str, signature: str) -> None:
    assert signature_url(url) == signature


def test_fetch_with_keys_takes_what_they_signed_as_it_was_sent(
    site: Site, downloader: Downloader, store: ImageStore
) -> None:
    site.sign(PATH, PACKED)
    assert downloader.fetch(site.url + PATH) == key_of(IMAGE)
    assert store.get_remote(site.url + PATH).sig_url == f"{site.url}{PATH}.asc"
    assert site.asked == [f"{PATH}.asc", PATH]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("changed", "invalid signature: hash tag doesn't match"),
        ("of the unpacked bytes", "invalid signature: hash tag doesn't match"),
        ("by a stranger", "signature made by unknown entity"),
        ("no signature", "no PGP signature embedded in plain text data"),
    ],
)
def test_fetch_with_keys_refuses_and_leaves_nothing(
    site: Site, downloader: Downloader, store: ImageStore, how: str, says: str
) -> None:
    site.sign(
        PATH, IMAGE if how == "of the unpacked bytes" else PACKED, "stranger" if "stranger" in how else "catalogue"
    )
    if how == "changed":
        site.answers[PATH] = [(200, gzip.compress(aci(content=b"other")))]
    elif how == "of the unpacked bytes":
        site.answers[PATH] = [(200, PACKED)]
    elif how == "no signature":
        site.answers[f"{PATH}.asc"] = [(200, b"<html>")]
    err = _failure(downloader, site.url + PATH)
    assert isinstance(err, BadDataError)
    assert err.message == f"cannot trust {site.url}{PATH}: {says if how == 'no signature' else 'openpgp: ' + says}"
    assert (files(store), store.list_aci_infos(), store.list_remotes()) == (set(), [], [])


def test_fetch_with_keys_of_what_has_no_signature_does_not_ask_for_the_image(
    site: Site, downloader: Downloader, store: ImageStore
) -> None:
    site.answers[PATH] = [(200, PACKED)]
    err = _failure(downloader, site.url + PATH)
    assert (type(err), err.message) == (NotFoundError, f"no signature at {site.url}{PATH}.asc")
    assert (site.asked, files(store)) == ([f"{PATH}.asc"], set())


def test_signature_that_is_not_ready_is_asked_for_again_after_the_image(site: Site, downloader: Downloader) -> None:
    signature = site.sign(PATH, PACKED)
    site.answers[f"{PATH}.asc"] = [(202, b""), (200, signature)]
    assert downloader.fetch(site.url + PATH) == key_of(IMAGE)
    assert site.asked == [f"{PATH}.asc", PATH, f"{PATH}.asc"]


def test_signature_that_is_never_ready_is_an_error(site: Site, downloader: Downloader, store: ImageStore) -> None:
    site.sign(PATH, PACKED)
    site.answers[f"{PATH}.asc"] = [(202, b"")]
    err = _failure(downloader, site.url + PATH)
    assert (type(err), err.message) == (
        UnavailableError,
        f"the signature at {site.url}{PATH}.asc is not ready yet",
    )
    assert files(store) == set()


def test_image_that_came_without_keys_is_fetched_again_with_them(site: Site, store: ImageStore) -> None:
    site.sign(PATH, PACKED)
    Downloader(store).fetch(site.url + PATH)
    site.answers[PATH] = [(200, gzip.compress(IMAGE, 1))]
    checked = Downloader(store, verifier=Verifier(key().public))
    with pytest.raises(BadDataError, match="cannot trust"):
        checked.fetch(site.url + PATH, policy=PullPolicy.NEW)


# -- names -----------------------------------------------------------------------------------------------------------------


class _Elsewhere(HTTPAdapter):
    """Sends requests for the world's hosts to the test's server, the host as the first part of the path."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        wanted = str(request.url)
        parts = urlsplit(wanted)
        request.url = f"{self._url}/{parts.netloc}{parts.path}" + (f"?{parts.query}" if parts.query else "")
        answer = super().send(request, *args, **kwargs)
        request.url = answer.url = wanted
        return answer


@pytest.fixture
def session(site: Site) -> Iterator[requests.Session]:
    with requests.Session() as made:
        made.mount("https://", _Elsewhere(site.url))
        yield made


def _page(*tags: tuple[str, str]) -> bytes:
    lines = [f'<meta name="ac-discovery" content="{prefix} {template}">' for prefix, template in tags]
    return f"<html><head>{''.join(lines)}<title>x</title></head></html>".encode()


TEMPLATE = "https://images.example.com/{name}-{version}-{os}-{arch}.{ext}"
WANTED = parse_app_string("example.com/tools/app:1.0,os=linux,arch=s390x")
FOUND = "https://images.example.com/example.com/tools/app-1.0-linux-s390x.aci"


def test_name_is_found_by_the_template_of_its_nearest_page(site: Site, session: requests.Session) -> None:
    other = ("example.com/toolshed", "https://wrong.example.com/{name}")
    wanting = ("example.com", "https://wrong.example.com/{name}-{flavour}")
    plain = ("example.com", "http://insecure.example.com/{name}")
    site.answers["/example.com/tools?ac-discovery=1"] = [
        (200, _page(other, wanting, plain, ("example.com/tools", TEMPLATE)))
    ]
    site.answers["/example.com/?ac-discovery=1"] = [(200, _page(("example.com", "https://far.example.com/{name}")))]
    assert find_image_urls(WANTED, session) == [FOUND]
    assert site.asked == ["/example.com/tools/app?ac-discovery=1", "/example.com/tools?ac-discovery=1"]


@pytest.mark.parametrize("rubbish", [b"<![foo", b"<![foo bar]>", b"\xff\xfe<", b"<!DOCTYPE a [<!FOO>]>", b""])
def test_page_with_rubbish_says_what_it_said_before_it(site: Site, session: requests.Session, rubbish: bytes) -> None:
    site.answers["/example.com/tools/app?ac-discovery=1"] = [(200, rubbish)]
    site.answers["/example.com/tools?ac-discovery=1"] = [(200, _page(("example.com", TEMPLATE)) + rubbish)]
    assert find_image_urls(WANTED, session) == [FOUND]


def test_name_without_labels_means_the_latest_for_this_machine(site: Site, session: requests.Session) -> None:
    site.answers["/example.com/?ac-discovery=1"] = [(200, _page(("example.com", TEMPLATE)))]
    arch = default_labels()["arch"]
    assert find_image_urls(AppName("example.com/app"), session) == [
        f"https://images.example.com/example.com/app-latest-linux-{arch}.aci"
    ]


def test_name_that_nobody_knows_is_not_found(site: Site, session: requests.Session) -> None:
    with pytest.raises(NotFoundError, match=r"no page of example\.com says where images of example\.com/app are"):
        find_image_urls(AppName("example.com/app"), session)
    session.mount("https://", _Elsewhere("http://127.0.0.1:1"))
    with pytest.raises(UnavailableError, match="cannot ask where images are"):
        find_image_urls(AppName("example.com/app"), session)


def _offer(site: Site, name: str, image: bytes, version: str = "latest", arch: str = "") -> None:
    arch = arch or default_labels()["arch"]
    site.answers["/example.com/?ac-discovery=1"] = [(200, _page(("example.com", TEMPLATE)))]
    site.answers[f"/images.example.com/{name}-{version}-linux-{arch}.aci"] = [(200, image)]


@pytest.mark.parametrize(("text", "latest"), [("example.com/app", True), ("example.com/app:1.0", False)])
def test_fetch_by_name_marks_the_latest_only_if_no_version_was_asked_for(
    site: Site, session: requests.Session, store: ImageStore, text: str, *, latest: bool
) -> None:
    app = parse_app_string(text)
    _offer(site, app.name, PACKED, app.labels.get("version", "latest"))
    assert Downloader(store, session).fetch_name(app) == key_of(IMAGE)
    assert store.get_aci_info(key_of(IMAGE)).latest is latest
    asked = len(site.asked)
    assert Downloader(store, session).fetch_name(app, policy=PullPolicy.NEW) == key_of(IMAGE)
    assert len(site.asked) == asked, "what the store has is enough"


def test_fetch_by_name_of_an_image_called_otherwise_is_refused(
    site: Site, session: requests.Session, store: ImageStore
) -> None:
    _offer(site, "example.com/app", aci("example.com/other"))
    with pytest.raises(BadDataError, match="error extracting image manifest") as caught:
        Downloader(store, session).fetch_name(AppName("example.com/app"))
    assert chain(caught.value).endswith('the image is called "example.com/other", not "example.com/app"')
    assert files(store) == set()
    with pytest.raises(NotFoundError, match="pull policy is never"):
        Downloader(store, session).fetch_name(AppName("example.com/app"), policy=PullPolicy.NEVER)


# -- dependencies ----------------------------------------------------------------------------------------------------------


def _image(name: str, *dependencies: Any) -> bytes:
    return aci(f"example.com/{name}", dependencies=[{"imageName": f"example.com/{one}"} for one in dependencies])


def test_dependencies_are_fetched_breadth_first_and_each_once(
    site: Site, session: requests.Session, store: ImageStore
) -> None:
    images = {name: _image(name, *below) for name, below in {"a": "bc", "b": "d", "c": "da", "d": "b"}.items()}
    for name, image in images.items():
        _offer(site, f"example.com/{name}", image)
    downloader = Downloader(store, session)
    first = downloader.fetch_name(AppName("example.com/a"))
    assert downloader.fetch_dependencies(first) == [key_of(images[name]) for name in "bcd"]
    assert files(store) == files_of(*map(key_of, images.values()))
    fetched = [path for path in site.asked if path.endswith(".aci")]
    assert len(fetched) == len(set(fetched)) == 4


def test_dependency_by_id_must_be_that_image(site: Site, session: requests.Session, store: ImageStore) -> None:
    base = _image("base")
    wanted = store.get_aci_info(put(store, base)).image_id
    over = aci("example.com/over", dependencies=[{"imageName": "example.com/base", "imageID": wanted}])
    downloader = Downloader(store, session)
    key_over = put(store, over)
    assert downloader.fetch_dependencies(key_over) == [key_of(base)], "it is here already"
    store.delete_aci(key_of(base))
    _offer(site, "example.com/base", aci("example.com/base", content=b"other"))
    with pytest.raises(BadDataError, match=f"not {wanted}"):
        downloader.fetch_dependencies(key_over)


# -- the command -----------------------------------------------------------------------------------------------------------


def _run(directory: Path, *arguments: object) -> Result:
    environment = {"MISTIFY_CONTAINER_STORE": str(directory / "store")}
    return CliRunner().invoke(cli, ["blobs", *map(str, arguments)], env=environment)


def test_blobs_import_and_fetch_with_a_keyring_want_a_signature(site: Site, tmp_path: Path) -> None:
    keyring, image, other = tmp_path / "keys.asc", tmp_path / "app.aci", tmp_path / "elsewhere"
    keyring.write_bytes(key().public)
    image.write_bytes(PACKED)
    refused = _run(tmp_path, "import", image, "--keyring", keyring, "--json")
    assert (refused.exit_code, "cannot read signature" in refused.stdout) == (1, True)
    signature = site.sign(PATH, PACKED)
    Path(f"{image}.asc").write_bytes(signature)
    other.write_bytes(signature)
    for arguments in (["import", image], ["import", image, "--signature", other], ["fetch", site.url + PATH]):
        done = _run(tmp_path, *arguments, "--keyring", keyring)
        assert (done.exit_code, done.stdout) == (0, f"{key_of(IMAGE)}\n"), done.output
    image.write_bytes(gzip.compress(IMAGE, 1))
    refused = _run(tmp_path, "import", image, "--keyring", keyring)
    assert (refused.exit_code, "cannot trust" in refused.stderr) == (1, True)
    for wrong in (["import", "-", "--keyring", keyring], ["import", image, "--signature", other]):
        assert isinstance(_run(tmp_path, *wrong).exception, SystemExit | InvalidArgumentError)


def test_blobs_fetch_with_dependencies_prints_every_key(site: Site, tmp_path: Path) -> None:
    site.answers[PATH] = [(200, _image("base"))]
    done = _run(tmp_path, "fetch", site.url + PATH, "--dependencies")
    assert (done.exit_code, done.stdout) == (0, f"{key_of(_image('base'))}\n")
    assert "malformed app string" in _run(tmp_path, "fetch", "a:b:c").stderr
