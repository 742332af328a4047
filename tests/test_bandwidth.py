"""Measuring the machine: every block is read once and in full, nothing is left behind, and a file is not believed."""

import errno
import json
import mmap
import os
import random
import sys
from collections import namedtuple
from dataclasses import replace

import pytest
import torch

from workbench import bandwidth, diskspeed, machine
from workbench.bandwidth import Measured, Rate, fastest, measure, place, saved
from workbench.errors import BudgetError, RequestError

MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="the page cache can be kept out on Linux only")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """The user's own measurement is neither read nor replaced."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(diskspeed, "FILE", 7 * MIB)
    monkeypatch.setattr(diskspeed, "ROUNDS", 2)
    monkeypatch.setattr(bandwidth, "LARGE", 4 * MIB)


@pytest.fixture
def folder(tmp_path):
    """Empty before; after the test nothing may be left in it, and no descriptor open."""
    path = tmp_path / "disk"
    path.mkdir()
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    yield path
    assert list(path.iterdir()) == []
    assert sys.platform != "linux" or len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def measured() -> Measured:
    def some(at):
        return Rate(at, tuple(random.uniform(1e8, 9e10) for _ in range(5)))

    return Measured(
        memory=(some(1), some(8)), disk=(some(1), some(4)), link=some(1), device_memory=some(1),
        block=3 * MIB, file=999 * MIB, past_cache=diskspeed.DIRECT, file_system="xfs",
        when="2026-01-02T03:04:05+00:00", load=0.25, cpu=machine.cpu_name(), cores=machine.cores(), threads=8,
        device="A GPU", torch="2.13.0", package="0.1.0",
    )  # fmt: skip


@linux
def test_it_measures_what_was_asked_and_says_how(small, folder, monkeypatch):
    stages, threads, really, reading = [], torch.get_num_threads(), diskspeed._round, []
    monkeypatch.setattr(diskspeed, "_round", lambda *known: (reading.append(len(known[1])), really(*known))[1])
    got = measure(folder, "cpu", stages.append, block=MIB, readers=(1, 3))
    assert [rate.at for rate in got.disk] == [1, 3] and all(len(rate.readings) == 2 for rate in got.disk)
    assert reading == [1, 3, 1, 3]
    assert [rate.at for rate in got.memory] == sorted({1, threads})
    assert torch.get_num_threads() == threads
    assert got.link is None and got.device_memory is None and got.device == "cpu"
    assert (got.block, got.file, got.cores) == (MIB, 7 * MIB, machine.cores())
    assert stages and got.past_cache in (diskspeed.DIRECT, diskspeed.EMPTIED) and got.file_system
    text = str(got)
    assert all(f"{name} " in text and found in text for name, found in got.lines()) and "disk, 3 readers" in text
    assert got.when in text and got.past_cache in text and "blocks of 1 MiB of a file of 7 MiB" in text


@linux
def test_without_a_folder_it_measures_where_the_cache_is(small):
    measure(device="cpu", block=MIB)
    assert list(place().parent.iterdir()) == []  # made, and nothing left


def test_every_block_is_read_once_and_in_full(tmp_path, monkeypatch):
    """Short reads are what a file system may give; a block read twice would be in its cache."""
    block, count, really = 8192, 11, os.preadv
    content = os.urandom(block * count + 100)  # the rest is no block
    path = tmp_path / "file"
    path.write_bytes(content)
    pieces = []

    def short(file, buffers, offset):
        got = really(file, [buffers[0][:3000]], offset)
        pieces.append((offset, bytes(buffers[0][:got])))
        return got

    monkeypatch.setattr(os, "preadv", short)
    file = os.open(path, os.O_RDONLY)
    buffers = [mmap.mmap(-1, block) for _ in range(3)]
    assert diskspeed._round(file, buffers, len(content)) > 0
    os.close(file)
    assert b"".join(piece for _, piece in sorted(pieces)) == content[: block * count]


@pytest.mark.parametrize(("seconds", "blocks"), [(60.0, 64), (-1.0, 1)])
def test_blocks_come_in_random_order_and_fewer_of_a_slow_disk(tmp_path, monkeypatch, seconds, blocks):
    path = tmp_path / "file"
    path.write_bytes(bytes(4096 * 64))
    monkeypatch.setattr(diskspeed, "ROUND_SECONDS", seconds)
    offsets, really = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *known: (offsets.append(known[2]), really(*known))[1])
    with path.open("rb") as file:
        diskspeed._round(file.fileno(), [mmap.mmap(-1, 4096)], 4096 * 64)
    assert len(set(offsets)) == len(offsets) == blocks
    assert blocks == 1 or offsets != sorted(offsets)


@linux
@pytest.mark.parametrize("at", ["writing", "reading from disk"])
def test_an_interrupt_leaves_nothing(small, folder, at):
    seen = []

    def progress(stage):
        seen.extend(folder.iterdir())
        if stage.startswith(at):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(folder, "cpu", progress, block=MIB)
    assert seen == []  # nameless while it is there: even a killed process leaves nothing


def test_an_interrupt_gives_torch_its_threads_back(small, monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 2)

    def stop(*known):
        raise KeyboardInterrupt

    monkeypatch.setattr(bandwidth, "_reads", stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            bandwidth._memory()
        assert torch.get_num_threads() == threads + 2
    finally:
        torch.set_num_threads(threads)


@linux
@pytest.mark.parametrize("when", ["opening", "reading"])
def test_where_o_direct_is_refused_the_cache_is_emptied(small, folder, monkeypatch, when):
    opened, read, emptied = os.open, os.preadv, []
    direct = set()

    def refusing(path, flags, *known, **more):
        if flags & os.O_DIRECT and when == "opening":
            raise OSError(errno.EINVAL, "Invalid argument")
        file = opened(path, flags & ~os.O_DIRECT, *known, **more)
        if flags & os.O_DIRECT:
            direct.add(file)
        return file

    def reading(file, *known):
        if file in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return read(file, *known)

    monkeypatch.setattr(os, "open", refusing)
    monkeypatch.setattr(os, "preadv", reading)
    monkeypatch.setattr(os, "posix_fadvise", lambda *known: emptied.append(known[3]))
    reads = diskspeed.read_blocks(folder, MIB, (1, 2), lambda stage: None)
    assert reads.past_cache == diskspeed.EMPTIED and min(map(min, reads.rates.values())) > 0
    assert emptied == [os.POSIX_FADV_DONTNEED] * 4  # two rounds of two numbers of readers


@linux
def test_other_troubles_with_the_disk_are_not_taken_for_a_refusal(small, folder, monkeypatch):
    read, calls = os.preadv, []

    def broken_once(*known):
        calls.append(known)
        if len(calls) == 1:
            raise OSError(errno.EIO, "Input/output error")
        return read(*known)

    monkeypatch.setattr(os, "preadv", broken_once)
    with pytest.raises(RequestError, match=r"Input/output error.*folder"):
        measure(folder, "cpu", block=MIB)


@linux
@pytest.mark.parametrize(("free", "block"), [(64 * MIB - 1, MIB), (100 * MIB, 16 * MIB)])
def test_little_room_is_refused_before_anything_is_written(small, folder, monkeypatch, free, block):
    monkeypatch.setattr(diskspeed, "FILE", 1024 * MIB)
    monkeypatch.setattr(diskspeed.psutil, "disk_usage", lambda path: namedtuple("Usage", "free")(free))
    with pytest.raises(BudgetError, match="make room, or name a folder"):
        measure(folder, "cpu", lambda stage: pytest.fail("it began"), block=block)


@linux
def test_it_takes_half_of_what_is_free(small, folder, monkeypatch):
    monkeypatch.setattr(diskspeed, "FILE", 1024 * MIB)
    monkeypatch.setattr(diskspeed.psutil, "disk_usage", lambda path: namedtuple("Usage", "free")(67 * MIB))
    assert diskspeed.read_blocks(folder, MIB, (2,), lambda stage: None).file == 33.5 * MIB


@linux
def test_a_disk_that_fills_up_is_a_budget_error(small, folder, monkeypatch):
    def full(*known):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(BudgetError, match="full"):
        measure(folder, "cpu", block=MIB)


@linux
def test_what_cannot_be_measured_is_refused(tmp_path):
    with pytest.raises(RequestError, match="No such file"):
        measure(tmp_path / "nowhere", "cpu")
    with pytest.raises(RequestError, match="4096"):
        measure(tmp_path, "cpu", block=5000)
    with pytest.raises(RequestError, match="readers"):
        measure(tmp_path, "cpu", readers=(0, 4))
    with pytest.raises(RequestError, match="'abacus'"):
        measure(tmp_path, "abacus")
    with pytest.raises(RequestError, match="cuda:99 is not here"):
        measure(tmp_path, "cuda:99")


def test_a_system_that_cannot_keep_its_cache_out_measures_no_disk(small, folder, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    got = measure(folder, "cpu")
    assert got.disk == () and got.memory and diskspeed.NOWHERE in str(got)


def test_a_rate_is_its_median_and_its_range():
    assert str(Rate(4, (1e9, 2.5e9, 5.04e9, 2.2e9))) == "2.35 GB/s, 1 to 5.04 in 4 readings"
    assert fastest((Rate(1, (2e9, 2e9, 9e9)), Rate(4, (3e9,)))).at == 4


def test_what_was_saved_comes_back(measured):
    assert saved() is None
    assert measured.save() == place() and saved() == measured
    later = replace(measured, link=None, device_memory=None, disk=())
    later.save()
    assert saved() == later
    assert [path.name for path in place().parent.iterdir()] == [place().name]


def test_a_save_that_fails_keeps_the_old_one(measured, monkeypatch):
    measured.save()

    def full(*known):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RequestError, match="No space left"):
        replace(measured, threads=77).save()
    assert saved() == measured
    assert [path.name for path in place().parent.iterdir()] == [place().name]


def spoil(text: str, **changed) -> str:
    return json.dumps({**json.loads(text), **changed})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: spoil(text, version=bandwidth.VERSION + 1), f"version {bandwidth.VERSION + 1}"),
        (lambda text: "[]", "version None"),
        (lambda text: text[: len(text) // 2], "cannot be read"),
        (lambda text: text.replace('"cores"', '"kernels"'), "cores"),
        (lambda text: spoil(text, memory=3), "damaged"),
        (lambda text: spoil(text, memory=[]), "damaged"),
        (lambda text: spoil(text, disk=[{"at": 1, "readings": []}]), "damaged"),
        (lambda text: spoil(text, link={"at": 1, "readings": [0.0]}), "damaged"),
        (lambda text: spoil(text, cores=machine.cores() + 1), "cores"),
        (lambda text: spoil(text, cpu="An Abacus"), "An Abacus"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_the_remedy(measured, change, says):
    path = measured.save()
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(RequestError, match="doctor --measure") as caught:
        saved()
    assert says in str(caught.value) and str(path) in str(caught.value)


def test_a_relative_cache_folder_is_ignored(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert place().is_absolute() and place().parts[-3:] == (".cache", "deepseek-workbench", "machine.json")


def test_a_glance_is_the_best_of_what_it_saw(monkeypatch):
    monkeypatch.setattr(bandwidth, "_reads", lambda block, rounds: iter([3.0, 8.0, 5.0][:rounds]))
    assert bandwidth.glance("cpu") == 8.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_has_a_link_and_a_memory(small, folder):
    got = measure(folder, block=MIB)
    assert got.device == torch.cuda.get_device_name(0)
    assert got.device_memory.median > got.link.median > 0
