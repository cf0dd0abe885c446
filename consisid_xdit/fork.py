"""ConsisID as the registry knows it: CogVideoX-5b-I2V, and cross attention to a face. No torch."""

from __future__ import annotations

from cogvideox_xdit.fork import checkpoint
from common.registry.downloads import Part, diffusers_files, file
from common.registry.forks import CrossAttention, Demo, Fork, Size
from consisid_xdit.config import DEMOS, PREVIEW, ConsisIDConfig, read_rules
from consisid_xdit.options import ConsisIDOptions

REPO = "BestWishYsh/ConsisID-preview"


def face_attention(config: ConsisIDConfig) -> CrossAttention:
    """Video tokens read the face tokens, which every rank has."""
    width = config.cross_heads * config.cross_head_dim
    return CrossAttention(config.crossings, width, keys=config.queries, matmul=2 * 2 * config.width * width)


def _faces() -> tuple[Part, ...]:
    def part(what: str, licence: str, *names: str) -> Part:
        return Part(what, REPO, tuple(file(f"face_encoder/{name}") for name in names), licence)

    return (
        part(
            "face detection and recognition (antelopev2)",
            "insightface: non-commercial research only",
            "models/antelopev2/scrfd_10g_bnkps.onnx",
            "models/antelopev2/glintr100.onnx",
        ),
        part("face landmarks and parsing", "see facexlib", "detection_Resnet50_Final.pth", "parsing_bisenet.pth"),
        part("image tower (EVA02-CLIP)", "see EVA-CLIP", "EVA02_CLIP_L_336_psz14_s6B.pt"),
    )


MODEL = checkpoint(
    PREVIEW,
    (face_attention(PREVIEW),),
    name="consisid",
    title="ConsisID",
    parameters=6_217_102_912,
    files=diffusers_files(REPO, "see the model card (built on CogVideoX-5b-I2V)", *_faces()),
    folder="ConsisID-preview",
    demo=Demo("face", Size(96, 64, 17, 4)),
)
FORK = Fork(
    "consisid",
    "ConsisID",
    "consisid_xdit",
    "consisid-xdit",
    (MODEL,),
    "ConsisIDPipeline",
    extras=("face",),
    read_rules=read_rules,
    demos=DEMOS,
    options=ConsisIDOptions,
)
