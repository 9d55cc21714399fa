# SPDX-License-Identifier: Apache-2.0
"""The hooks by which accelerate and diffusers keep weights elsewhere, or in another dtype, between calls.

A hook belongs to the module that it was put on, and remembers that module's tensors by name. Whoever replaces modules
or reads a whole model has to reach through it. Each private name has a canary in `test_compat_offload.py`.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
from accelerate.utils import named_module_tensors, set_module_tensor_to_device
from safetensors.torch import load_file
from torch import nn


_GROUP_HOOKS = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")
_CASTING_HOOK = "layerwise_casting"
_OWN_FOLDER = "diffusers-ternary-"


# --- accelerate: weights on the meta device, their values in a map --------------------------------------------------


def align_hook(module: nn.Module) -> AlignDevicesHook | None:
    """accelerate's hook that places a module's tensors, if it has one."""
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return next((one for one in hooks if isinstance(one, AlignDevicesHook)), None)


def _offloaded_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """What a module's hook will put on it for the next call, on the CPU."""
    hook = align_hook(module)
    if hook is None or not hook.offload:
        return {}
    names = named_module_tensors(
        module, include_buffers=hook.offload_buffers, recurse=hook.place_submodules, remove_non_persistent=True
    )
    return {name: hook.weights_map[name] for name, tensor in names if tensor.is_meta}


def offloaded_by_accelerate(model: nn.Module) -> bool:
    """Whether accelerate keeps any tensor of a model elsewhere: on the CPU or on disk."""
    return any((hook := align_hook(module)) is not None and hook.offload for module in model.modules())


def placed_as_a_whole(model: nn.Module) -> str | None:
    """Name of a module that accelerate loads with all modules in it, by the names of their tensors."""
    for name, module in model.named_modules():
        hook = align_hook(module)
        if hook is not None and hook.offload and hook.place_submodules:
            return name
    return None


def complete_state_dict(model: nn.Module, **options: Any) -> Any:
    """`model.state_dict()` with the values of tensors that accelerate keeps elsewhere."""
    state_dict = type(model).state_dict(model, **options)
    for module_name, module in model.named_modules():
        for name, value in _offloaded_tensors(module).items():
            full = f"{module_name}.{name}" if module_name else name
            if full in state_dict:
                state_dict[full] = value
    return state_dict


def load_tensors(module: nn.Module) -> None:
    """Puts the tensors that accelerate keeps elsewhere onto a module, on the CPU."""
    for name, value in _offloaded_tensors(module).items():
        set_module_tensor_to_device(module, name, "cpu", value=value)


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Gives a module that takes another one's place the same placement and the same layerwise casting.

    Its weights are kept on the CPU between calls where those of `source` were kept on the CPU or on disk.
    """
    hook = align_hook(source)
    if hook is not None:
        own = AlignDevicesHook(
            execution_device=hook.execution_device,
            offload=hook.offload,
            io_same_device=hook.io_same_device,
            offload_buffers=hook.offload_buffers,
            skip_keys=hook.skip_keys,
        )
        add_hook_to_module(target, own)
    casting = casting_hook(source)
    if casting is not None:
        from diffusers.hooks.layerwise_casting import apply_layerwise_casting_hook

        apply_layerwise_casting_hook(target, casting.storage_dtype, casting.compute_dtype, casting.non_blocking)


# --- diffusers: layerwise casting, groups of modules on the CPU or on disk ------------------------------------------


def _diffusers_hook(module: nn.Module, name: str) -> Any:
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(name)


def casting_hook(module: nn.Module) -> Any:
    """diffusers' hook that casts a module for each call: has `storage_dtype`, `compute_dtype`, `non_blocking`."""
    return _diffusers_hook(module, _CASTING_HOOK)


def is_group_offloaded(model: nn.Module) -> bool:
    """Whether diffusers keeps groups of a model's modules elsewhere."""
    return any(_diffusers_hook(module, _GROUP_HOOKS[0]) is not None for module in model.modules())


@contextlib.contextmanager
def without_group_offloading(model: nn.Module, *, keep: bool = False) -> Iterator[None]:
    """Lifts diffusers' group offloading: all tensors are in memory, and may be replaced; then it is applied anew.

    diffusers would take the files of a disk offload for those of the new modules: they are removed, and new ones are
    written to a folder within.

    Args:
        model (`nn.Module`): a model of diffusers or transformers.
        keep (`bool`, *optional*, defaults to `False`): whether the tensors stay in memory until the next call, which
            offloads each group when it is done with it. What is on disk has no values in memory.
    """
    found = [_diffusers_hook(module, _GROUP_HOOKS[0]) for module in model.modules()]
    hooks = [hook for hook in found if hook is not None]
    if not hooks:
        yield
        return
    from diffusers.hooks.group_offloading import _apply_group_offloading

    files = set()
    for group in {id(hook.group): hook.group for hook in hooks}.values():
        if group.offload_to_disk_path and os.path.exists(group.safetensors_file_path):
            _load_group(group)
            files.add(group.safetensors_file_path)
    registries: list[Any] = [part._diffusers_hook for part in model.modules() if hasattr(part, "_diffusers_hook")]
    for registry, name in itertools.product(registries, _GROUP_HOOKS):
        registry.remove_hook(name, recurse=False)
    try:
        yield
    finally:
        for file in files:
            os.unlink(file)
        tensors_in_memory = {parameter: parameter.data for parameter in model.parameters()} if keep else {}
        _apply_group_offloading(model, _on_new_folder(hooks[0].config))
        for parameter, value in tensors_in_memory.items():
            parameter.data = value


def _load_group(group: Any) -> None:
    tensors = load_file(group.safetensors_file_path)
    missing = next((key for key in group.key_to_tensor if key not in tensors), None)
    if missing is not None:
        raise ValueError(
            f"{group.safetensors_file_path} was there before this model was offloaded, and diffusers took it for the "
            "model's own: its weights are lost. Load the model again and offload it to an empty folder."
        )
    for key, tensor in group.key_to_tensor.items():
        tensor.data = tensors[key]


def _on_new_folder(config: Any) -> Any:
    """The same offloading; to disk, in a folder of its own: diffusers never overwrites a group's file."""
    folder = config.offload_to_disk_path
    if folder is None:
        return config
    if os.path.basename(folder).startswith(_OWN_FOLDER):
        with contextlib.suppress(OSError):
            os.rmdir(folder)
        folder = os.path.dirname(folder)
    return dataclasses.replace(config, offload_to_disk_path=tempfile.mkdtemp(prefix=_OWN_FOLDER, dir=folder))


@contextlib.contextmanager
def complete_for_saving(model: nn.Module) -> Iterator[None]:
    """Makes `model.state_dict()` complete for a while, wherever hooks keep the tensors."""
    with without_group_offloading(model):
        if not offloaded_by_accelerate(model):
            yield
            return
        model.state_dict = functools.partial(complete_state_dict, model)  # type: ignore[method-assign]
        try:
            yield
        finally:
            del model.state_dict
