# SPDX-License-Identifier: Apache-2.0
"""A place is written to by one run at a time."""

import pytest

from diffusers_ternary.files import lock
from integration_tests.support.fresh_process import run_python


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


def test_a_place_where_nothing_can_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OSError, match=r"out cannot be written: .*\. Choose another place"),
        lock(tmp_path / "file" / "x" / "out", "a run"),
    ):
        pytest.fail("there is no such place")
