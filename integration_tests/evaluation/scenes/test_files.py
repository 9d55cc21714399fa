# SPDX-License-Identifier: Apache-2.0
"""Finding the models of Scenes, or being told where to get them."""

import pytest
from diffusers import AutoencoderTiny

from diffusers_ternary.evaluation.scenes.files import FOLDER_VARIABLE, JUDGE, scenes_file


def test_a_missing_model_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    (tmp_path / "flux").mkdir()  # a folder without a pipeline is none
    for name in ("flux", "vae", JUDGE):
        with pytest.raises(FileNotFoundError, match=rf"{name} is not there.*clone.*{FOLDER_VARIABLE}.*rebuild\.sh"):
            scenes_file(name)


def test_the_variable_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    (tmp_path / "sana").mkdir()
    (tmp_path / "sana" / "model_index.json").touch()
    (tmp_path / JUDGE).touch()
    assert scenes_file("sana") == tmp_path / "sana"
    assert scenes_file(JUDGE) == tmp_path / JUDGE


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'unet'; choose from flux, sana, vae, judge\.safetensors"):
        scenes_file("unet")


def test_the_repository_has_autoencoder_and_judge():
    vae = AutoencoderTiny.from_pretrained(scenes_file("vae"))
    assert vae.config.latent_channels == 4
    assert scenes_file(JUDGE).parent == scenes_file("vae").parent
