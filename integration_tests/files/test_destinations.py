# SPDX-License-Identifier: Apache-2.0
"""Results are complete or absent, and take the place of nothing but results of earlier runs."""

import json
import os
import pathlib
import shutil

import pytest

from diffusers_ternary.files import atomic, destinations
from diffusers_ternary.files.destinations import check_folder, output_file, output_folder


INDEX = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}


def pipeline(folder: pathlib.Path, content: str = "old") -> pathlib.Path:
    """A folder like one of `save_pretrained`."""
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    (folder / "transformer" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_text(content)
    return folder


def content(folder: pathlib.Path) -> str:
    return (folder / "transformer" / "diffusion_pytorch_model.safetensors").read_text()


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_appears_when_the_block_ends(tmp_path):
    target = tmp_path / "deep" / "out"
    with output_folder(target) as folder:
        (folder / "weights").write_text("x")
        (folder / "weights").chmod(0o600)  # as safetensors makes them
        assert not target.exists()
    assert (target / "weights").read_text() == "x"
    assert names(target.parent) == ["out"]
    assert target.stat().st_mode & 0o055, "readable for others, unlike a private temporary folder"
    assert (target / "weights").stat().st_mode & 0o044


def test_an_error_leaves_nothing(tmp_path):
    def write_half() -> None:
        with output_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_overwritten(tmp_path):
    target = pipeline(tmp_path / "out")
    with pytest.raises(FileExistsError, match="--overwrite"), output_folder(target):
        pass
    with pytest.raises(RuntimeError), output_folder(target, overwrite=True):
        raise RuntimeError
    assert content(target) == "old"
    with output_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert names(target) == ["new"]
    assert names(tmp_path) == ["out"]


def test_an_empty_folder_is_filled(tmp_path):
    with output_folder(tmp_path) as folder:
        (folder / "new").write_text("new")
    assert names(tmp_path) == ["new"]


REPORT = {"result.json": '{"psnr_db": 1.0}', "index.html": "", "images/00_student.png": "", "contact_sheet.png": ""}
MODEL = {"config.json": '{"model_type": "t5"}', "model-00001-of-00002.safetensors": "", "generation_config.json": "{}"}
TOKENIZER = {
    "tokenizer/tokenizer.json": "",
    "tokenizer/vocab.json": "",
    "tokenizer/additional_chat_templates/a.jinja": "",
}


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ({}, None),
        (MODEL, None),
        (REPORT, None),
        ({"model_index.json": json.dumps({"tokenizer": ["transformers", "T5"]}), **TOKENIZER}, None),
        ({"notes.txt": "mine"}, "notes.txt"),
        ({**MODEL, "thesis.tex": "mine"}, "thesis.tex"),
        ({**MODEL, "my_lora.safetensors": "mine"}, "my_lora.safetensors"),
        ({**MODEL, "README.md": "my model card"}, "README.md"),
        ({**MODEL, ".git/config": "mine"}, ".git/config"),
        ({**MODEL, "backup/config.json": "{}"}, "backup/config.json"),
        ({**REPORT, "images/holiday.png": "mine"}, "images/holiday.png"),
        ({"a/config.json": '{"model_type": "t5"}', "a/model.safetensors": ""}, "a/config.json"),
        ({"config.json": "{", "model.safetensors": ""}, "config.json"),
        ({"config.json": '{"editor": "vim"}'}, "config.json"),
    ],
)
def test_only_results_are_replaced(tmp_path, written, found):
    target = tmp_path / "out"
    for name, text in written.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(text)
    if found is None:
        assert check_folder(target, overwrite=True) == target.resolve()
        return
    with pytest.raises(FileExistsError) as error, output_folder(target, overwrite=True):
        pytest.fail("the work must not start")
    assert f"{target.resolve()} holds {pathlib.Path(found)}, which neither" in str(error.value)
    assert {name: (target / name).read_text() for name in written} == written
    assert names(tmp_path) == ["out"]


def test_copies_of_the_source_may_be_replaced(tmp_path):
    source, target = pipeline(tmp_path / "source"), pipeline(tmp_path / "out")
    for folder in (source, target):
        (folder / "LICENSE").write_text("free")
        (folder / "samples").mkdir()
        (folder / "samples" / "grid.png").write_text("grid")
    assert check_folder(target, sources=[source], overwrite=True)
    (target / "samples" / "grid.png").write_text("mine")
    with pytest.raises(FileExistsError, match=r"samples.grid\.png"):
        check_folder(target, sources=[source], overwrite=True)


def test_the_source_is_never_replaced(tmp_path, monkeypatch):
    home = tmp_path / "home"
    source = pipeline(home / "models" / "source")
    (home / "link").symlink_to(source)
    cases = {
        source: "is the source",
        home / "link": "is the source",
        home / "models": "holds the source",
        home: "holds the source",
        source / "transformer": "is part of the source",
        source / ".." / "source": "is the source",
    }
    for target, message in cases.items():
        with pytest.raises(ValueError, match=message), output_folder(target, sources=[source], overwrite=True):
            pytest.fail("the work must not start")
    assert check_folder(source / "packed", sources=[source]) == source / "packed"
    with pytest.raises(ValueError, match="is the working folder"):
        check_folder(tmp_path / "work", work=[tmp_path / "work"])
    with pytest.raises(ValueError, match="holds the working folder"):
        check_folder(tmp_path / "out", work=[None, tmp_path / "out" / "work"])
    monkeypatch.chdir(source)
    for target in (".", "..", source, "../.."):
        with pytest.raises(ValueError, match="the current folder"):
            check_folder(target, overwrite=True)
    assert content(source) == "old"


def test_a_link_is_followed(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "out").symlink_to(disk / "models")
    with output_folder(tmp_path / "out") as folder:
        assert folder.parent == disk
        pipeline(folder / "x")
    assert (tmp_path / "out").is_symlink()
    assert names(disk) == ["models"]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises((ValueError, FileExistsError)), output_folder(tmp_path / "loop"):
        pytest.fail("the work must not start")


def test_what_appears_meanwhile_is_left_alone_and_the_result_is_kept(tmp_path):
    target = tmp_path / "out"

    def run(*, overwrite: bool) -> None:
        with output_folder(target, overwrite=overwrite) as folder:
            (folder / "weights").write_text("hours of work")
            target.mkdir(exist_ok=True)
            (target / "mine.txt").write_text("mine")

    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="left alone") as error:
            run(overwrite=overwrite)
        kept = pathlib.Path(str(error.value).rpartition(" ")[2])
        assert (kept / "weights").read_text() == "hours of work"
        assert (target / "mine.txt").read_text() == "mine"
        assert sorted([kept.name, "out"]) == names(tmp_path)
        shutil.rmtree(kept)
        shutil.rmtree(target)


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("step", range(12))
def test_a_kill_between_any_two_steps_loses_neither(tmp_path, monkeypatch, step, exchange):
    """Every change of a name is a moment at which the process may be gone."""
    target = pipeline(tmp_path / "out", "old")
    count = 0

    class Killed(BaseException):
        pass

    def dies(function):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count > step:
                raise Killed
            return function(*arguments, **options)

        return call

    if not exchange:
        monkeypatch.setattr(atomic, "_exchanged", lambda *names: False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", dies(os.rename))
        patch.setattr(pathlib.Path, "rename", dies(pathlib.Path.rename))
        patch.setattr(atomic, "_exchanged", dies(atomic._exchanged))
        patch.setattr(atomic.shutil, "rmtree", dies(atomic.shutil.rmtree))
        patch.setattr(pathlib.Path, "unlink", dies(pathlib.Path.unlink))
        try:
            with output_folder(target, overwrite=True) as folder:
                pipeline(folder / "x").joinpath("transformer").rename(folder / "transformer")
                (folder / "x" / "model_index.json").rename(folder / "model_index.json")
                (folder / "x").rmdir()
                (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_text("new")
        except Killed:
            pass
    with pytest.raises(FileExistsError, match="exists already"), output_folder(target):
        pass
    assert content(target) in ("old", "new")
    assert names(tmp_path) == ["out"], "the next run removes what was left"


@pytest.mark.skipif(not pathlib.Path("/proc").is_mount(), reason="knows a mounted folder on Linux only")
def test_a_mounted_disk_is_noticed_before_the_work():
    with pytest.raises(FileExistsError, match="where a disk is mounted"):
        check_folder("/proc", overwrite=True)


def test_two_runs_do_not_share_a_destination(tmp_path):
    with output_folder(tmp_path / "out") as folder:
        (folder / "weights").write_text("first")
        with pytest.raises(BlockingIOError, match="is in use by another run"), output_folder(tmp_path / "out"):
            pytest.fail("the work must not start")
        with output_folder(tmp_path / "other") as other:
            (other / "weights").write_text("second")
    assert names(tmp_path) == ["other", "out"]
    assert (tmp_path / "out" / "weights").read_text() == "first"


def test_files_of_another_kind_are_kept(tmp_path):
    file = tmp_path / "flux.gguf"
    file.write_bytes(b"my novel")
    for overwrite, message in ((False, "--overwrite"), (True, "another kind of file")):
        with pytest.raises(FileExistsError, match=message), output_file(file, magic=b"GGUF", overwrite=overwrite):
            pytest.fail("the work must not start")
    file.write_bytes(b"GGUF old")
    with pytest.raises(ValueError, match="is the source"):
        destinations.check_file(file, magic=b"GGUF", sources=[file], overwrite=True)
    with output_file(file, magic=b"GGUF", overwrite=True) as temporary:
        temporary.write_bytes(b"GGUF new")
        assert file.read_bytes() == b"GGUF old"
    assert file.read_bytes() == b"GGUF new"
    with pytest.raises(FileExistsError, match="left alone"), output_file(file.with_name("b"), magic=b"GGUF") as other:  # noqa: PT012
        other.write_bytes(b"GGUF b")
        file.with_name("b").write_text("mine")
    assert file.with_name("b").read_text() == "mine"
    assert [path.read_bytes() for path in tmp_path.glob("b-*")] == [b"GGUF b"]
