# SPDX-License-Identifier: Apache-2.0
"""What is written is complete or absent."""

import pytest
import torch
from safetensors.torch import save_file

from diffusers_ternary.files import (
    atomic,
    new_file,
    read_json,
    recover_contents,
    recover_folder,
    remove_folder,
    write_json,
)


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ZeroDivisionError), new_file(path) as temporary:
        temporary.write_bytes(bytes(1 // 0))
    assert read_json(path) == {"a": 1}
    with new_file(path) as temporary:
        save_file({"x": torch.zeros(1)}, temporary)  # which makes private files
    assert path.stat().st_mode & 0o044
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")}, allow_nan=False)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_what_killed_runs_left_is_removed_and_nothing_else(tmp_path):
    for name in (
        ".a.0a1b2c3d.partial",
        ".a.b.0a1b2c3d.partial",
        ".a.notes",
        ".a.mine.partial",
        ".a.20240131.old",  # a backup of the user's
        ".a.2024.old",
        ".b.0a1b2c3d.old",
        "a",
    ):
        (tmp_path / name).write_text(name)
    recover_folder(tmp_path / "a")
    mine = [".a.2024.old", ".a.20240131.old"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *mine,
        ".a.b.0a1b2c3d.partial",
        ".a.mine.partial",
        ".a.notes",
        ".b.0a1b2c3d.old",
        "a",
    ]
    recover_contents(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [*mine, ".a.mine.partial", ".a.notes", "a", "b"]
    assert (tmp_path / "b").read_text() == ".b.0a1b2c3d.old"


def test_a_folder_that_was_being_removed_is_gone(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").touch()

    def killed(*arguments, **options):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(atomic.shutil, "rmtree", killed)
        with pytest.raises(SystemExit):
            remove_folder(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert len(list(tmp_path.iterdir())) == 1
    recover_folder(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
