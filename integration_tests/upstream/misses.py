# SPDX-License-Identifier: Apache-2.0
"""Upstream tests that fail with ternary models, and why: patterns of `CLASS.test[parameters]`, the first that fits."""

_SAFETENSORS = "Saves with `safe_serialization=False`: packed weights are stored as safetensors alone."

MISSES = {
    "*.test_helper[quantization_dtype_assignment]": "A packed model may be cast: codes stay as they are, and what is "
    "not packed changes, as `torch.nn.Module.to` promises. The test wants an error, as of backends that cannot.",
    "*Model.test_from_save_pretrained_dtype*": "Loads with `low_cpu_mem_usage=False`, which diffusers refuses for "
    "every quantized model.",
    "*Lora.test_lora_layerwise_casting*": "Wants the weights of every layer in float8: codes are packed and stay.",
    "*Training.test_gradient_checkpointing_equivalence": "Asserts that a new model is in training mode; the quantized "
    "one here comes from `from_pretrained`, which leaves every model in evaluation mode.",
    "*Pipeline.test_save_load_local": _SAFETENSORS,
    "*Pipeline.test_save_load_optional_components": _SAFETENSORS,
    "*Pipeline.test_serialization_with_variants": _SAFETENSORS,
    "*Pipeline.test_loading_with*variants*": _SAFETENSORS,
    "*Pipeline.test_torch_dtype_dict": _SAFETENSORS,
    "*LoraMemory.test_*offload*": "Streams and `enable_model_cpu_offload` need an "
    "accelerator: diffusers raises on a CPU.",
}
