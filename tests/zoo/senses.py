"""Models of transformers for pictures, sound, both with text, and time series."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.hugging import WORDS, alone, both, seen, tokens

SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2
}  # fmt: skip

both("vit", "ViTForImageClassification", "ViTConfig", seen(8), image_size=8, patch_size=4, **SMALL)
both("deit", "DeiTForImageClassification", "DeiTConfig", seen(8), image_size=8, patch_size=4, **SMALL)
both("dinov2", "Dinov2ForImageClassification", "Dinov2Config", seen(8), image_size=8, patch_size=4, mlp_ratio=2,
     **{k: v for k, v in SMALL.items() if k != "intermediate_size"})  # fmt: skip
alone("beit", "BeitForImageClassification", "BeitConfig", seen(8), image_size=8, patch_size=4, **SMALL)
alone(
    "swin", "SwinForImageClassification", "SwinConfig", seen(16),
    image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[1, 2], window_size=4,
)  # fmt: skip
alone(
    "swinv2", "Swinv2ForImageClassification", "Swinv2Config", seen(16),
    image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[1, 2], window_size=4,
)  # fmt: skip
CONVOLVED: dict[str, Any] = {"hidden_sizes": [8, 12], "depths": [1, 2], "num_stages": 2}
alone("convnext", "ConvNextForImageClassification", "ConvNextConfig", seen(16), **CONVOLVED)
alone("convnextv2", "ConvNextV2ForImageClassification", "ConvNextV2Config", seen(16), **CONVOLVED)
alone(
    "resnet train", "ResNetForImageClassification", "ResNetConfig", seen(16), train=True,
    embedding_size=4, hidden_sizes=[8, 12], depths=[1, 1],
)  # fmt: skip
alone(
    "regnet train", "RegNetForImageClassification", "RegNetConfig", seen(16), train=True,
    embedding_size=4, hidden_sizes=[8, 12], depths=[1, 1], groups_width=4,
)  # fmt: skip
alone(
    "segformer", "SegformerForImageClassification", "SegformerConfig", seen(16),
    num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 12], num_attention_heads=[1, 2],
    patch_sizes=[3, 3], strides=[2, 2], mlp_ratios=[2, 2], decoder_hidden_size=8,
)  # fmt: skip


def captioned() -> dict[str, Any]:
    return {"input_ids": tokens(), "pixel_values": torch.randn(2, 3, 8, 8), "return_loss": True}


PAIRED: dict[str, Any] = {
    "text_config": {**SMALL, "vocab_size": WORDS, "max_position_embeddings": 16, "projection_dim": 8,
                    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "vision_config": {**SMALL, "image_size": 8, "patch_size": 4, "projection_dim": 8},
    "projection_dim": 8,
}  # fmt: skip
both("clip", "CLIPModel", "CLIPConfig", captioned, **PAIRED)
alone("siglip", "SiglipModel", "SiglipConfig", captioned, **{k: PAIRED[k] for k in ("text_config", "vision_config")})


def heard() -> dict[str, Any]:
    return {"input_features": torch.randn(2, 4, 12), "labels": tokens(5)}


both(
    "whisper", "WhisperForConditionalGeneration", "WhisperConfig", heard,
    vocab_size=WORDS, num_mel_bins=4, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=6, max_target_positions=16,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
    begin_suppress_tokens=None,
)  # fmt: skip


def waves() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 100), "labels": torch.tensor([0, 1])}


LISTENING: dict[str, Any] = {
    **SMALL, "conv_dim": [8, 8], "conv_stride": [4, 2], "conv_kernel": [6, 3], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "vocab_size": WORDS,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
both("wav2vec2", "Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", waves, **LISTENING)
alone("hubert", "HubertForSequenceClassification", "HubertConfig", waves, **LISTENING)
alone("wavlm", "WavLMForSequenceClassification", "WavLMConfig", waves, **LISTENING)
alone(
    "wav2vec2 with CTC", "Wav2Vec2ForCTC", "Wav2Vec2Config",
    lambda: {"input_values": torch.randn(2, 100), "labels": tokens(3)}, ctc_loss_reduction="mean", **LISTENING,
)  # fmt: skip


def series() -> dict[str, Any]:
    return {"past_values": torch.randn(2, 16, 2), "future_values": torch.randn(2, 4, 2)}


alone(
    "patchtst", "PatchTSTForPrediction", "PatchTSTConfig", series,
    num_input_channels=2, context_length=16, prediction_length=4, patch_length=4, patch_stride=4, d_model=16,
    num_attention_heads=2, num_hidden_layers=1, ffn_dim=24, loss="mse",
)  # fmt: skip


def forecast() -> dict[str, Any]:
    """Eight values of which the last four are to be told apart from noise, with lags of up to two."""
    return {
        "past_values": torch.randn(2, 10), "past_time_features": torch.randn(2, 10, 1),
        "past_observed_mask": torch.ones(2, 10), "future_values": torch.randn(2, 4),
        "future_time_features": torch.randn(2, 4, 1),
    }  # fmt: skip


FORECASTING: dict[str, Any] = {
    "prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1, "d_model": 16,
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
}  # fmt: skip
alone("time series, Student t", "TimeSeriesTransformerForPrediction", "TimeSeriesTransformerConfig", forecast,
      **FORECASTING)  # fmt: skip
alone(
    "autoformer",
    "AutoformerForPrediction",
    "AutoformerConfig",
    forecast,
    moving_average=3,
    label_length=4,
    **FORECASTING,
)
