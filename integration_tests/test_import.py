# SPDX-License-Identifier: Apache-2.0
"""Importing the package registers the backend and does nothing else."""

import pytest

from integration_tests.support.fresh_process import run_python


@pytest.fixture(scope="module")
def imported():
    """What a fresh process looks like after the import, beside what the hosts had loaded already."""
    return run_python(
        """
        import json, logging, sys, threading, warnings

        import torch, diffusers, transformers, accelerate
        import diffusers.quantizers.auto, transformers.quantizers.auto, transformers.core_model_loading
        import diffusers.utils.logging

        before, threads = set(sys.modules), threading.active_count()
        mapping = dict(diffusers.quantizers.auto.AUTO_QUANTIZER_MAPPING)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import diffusers_ternary
        new = set(sys.modules) - before
        diffusers_ternary.backend.register()
        print(json.dumps({
            "new": sorted(new),
            "cuda": torch.cuda.is_initialized(),
            "threads": threading.active_count() - threads,
            "warnings": [str(warning.message) for warning in caught],
            "handlers": len(logging.getLogger("diffusers_ternary").handlers),
            "public": sorted(name for name in diffusers_ternary.__all__ if not hasattr(diffusers_ternary, name)),
            "others": {
                name: quantizer.__name__
                for name, quantizer in diffusers.quantizers.auto.AUTO_QUANTIZER_MAPPING.items()
                if mapping.get(name) is not quantizer
            },
        }))
        """
    )


def test_initialises_no_cuda(imported):
    assert imported["cuda"] is False


@pytest.mark.parametrize(
    "library",
    ["triton", "peft", "torchmetrics", "matplotlib", "torchvision", "typer", "rich", "jinja2", "sentencepiece"],
)
def test_imports_no_optional_library(imported, library):
    assert not [name for name in imported["new"] if name.split(".")[0] == library]


@pytest.mark.parametrize(
    "part",
    [
        "cli",
        "demo",
        "evaluation",
        "calibration",
        "distillation",
        "hub",
        "interop",
        "inspection",
        "sources",
        "kernels.triton",
    ],
)
def test_imports_no_part_that_is_not_needed(imported, part):
    prefix = f"diffusers_ternary.{part}"
    assert not [name for name in imported["new"] if name == prefix or name.startswith(f"{prefix}.")]


def test_starts_no_thread_warns_of_nothing_and_leaves_logging_alone(imported):
    assert imported["threads"] == 0
    assert imported["warnings"] == []
    assert imported["handlers"] == 0


def test_registers_one_backend_and_leaves_the_others_alone(imported):
    assert imported["others"] == {"diffusers_ternary": "TernaryDiffusersQuantizer"}


def test_offers_what_it_announces(imported):
    assert imported["public"] == []
