"""Four processes import and remove images and are killed at random instants: index and files agree, or verify mends it and says so."""

from __future__ import annotations

import io
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from image_service.imagestore.checking import StoreCheck
from image_service.imagestore.importing import import_image
from image_service.imagestore.oci_checking import OciCheck
from image_service.imagestore.oci_images import OciImages
from image_service.imagestore.store import ImageStore

KILLS = 50
PROCESSES = 4
ROUNDS = -(-KILLS // PROCESSES)

# Imports and removes images of a few kinds in an order of its own; each acknowledged import is read back now and then.
WORKER = """
import io, os, random, sys
from image_service.imagestore.importing import import_image
from image_service.imagestore.oci_images import OciImages
from image_service.imagestore.store import ImageStore
from imaging.errors import MistifyError
from tests.imagestore.images import aci
from tests.imagestore.test_oci_images import Layout
chance = random.Random(int(sys.argv[2]))
store = ImageStore(sys.argv[1])
os.write(1, b"ready\\n")
while True:
    number = chance.randrange(6)
    if chance.random() < 0.3:
        layout = Layout()
        image = layout.tag(layout.image(b"base" * 9000, b"%d" % number * 9000), f"v{number}").pack()
    else:
        image = aci(content=b"%d" % number * 40_000, labels={"version": str(number)})
    [done] = import_image(store, io.BytesIO(image))
    os.write(1, b"i")
    if chance.random() < 0.5:
        try:
            store.delete_aci(done.key) if done.kind == "aci" else OciImages(store).delete(f"image:v{number}")
        except MistifyError:
            os.write(1, b"x")  # another process was faster
"""


def _kill_four(directory: Path, chance: random.Random, seed: int) -> None:
    """Run the workers, kill each after a random number of acknowledgements and a random moment."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(directory), str(seed * 10 + number)], stdout=subprocess.PIPE
        )
        for number in range(PROCESSES)
    ]
    try:
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == b"ready\n"
        for worker in chance.sample(workers, len(workers)):
            assert worker.stdout is not None
            worker.stdout.read(chance.randint(1, 4))
            worker.send_signal(signal.SIGKILL)
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate(timeout=60)


def _check(directory: Path, context: str) -> int:
    """Everything the index has must be there and whole; the rest is found, said and gone afterwards. How much was found."""
    with ImageStore(directory) as store:
        images = OciImages(store)
        check, oci = StoreCheck(store), OciCheck(images, store)
        found = check.verify() + oci.verify()
        strays = {
            "files without a record",
            "a part of no image",
            "a tag's file is not what the index says",
            "temporary file of a dead process",
        }
        problems = {finding.problem.partition(":")[0] for finding in found}
        assert problems <= strays, (context, found)
        mended = check.verify(repair=True) + oci.verify(repair=True)
        assert len(mended) >= len(found), context
        assert all(finding.repair for finding in mended), (context, mended)
        assert check.verify() + oci.verify() == [], context
        assert [path for path in directory.rglob("*tmp*") if path.is_file()] == [], context
        for info in store.list_aci_infos():
            with store.open_stream(info.blob_key, verify=True) as file:
                assert len(file.read()) == info.size_bytes, context
        return len(mended)


@pytest.mark.slow
def test_kills_at_random_instants_from_four_processes_leave_index_and_files_in_agreement(
    tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout)
    seed = random.SystemRandom().getrandbits(32)
    chance = random.Random(seed)
    mended = 0
    for number in range(ROUNDS):
        _kill_four(tmp_path / "store", chance, seed + number)
        mended += _check(tmp_path / "store", f"seed {seed}, round {number}")
    assert mended > 0, f"seed {seed}: no kill came between two steps, so nothing was shown"


def test_store_after_a_kill_takes_the_next_import(
    tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.imagestore.images import aci, key_of

    monkeypatch.chdir(checkout)
    _kill_four(tmp_path / "store", random.Random(1), 1)
    with ImageStore(tmp_path / "store") as store:
        image = aci(content=b"after")
        assert import_image(store, io.BytesIO(image))[0].key == key_of(image)
        with store.open_stream(key_of(image)) as file:
            assert file.read() == image
