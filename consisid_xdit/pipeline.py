"""ConsisID from a photograph and a prompt to frames. The number of ranks changes the time it takes and nothing else.

CogVideoX's image to video pipeline, with the aligned face as its image and the face tokens in its conditions.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cogvideox_xdit.pipeline import CogVideoXPipeline, Generation
from cogvideox_xdit.sampling import Start, sample
from cogvideox_xdit.weights import STEM
from common.parallel.mesh import on_main
from common.registry.settings import DecodeOptions, either
from common.run.quantize import TransformerFiles
from common.video.inputs import Picture, image_frames
from common.video.pictures import as_rgb, read_image
from common.video.states import StateKeeper
from common.weights.load import find_files, on_meta, open_checkpoint
from common.weights.placement import place
from consisid_xdit.config import ConsisIDConfig, read_consisid
from consisid_xdit.face import FaceReader, IdentityFeatures, load_identity
from consisid_xdit.keypoints import draw_keypoints
from consisid_xdit.transformer import ConsisIDTransformer
from consisid_xdit.weights import rename_table, transformer_files


class ConsisIDPipeline(CogVideoXPipeline):
    """Loads each stage's model when its turn comes, face models first, and lets it go before the next one's.

    Constructor and `from_pretrained` are CogVideoX's.
    """

    config: ConsisIDConfig
    read_config = staticmethod(read_consisid)

    @torch.inference_mode()
    def __call__(  # type: ignore[override]
        self,
        prompt: str,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_steps: int | None = None,
        cfg_scale: float | None = None,
        seed: int = 0,
        latents: Tensor | None = None,
        output: str = "frames",
        image: Picture | None = None,
        identity: IdentityFeatures | str | Path | None = None,
        dynamic_cfg: bool = False,
        decode: DecodeOptions | None = None,
        latents_file: str | Path | None = None,
        keeper: StateKeeper | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Tensor | None:
        """Generate one video of a person. Collective: every rank calls it with the same arguments.

        image: a photograph with the face (a file, a PIL image or uint8 (H, W, 3)); needs the extra `face`.
        identity: what `identify` gave, or a file of it, in place of the photograph.
        latents_file: where rank 0 puts the final latents before the decode begins.
        The rest is as for CogVideoX, with its results and errors.
        """
        num_steps = either(num_steps=num_steps, num_inference_steps=num_inference_steps)
        cfg_scale = either(cfg_scale=cfg_scale, guidance_scale=guidance_scale)
        run = self.generation(height, width, num_frames, num_steps, cfg_scale, dynamic_cfg)
        self.check(run, latents, output)
        if not isinstance(identity, IdentityFeatures):
            identity = self.identify(image, identity)
        text = self.encode_prompts(prompt, negative_prompt, run)
        generator = torch.Generator("cpu").manual_seed(seed)
        frame_latents = [self.encode_frames(frames, generator) for frames in self._pictures(identity, run)]
        start = self.start(run, torch.cat(frame_latents, dim=2), latents, generator)
        final = self._sample_person(identity, start, text, run, keeper)[:, :, run.padding :]
        return self.finished(final, output, latents_file, decode, model="consisid", prompt=prompt, seed=seed)

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

    def _pictures(self, identity: IdentityFeatures, run: Generation) -> list[Tensor]:
        """The aligned face and, where the checkpoint wants them, its drawn landmarks; each (1, H, W, 3), a video apart.

        The square face on white is stretched, as in the reference: so the model was trained.
        """
        canvases: list[Picture] = [identity.image.cpu()]
        if self.config.kps:
            canvases.append(draw_keypoints(identity.face_kps.cpu().numpy(), *identity.image.shape[:2]))
        size = (run.height, run.width)
        return [on_main(self.mesh, partial(image_frames, canvas, *size, "stretch")) for canvas in canvases]

    def _sample_person(
        self,
        identity: IdentityFeatures,
        start: Start,
        text: dict[int, Tensor],
        run: Generation,
        keeper: StateKeeper | None,
    ) -> Tensor:
        """As `_sample`, with the face in the conditions of both branches."""
        branches = self.guidance.branches(*run.scales)
        with self.stage_model("transformer", self.compiled_transformer) as model:
            face = model.read_face(identity.id_cond, identity.id_vit_hidden) if self.config.face else None
            conds = {b: model.prepare(text[b], run.size, start.image, face=face) for b in branches}
            return sample(model, start, conds, run.solver, run.scales, self.guidance, self.report, keeper)

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
