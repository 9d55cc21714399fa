# SPDX-License-Identifier: Apache-2.0
"""The pipeline that the commands are tried on."""

import pathlib

import pytest

from integration_tests.support.pipelines import PIPELINES


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of a float pipeline."""
    folder = tmp_path_factory.mktemp("float") / "flux"
    PIPELINES["flux"].build().save_pretrained(folder)
    return folder
