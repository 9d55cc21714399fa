# SPDX-License-Identifier: Apache-2.0
"""Pixel people: a really trained text-to-image pipeline small enough to ship, and a judge of what it draws."""

from diffusers_ternary.demo.grammar import attributes_of, held_out_prompts, training_prompts
from diffusers_ternary.demo.judge import AttributeAccuracy, Judge, attribute_accuracy, real_images
from diffusers_ternary.demo.pipeline import DEMO_CALL, demo_folder, demo_pipeline, generate


__all__ = [
    "DEMO_CALL",
    "AttributeAccuracy",
    "Judge",
    "attribute_accuracy",
    "attributes_of",
    "demo_folder",
    "demo_pipeline",
    "generate",
    "held_out_prompts",
    "real_images",
    "training_prompts",
]
