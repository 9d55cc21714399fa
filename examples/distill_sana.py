# SPDX-License-Identifier: Apache-2.0
"""Distills SANA 1.6B to ternary codes, all of them trained: an estimated 25 GB with bitsandbytes, 35 GB without.

python examples/distill_sana.py --output sana-ternary
accelerate launch --multi_gpu examples/distill_sana.py --output sana-ternary   # data parallel
python examples/distill_sana.py --dry-run                                     # memory of every mode, nothing trained

Run the same command again to go on after an interruption.
"""

import argparse
import json

import torch
from accelerate import PartialState
from diffusers import SanaPipeline

from diffusers_ternary import TernaryConfig
from diffusers_ternary.calibration import CalibrationConfig
from diffusers_ternary.distillation import DistillConfig, distill
from diffusers_ternary.distillation.config import MODES
from diffusers_ternary.distillation.memory import estimate_memory
from diffusers_ternary.rollouts.prompts import read_prompts, split_held_out


MODEL = "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="Hub id or folder")
    parser.add_argument("--output", default="sana-ternary", help="folder to write; the run lies in OUTPUT-run")
    parser.add_argument("--prompts", default="template:4000", help="file, template:N or datasets:NAME")
    parser.add_argument("--held-out", type=int, default=64, help="prompts that are never trained on")
    parser.add_argument("--mode", default="full", choices=MODES)
    parser.add_argument("--updates", type=int, default=4000, help="updates of the weights")
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a forward; 8 forwards make an update")
    parser.add_argument("--size", type=int, default=1024, help="pixels")
    parser.add_argument("--call", type=json.loads, default={}, help="further arguments of the pipeline call, JSON")
    parser.add_argument("--float32", action="store_true", help="compute in float32 instead of bfloat16")
    parser.add_argument("--dry-run", action="store_true", help="print the memory that each mode needs")
    return parser.parse_args()


def main() -> None:
    """Distills (which checks first that the run fits), and saves."""
    arguments = parse()
    state = PartialState()
    pipeline = SanaPipeline.from_pretrained(
        arguments.model, dtype=torch.float32 if arguments.float32 else torch.bfloat16
    )
    call = {"height": arguments.size, "width": arguments.size, "num_inference_steps": 20, "guidance_scale": 4.5}
    config = TernaryConfig()
    run = DistillConfig(
        mode=arguments.mode,
        updates=arguments.updates,
        batch_size=arguments.batch_size,
        gradient_accumulation_steps=8,
        calibration=CalibrationConfig(batch_size=arguments.batch_size),
        call_kwargs={**call, **arguments.call},
    )
    if arguments.dry_run:
        tokens = (arguments.size // 32) ** 2  # one for 32 x 32 pixels
        for mode in MODES:
            changed = DistillConfig(**{**vars(run), "mode": mode})
            print(estimate_memory(pipeline.transformer, config, changed, tokens=tokens))
        return
    train, held_out = split_held_out(read_prompts(arguments.prompts), arguments.held_out)
    folder = f"{arguments.output}-run"
    student = distill(pipeline.to(state.device), train, config, run, folder, held_out_prompts=held_out)
    if state.is_main_process:
        student.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
