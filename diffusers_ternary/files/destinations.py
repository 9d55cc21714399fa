# SPDX-License-Identifier: Apache-2.0
"""Where the user said to write: checked before the work starts; only results of earlier runs are ever replaced."""

import contextlib
import errno
import filecmp
import os
import pathlib
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .atomic import new_file, recover_folder, replace_folder, staged_folder
from .documents import read_json, write_json
from .locks import lock
from .names import PathLike


# What save_pretrained of pipelines, models, schedulers, tokenizers and processors, and this package's commands write.
_WRITTEN = re.compile(
    r"(modular_)?model_index\.json|config\.json|\w+_config\.json|(special_tokens_map|added_tokens|tekken)\.json"
    r"|(diffusion_pytorch_|pytorch_)?model([-.][\w.-]+)?\.(safetensors|bin)(\.index(\.[\w-]+)?\.json)?"
    r"|\d+\.safetensors"  # mflux's shards
    r"|tokenizer\.(json|model)|vocab\.(json|txt)|merges\.txt|(spiece|sentencepiece(\.bpe)?)\.model|(source|target)\.spm"
    r"|chat_template\.(json|jinja)|(calibration|distill|evaluation)\.json|calibration\.png"
)
_REPORT = re.compile(r"index\.html|result\.json|contact_sheet\.png|velocity_error\.png|\d+_(student|teacher)\.png")
_CHAT_TEMPLATES = "additional_chat_templates"
_IN_THE_WAY = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR}


@contextlib.contextmanager
def output_folder(
    destination: PathLike,
    *,
    sources: Iterable[PathLike | None] = (),
    work: Iterable[PathLike | None] = (),
    overwrite: bool = False,
) -> Iterator[pathlib.Path]:
    """Gives a folder to fill, which takes the place of `destination` when the block ends without an error.

    Args:
        destination (`str` or `os.PathLike`): a symbolic link is followed.
        sources (`Iterable`, *optional*): what the work reads; what does not exist (a Hub id) is passed over.
        work (`Iterable`, *optional*): folders for intermediate results.
        overwrite (`bool`, *optional*, defaults to `False`): replace the result of an earlier run.

    Raises:
        FileExistsError: if `destination` exists (and is not an empty folder) and `overwrite` is false, or if it holds
            what neither this package nor `save_pretrained` wrote.
        ValueError: if it is, or holds, a source or a working folder.
        BlockingIOError: if another run is writing there.
    """
    inputs, work = [path for path in sources if path is not None], list(work)
    target = _check_place(destination, inputs, work)
    with lock(target, "another run"):
        recover_folder(target)
        check_folder(target, sources=inputs, work=work, overwrite=overwrite)
        with staged_folder(target) as folder:
            yield folder
            forget_local_paths(folder)
            _place(folder, target, inputs, overwrite=overwrite)


@contextlib.contextmanager
def output_file(
    destination: PathLike, *, magic: bytes, sources: Iterable[PathLike | None] = (), overwrite: bool = False
) -> Iterator[pathlib.Path]:
    """The name of a file to write, which takes the place of `destination` when the block ends without an error.

    Args:
        destination (`str` or `os.PathLike`): a symbolic link is followed.
        magic (`bytes`): how files of that kind begin; no other file is replaced.
        sources (`Iterable`, *optional*): what the work reads.
        overwrite (`bool`, *optional*, defaults to `False`): replace the result of an earlier run.

    Raises:
        FileExistsError: if it exists and `overwrite` is false, or if it is another kind of file.
        ValueError: if it is a source.
        BlockingIOError: if another run is writing there.
    """
    target = check_file(destination, magic=magic, sources=sources, overwrite=overwrite)
    with lock(target, "another run"):
        recover_folder(target)
        with new_file(target) as temporary:
            yield temporary
            try:
                check_file(target, magic=magic, sources=sources, overwrite=overwrite)
            except FileExistsError as error:
                raise _kept(temporary, target) from error


def forget_local_paths(folder: pathlib.Path) -> None:
    """Removes from the configurations in a folder where on this machine they were loaded from.

    Hosts write it into every config.json (`_name_or_path`): names of users and customers, in a folder that is shared.
    """
    for path in folder.rglob("*.json"):
        if path.name in ("config.json", "model_index.json") and not path.is_symlink():
            content = read_json(path) or {}
            if _without_local_paths(content) != content:
                write_json(path, _without_local_paths(content))


def _without_local_paths(content: Any) -> Any:
    if not isinstance(content, dict):
        return content
    return {
        name: _without_local_paths(value)
        for name, value in content.items()
        if name != "_name_or_path" or not is_local_path(value)
    }


def is_local_path(value: object) -> bool:
    """Whether a `_name_or_path` is one of this machine, and not the id of a Hub repository."""
    if not isinstance(value, str):
        return False
    absolute = value.startswith(("/", ".", "~")) or "\\" in value or pathlib.PurePath(value).is_absolute()
    return absolute or value.count("/") > 1 or (bool(value) and os.path.lexists(value))


def check_folder(
    destination: PathLike,
    *,
    sources: Iterable[PathLike | None] = (),
    work: Iterable[PathLike | None] = (),
    overwrite: bool = False,
) -> pathlib.Path:
    """Checks a destination as [`output_folder`] does, without touching it.

    Returns:
        `pathlib.Path`: with symbolic links resolved.
    """
    target = _check_place(destination, sources, work)
    if not os.path.lexists(target):
        return target
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file. Choose another name for the folder.")
    if target.is_mount():
        raise FileExistsError(f"{target} is where a disk is mounted, which cannot be replaced. Name a folder in it.")
    if not any(target.iterdir()):
        return target
    if not overwrite:
        raise FileExistsError(f"{target} exists already. Choose another folder, or pass --overwrite.")
    _refuse_foreign(target, _local(sources))
    return target


def _check_place(
    destination: PathLike, sources: Iterable[PathLike | None], work: Iterable[PathLike | None]
) -> pathlib.Path:
    target = _resolved(destination)
    for source in _local(sources):
        _refuse_parts_of(target, source)
    _refuse_around(target, [_resolved(path) for path in work if path is not None], "the working folder")
    with contextlib.suppress(FileNotFoundError):  # the current folder may have been deleted
        _refuse_around(target, [pathlib.Path.cwd()], "the current folder")
    return target


def _local(sources: Iterable[PathLike | None]) -> list[pathlib.Path]:
    return [_resolved(path) for path in sources if path is not None and os.path.exists(path)]


def check_file(
    destination: PathLike, *, magic: bytes, sources: Iterable[PathLike | None] = (), overwrite: bool = False
) -> pathlib.Path:
    """Checks a destination as [`output_file`] does, without touching it."""
    target = _resolved(destination)
    _refuse_around(target, _local(sources), "the source")
    if not os.path.lexists(target):
        return target
    if not target.is_file():
        raise FileExistsError(f"{target} exists and is not a file. Choose another name.")
    if not overwrite:
        raise FileExistsError(f"{target} exists already. Choose another file, or pass --overwrite.")
    with open(target, "rb") as file:
        if file.read(len(magic)) != magic:
            raise FileExistsError(f"{target} is another kind of file, which is not replaced. Choose another name.")
    return target


def _resolved(path: PathLike) -> pathlib.Path:
    try:
        return pathlib.Path(path).resolve()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} is not a path that can be followed ({error}). Choose another.") from error


def _refuse_parts_of(target: pathlib.Path, source: pathlib.Path) -> None:
    """No result takes the place of what it is made from, as a whole or in part."""
    _refuse_around(target, [source], "the source")
    if not target.is_relative_to(source) or not target.exists():
        return
    first = target.relative_to(source).parts[0]
    if (source / first).is_file() or first in _components(source):
        raise ValueError(f"{target} is part of the source {source}. Choose another place.")


def _refuse_around(target: pathlib.Path, places: Iterable[pathlib.Path], what: str) -> None:
    for place in places:
        if target == place or target in place.parents:
            relation = f"is {what}" if target == place else f"holds {what} {place}"
            raise ValueError(f"{target} {relation}, which no result may replace. Choose another place.")


def _refuse_foreign(target: pathlib.Path, sources: Iterable[pathlib.Path]) -> None:
    found = next(_foreign(target, list(sources)), None)
    if found is not None:
        raise FileExistsError(
            f"{target} holds {found}, which neither this package nor save_pretrained wrote: --overwrite replaces "
            "results only. Move it away, delete it, or choose another folder."
        )


def _foreign(target: pathlib.Path, sources: list[pathlib.Path]) -> Iterator[str]:
    """Names in a folder that are not part of a pipeline, a model or a report, nor copies of a source's files."""
    report = "psnr_db" in (_json(target / "result.json") or {})
    config = _json(target / "config.json") or {}
    pipeline = any((target / name).is_file() for name in ("model_index.json", "modular_model_index.json"))
    model = bool({"_class_name", "architectures", "model_type", "quantization_config"} & config.keys())
    known = _REPORT if report else _WRITTEN
    folders = {"images"} if report else {_CHAT_TEMPLATES, *_components(target)}
    for path in sorted(target.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        name = path.relative_to(target)
        placed = len(name.parts) == 1 or name.parts[0] in folders
        fitting = known.fullmatch(path.name) or _CHAT_TEMPLATES in name.parts
        if (report or pipeline or model) and placed and fitting and not path.is_symlink():
            continue
        copies = (source / name for source in sources)
        if path.is_symlink() or not any(copy.is_file() and filecmp.cmp(path, copy, False) for copy in copies):
            yield str(name)


def _components(folder: pathlib.Path) -> set[str]:
    index: Mapping[str, Any] = _json(folder / "model_index.json") or _json(folder / "modular_model_index.json") or {}
    return {name for name, value in index.items() if isinstance(value, list)}


def _json(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except ValueError:
        return None


def _place(folder: pathlib.Path, target: pathlib.Path, sources: Iterable[PathLike], *, overwrite: bool) -> None:
    """Moves a complete folder to its place; what appeared there meanwhile is checked like what was there before."""
    try:
        if overwrite:
            check_folder(target, sources=sources, overwrite=True)
        replace_folder(folder, target, overwrite=overwrite)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in {None, *_IN_THE_WAY}:
            raise
        raise _kept(folder, target) from error


def _kept(result: pathlib.Path, target: pathlib.Path) -> FileExistsError:
    """Gives a result that cannot take its place a name of its own."""
    place = target.with_name(f"{target.stem}-{secrets.token_hex(4)}{target.suffix}")
    result.rename(place)
    return FileExistsError(
        f"{target} appeared or changed during the run, and was left alone. The result is in {place}"
    )
