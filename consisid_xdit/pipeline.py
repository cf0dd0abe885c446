"""ConsisID from a photograph and a prompt to frames. The number of ranks changes the time it takes and nothing else.

CogVideoX's image to video pipeline, with the aligned face as its image and the face tokens in its conditions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cogvideox_xdit.pipeline import CogVideoXPipeline
from cogvideox_xdit.transformer import Size
from cogvideox_xdit.weights import STEM
from common.parallel.mesh import on_main
from common.run.quantize import TransformerFiles
from common.video.inputs import Picture, image_frames
from common.video.pictures import as_rgb, read_image
from common.weights.load import find_files, on_meta, open_checkpoint
from common.weights.placement import place
from consisid_xdit.config import ConsisIDConfig, read_consisid
from consisid_xdit.face import FaceReader, IdentityFeatures, load_identity
from consisid_xdit.keypoints import draw_keypoints
from consisid_xdit.transformer import ConsisIDTransformer, Face, FaceCondition
from consisid_xdit.weights import rename_table, transformer_files


class ConsisIDPipeline(CogVideoXPipeline):
    """Loads each stage's model when its turn comes, face models first, and lets it go before the next one's.

    Constructor and `from_pretrained` are CogVideoX's.
    """

    config: ConsisIDConfig
    read_config = staticmethod(read_consisid)
    _identity: IdentityFeatures | None = None
    _face: Face | None = None

    @torch.inference_mode()
    def __call__(  # type: ignore[override]
        self,
        prompt: str,
        negative_prompt: str = "",
        image: Picture | None = None,
        identity: IdentityFeatures | str | Path | None = None,
        **options: Any,
    ) -> Tensor | None:
        """Generate one video of a person. Collective: every rank calls it with the same arguments.

        image: a photograph with the face (a file, a PIL image or uint8 (H, W, 3)); needs the extra `face`.
        identity: what `identify` gave, or a file of it, in place of the photograph.
        options: as for CogVideoX (`height`, `width`, `num_frames`, `num_steps`, `cfg_scale`, `seed`, `latents`,
        `output`, `dynamic_cfg`, `decode`, ...), with its results and errors.
        """
        if not isinstance(identity, IdentityFeatures):
            identity = self.identify(image, identity)
        self._identity, self._face = identity, None
        try:
            # The aligned face on white is stretched, as in the reference: so the model was trained.
            return super().__call__(prompt, negative_prompt, image=identity.image.cpu(), fit="stretch", **options)
        finally:
            self._identity, self._face = None, None

    @torch.inference_mode()
    def identify(self, image: Picture | None = None, file: str | Path | None = None) -> IdentityFeatures:
        """Identity features of a photograph's largest face, or of a file that `save_identity` wrote. Collective.

        Rank 0 reads; its models are gone before this returns, also where others are kept. Raises ValueError unless
        exactly one of the two is given, and for pictures and files that will not do.
        """
        if (image is None) == (file is None):
            raise ValueError("give either a photograph (image) or a file of identity features, and not both")

        def make() -> tuple[IdentityFeatures, list[str]]:
            if file is not None:
                return load_identity(file, self.config), []
            picture = as_picture(image)
            return self._load_face_models().read(picture)

        with self.report.stage("reading the face"):
            identity, remarks = on_main(self.mesh, make)
        for text in remarks:
            self.report.warn(text)
        return identity

    def condition(  # type: ignore[override]
        self, model: ConsisIDTransformer, text: Tensor, size: Size, image: Tensor | None
    ) -> FaceCondition:
        """A guidance branch; the face is the same in both, so it is read at the first and kept for the other."""
        if self._face is None and self.config.face:
            assert self._identity is not None
            self._face = model.read_face(self._identity.id_cond, self._identity.id_vit_hidden)
        return model.prepare(text, size, image, face=self._face)

    def _encode_frames(self, frames: Tensor, generator: torch.Generator) -> Tensor:
        """The face's latents; the drawn landmarks' behind them where the checkpoint wants them, as a picture apart."""
        latents = [super()._encode_frames(frames, generator)]
        if self.config.kps:
            assert self._identity is not None
            canvas = draw_keypoints(self._identity.face_kps.cpu().numpy(), *self._identity.image.shape[:2])
            height, width = frames.shape[1:3]
            landmarks = image_frames(canvas, height, width, "stretch")
            latents.append(super()._encode_frames(landmarks.to(frames.device), generator))
        return torch.cat(latents, dim=2)

    def _load_face_models(self) -> FaceReader:
        with self.report.stage("loading face models"):
            return FaceReader.load(self.model_dir, self.device, self.dtype)

    def transformer_files(self) -> tuple[TransformerFiles, ...]:
        return transformer_files(self.model_dir, self.dtype)

    def load_transformer(self) -> ConsisIDTransformer:
        with self.report.loading("loading transformer") as progress:
            checkpoint = open_checkpoint(find_files(self.model_dir / "transformer", STEM, self.dtype))
            model, table = on_meta(ConsisIDTransformer, self.config, self.sp), rename_table(self.config)
            where = (self.placement, self.mesh.weights)
            return place(model, checkpoint, table, self.device, self.dtype, (), *where, progress)


def as_picture(image: Picture | None) -> np.ndarray:
    """A photograph as RGB (H, W, 3) uint8, upright. Raises ValueError when it is none."""
    if isinstance(image, (str, Path)):
        return read_image(image)
    if isinstance(image, Image.Image):
        return as_rgb(image)
    picture = np.asarray(image)
    if picture.ndim != 3 or picture.shape[-1] != 3 or picture.dtype != np.uint8 or 0 in picture.shape:
        raise ValueError(f"the image is {picture.dtype} of shape {list(picture.shape)}; expected uint8 (H, W, 3)")
    return picture
