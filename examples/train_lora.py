# SPDX-License-Identifier: Apache-2.0
"""Trains a LoRA on the ternary pixel-people pipeline: a new style, sepia, from 256 pictures in two minutes.

python examples/train_lora.py --output sepia

Memory holds the packed base and the adapter: no float copy of the weights, no gradient for them. Works the same for
any Flux pipeline that was loaded with `quantization_config=TernaryConfig()` or from a packed folder.
"""

import argparse

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import FluxPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from diffusers_ternary.demo import DEMO_CALL, real_images
from diffusers_ternary.demo.variants import find_variant


LUMINANCE, BROWN = np.array([0.299, 0.587, 0.114]), np.array([1.0, 0.85, 0.6])


def sepia(images: np.ndarray) -> np.ndarray:
    """The style: float `[B, H, W, 3]` in [0, 1] to brown tones."""
    return (images @ LUMINANCE)[..., None] * BROWN


@torch.no_grad()
def encode(pipe: FluxPipeline, images: np.ndarray, prompts: list[str]) -> dict[str, torch.Tensor]:
    """Latents as the transformer takes them, and the text embeddings."""
    pixels = torch.from_numpy(images).movedim(-1, 1).float() * 2 - 1
    latents = (pipe.vae.encode(pixels).latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    text, pooled, _ = pipe.encode_prompt(prompts, None, max_sequence_length=DEMO_CALL["max_sequence_length"])
    return {"x0": pipe._pack_latents(latents, *latents.shape), "text": text, "pooled": pooled}


def main() -> None:
    """Trains the adapter and saves it; `pipe.load_lora_weights(folder)` loads it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="sepia", help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(arguments.seed)
    pipe = find_variant("calibrated").load(torch.float32).to(accelerator.device)
    real = real_images()
    data = encode(pipe, sepia(real.images[:256] / 255.0), list(real.prompts[:256]))
    ids = pipe._prepare_latent_image_ids(1, 8, 8, accelerator.device, torch.float32)  # 2x2 pixels a token
    text_ids = torch.zeros(data["text"].shape[1], 3, device=accelerator.device)

    pipe.transformer.add_adapter(LoraConfig(r=arguments.rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    pipe.transformer.enable_gradient_checkpointing()
    adapter = [p for p in pipe.transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapter, lr=3e-3)
    model, optimizer = accelerator.prepare(pipe.transformer, optimizer)
    for step in range(arguments.steps):
        rows = torch.randint(len(data["x0"]), (32,))
        x0, t = data["x0"][rows], torch.sigmoid(torch.randn(32, device=accelerator.device))
        noise = torch.randn_like(x0)
        noisy = (1 - t[:, None, None]) * x0 + t[:, None, None] * noise
        text = {"encoder_hidden_states": data["text"][rows], "pooled_projections": data["pooled"][rows]}
        v = model(noisy, timestep=t, img_ids=ids, txt_ids=text_ids, return_dict=False, **text)[0]
        loss = (v - (noise - x0)).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0:
            print(f"step {step:4d}  loss {loss.item():.4f}")
    layers = get_peft_model_state_dict(accelerator.unwrap_model(model))
    FluxPipeline.save_lora_weights(arguments.output, transformer_lora_layers=layers)


if __name__ == "__main__":
    main()
