"""LLaVA with visual-token pruning as a model of lmms-eval: ``--model llava_todre``.

lmms-eval finds :func:`manifest` through the entry point ``lmms_eval.models`` once this package is
installed. Every option of model and method is a model argument:

    python -m lmms_eval --model llava_todre --tasks pope --batch_size 4 \
        --model_args pretrained=checkpoints/mini,method=todre,retain_ratio=0.1,log_dir=outputs/log

``model`` holds the class, ``arguments`` reads ``--model_args``, ``requests`` forms batches,
``image_keys`` finds documents with the same image, ``distributed`` is for several processes,
``answer_log`` keeps answers on disk, ``answer_line`` is one of them, and ``fingerprint`` covers
what answers depend on.
"""

from __future__ import annotations

from typing import Any

NAME = "llava_todre"


def manifest() -> Any:
    """Return the ``ModelManifest`` that registers the model in lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(NAME, simple_class_path="llava_todre.lmms_plugin.model.LlavaTodre")
