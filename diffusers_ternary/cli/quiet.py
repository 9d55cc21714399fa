# SPDX-License-Identifier: Apache-2.0
"""Less output from the libraries, for commands that print a result of their own."""

import logging
import warnings


def quiet_hosts() -> None:
    """Hides loading bars of diffusers and transformers, not ours, and warnings that nobody can do anything about.

    For the rest of the process; called before the hosts' models are imported, which is when transformers tells
    everyone to install torchvision.
    """
    import diffusers
    import transformers

    from ..progress import Bar

    Bar.always = True
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for module in ("pipelines.pipeline_utils", "loaders.lora_base"):
        logging.getLogger(f"diffusers.{module}").addFilter(_keep)
    warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # of PEFT, for a second adapter


def _keep(record: logging.LogRecord) -> bool:
    # Pipelines are annotated with one autoencoder and take several: "Expected types for vae: AutoencoderKL, got ...".
    # Adapters need not be of every text encoder: "No LoRA keys associated to CLIPTextModel found with the prefix=...".
    return not record.getMessage().startswith(("Expected types for ", "No LoRA keys associated to "))
