"""docs/sources.md: the rows about NumPy, Python and Pillow are what they do. (Those about other libraries are held by
tests/integrations/test_sources.py, the sessions by test_docs.)
"""

from __future__ import annotations

import array
import ctypes
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from source_rows import RECIPES, ROWS, TEXT, WRITTEN, Source, assert_row_is_true, put

import tensorbridge as tb

Image = pytest.importorskip("PIL.Image", reason="no Pillow, which matplotlib brings")
RECORDS = [("flag", "i1"), ("x", "f4")]
BLOCKS: list[shared_memory.SharedMemory] = []


@pytest.fixture(autouse=True)
def blocks_are_closed() -> Iterator[None]:
    yield
    while BLOCKS:
        BLOCKS.pop().close()


def saved(folder: Path) -> Path:
    np.save(folder / "x.npy", np.arange(6.0))
    return folder / "x.npy"


def archived(folder: Path) -> Path:
    np.savez(folder / "x.npz", x=np.arange(6.0))
    return folder / "x.npz"


def loaded(mode: Any) -> Any:
    return lambda folder: np.load(saved(folder), mmap_mode=mode)


def mapped(mode: Any) -> Any:
    return lambda folder: np.memmap(saved(folder), "float64", mode, offset=128)


def write_to_the_file(x: Any) -> None:
    np.memmap(x.filename, x.dtype, "r+", x.offset, x.shape)[0] = WRITTEN


def shared_bytes(_: Path) -> Any:
    BLOCKS.append(shared_memory.SharedMemory(create=True, size=6))
    BLOCKS[-1].unlink()
    return BLOCKS[-1].buf


def image(_: Path) -> Any:
    return Image.new("RGB", (4, 2))


SOURCES: dict[str, list[Source]] = {
    '`np.load(path)`, an array of `np.load("x.npz")`': [
        Source(loaded(None), put),
        Source(lambda folder: np.load(archived(folder))["x"], put),
        Source(lambda folder: np.load(archived(folder), mmap_mode="r")["x"], put),
    ],
    '`np.load(path, mmap_mode="r")`, `np.memmap(mode="r")`': [
        Source(loaded("r"), write_to_the_file),
        Source(mapped("r"), write_to_the_file),
    ],
    'the same with mode "c"': [Source(loaded("c"), put), Source(mapped("c"), put)],
    'the same with mode "r+"': [Source(loaded("r+"), write_to_the_file), Source(mapped("r+"), write_to_the_file)],
    "`bytes`, `np.frombuffer` of it": [
        Source(lambda _: bytes(6)),
        Source(lambda _: np.frombuffer(bytes(48))),
    ],
    "`bytearray`, `array.array`, `np.frombuffer` of them": [
        Source(lambda _: bytearray(6), put),
        Source(lambda _: array.array("d", [1, 2]), put),
        Source(lambda _: np.frombuffer(bytearray(48)), put),
        Source(lambda _: np.frombuffer(array.array("d", [1, 2])), put),
    ],
    "`SharedMemory.buf`": [Source(shared_bytes, put)],
    "ctypes array": [
        Source(lambda _: (ctypes.c_double * 3)(), put),
        Source(lambda _: np.ctypeslib.as_array(ctypes.pointer(ctypes.c_double(1)), (1,)), put),
        Source(lambda _: multiprocessing.Array("d", 3, lock=False), put),
    ],
    "`multiprocessing.Array` with its lock": [Source(lambda _: multiprocessing.Array("d", 3))],
    "structured array": [Source(lambda _: np.zeros(3, RECORDS))],
    "its field, whose size does not divide that of the record": [Source(lambda _: np.zeros(3, RECORDS)["x"], put)],
    "big-endian array": [Source(lambda _: np.arange(3, dtype=">f8"), put)],
    "reversed view: RGB of an OpenCV image, `image[..., ::-1]`": [
        Source(lambda _: np.zeros((2, 4, 3), "uint8")[..., ::-1], put),
        Source(lambda _: np.arange(6.0)[::-1], put),
    ],
    "masked array": [Source(lambda _: np.ma.masked_array([1.0, 2.0], [False, True]))],
    "PIL image": [
        Source(image, lambda x: x.putpixel((0, 0), (WRITTEN,) * 3)),
        Source(lambda _: Image.new("L", (4, 2)), lambda x: x.putpixel((0, 0), WRITTEN)),
    ],
    "`np.array(image)`": [Source(lambda folder: np.array(image(folder)), put)],
}
CASES = [(row, number) for row, sources in SOURCES.items() for number in range(len(sources))]


@pytest.mark.parametrize(("row", "number"), CASES)
def test_row_of_the_page_is_what_a_real_array_does(row, number, tmp_path):
    assert_row_is_true(row, SOURCES[row][number], tmp_path)


def test_every_row_here_is_on_the_page():
    assert set(SOURCES) <= set(ROWS)
    assert len(ROWS) > 35


def test_every_block_is_a_session_or_a_recipe():
    assert TEXT.count("```python\n") == len(RECIPES)
    assert TEXT.count("```pycon\n>>> ") == TEXT.count("```pycon\n") >= 8


@pytest.mark.parametrize("mode", ["c", "r+"])
def test_a_write_to_the_tensor_reaches_the_file_in_one_mode_only(mode, tmp_path):
    x = loaded(mode)(tmp_path)
    tb.to_torch(x).zero_()
    assert np.load(tmp_path / "x.npy").any() == (mode == "c")


@pytest.mark.parametrize("source", [bytearray(8), array.array("b", bytes(8))])
def test_what_is_shared_is_not_resized(source):
    result = tb.to_torch(source)
    with pytest.raises(BufferError):
        source.append(1)
    assert len(result) == 8


def test_the_field_of_aligned_records_is_shared():
    assert tb.plan(np.zeros(3, np.dtype(RECORDS, align=True))["x"], "torch").zero_copy


def test_a_pointer_is_refused():
    with pytest.raises(tb.UnsupportedArrayError):
        tb.to_numpy(ctypes.pointer(ctypes.c_double(1)))


def test_an_array_that_does_not_hold_shared_memory_ends_the_process():
    """Why the page says to convert the buffer: NumPy keeps the memoryview, but not the export under it."""
    script = """
import numpy as np, tensorbridge as tb
from multiprocessing import shared_memory
block = shared_memory.SharedMemory(create=True, size=1 << 20)
block.unlink()
t = tb.to_torch(np.ndarray(4, "float64", block.buf))
block.close()
print(t[0])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode < 0
    assert done.stdout == b""
