# SPDX-License-Identifier: Apache-2.0
"""JSON from anywhere is a value, or an error that names the file; what is written is complete or absent."""

import errno
import tempfile

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from diffusers_ternary import files
from diffusers_ternary.files import (
    lock,
    new_file,
    new_folder,
    parse_json_object,
    read_json,
    recover_contents,
    recover_folder,
    temporary_folder,
    write_json,
)
from integration_tests.support.fresh_process import run_python


def test_a_json_object_is_read(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"a": [1, 2.5, "ü"]}', encoding="utf-8")
    assert read_json(file) == {"a": [1, 2.5, "ü"]}
    assert read_json(tmp_path / "none.json") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[1]", "does not hold a JSON object"),
        (b"null", "does not hold a JSON object"),
    ],
    ids=["empty", "cut off", "not UTF-8", "a huge number", "deep list", "deep object", "a list", "null"],
)
def test_everything_else_names_the_file(tmp_path, content, message):
    file = tmp_path / "broken.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"broken\.json .*{message}.*Restore the file"):
        read_json(file)
    with pytest.raises(ValueError, match=r"the source .*Write it again"):
        parse_json_object(content, source="the source", remedy="Write it again.")


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


def test_a_lock_is_held_by_one_and_ends_with_its_process(tmp_path):
    with lock(tmp_path / "run", "another run") as held:
        assert held
        message = f"{tmp_path / 'run'} is in use by another run. Wait until that has ended, or choose another place"
        with pytest.raises(BlockingIOError) as error, lock(tmp_path / "run", "another run"):
            pytest.fail("two have it")
        assert error.value.strerror == message
        other = """
        import json, sys
        from diffusers_ternary.files import lock
        try:
            with lock(sys.argv[1], "another run"):
                print(json.dumps("free"))
        except BlockingIOError as error:
            print(json.dumps(error.strerror))
        """
        assert run_python(other, tmp_path / "run") == message
    assert list(tmp_path.iterdir()) == []
    killed = """
    import os, signal, sys
    from diffusers_ternary.files import lock
    with lock(sys.argv[1], "another run"):
        print("null", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    with pytest.raises(AssertionError, match="the fresh process failed"):
        run_python(killed, tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == [".run.lock"]
    with lock(tmp_path / "run", "another run"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_folders_made_for_a_lock_go_with_it_unless_something_was_written(tmp_path):
    with lock(tmp_path / "a" / "b" / "run", "a run"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with lock(tmp_path / "a" / "b" / "run", "a run"):
        (tmp_path / "a" / "b" / "run").write_text("done")
    assert (tmp_path / "a" / "b" / "run").read_text() == "done"


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
        patch.setattr(files.shutil, "rmtree", killed)
        with pytest.raises(SystemExit):
            files.remove_folder(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert len(list(tmp_path.iterdir())) == 1
    recover_folder(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_nothing_can_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OSError, match=r"out cannot be written: .*\. Choose another place"),
        lock(tmp_path / "file" / "x" / "out", "a run"),
    ):
        pytest.fail("there is no such place")
