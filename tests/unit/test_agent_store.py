"""The store on the file driver: names, volumes, snapshots, guests, images that are in the pool."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_image.app import CHANGE_THREADS
from agent_image.drivers.base import DatasetKind, StorageDriver
from agent_image.fetch import FetchOrder
from agent_image.guests import DiskRequest
from agent_image.store_pool import Pool
from imaging.errors import (
    AlreadyExistsError,
    BusyError,
    InvalidArgumentError,
    InvalidNameError,
    MistifyError,
    NoSpaceError,
    NotFoundError,
    NotPermittedError,
    UnavailableError,
    WrongKindError,
)
from imaging.names import DatasetName, SnapshotName
from imaging.threads import Offload
from tests.fakes.agent_world import MIB, POOL, World, disk, open_world, read_path
from tests.fakes.image_server import FakeImageServer


@pytest.fixture
def server() -> Iterator[FakeImageServer]:
    with FakeImageServer() as server:
        yield server


@pytest.fixture
async def world(tmp_path: Path, server: FakeImageServer) -> AsyncIterator[World]:
    async with open_world(tmp_path / "state", server) as world:
        yield world


async def have_image(world: World, image_id: str = "img", size_bytes: int = MIB) -> bytes:
    body = disk(sum(image_id.encode()), size_bytes)
    world.server.serve(image_id, body)
    await world.store.request_image(FetchOrder.checked(image_id, kind="kvm"))
    return body


async def refusal(call: Awaitable[object]) -> tuple[type[MistifyError], str]:
    """The class and the text a call fails with."""
    with pytest.raises(MistifyError) as caught:
        await call
    return type(caught.value), caught.value.message


# -- names -----------------------------------------------------------------------------------------------------------


async def test_open_fresh_pool_has_images_and_guests(world: World) -> None:
    assert world.datasets() == ["mistify", "mistify/guests", "mistify/images"]


@pytest.mark.parametrize(
    "wire_id",
    ["..", ".", "images/..", "../other/x", "a//b", "/a", "a/", "-x", "a/-x", "a%b", "a,b", "a b", "a\0b", "x" * 300],
)
async def test_resolve_bad_name_is_refused_with_known_words(world: World, wire_id: str) -> None:
    for call in (
        world.store.get_volume(wire_id),
        world.store.create_volume(wire_id, MIB),
        world.store.delete_dataset(wire_id),
        world.store.list_snapshots(wire_id),
        world.store.create_snapshot(wire_id, "s"),
    ):
        assert await refusal(call) == (InvalidNameError, "not a valid dataset")


async def test_resolve_full_name_means_the_pool_unless_relative_exists(world: World) -> None:
    await world.store.create_volume("v", MIB)
    assert str((await world.store.get_volume("mistify/v")).name) == "mistify/v"
    world.driver.create_filesystem(DatasetName.parse("mistify/mistify"))
    world.driver.create_volume(DatasetName.parse("mistify/mistify/v"), 2 * MIB)
    assert (await world.store.get_volume("mistify/v")).size_bytes == 2 * MIB


@given(wire_id=st.text(alphabet=st.sampled_from("ab./@-%mistify:\0 "), max_size=40))
def test_resolve_any_text_never_leaves_the_pool(wire_id: str) -> None:
    class NothingThere:
        pool = POOL

        def get(self, name: DatasetName) -> None:
            raise NotFoundError("not found")

        get_snapshot = get

    class Directly:
        threads_max = 1

        async def __call__(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    async def resolve() -> None:
        here = cast("Offload", Directly())
        pool = Pool(cast("StorageDriver", NothingThere()), here, here)
        try:
            name = await pool.resolve(wire_id)
        except InvalidNameError:
            return
        dataset = name.dataset if isinstance(name, SnapshotName) else name
        assert dataset.is_within(POOL.root)
        assert not {".", ".."} & set(dataset.parts)

    asyncio.run(resolve())


@pytest.mark.parametrize("wire_id", ["images", "guests", "mistify", "mistify/images", "mistify/guests"])
async def test_delete_dataset_of_layout_is_refused(world: World, wire_id: str) -> None:
    with pytest.raises(NotPermittedError, match="can't be deleted"):
        await world.store.delete_dataset(wire_id)
    assert world.datasets() == ["mistify", "mistify/guests", "mistify/images"]


# -- volumes ---------------------------------------------------------------------------------------------------------


async def test_create_volume_twice_the_same_is_fine(world: World) -> None:
    first = await world.store.create_volume("a/b/v", MIB)
    assert await world.store.create_volume("a/b/v", MIB) == first
    assert first.size_bytes == MIB
    assert read_path(first.device) == bytes(MIB)


async def test_create_volume_other_size_or_kind_already_exists(world: World) -> None:
    await world.store.create_volume("v", MIB)
    await have_image(world)
    await world.store.clone_image("img", "mistify/c")
    for wire_id, size_bytes in (("v", 2 * MIB), ("images", MIB), ("c", MIB)):
        assert await refusal(world.store.create_volume(wire_id, size_bytes)) == (
            AlreadyExistsError,
            "dataset already exists",
        )


@pytest.mark.parametrize(
    ("wire_id", "size_bytes", "text"),
    [
        ("", 0, "need a valid size"),
        ("", -1, "need a valid size"),
        ("", 1, "need an id"),
        ("..", 0, "need a valid size"),
    ],
)
async def test_create_volume_wrong_argument_first_check_wins(
    world: World, wire_id: str, size_bytes: int, text: str
) -> None:
    assert await refusal(world.store.create_volume(wire_id, size_bytes)) == (InvalidArgumentError, text)


async def test_get_volume_of_other_things_is_not_a_volume(world: World) -> None:
    await world.store.create_volume("v", MIB)
    await world.store.create_snapshot("v", "s")
    for wire_id in ("images", "v@s"):
        assert await refusal(world.store.get_volume(wire_id)) == (WrongKindError, "not a volume")


async def test_create_volume_under_hidden_name_is_refused(world: World) -> None:
    with pytest.raises(InvalidNameError):
        await world.store.create_volume("images/.incoming-x", MIB)


async def test_delete_dataset_with_everything_below_is_gone(world: World) -> None:
    await world.store.create_volume("a/v", MIB)
    await world.store.create_snapshot("a", "s", recursive=True)
    gone = await world.store.delete_dataset("a")
    assert (str(gone.name), gone.size_bytes) == ("mistify/a", 0)
    with pytest.raises(NotFoundError):
        await world.store.get_volume("a/v")


async def test_delete_dataset_that_is_cloned_elsewhere_names_the_clone(world: World) -> None:
    await world.store.create_volume("a", MIB)
    await world.store.create_snapshot("a", "s")
    world.driver.clone(SnapshotName.parse("mistify/a@s"), DatasetName.parse("mistify/c"))
    with pytest.raises(BusyError) as caught:
        await world.store.delete_dataset("a")
    assert "mistify/c" in caught.value.dependants
    assert (await world.store.get_volume("a")).size_bytes == MIB


async def test_changes_that_hang_keep_nobody_from_an_answer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are threads for changes, and more: so it is while the disks of a pool are away."""
    await world.store.create_volume("v", MIB)
    await world.store.create_snapshot("v", "s")
    disks_are_back = threading.Event()
    destroy = world.driver.destroy

    def hang(name: DatasetName, *, recursive: bool = False) -> None:
        assert disks_are_back.wait(60)
        destroy(name, recursive=recursive)

    def suspended(_name: DatasetName) -> None:
        raise UnavailableError("the pool is suspended")

    monkeypatch.setattr(world.driver, "destroy", hang)
    for number in range(CHANGE_THREADS + 2):
        await world.store.create_volume(f"n{number}", MIB)
    changes = [asyncio.ensure_future(world.store.delete_dataset(f"n{number}")) for number in range(CHANGE_THREADS + 2)]
    try:
        async with asyncio.timeout(60):
            assert (await world.store.get_volume("v")).size_bytes == MIB
            assert len(await world.store.list_volumes()) == CHANGE_THREADS + 3
            assert [str(one.name) for one in await world.store.list_snapshots("")] == ["mistify/v@s"]
        assert not any(change.done() for change in changes)
        monkeypatch.setattr(world.driver, "usage", suspended)
        refused = await asyncio.wait_for(asyncio.gather(*changes[CHANGE_THREADS:], return_exceptions=True), 60)
        assert [type(one) for one in refused] == [UnavailableError] * 2
    finally:
        monkeypatch.undo()
        disks_are_back.set()
        await asyncio.gather(*changes, return_exceptions=True)
    for number in range(CHANGE_THREADS, CHANGE_THREADS + 2):
        await world.store.delete_dataset(f"n{number}")
    assert [str(one.name) for one in await world.store.list_volumes()] == ["mistify/v"]


# -- snapshots -------------------------------------------------------------------------------------------------------


async def test_snapshots_recursive_are_made_listed_and_deleted_in_order(world: World) -> None:
    for name in ("a/v2", "a/v1"):
        await world.store.create_volume(name, MIB)
    made = await world.store.create_snapshot("a", "s", recursive=True)
    expected = ["mistify/a@s", "mistify/a/v1@s", "mistify/a/v2@s"]
    assert [str(one.name) for one in made] == expected
    await world.store.create_snapshot("a/v1", "r")
    listed = [str(one.name) for one in await world.store.list_snapshots("a")]
    assert listed == ["mistify/a@s", "mistify/a/v1@s", "mistify/a/v1@r", "mistify/a/v2@s"]
    assert [str(one.name) for one in await world.store.list_snapshots("a/v1@r")] == ["mistify/a/v1@r"]
    gone = await world.store.delete_snapshot("a@s", recursive=True)
    assert [str(one.name) for one in gone] == expected
    assert [str(one.name) for one in await world.store.list_snapshots("")] == ["mistify/a/v1@r"]


@pytest.mark.parametrize(
    ("wire_id", "dest", "text"),
    [
        ("", "", "need an id"),
        ("nope", "", "not found"),
        ("v@nope", "s", "not found"),
        ("v/../w", "", "not a valid dataset"),
        ("v@s", "", "cannot create a snapshot of a snapshot"),
        ("v", "", "need a dest"),
        ("v", "a/b", "invalid snapshot dest"),
        ("v", "a@b", "invalid snapshot dest"),
        ("v", "s\n", "invalid snapshot dest"),
    ],
)
async def test_create_snapshot_wrong_argument_first_check_wins(
    world: World, wire_id: str, dest: str, text: str
) -> None:
    await world.store.create_volume("v", MIB)
    await world.store.create_snapshot("v", "s")
    assert (await refusal(world.store.create_snapshot(wire_id, dest)))[1] == text


async def test_rollback_over_newer_snapshots_only_on_demand(world: World) -> None:
    volume = await world.store.create_volume("v", MIB)
    await world.store.create_snapshot("v", "s1")
    world.write(volume.name, b"changed")
    await world.store.create_snapshot("v", "s2")
    with pytest.raises(BusyError):
        await world.store.rollback_snapshot("v@s1")
    await world.store.rollback_snapshot("v@s1", destroy_newer=True)
    assert read_path(volume.device, 7) == bytes(7)
    assert [one.name.snapshot for one in await world.store.list_snapshots("v")] == ["s1"]


async def test_delete_snapshot_of_an_image_is_refused(world: World) -> None:
    await have_image(world)
    for wire_id, recursive in (("images/img@image", False), ("images/img@image", True)):
        with pytest.raises(NotPermittedError, match="content of image img"):
            await world.store.delete_snapshot(wire_id, recursive=recursive)
    await world.store.create_snapshot("images", "image")
    with pytest.raises(NotPermittedError, match="content of image img"):
        await world.store.delete_snapshot("images@image", recursive=True)
    await world.store.delete_snapshot("images@image")


# -- images that are here --------------------------------------------------------------------------------------------


async def test_clone_image_twice_the_same_is_fine_other_is_not(world: World) -> None:
    body = await have_image(world)
    await have_image(world, "img2")
    volume = await world.store.clone_image("img", "mistify/x/y/c")
    assert await world.store.clone_image("img", "mistify/x/y/c") == volume
    assert read_path(volume.device) == body
    assert await refusal(world.store.clone_image("img2", "mistify/x/y/c")) == (
        AlreadyExistsError,
        "dataset already exists",
    )


@pytest.mark.parametrize(
    ("image_id", "dest", "text"),
    [
        ("", "", "need dest"),
        ("nope", "mistify/c", "not found"),
        ("", "mistify/c", "not found"),
        ("img", "other/c", "not a valid dataset"),
        ("img", "c", "not a valid dataset"),
        ("img", "mistify/../c", "not a valid dataset"),
        ("img", "mistify/c@s", "not a valid dataset"),
        ("img", "mistify/images/.deleted-x", "not a valid dataset"),
    ],
)
async def test_clone_image_wrong_argument_first_check_wins(world: World, image_id: str, dest: str, text: str) -> None:
    await have_image(world)
    assert (await refusal(world.store.clone_image(image_id, dest)))[1] == text


async def test_delete_image_without_clones_leaves_nothing(world: World) -> None:
    await have_image(world)
    gone = await world.store.delete_image("img")
    assert (gone.id, gone.volume, gone.size_bytes) == ("img", "mistify/images/img", MIB)
    assert world.datasets() == ["mistify", "mistify/guests", "mistify/images"]
    for image_id in ("img", "", "../x"):
        assert await refusal(world.store.delete_image(image_id)) == (NotFoundError, "not found")


async def test_delete_image_with_a_clone_keeps_its_blocks_until_the_clone_goes(world: World) -> None:
    body = await have_image(world)
    volume = await world.store.clone_image("img", "mistify/c")
    await world.store.delete_image("img")
    with pytest.raises(NotFoundError):
        await world.store.get_image("img")
    assert [str(one.name) for one in await world.store.list_volumes()] == ["mistify/c"]
    assert await world.store.list_snapshots("") == []
    assert read_path(volume.device) == body
    hidden = [name for name in world.datasets() if "/.deleted-" in name]
    assert len(hidden) == 1
    with pytest.raises(NotFoundError):
        await world.store.get_volume(hidden[0].removeprefix("mistify/"))
    await have_image(world)  # the name is free again
    await world.store.delete_dataset("c")
    assert world.datasets() == ["mistify", "mistify/guests", "mistify/images", "mistify/images/img"]


async def test_delete_image_with_a_clone_is_finished_after_a_restart(tmp_path: Path, server: FakeImageServer) -> None:
    async with open_world(tmp_path / "state", server) as world:
        await have_image(world)
        await world.store.clone_image("img", "mistify/c")
        await world.store.delete_image("img")
    async with open_world(tmp_path / "state", server) as world:
        assert await world.store.list_images() == []
        await world.store.delete_dataset("c")
        assert world.datasets() == ["mistify", "mistify/guests", "mistify/images"]


async def test_delete_dataset_of_an_image_forgets_the_image(world: World) -> None:
    await have_image(world)
    await world.store.delete_dataset("images/img")
    assert await world.store.list_images() == []


# -- records and pool ------------------------------------------------------------------------------------------------


async def test_open_brings_records_and_pool_together(tmp_path: Path, server: FakeImageServer) -> None:
    async with open_world(tmp_path / "state", server) as world:
        for image_id in ("kept", "lost", "found"):
            await have_image(world, image_id)
        record = await world.store.get_image("found")
        world.parts.records.delete("found")  # as if killed between rename and record
        world.driver.destroy(DatasetName.parse("mistify/images/lost"), recursive=True)
        world.driver.create_volume(DatasetName.parse("mistify/images/.incoming-left"), MIB)
        world.driver.create_volume(DatasetName.parse("mistify/images/foreign"), MIB)
    async with open_world(tmp_path / "state", server) as world:
        assert [one.id for one in await world.store.list_images()] == ["found", "kept"]
        assert await world.store.get_image("found") == record
        assert [name for name in world.datasets() if name.startswith("mistify/images/")] == [
            "mistify/images/foreign",
            "mistify/images/found",
            "mistify/images/kept",
        ]


async def test_request_image_onto_a_foreign_dataset_is_refused(world: World) -> None:
    world.driver.create_volume(DatasetName.parse("mistify/images/img"), MIB)
    world.server.serve("img", disk(1))
    assert await refusal(world.store.request_image(FetchOrder.checked("img"))) == (
        AlreadyExistsError,
        "dataset already exists",
    )
    assert world.driver.get(DatasetName.parse("mistify/images/img")).kind is DatasetKind.VOLUME


# -- guests ----------------------------------------------------------------------------------------------------------


async def test_create_guest_disks_makes_clone_and_empty_volume(world: World) -> None:
    body = await have_image(world)
    wanted = [DiskRequest("img", 0), DiskRequest("", 2 * MIB)]
    assert list(await world.store.verify_disks("g1", wanted)) == [MIB, 2 * MIB]
    made = await world.store.create_guest_disks("g1", wanted)
    assert [one.volume for one in made] == ["mistify/guests/g1/disk-0", "mistify/guests/g1/disk-1"]
    assert [one.size_bytes for one in made] == [MIB, 2 * MIB]
    assert read_path(made[0].source) == body
    assert read_path(made[1].source) == bytes(2 * MIB)
    assert await world.store.create_guest_disks("g1", wanted) == made


@pytest.mark.parametrize(
    ("guest_id", "disks", "text"),
    [
        ("", [DiskRequest("", MIB)], "invalid argument"),
        ("g", [], "invalid argument"),
        ("g", [DiskRequest("", 0)], "invalid argument"),
        ("g", [DiskRequest("", -MIB)], "invalid argument"),
        ("g", [DiskRequest("nope", 0), DiskRequest("", 0)], "invalid argument"),
        ("g", [DiskRequest("nope", 0)], "not found"),
        ("g", [DiskRequest("", 1 << 62), DiskRequest("nope", 0)], "not found"),
        ("g", [DiskRequest("", 1 << 62)] * 8, "no space left on device"),
        ("g", [DiskRequest("", 1 << 30)], "no space left on device"),
        ("../x", [DiskRequest("", MIB)], "not a valid dataset"),
    ],
)
async def test_guest_disks_wrong_argument_first_check_wins(
    world: World, guest_id: str, disks: list[DiskRequest], text: str
) -> None:
    for call in (world.store.verify_disks, world.store.create_guest_disks):
        assert (await refusal(call(guest_id, disks)))[1] == text
    assert world.datasets() == ["mistify", "mistify/guests", "mistify/images"]


async def test_volume_without_a_device_is_listed_and_deleted_but_not_handed_out(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "blind", "c"):
        await world.store.create_volume(name, MIB)
    real, waited_s = world.driver.device, list[float]()

    def device(name: DatasetName, *, timeout_s: float) -> Path:
        if name.leaf == "blind":
            waited_s.append(timeout_s)
            raise UnavailableError(f"the device of {name} did not appear within {timeout_s:g} s")
        return real(name, timeout_s=timeout_s)

    monkeypatch.setattr(world.driver, "device", device)
    for _ in range(2):
        listed = await world.store.list_volumes()
        assert [(one.name.leaf, one.device != "") for one in listed] == [("a", True), ("blind", False), ("c", True)]
    assert [patience_s > 0.0 for patience_s in waited_s] == [True, False], "the second list does not wait again"
    with pytest.raises(UnavailableError):
        await world.store.get_volume("blind")
    assert (await world.store.delete_dataset("blind")).device == ""
    assert [one.name.leaf for one in await world.store.list_volumes()] == ["a", "c"]


async def test_create_guest_disks_second_fails_leaves_none(world: World) -> None:
    await world.store.create_volume("guests/g/disk-1", 4 * MIB)
    with pytest.raises(AlreadyExistsError):
        await world.store.create_guest_disks("g", [DiskRequest("", MIB), DiskRequest("", MIB)])
    assert [str(one.name) for one in await world.store.list_volumes()] == ["mistify/guests/g/disk-1"]


async def test_create_guest_disks_concurrent_requests_do_not_overbook(world: World) -> None:
    await have_image(world, size_bytes=64 * MIB)

    async def create(number: int) -> bool:
        try:
            await world.store.create_guest_disks(f"g{number}", [DiskRequest("", 340 * MIB)])
        except NoSpaceError:
            return False
        return True

    assert sum(await asyncio.gather(*(create(number) for number in range(8)))) == 2
    assert len(await world.store.list_volumes()) == 3


async def test_delete_guest_disks_unknown_guest_is_fine(world: World) -> None:
    await world.store.create_guest_disks("g1", [DiskRequest("", MIB)])
    await world.store.delete_guest_disks("g1")
    await world.store.delete_guest_disks("g1")
    assert world.datasets() == ["mistify", "mistify/guests", "mistify/images"]
    assert await refusal(world.store.delete_guest_disks("")) == (InvalidArgumentError, "invalid argument")
