# SPDX-License-Identifier: Apache-2.0
"""The one way in which verbs hand over their reports."""

import torch
from diffusers import DiffusionPipeline
from torch import nn

from diffusers_ternary.backend import below_compiled_wrappers
from diffusers_ternary.backend.reports import attach_report
from integration_tests.support.pipelines import PIPELINES


def test_hangs_on_the_pipeline_and_is_returned_on_request(tmp_path):
    pipeline = PIPELINES["flux"].build()
    assert attach_report(pipeline, "first", False) is pipeline
    assert pipeline.ternary_report == "first"
    target, report = attach_report(pipeline, "second", True)
    assert target is pipeline
    assert report == pipeline.ternary_report == "second"
    pipeline.save_pretrained(tmp_path)
    assert not hasattr(DiffusionPipeline.from_pretrained(tmp_path), "ternary_report")


def test_a_compiled_model_comes_back_in_its_wrapper():
    verb = below_compiled_wrappers(lambda model: attach_report(model, "report", True))
    compiled = torch.compile(nn.Linear(2, 2), backend="eager")
    model, report = verb(compiled)
    assert model is compiled
    assert report == model.ternary_report == "report"
    assert list(model._orig_mod.state_dict()) == ["weight", "bias"]
