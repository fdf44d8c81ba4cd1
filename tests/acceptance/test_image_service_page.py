"""The operator's page in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.servers.processes import free_port
from tests.acceptance.browser import Page, open_page, start_browser
from tests.acceptance.daemons import Daemon, start_image_service
from tests.acceptance.image_service_calls import FETCHING, call, sha256, upload
from tests.fakes.source_server import Source, start_source_server
from tests.waiting import wait_until

pytestmark = pytest.mark.backend("browser")

DATA = b"a disk" * 1000
PNG = b"\x89PNG\r\n\x1a\n"
TOKEN = "geheim"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with start_browser(tmp_path_factory.mktemp("browser") / "profile") as address:
        yield address


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with start_image_service(tmp_path_factory.mktemp("page") / "state", **FETCHING) as daemon:
        yield daemon


@pytest.fixture
def service(running: Daemon) -> Daemon:
    for record in call(running, "GET", "/images").json():
        call(running, "DELETE", f"/images/{record['id']}")
    return running


@pytest.fixture
def page(browser: str) -> Iterator[Page]:
    with open_page(browser) as page:
        yield page
        assert page.complaints == []


def says(page: Page, *words: str, selector: str = "body") -> None:
    wait_until(lambda: all(word in page.text(selector) for word in words), f"the page to say {words}")


def test_page_shows_images_and_takes_no_word_of_them_for_a_program(service: Daemon, page: Page, tmp_path: Path) -> None:
    name = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"
    record = upload(service, DATA, **{"X-Image-Name": name, "X-Image-Version": "12", "X-Image-Label": "os=debian"})
    page.go(f"{service.url}/")
    says(page, name, "12", record["id"], "os=debian", record["digest"], "5.9 KiB", "complete", "raw")
    assert page.run("document.title") == "Images"
    assert page.screenshot(tmp_path / "page.png").startswith(PNG)


def test_page_without_images_says_so(service: Daemon, page: Page) -> None:
    page.go(f"{service.url}/")
    says(page, "There are no images yet.")


def test_page_uploads_refuses_and_deletes(service: Daemon, page: Page, tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(DATA)
    page.go(f"{service.url}/")
    page.choose_file("#file", disk)
    page.fill("#name", "näme")
    page.fill("#digest", sha256(b"something else"))
    page.click("#upload button")
    says(page, "has digest", selector="#note")
    page.run("document.querySelector('#digest').value = ''")
    page.click("#upload button")
    says(page, "Uploaded as", selector="#note")
    says(page, "näme", sha256(DATA))
    (record,) = call(service, "GET", "/images").json()
    assert (record["name"], record["digest"]) == ("näme", sha256(DATA))
    page.answer_dialogs = False
    page.click("#images button")
    page.answer_dialogs = True
    assert len(call(service, "GET", "/images").json()) == 1
    page.click("#images button")
    says(page, "There are no images yet.", f"Deleted {record['id']}")
    assert call(service, "GET", "/images").json() == []


def test_page_fetches_and_shows_how_it_goes(service: Daemon, page: Page) -> None:
    with start_source_server() as sources:
        source = Source(DATA, hold_after=1000)
        url = sources.add("/page", source)
        page.go(f"{service.url}/")
        page.fill("#source", url)
        page.click("#fetch button")
        says(page, url, "downloading")
        assert page.run("document.querySelectorAll('#images progress').length") == 1
        source.go.set()
        says(page, "complete", sha256(DATA))
        page.fill("#source", f"{url}?type=container")
        page.run("document.querySelector('#fetch-type').value = 'container'")
        page.fill("#fetch-digest", sha256(b"something else"))
        page.click("#fetch button")
        says(page, "error", "has digest")


def test_page_of_a_guarded_service_opens_and_asks_for_the_token(browser: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    port = free_port()
    arguments = ["-a", str(port), "--state-dir", str(tmp_path / "state"), "--token-file", str(tmp_path / "token")]
    daemon = Daemon("image_service", arguments, port, tmp_path / "service.log")
    daemon.start(wait=False)
    allowed = {"Authorization": f"Bearer {TOKEN}"}
    try:
        wait_until(lambda: "listening on" in daemon.log(), "the service to listen")
        put = call(daemon, "PUT", "/images", data=DATA, headers=allowed | {"X-Image-Type": "kvm"})
        assert put.status_code == 200
        with open_page(browser) as page:
            page.go(f"{daemon.url}/")
            says(page, "Token", "missing or wrong bearer token")
            assert put.json()["id"] not in page.text()
            page.fill("#token", TOKEN)
            says(page, put.json()["id"])
            assert "missing or wrong" not in page.text()
            assert page.complaints == []
        assert call(daemon, "GET", "/", headers={"Host": "elsewhere.example"}).status_code == 403
    finally:
        daemon.stop()
