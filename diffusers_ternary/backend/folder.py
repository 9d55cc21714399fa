# SPDX-License-Identifier: Apache-2.0
"""What a local folder that `save_pretrained` wrote says of itself, read as something that anybody may have written.

Names that lead out of the folder, links, and classes that are none are errors, before anything follows them. Nothing
is loaded or downloaded here: that is done in `sources.py`, and packed weights are read in `packed_folder.py`.
"""

import contextlib
import os
import pathlib
import pickle
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

from safetensors import SafetensorError

from ..files import RESTORE, read_json


_PACKAGE = __name__.partition(".")[0]
# Of the interpreter, pickle and torch. ValueError, OSError and TypeError speak for themselves.
_INNER_ERRORS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    SafetensorError,
    pickle.PickleError,
)


def pipeline_parts(index: Mapping[str, Any], *, source: str | os.PathLike[str]) -> dict[str, tuple[str, str]]:
    """The components that a `model_index.json` names, those that are not left out.

    Args:
        index (`Mapping`): its content.
        source (`str` or `PathLike`): the pipeline, for messages.

    Returns:
        `dict[str, tuple[str, str]]`: component → library and class.

    Raises:
        ValueError: if a name is a path, say: components are folders of the pipeline.
    """
    parts = {}
    for name, value in index.items():
        is_part = isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
        if not is_part or name.startswith("_"):  # settings of the pipeline, or a component that is left out
            continue
        if not name.isidentifier():
            raise ValueError(f"{source}: model_index.json names a component {name!r}, which is not a name. {RESTORE}")
        parts[name] = (value[0], value[1])
    return parts


def check_pipeline(index: Mapping[str, Any], *, source: str | os.PathLike[str]) -> None:
    """Checks the class that a `model_index.json` names, and its components ([`pipeline_parts`]).

    Raises:
        ValueError: if diffusers has no such pipeline.
    """
    import diffusers

    pipeline_parts(index, source=source)
    name = index.get("_class_name")
    if isinstance(name, list):  # a file of its own, and the class in it
        return
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, diffusers.DiffusionPipeline):
        raise ValueError(
            f"{source}: model_index.json names {name!r}, which is not a pipeline of the installed diffusers. Upgrade "
            "diffusers, or restore the file."
        )


def weight_files(folder: pathlib.Path, name: str, variant: str | None = None) -> list[pathlib.Path]:
    """The safetensors files that the host library would read: those of an index first, else the single file.

    Args:
        folder (`Path`): of a model.
        name (`str`): file name without its ending: `"diffusion_pytorch_model"` or `"model"`.
        variant (`str`, *optional*): of the files, e.g. `"fp16"`.

    Raises:
        ValueError: if a file is missing, or the index names one of another folder.
    """
    stem = name if variant is None else f"{name}.{variant}"
    index_name = f"{name}.safetensors.index.json" if variant is None else f"{name}.safetensors.index.{variant}.json"
    index = read_json(folder / index_name)
    if index is not None:
        files = [folder / file for file in shard_names(index, source=folder / index_name)]
        missing = [file.name for file in files if not file.is_file()]
        if missing or not files:
            raise ValueError(f"{folder / index_name} lists {', '.join(missing) or 'no files'}, which is missing.")
        return files
    file = folder / f"{stem}.safetensors"
    if file.is_file():
        return [file]
    found = sorted(entry.name for entry in folder.glob("*.safetensors"))
    raise ValueError(
        f"{folder} has no {file.name} ({', '.join(found) or 'no safetensors files at all'}). Choose a --variant, or "
        "save the model as safetensors first."
    )


def default_files(folder: pathlib.Path, config: Mapping[str, Any]) -> list[pathlib.Path]:
    """The safetensors files of a model that is loaded without a variant; if there are none, all that there are.

    Args:
        folder (`Path`): of a model.
        config (`Mapping`): its config.json.
    """
    if has_default_files(folder, config):
        return weight_files(folder, weights_name(config))
    return sorted(folder.glob("*.safetensors"))


def has_default_files(folder: pathlib.Path, config: Mapping[str, Any]) -> bool:
    """Whether a model has safetensors files that are loaded without a variant; arguments as of [`default_files`]."""
    name = weights_name(config)
    return any((folder / f"{name}{ending}").is_file() for ending in (".safetensors", ".safetensors.index.json"))


def shard_names(index: Mapping[str, Any], *, source: pathlib.Path) -> list[str]:
    """The files that an index of shards names, all of its own folder.

    Raises:
        ValueError: if it is not an index, or names something else.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{source} has no weight_map. {RESTORE}")
    return sorted({check_file_name(file, source=source) for file in weight_map.values()})


def weights_name(config: Mapping[str, Any]) -> str:
    """File name of a model's weights, without its ending."""
    return "diffusion_pytorch_model" if "_class_name" in config else "model"


def model_name(config: Mapping[str, Any]) -> tuple[str, str]:
    """Library (`"diffusers"` or `"transformers"`) and class that a model's config.json names."""
    if "_class_name" in config:
        return "diffusers", str(config["_class_name"])
    names = config.get("architectures")
    return "transformers", str(names[0]) if isinstance(names, list) and names else "AutoModel"


def model_class(config: Mapping[str, Any], *, source: str | os.PathLike[str]) -> type[Any]:
    """The class of diffusers or transformers that a config.json names.

    Raises:
        ValueError: if there is none of that name, or it is not a class of models.
    """
    import diffusers
    import transformers

    if "_class_name" in config:
        library, base, name = diffusers, diffusers.ModelMixin, config["_class_name"]
    else:
        library, base = transformers, transformers.PreTrainedModel
        names = config.get("architectures")
        name = names[0] if isinstance(names, list) and names else None
    found = getattr(library, name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, base):
        shown = name if name and isinstance(name, str) else repr(name)
        raise ValueError(
            f"{source}: the installed {library.__name__} has no class {shown} of models, which config.json names. "
            f"Upgrade {library.__name__}, or restore the file."
        )
    return found


def quant_method(config: Mapping[str, Any], *, source: str | os.PathLike[str]) -> Any:
    """The method that a config.json says its weights are quantized with; `None` for float weights.

    Raises:
        ValueError: if its `quantization_config` is not one.
    """
    section = config.get("quantization_config")
    if section is not None and not isinstance(section, dict):
        raise ValueError(f"{source}: quantization_config={section!r} in config.json is not an object. {RESTORE}")
    return (section or {}).get("quant_method")


def refuse_links(root: pathlib.Path) -> None:
    """Checks that a folder that is about to be copied or published holds no symbolic links.

    What a link shows may be anything that the user can read, a private key as well. Links of a Hub cache that lead to
    files of the same repository are let pass.

    Raises:
        ValueError: names the link and where it leads.
    """
    blobs = _cache_of(root)
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]  # neither copied nor published
        for name in sorted([*subfolders, *(name for name in names if not name.startswith("."))]):
            path = pathlib.Path(folder, name)
            if path.is_symlink() and (blobs is None or blobs not in path.resolve().parents):
                raise ValueError(
                    f"{path} is a symbolic link to {os.readlink(path)}. What it leads to would be copied or published "
                    "with the folder: put a copy in its place, or remove it."
                )


def _cache_of(root: pathlib.Path) -> pathlib.Path | None:
    """The files of a Hub cache's repository (`models--OWNER--NAME/snapshots/COMMIT` is given), else `None`."""
    for folder in (root.absolute(), *root.absolute().parents):
        blobs = folder.parent.parent / "blobs"
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--") and blobs.is_dir():
            return blobs.resolve()
    return None


def check_file_name(name: object, *, source: str | os.PathLike[str]) -> str:
    """A name that a file gives for another one in the same folder, if that is what it is.

    Raises:
        ValueError: if it leads to another folder, or is not a name.
    """
    if not isinstance(name, str) or not name or name in (".", "..") or any(mark in name for mark in "/\\\0:"):
        raise ValueError(f"{os.fspath(source)} names {name!r}, which is not the name of a file beside it. {RESTORE}")
    return name


@contextlib.contextmanager
def explained_loading(source: str | os.PathLike[str], *, own_reader: bool = False) -> Iterator[None]:
    """Turns what libraries raise on damaged or hostile files into an error that names the source.

    Errors of this package's own code stay what they are: they are bugs, and no download mends them.

    Args:
        source (`str` or `PathLike`): what is read.
        own_reader (`bool`, *optional*, defaults to `False`): whether this package reads the file itself, so that
            damage shows in its own lookups and calculations as well.

    Raises:
        ValueError: instead of errors that say what went wrong inside, and not with what.
    """
    try:
        yield
    except _INNER_ERRORS as error:
        reason = str(error).strip().splitlines()
        # Of torch: torch.OutOfMemoryError, and a plain RuntimeError of the CPU's allocator.
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
            raise ValueError(
                f"{source} does not fit into memory ({reason[0]}). Free some, or choose another device; if the model "
                "is not that large, its config.json is damaged."
            ) from error
        if _is_own(error) and (not own_reader or isinstance(error, AttributeError)):
            raise
        raise ValueError(
            f"{source} cannot be loaded ({type(error).__name__}: {reason[0] if reason else 'no more is known'}). A "
            "file in it is damaged, or not what its config.json says."
        ) from error


def _is_own(error: BaseException) -> bool:
    """Whether an error comes from this package's code, be it that a library called it (a hook, a quantizer)."""
    if isinstance(error, (SafetensorError, pickle.PickleError)):  # raised without a frame of their own
        return False
    frames = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    own = [name.partition(".")[0] == _PACKAGE for name in frames]
    called = own[own.index(False) :] if False in own else []  # by those of this package that asked a library to read
    return not called or any(called)
