# SPDX-License-Identifier: Apache-2.0
"""Makes the distilled version of the embedded model that `diffusers-ternary demo` shows, from a finished run.

    python examples/distill_pixel_people.py --output run
    python examples/pixel_people/embed_distilled.py run diffusers_ternary/demo/data/distilled

Prompts only: none of the held-out combinations, no images.
"""

import argparse
import pathlib
import shutil

import torch
from diffusers import FluxTransformer2DModel

import diffusers_ternary  # noqa: F401 - registers the packed format


def main() -> None:
    """Stores what is not converted in bfloat16, like the teacher's file, and takes the report along."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=pathlib.Path, help="output folder of distill_pixel_people.py")
    parser.add_argument("output", type=pathlib.Path, help="folder for the transformer")
    arguments = parser.parse_args()

    transformer = FluxTransformer2DModel.from_pretrained(arguments.run / "best")
    for parameter in transformer.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)
    # diffusers writes the folder it loaded from, which means nothing on another machine
    transformer.register_to_config(_name_or_path="diffusers_ternary.demo_folder()")
    transformer.save_pretrained(arguments.output)
    shutil.copy(arguments.run / "distill.json", arguments.output / "distill.json")


if __name__ == "__main__":
    main()
