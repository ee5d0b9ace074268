"""CLIP's text tower: how well each patch matches a question, for methods that need it.

Symbols: N patches, W width of the vision tower, E width of the space images and texts share, M
chunks of a question.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPModel

from llava_todre.errors import TodreError
from llava_todre.model.checkpoint import find_checkpoint


class ClipText(nn.Module):
    """The parts of a CLIP model that LLaVA leaves out: text tower and both projections."""

    def __init__(self, clip: CLIPModel, tokenizer: Any) -> None:
        """Take the parts of ``clip``; its vision tower can go.

        Args:
            clip: the CLIP model whose vision tower LLaVA uses.
            tokenizer: its tokenizer.
        """
        super().__init__()
        self.text_model = clip.text_model
        self.text_projection = clip.text_projection
        self.visual_projection = clip.visual_projection
        self.post_layernorm = clip.vision_model.post_layernorm
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, path: str, revision: str | None = None) -> ClipText:
        """Load from a folder or a hub id, e.g. ``openai/clip-vit-large-patch14-336``.

        Raises:
            TodreError: there is no such checkpoint, or it is not one of CLIP.
        """
        folder = find_checkpoint("clip_text", path, revision)
        try:
            clip = CLIPModel.from_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, RuntimeError, AttributeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise TodreError(f"clip_text {path!r} is not a CLIP checkpoint: {reason}") from None
        return cls(clip, tokenizer).eval()

    @torch.no_grad()
    def similarity(self, patches: Tensor, question: str) -> Tensor:
        """Return the cosine of patches with a question, in the space CLIP was trained in.

        Args:
            patches: (N, W) features of the vision tower.
            question: as the user wrote it, without prompt template; longer ones than CLIP can read
                are cut into chunks.

        Returns:
            (N, M) float32.
        """
        states = self.visual_projection(self.post_layernorm(patches.to(self.post_layernorm.weight)))
        images = nn.functional.normalize(states.float(), dim=-1)
        return images @ self._embed(question).T.to(images)

    def _embed(self, question: str) -> Tensor:
        """Return (M, E) unit vectors, one for each chunk."""
        room = self.text_model.config.max_position_embeddings - 2  # for the marks of both ends
        ids = self.tokenizer(question, add_special_tokens=False).input_ids
        first, last = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        device = self.post_layernorm.weight.device
        pooled = [
            self.text_model(
                torch.tensor([[first, *ids[start : start + room], last]], device=device)
            ).pooler_output[0]
            for start in range(0, max(1, len(ids)), room)
        ]
        return nn.functional.normalize(self.text_projection(torch.stack(pooled)).float(), dim=-1)
