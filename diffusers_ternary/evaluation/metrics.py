# SPDX-License-Identifier: Apache-2.0
"""Distances between two images of the same prompt and seed."""

import dataclasses
import importlib.util
import math
import pathlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from PIL import Image

from ..extras import import_extra


COMPARISON = "Comparing pictures"
_Pair = tuple[Image.Image, Image.Image]
SSIM_WINDOW = 11  # pixels, Wang et al. 2004
LPIPS_MIN_SIZE = 32  # pixels, below it AlexNet's last feature map is empty


@dataclasses.dataclass(frozen=True)
class ImageDistance:
    """Distance of the student's images from the teacher's.

    Args:
        psnr_db (`float`): peak signal-to-noise ratio of the mean squared error over all images, in dB; infinite if
            all are identical.
        psnr_per_image (`tuple[float, ...]`): the same for each image.
        ssim (`float`, *optional*): mean structural similarity (Wang et al. 2004), 1 = identical. As torchmetrics
            defines it: over the windows around all pixels, the image being mirrored at its borders. Those that
            count only windows inside the image differ, by a few hundredths for images of 16 pixels.
        lpips (`float`, *optional*): mean perceptual distance (Zhang et al. 2018, AlexNet), 0 = identical.
        unavailable (`dict[str, str]`): metrics that are `None`, and why.
    """

    psnr_db: float
    psnr_per_image: tuple[float, ...]
    ssim: float | None
    lpips: float | None
    unavailable: dict[str, str]


def image_distance(
    student: Sequence[Image.Image],
    teacher: Sequence[Image.Image],
    *,
    wrap: Callable[[Sequence[_Pair]], Iterable[_Pair]] = iter,
) -> ImageDistance:
    """Measures RGB images of one size, pairwise, as 8-bit values between 0 and 1.

    Args:
        student, teacher (`Sequence[PIL.Image.Image]`): as many of both.
        wrap (`Callable`, *optional*): put around the pairs, to show progress.

    Raises:
        ValueError: if there are no pairs or their sizes differ.
    """
    if not teacher or len(student) != len(teacher):
        raise ValueError(f"{len(student)} student and {len(teacher)} teacher images are not pairs.")
    for ours, theirs in zip(student, teacher, strict=True):
        check_same_size(ours, theirs)
    metrics = import_extra("torchmetrics.image", COMPARISON)
    functional = import_extra("torchmetrics.functional.image", COMPARISON)
    pooled = metrics.PeakSignalNoiseRatio(data_range=1.0).set_dtype(torch.float64)
    reasons: dict[str, str] = {}
    smallest = min(min(image.size) for image in teacher)
    if smallest < SSIM_WINDOW:
        reasons["ssim"] = f"the images are {smallest} pixels small, its window is {SSIM_WINDOW}"
    reason = lpips_unavailable(smallest)
    if reason is not None:
        reasons["lpips"] = reason
    perceptual = None
    if reason is None:
        perceptual = metrics.LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
    psnr, ssim = [], []
    for ours, theirs in wrap(list(zip(student, teacher, strict=True))):
        pair = to_tensor(ours), to_tensor(theirs)  # [1, 3, H, W] each
        pooled.update(*pair)
        psnr.append(float(functional.peak_signal_noise_ratio(*pair, data_range=1.0)))
        if "ssim" not in reasons:
            ssim.append(float(functional.structural_similarity_index_measure(*pair, data_range=1.0)))
        if perceptual is not None:
            perceptual.update(pair[0].float(), pair[1].float())
    return ImageDistance(
        psnr_db=float(pooled.compute()),
        psnr_per_image=tuple(psnr),
        ssim=math.fsum(ssim) / len(ssim) if ssim else None,
        lpips=None if perceptual is None else float(perceptual.compute()),
        unavailable=reasons,
    )


def check_same_size(student: Image.Image, teacher: Image.Image) -> None:
    """Raises a `ValueError` if two images of a pair differ in size."""
    if student.size != teacher.size:
        ours, theirs = ("x".join(map(str, image.size)) for image in (student, teacher))
        raise ValueError(
            f"The student draws images of {ours} pixels, the teacher of {theirs}. Give both the same size with "
            'call_kwargs={"height": ..., "width": ...}.'
        )


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB image as float64 `[1, 3, H, W]` between 0 and 1."""
    values = torch.from_numpy(np.array(image, dtype=np.float64) / 255)  # [H, W, 3]
    return values.permute(2, 0, 1).unsqueeze(0).contiguous()


def lpips_unavailable(smallest_side: int) -> str | None:
    """Why LPIPS cannot be computed here, or `None`. Weights are never downloaded."""
    if smallest_side < LPIPS_MIN_SIZE:
        return f"the images are {smallest_side} pixels small, its network needs {LPIPS_MIN_SIZE}"
    if importlib.util.find_spec("torchvision") is None:
        return "torchvision is not installed"
    from torchvision.models import AlexNet_Weights

    weights = pathlib.Path(torch.hub.get_dir(), "checkpoints", AlexNet_Weights.DEFAULT.url.rpartition("/")[2])
    if not weights.is_file():
        return f"its AlexNet weights are not at {weights}"
    return None
