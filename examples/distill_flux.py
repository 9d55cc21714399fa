# SPDX-License-Identifier: Apache-2.0
"""Distills FLUX.1-dev: a low-rank correction of rank 64 beside calibrated ternary codes, an estimated 45 GB.

python examples/distill_flux.py --output flux-ternary
accelerate launch --multi_gpu examples/distill_flux.py --output flux-ternary   # data parallel
accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP \
    examples/distill_flux.py --output flux-ternary --mode full                 # all codes, on eight GPUs of 80 GB

Run the same command again to go on after an interruption.
"""

import argparse
import json

import torch
from accelerate import PartialState
from diffusers import FluxPipeline

from diffusers_ternary import TernaryConfig
from diffusers_ternary.distillation import DistillConfig, distill
from diffusers_ternary.distillation.config import MODES
from diffusers_ternary.rollouts.prompts import read_prompts, split_held_out


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev", help="Hub id or folder")
    parser.add_argument("--output", default="flux-ternary", help="folder to write; the run lies in OUTPUT-run")
    parser.add_argument("--prompts", default="template:4000", help="file, template:N or datasets:NAME")
    parser.add_argument("--held-out", type=int, default=64, help="prompts that are never trained on")
    parser.add_argument("--mode", default="lora", choices=MODES)
    parser.add_argument("--rank", type=int, default=64, help="of the correction, in mode lora")
    parser.add_argument("--updates", type=int, default=2000, help="updates of the weights")
    parser.add_argument("--rows", type=int, default=8, help="of an update, one forward each")
    parser.add_argument("--size", type=int, default=1024, help="pixels")
    parser.add_argument("--call", type=json.loads, default={}, help="further arguments of the pipeline call, JSON")
    parser.add_argument("--float32", action="store_true", help="compute in float32 instead of bfloat16")
    return parser.parse_args()


def main() -> None:
    """Distills (which checks first that the run fits), and saves."""
    arguments = parse()
    state = PartialState()
    pipeline = FluxPipeline.from_pretrained(
        arguments.model, dtype=torch.float32 if arguments.float32 else torch.bfloat16
    )
    call = {"height": arguments.size, "width": arguments.size, "num_inference_steps": 28, "guidance_scale": 3.5}
    run = DistillConfig(
        mode=arguments.mode,
        rank=arguments.rank,
        updates=arguments.updates,
        batch_size=1,
        gradient_accumulation_steps=arguments.rows,
        gradient_checkpointing=True,
        call_kwargs={**call, **arguments.call},
    )
    train, held_out = split_held_out(read_prompts(arguments.prompts), arguments.held_out)
    if state.device.type == "cpu":
        pipeline.to(state.device)
    else:  # the text encoders (10 GB) are there only while the teacher's latents are drawn
        pipeline.enable_model_cpu_offload(device=state.device)
    student = distill(pipeline, train, TernaryConfig(), run, f"{arguments.output}-run", held_out_prompts=held_out)
    if state.is_main_process:
        student.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
