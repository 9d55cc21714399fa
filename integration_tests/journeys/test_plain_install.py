# SPDX-License-Identifier: Apache-2.0
"""What people see who open a packed folder without importing this package: no model, and the name to install."""

import pytest
import torch

from diffusers_ternary import TernaryConfig, quantize
from integration_tests.support import denoisers, text_encoders
from integration_tests.support.fresh_process import run_python


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What stock diffusers and transformers do with packed folders in a process without this package."""
    root = tmp_path_factory.mktemp("packed")
    torch.manual_seed(0)
    quantize(denoisers.flux()).save_pretrained(root / "flux")
    quantize(text_encoders.clip(), TernaryConfig(group_size=8)).save_pretrained(root / "clip")
    return run_python(
        """
        import contextlib, io, json, sys
        from diffusers import FluxTransformer2DModel
        from transformers import CLIPTextModel

        outcomes = {}
        for name, model_class in {"flux": FluxTransformer2DModel, "clip": CLIPTextModel}.items():
            log = io.StringIO()
            with contextlib.redirect_stderr(log):
                try:
                    model_class.from_pretrained(f"{sys.argv[1]}/{name}")
                    message = "loaded"
                except Exception as error:
                    message = f"{type(error).__name__}: {error}"
            outcomes[name] = message
        outcomes["imported"] = "diffusers_ternary" in sys.modules
        print(json.dumps(outcomes))
        """,
        root,
    )


def test_nothing_imported_the_package(outcomes):
    assert outcomes["imported"] is False


def test_diffusers_names_the_package(outcomes):
    assert outcomes["flux"].startswith("ValueError: Unknown quantization type, got diffusers_ternary")


def test_transformers_refuses_too(outcomes):
    # It only warns of the unknown method; the packed shapes then keep it from loading nonsense.
    assert outcomes["clip"].startswith("RuntimeError")
