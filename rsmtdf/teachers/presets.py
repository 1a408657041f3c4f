"""Teachers by name: the paper's two, and others that are worth a try. Data only; any other is one YAML entry.

Normalisation is the published model's own, but for `clip_vitl14`, which sees ImageNet's as in the paper
(`reference/official_code`): with CLIP's own statistics its features differ by 4 %.
"""

from __future__ import annotations

from rsmtdf.teachers.source import PosEmbed, TeacherSource

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)
_SAT_MEAN, _SAT_STD = (0.43, 0.411, 0.296), (0.213, 0.156, 0.143)


def _dinov2(name: str, model: str) -> TeacherSource:
    # The DINOv2 code resamples tables of its register models by size and antialiased, which is timm's rule.
    rule: PosEmbed = "timm" if "_reg4_" in model else "official"
    return TeacherSource(
        name=name,
        library="timm",
        model=f"{model}.lvd142m",
        pos_embed=rule,
        licence="Apache-2.0",
        origin="https://github.com/facebookresearch/dinov2",
    )


_ALL = (
    _dinov2("dinov2_vitb14", "vit_base_patch14_dinov2"),
    TeacherSource(
        name="clip_vitl14",
        library="open_clip",
        model="ViT-L-14-quickgelu",
        weights="openai",
        # A fixed 16 x 16 grid, the last block before `ln_post`: as in the paper.
        input_px=224,
        final_norm=False,
        licence="MIT",
        origin="https://github.com/openai/CLIP",
    ),
    _dinov2("dinov2_vits14", "vit_small_patch14_dinov2"),
    _dinov2("dinov2_vitl14", "vit_large_patch14_dinov2"),
    # Registers take up the high-norm outlier tokens that plain DINOv2 has in smooth areas.
    _dinov2("dinov2_vits14_reg4", "vit_small_patch14_reg4_dinov2"),
    _dinov2("dinov2_vitb14_reg4", "vit_base_patch14_reg4_dinov2"),
    _dinov2("dinov2_vitl14_reg4", "vit_large_patch14_reg4_dinov2"),
    TeacherSource(
        name="dinov3_vitb16",
        library="timm",
        model="vit_base_patch16_dinov3.lvd1689m",
        pos_embed="native",
        licence="DINOv3 License",
        origin="https://huggingface.co/timm/vit_base_patch16_dinov3.lvd1689m",
    ),
    TeacherSource(
        name="dinov3_vitl16_sat",
        library="timm",
        model="vit_large_patch16_dinov3.sat493m",
        pos_embed="native",
        mean=_SAT_MEAN,
        std=_SAT_STD,
        licence="DINOv3 License",
        origin="https://huggingface.co/timm/vit_large_patch16_dinov3.sat493m",
    ),
    TeacherSource(
        name="clip_vitb16",
        library="open_clip",
        model="ViT-B-16-quickgelu",
        weights="openai",
        input_px=224,
        mean=_CLIP_MEAN,
        std=_CLIP_STD,
        final_norm=False,
        licence="MIT",
        origin="https://github.com/openai/CLIP",
    ),
    TeacherSource(
        name="remoteclip_vitl14",
        library="open_clip",
        # Loaded as its authors' example does, with the exact GELU; the file does not tell which it was trained with.
        model="ViT-L-14",
        weights="hf:chendelong/RemoteCLIP/RemoteCLIP-ViT-L-14.pt",
        input_px=224,
        mean=_CLIP_MEAN,
        std=_CLIP_STD,
        final_norm=False,
        licence="see origin",
        origin="https://huggingface.co/chendelong/RemoteCLIP",
    ),
    TeacherSource(
        name="siglip_vitb16",
        library="open_clip",
        model="ViT-B-16-SigLIP",
        weights="webli",
        input_px=224,
        mean=_HALF,
        std=_HALF,
        licence="Apache-2.0",
        origin="https://huggingface.co/timm/ViT-B-16-SigLIP",
    ),
)

PRESETS: dict[str, TeacherSource] = {source.name: source for source in _ALL}
