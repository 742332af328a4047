"""Files of a packed checkpoint: what is read is what was written, or an error says what is wrong."""

import errno
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from packs import flip
from safetensors import safe_open
from safetensors.torch import save_file

from workbench.blocks import PAGE, slab
from workbench.errors import CheckpointError
from workbench.packfile import Entry, PackFile, PackWriter, write_json

ODD = {  # nothing is a multiple of anything
    "codes": torch.uint8, "scale": torch.float16, "norm:0": torch.bfloat16, "plain": torch.float32,
    "eight": torch.float8_e4m3fn, "double": torch.float64,
}  # fmt: skip


def drawn(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bytes, seen as that type: NaN and all."""
    raw = torch.randint(256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8)
    return raw.view(dtype)


def written(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with PackWriter(path, entries, {"made_from": "a test"}) as file:
        for tensor in tensors.values():
            file.write(tensor)
    assert path.stat().st_size == PackWriter(path, entries, {"made_from": "a test"}).nbytes
    return path


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def read(file: PackFile, name: str, aligned: bool = True) -> torch.Tensor:
    nbytes = file.stored[name].nbytes
    into = slab(1, nbytes)[0] if aligned else torch.empty(nbytes + 1, dtype=torch.uint8)[1:]
    into.fill_(0xA5)
    file.read(name, into)
    return into


@pytest.fixture
def odd(tmp_path):
    tensors = {name: drawn(dtype, 3, 7 + at) for at, (name, dtype) in enumerate(ODD.items())}
    return written(tmp_path / "odd.safetensors", tensors), tensors


@pytest.fixture
def blocks(tmp_path):
    tensors = {str(expert): drawn(torch.uint8, PAGE * (1 + expert % 3)) for expert in range(9)}
    return written(tmp_path / "blocks.safetensors", tensors), tensors


def test_what_is_read_is_what_was_written(odd):
    path, tensors = odd
    file = PackFile(path)
    assert list(file.stored) == list(tensors)
    for name, tensor in tensors.items():
        assert (file.stored[name].type, file.stored[name].shape) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(read(file, name), raw(tensor))
    assert file.metadata["made_from"] == "a test"


def test_any_reader_of_safetensors_opens_it_and_data_begins_on_a_page(odd):
    path, tensors = odd
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            assert torch.equal(raw(found), raw(tensor))
    assert min(stored.start for stored in PackFile(path).stored.values()) % PAGE == 0


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
def test_blocks_are_read_into_any_memory(blocks, direct, aligned):
    path, tensors = blocks
    file = PackFile(path, direct=direct)
    for name, tensor in tensors.items():
        assert torch.equal(read(file, name, aligned), tensor)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no reads past its cache")
@pytest.mark.parametrize("when", ["opened", "read"])
def test_where_the_file_system_cannot_read_past_the_cache_it_is_read_all_the_same(blocks, monkeypatch, when):
    path, tensors = blocks
    plain_open, plain_read, refused = os.open, os.preadv, []

    def opened(name, flags, *rest):
        descriptor = plain_open(name, flags & ~os.O_DIRECT, *rest)
        if flags & os.O_DIRECT:
            refused.append(descriptor)
            if when == "opened":
                os.close(descriptor)
                raise OSError(errno.EINVAL, "Invalid argument")
        return descriptor

    def readv(descriptor, *rest):
        if descriptor in refused and when == "read":
            refused[refused.index(descriptor)] = -descriptor  # closed now, and its number free for another
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain_read(descriptor, *rest)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "preadv", readv)
    file = PackFile(path, direct=True)
    assert refused
    for name, tensor in tensors.items():
        assert torch.equal(read(file, name, aligned=False), tensor)


def test_a_read_that_brings_less_goes_on(odd, monkeypatch):
    path, tensors = odd
    plain = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: plain(file, [buffers[0][: random.randint(1, 5)]], at))
    file = PackFile(path)
    for name, tensor in tensors.items():
        assert torch.equal(read(file, name), raw(tensor))


def test_many_threads_read_at_once(blocks):
    path, tensors = blocks
    file = PackFile(path, direct=True)
    names = random.choices(list(tensors), k=400)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda name: read(file, name, aligned=random.random() < 0.5), names))
    assert all(torch.equal(one, tensors[name]) for name, one in zip(names, found, strict=True))


@pytest.mark.parametrize("kind", ["odd", "blocks"])
def test_a_flipped_bit_is_found_in_its_tensor_and_nowhere_else(kind, request):
    path, tensors = request.getfixturevalue(kind)
    for name, stored in PackFile(path).stored.items():
        at, bit = stored.start + random.randrange(stored.nbytes), random.randrange(8)
        flip(path, at, bit)
        file = PackFile(path, direct=True)
        for other, tensor in tensors.items():
            if other != name:
                assert torch.equal(read(file, other), raw(tensor))
        with pytest.raises(CheckpointError, match=f"{path.name}: {name} is damaged"):
            read(file, name)
        flip(path, at, bit)


def test_a_file_cut_short_is_not_opened(odd):
    path, _ = odd
    whole = path.read_bytes()
    for size in (0, 7, 8, 100, PAGE - 1, PAGE, PAGE + 1, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=path.name):
            PackFile(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match=path.name):
        PackFile(path)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("cut", [1, 700, PAGE, PAGE + 512])
def test_a_file_cut_short_while_it_is_open(blocks, direct, cut, monkeypatch):
    path, tensors = blocks
    file, plain = PackFile(path, direct=direct), os.preadv

    def strict(descriptor, buffers, at):  # as disks are whose sectors are pages
        if direct and at % PAGE:
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(descriptor, buffers, at)

    monkeypatch.setattr(os, "preadv", strict)
    os.truncate(path, path.stat().st_size - cut)
    with pytest.raises(CheckpointError, match="8 ends after .* cut short while it was open"):
        read(file, "8")
    assert torch.equal(read(file, "0"), tensors["0"])


def test_a_disk_that_cannot_be_read(blocks, monkeypatch):
    path, _ = blocks
    file = PackFile(path)

    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(CheckpointError, match="reading 0 failed .*Input/output error"):
        read(file, "0")


def test_files_that_are_not_ours(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="its checksums are missing"):
        PackFile(tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="none.safetensors"):
        PackFile(tmp_path / "none.safetensors")


def test_an_error_or_an_interrupt_leaves_neither_a_file_nor_a_part(tmp_path):
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):  # noqa: SIM117 - the file is closed first
            with PackWriter(tmp_path / "x.safetensors", [Entry("a", torch.uint8, (9,))], {}) as file:
                file.write(torch.zeros(9, dtype=torch.uint8))
                assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors.part"]
                raise error
        assert not list(tmp_path.iterdir())


def test_what_is_not_complete_is_no_file(tmp_path):
    tensors = {"a": drawn(torch.uint8, 5000), "b": drawn(torch.uint8, 5000)}
    path, entries = tmp_path / "x.safetensors", [Entry(name, torch.uint8, (5000,)) for name in tensors]
    with pytest.raises(AssertionError, match="missing"), PackWriter(path, entries, {}) as file:
        file.write(tensors["a"])
    with PackWriter(path, entries, {}) as file:
        file.write(tensors["a"])
        part = path.with_name("x.safetensors.part")
        os.truncate(part, file.nbytes)  # as long as it will be: still no reader takes it for one
        with pytest.raises(CheckpointError):
            PackFile(part)
        file.write(tensors["b"])
    assert torch.equal(read(PackFile(path), "b"), tensors["b"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
@pytest.mark.parametrize("size", [10, 1_000_000])
def test_a_full_disk(tmp_path, size):
    """What fits into a buffer fails when it is flushed, anything larger at once."""
    path = tmp_path / "x.safetensors"
    path.with_name("x.safetensors.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):  # noqa: SIM117
        with PackWriter(path, [Entry("a", torch.uint8, (size,))], {}) as file:
            file.write(torch.zeros(size, dtype=torch.uint8))
    assert not list(tmp_path.iterdir())
    (tmp_path / "x.json.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "x.json", {"a": 1})
    assert not list(tmp_path.iterdir())
