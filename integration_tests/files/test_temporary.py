# SPDX-License-Identifier: Apache-2.0
"""Temporary folders end with their process."""

import tempfile

from diffusers_ternary.files import temporary_folder


def test_temporary_folders_of_killed_processes_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "push-0123").mkdir()
    (tmp_path / "push-0123" / "weights").write_text("24 GB")
    (tmp_path / ".push-4567.lock").touch()  # killed before it had made its folder
    (tmp_path / "pull-0123").mkdir()
    with temporary_folder("push-") as first, temporary_folder("push-") as second:
        assert first != second
        assert first.is_dir(), "a folder in use is not a leftover"
        assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == sorted(
            [first.name, second.name, "pull-0123"]
        )
    assert [p.name for p in tmp_path.iterdir()] == ["pull-0123"]
