"""Every file of a published, signed tree is tampered with in turn: the error says which one, and nobody gets wrong bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from image_service.catalog_mirror import Mirror, MirrorReport
from imaging.errors import BadDataError
from imaging.simplestreams.signing import NO_SIGNATURE, Signer, Verifier
from imaging.simplestreams.sources import FileSource
from imaging.simplestreams.transfer import items_of
from imaging.simplestreams.tree import TreeReader
from tests.simplestreams.catalogues import key
from tests.simplestreams.trees import default_products, write_tree

BAD_SIGNATURE = "openpgp: invalid signature: hash tag doesn't match"


def _mirror(base: Path, target: Path, name: str) -> MirrorReport:
    source = FileSource(base)
    with Signer(key("mirror").private) as signer:
        return Mirror(TreeReader(source, Verifier(key(name).public)), items_of(source), target, signer=signer).run()


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A mirror's tree, signed by the mirror."""
    base = write_tree(tmp_path / "source", default_products(tmp_path / "source"), signer="catalogue")
    assert _mirror(base, tmp_path / "site", "catalogue").failed == []
    return tmp_path / "site"


def _flip(path: Path, position: int) -> None:
    """Exchange one character for another of its kind."""
    data = bytearray(path.read_bytes())
    data[position] = ord("b") if data[position] == ord("a") else ord("a")
    path.write_bytes(data)


def test_every_document_tampered_with_in_turn_is_named_and_refused(site: Path, tmp_path: Path) -> None:
    documents = sorted(path.name for path in (site / "streams/v1").iterdir())
    assert [name.partition(".")[2] for name in documents] == ["json", "json.gpg", "sjson"] * 2
    for name in documents:
        copy = tmp_path / f"copy-{name}"
        shutil.copytree(site, copy, symlinks=True)
        streams = copy / "streams/v1"
        if not name.endswith(".sjson"):
            for twin in streams.glob("*.sjson"):
                twin.unlink()
        data = (streams / name).read_bytes()
        _flip(streams / name, data.find(b"jammy") if not name.endswith(".gpg") else len(data) // 2)
        with pytest.raises(BadDataError) as caught:
            TreeReader(FileSource(copy), Verifier(key("mirror").public)).read()
        url = f"file://{streams}/{name.removesuffix('.gpg')}"
        refusals = [BAD_SIGNATURE] if not name.endswith(".gpg") else [BAD_SIGNATURE, NO_SIGNATURE]
        assert caught.value.message in [f'cannot trust "{url}": {refusal}' for refusal in refusals], name
        assert len(list(TreeReader(FileSource(site), Verifier(key("mirror").public)).read().items())) == 18


def test_every_image_file_tampered_with_in_turn_is_named_and_not_brought(site: Path, tmp_path: Path) -> None:
    items = list(TreeReader(FileSource(site), Verifier(key("mirror").public)).read().items())
    assert len(items) == 18
    for number, item in enumerate(items):
        file, target = site / item.path, tmp_path / f"target-{number}"
        good = file.read_bytes()
        _flip(file, len(good) // 2)
        report = _mirror(site, target, "mirror")
        [told] = report.failed
        assert told.startswith(f"{item.product} {item.version}: {item.path} is sha256:")
        assert told.endswith(f"its catalogue says {item.digest}")
        assert not (target / item.path).exists()
        assert not (target / f"{item.path}.part").exists()
        file.write_bytes(good)
