# SPDX-License-Identifier: Apache-2.0
"""A full disk is one sentence, whoever ran into it."""

import errno

import pytest
from safetensors import SafetensorError

from diffusers_ternary.files import (
    new_file,
    new_folder,
)


def full_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/else")


def full_disk_in_safetensors() -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def full_disk_in_numpy() -> None:
    raise OSError("16384 requested and 0 written")


@pytest.mark.parametrize("fail", [full_disk, full_disk_in_safetensors, full_disk_in_numpy])
def test_a_full_disk_is_one_sentence_in_every_library(tmp_path, fail):
    def write() -> None:
        with new_folder(tmp_path / "out") as folder, new_file(folder / "weights"):
            fail()

    with pytest.raises(OSError, match="cannot be written") as error:
        write()
    assert error.value.errno == errno.ENOSPC
    place = " at /somewhere/else" if fail is full_disk else ""
    assert error.value.strerror == (
        f"{tmp_path / 'out'} cannot be written: No space left on device{place}. Nothing incomplete was left "
        "behind. Free space or choose another place, and run again."
    )
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_not_a_full_disk(tmp_path):
    with pytest.raises(SafetensorError, match="invalid header"), new_folder(tmp_path / "out"):
        raise SafetensorError("Error while deserializing: invalid header")
    with pytest.raises(FileNotFoundError), new_file(tmp_path / "a"):
        (tmp_path / "none").read_bytes()
    assert list(tmp_path.iterdir()) == []
