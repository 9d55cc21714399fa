# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints of the transformers classes that judge pictures: detectors, CLIP, BLIP-VQA."""

import pathlib

import torch
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    CLIPConfig,
    CLIPModel,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2Processor,
    SwinConfig,
    YolosConfig,
    YolosForObjectDetection,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

from .tokenizers import CLIP_VOCAB_SIZE, clip_tokenizer


COCO = {0: "person", 1: "dog", 2: "mouse", 3: "sofa"}
_LABELS = {"id2label": COCO, "label2id": {name: index for index, name in COCO.items()}}
_SIZE = {"height": 32, "width": 32}


def bert_tokenizer(folder: pathlib.Path) -> BertTokenizer:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    words = [*special, "a", ".", ",", "?", "yes", "no", "dog", "red", "cat", "person"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)}, model_max_length=32)


def _swin(**options: object) -> SwinConfig:
    return SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4, **options
    )


def mask2former(folder: pathlib.Path) -> pathlib.Path:
    torch.manual_seed(0)
    config = Mask2FormerConfig(
        backbone_config=_swin(out_features=["stage1", "stage2", "stage3", "stage4"]),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=6,
        **_LABELS,
    )
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessorPil(size=_SIZE).save_pretrained(folder)
    return folder


def yolos(folder: pathlib.Path) -> pathlib.Path:
    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[32, 32],
        patch_size=8,
        num_detection_tokens=5,
        **_LABELS,
    )
    YolosForObjectDetection(config).save_pretrained(folder)
    YolosImageProcessorPil(size=_SIZE).save_pretrained(folder)
    return folder


def owlv2(folder: pathlib.Path) -> pathlib.Path:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Owlv2Config(
        text_config={**shape, "vocab_size": CLIP_VOCAB_SIZE, "max_position_embeddings": 77, "eos_token_id": 513},
        vision_config={**shape, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    Owlv2Processor(Owlv2ImageProcessorPil(size=_SIZE), clip_tokenizer()).save_pretrained(folder)
    return folder


def grounding_dino(folder: pathlib.Path) -> pathlib.Path:
    torch.manual_seed(0)
    tokenizer = bert_tokenizer(folder)
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = GroundingDinoConfig(
        backbone_config=_swin(out_features=["stage2", "stage3", "stage4"]),
        text_config={**text, "model_type": "bert", "vocab_size": len(tokenizer), "max_position_embeddings": 64},
        d_model=32,
        num_queries=5,
        encoder_layers=1,
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_layers=2,
        decoder_ffn_dim=16,
        decoder_attention_heads=2,
        max_text_len=32,
    )
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    # The third feature map of 32 pixels would be a single one, which group normalization refuses.
    size = {"height": 64, "width": 64}
    GroundingDinoProcessor(GroundingDinoImageProcessorPil(size=size), tokenizer).save_pretrained(folder)
    return folder


def clip(folder: pathlib.Path) -> pathlib.Path:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **shape,
            "vocab_size": CLIP_VOCAB_SIZE,
            "max_position_embeddings": 77,
            "bos_token_id": 512,
            "eos_token_id": 513,
        },
        vision_config={**shape, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=_SIZE).save_pretrained(folder)
    return folder


def blip_vqa(folder: pathlib.Path) -> pathlib.Path:
    torch.manual_seed(0)
    tokenizer = bert_tokenizer(folder)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BlipConfig(
        text_config={
            **shape,
            "encoder_hidden_size": 16,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 32,
            "bos_token_id": 5,
            "sep_token_id": 3,
            "pad_token_id": 0,
        },
        vision_config={**shape, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    BlipForQuestionAnswering(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    BlipImageProcessorPil(size=_SIZE).save_pretrained(folder)
    return folder
