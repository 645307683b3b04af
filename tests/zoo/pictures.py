"""Models of timm, cut down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.zoo.cases import Problem, case, supervised

LABELS = torch.tensor([0, 2, 1, 1])


def add(name: str, build: Callable[[Any], nn.Module], size: int = 16, train: bool = False) -> None:
    """A case for `build(timm)`, away from its starting point, where residual branches are nearly zero."""

    def make() -> Problem:
        import timm

        model = build(timm)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.05)
        return supervised(model.train(train), nn.CrossEntropyLoss(), torch.randn(4, 3, size, size), LABELS)

    case(f"timm {name}", make, needs=("timm",))


def named(name: str, size: int = 16, train: bool = False, label: str = "", **settings: Any) -> None:
    add(label or name, lambda timm: timm.create_model(name, num_classes=3, **settings), size, train)


def in_both_modes(name: str, build: Callable[[Any], nn.Module], size: int = 16) -> None:
    for train in (True, False):
        add(f"{name} {'train' if train else 'eval'}", build, size, train)


def efficientnet(timm: Any) -> nn.Module:
    blocks = timm.models._efficientnet_builder.decode_arch_def(
        [["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r2_k3_s2_e2_c12_se0.25"]]
    )
    return timm.models.efficientnet.EfficientNet(
        blocks, num_classes=3, stem_size=8, num_features=16, act_layer=nn.SiLU, round_chs_fn=lambda channels: channels
    )


def mobilenetv3(timm: Any) -> nn.Module:
    blocks = timm.models._efficientnet_builder.decode_arch_def(
        [["ds_r1_k3_s2_e1_c8_se0.25_nre"], ["ir_r2_k3_s2_e2_c12_se0.25"]]
    )
    return timm.models.mobilenetv3.MobileNetV3(
        blocks, num_classes=3, stem_size=8, num_features=16, act_layer=nn.Hardswish,
        se_layer=timm.layers.SqueezeExcite, round_chs_fn=lambda channels: channels,
    )  # fmt: skip


def regnet(timm: Any) -> nn.Module:
    shape = timm.models.regnet.RegNetCfg(depth=4, w0=8, wa=8.0, wm=1.4, group_size=4, se_ratio=0.25, stem_width=8)
    return timm.models.regnet.RegNet(shape, num_classes=3, output_stride=8)


def mixer(timm: Any, **settings: Any) -> nn.Module:
    settings = {"embed_dim": 16, "num_blocks": 2, "img_size": 16, "patch_size": 8, **settings}
    return timm.models.mlp_mixer.MlpMixer(num_classes=3, **settings)


def resnet(timm: Any) -> nn.Module:
    shape: dict[str, Any] = {"layers": [1, 1, 1, 1], "channels": (4, 4, 6, 6), "stem_width": 4, "output_stride": 8}
    return timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, num_classes=3, **shape)


def nfnet(timm: Any) -> nn.Module:
    shape = timm.models.nfnet.NfCfg(
        depths=(1, 1), channels=(8, 12), stem_type="3x3", stem_chs=8, group_size=4, num_features=16,
        attn_layer="se", attn_kwargs={"rd_ratio": 0.5}, act_layer="silu",
    )  # fmt: skip
    return timm.models.nfnet.NormFreeNet(shape, num_classes=3)


in_both_modes("EfficientNet", efficientnet)
in_both_modes("MobileNetV3", mobilenetv3)
in_both_modes("RegNet", regnet, 32)
in_both_modes("NFNet", nfnet)
in_both_modes("ResNet", resnet, 32)
named("densenet121", 16, True, growth_rate=4, block_config=(2, 2))
PATCHED: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 16}
named("vit_tiny_patch16_224", depth=2, num_heads=2, init_values=0.1, **PATCHED)
named("vit_tiny_patch16_224", 16, True, "vit train, dropout", depth=2, num_heads=2, attn_drop_rate=0.1,
      drop_path_rate=0.2, proj_drop_rate=0.1, **PATCHED)  # fmt: skip
named("deit_tiny_distilled_patch16_224", depth=2, num_heads=2, **PATCHED)
add("mixer", lambda timm: mixer(timm))
add("resmlp", lambda timm: mixer(timm, block_layer=timm.models.mlp_mixer.ResBlock, mlp_ratio=2))
add("gmlp", lambda timm: mixer(timm, block_layer=timm.models.mlp_mixer.SpatialGatingBlock, mlp_ratio=2,
                               mlp_layer=timm.layers.GatedMlp))  # fmt: skip
named("cait_xxs24_224", depth=2, depth_token_only=1, num_heads=2, **PATCHED)
named("xcit_nano_12_p16_224", depth=1, cls_attn_layers=1, num_heads=2, **PATCHED)
NARROW: dict[str, Any] = {"num_classes": 3, "depths": (1, 1, 1, 1), "dims": (8, 8, 12, 12)}
add("convnext", lambda timm: timm.models.convnext.ConvNeXt(patch_size=2, **NARROW), 32)
add("convnextv2", lambda timm: timm.models.convnext.ConvNeXt(
    patch_size=2, use_grn=True, ls_init_value=None, conv_mlp=True, **NARROW
), 32)  # fmt: skip
named("swin_tiny_patch4_window7_224", img_size=16, patch_size=2, embed_dim=8, depths=(2, 1), num_heads=(1, 2),
      window_size=4)  # fmt: skip
named("swinv2_tiny_window8_256", img_size=16, patch_size=2, embed_dim=8, depths=(2, 1), num_heads=(1, 2),
      window_size=4)  # fmt: skip
add("poolformer", lambda timm: timm.models.metaformer.MetaFormer(
    layer_scale_init_values=0.1, res_scale_init_values=None, use_mlp_head=False, **NARROW
), 32)  # fmt: skip
add("caformer", lambda timm: timm.models.metaformer.MetaFormer(
    token_mixers=[timm.models.metaformer.SepConv, timm.models.metaformer.Attention],
    norm_layers=[timm.models.metaformer.LayerNorm2dNoBias, timm.models.metaformer.LayerNormNoBias],
    output_norm=timm.layers.LayerNorm2d,
    num_classes=3, depths=(1, 1), dims=(16, 32), res_scale_init_values=(None, 1.0), head_dim=8,
), 32)  # fmt: skip
add("convmixer", lambda timm: timm.models.convmixer.ConvMixer(
    12, 2, kernel_size=3, patch_size=4, num_classes=3
), 16, True)  # fmt: skip
add("focalnet", lambda timm: timm.models.focalnet.FocalNet(
    num_classes=3, embed_dim=8, depths=(1, 1), focal_levels=(2, 2), focal_windows=(3, 3)
))  # fmt: skip
named("starnet_s1", 32, base_dim=4, depths=[1, 1])
named("inception_next_atto", 32, depths=(1, 1), dims=(16, 24), mlp_ratios=(2, 2))
named("mambaout_femto", 32, depths=(1, 1), dims=(8, 12))
