"""A few of the cases of tests/by_hand/fuzz_files.py. Whatever is done to a file, the script that reads it
takes it, or refuses it with one line, and runs nothing of it. And the tool does find what it looks for."""
import pickle
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "by_hand"))
import fuzz_files


# Of these a case takes a hundredth of a second, of the others a tenth.
FAST = ("EDM's .pkl", "images in .npz", "image folders", "cached targets", "finished attacks", "drawn images")


@pytest.mark.slow
@pytest.mark.parametrize("kind", fuzz_files.KINDS)
def test_a_damaged_file_is_read_or_refused_with_one_line(kind):
    counts, faults = fuzz_files.fuzz(kind, range(53 if kind in FAST else 12))
    assert not faults and counts["refused"] > 0


@pytest.mark.parametrize("read, found", [
    (lambda path: pickle.loads(path.read_bytes()), "RUNS"), (lambda path: time.sleep(9), "ended by SIGALRM"),
    (lambda path: bytearray(6 << 30), "MemoryError"), (lambda path: 1 / 0, "ZeroDivisionError")])
def test_the_tool_finds_readers_that_run_code_hang_fill_the_memory_or_fail(monkeypatch, read, found):
    whole = pickle.dumps([1, "text", {"key": 2.5}])
    make = lambda folder: (folder / "file").write_bytes(whole)
    # As it was made, each of them reads the file.
    read_damaged = lambda folder: (folder / "file").read_bytes() == whole or read(folder / "file")
    monkeypatch.setitem(fuzz_files.KINDS, "bad", (make, read_damaged))
    monkeypatch.setattr(fuzz_files, "SECONDS", 1)
    _, faults = fuzz_files.fuzz("bad", range(40 if found == "RUNS" else 2))
    assert any(found in what for _, what in faults), faults
