"""ChronoEditTransformer3DModel: ChronoEdit, images edited as videos. Blocks as Wan's."""

from __future__ import annotations

from typing import ClassVar

from flashomni.models import adapter
from flashomni.models.wan import Wan

TINY, PUBLISHED = Wan.sizes["tiny"], Wan.sizes["published"]


@adapter("ChronoEditTransformer3DModel")
class ChronoEdit(Wan):
    sizes: ClassVar = {
        "tiny": TINY,
        "published": {**PUBLISHED, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    }
