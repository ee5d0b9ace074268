"""LLaVA with visual-token pruning as a model of lmms-eval: ``--model llava_todre``.

lmms-eval finds :func:`manifest` through the entry point ``lmms_eval.models`` once this package is
installed. Every option of model and method is a model argument:

    python -m lmms_eval --model llava_todre --tasks pope --batch_size 4 \
        --model_args pretrained=checkpoints/mini,method=todre,retain_ratio=0.1,log_dir=outputs/log

``model`` holds the class, ``arguments`` reads ``--model_args``, ``requests`` what one call of
lmms-eval asks for, ``image_keys`` which documents show the same image, ``prefetch`` what is
prepared meanwhile, ``distributed`` several processes, ``tensor_parallel`` those that share one
model, ``answer_log`` the answers that are kept on disk, ``fingerprint`` what they depend on, and
``response_cache`` lmms-eval's own store of answers.
"""

from __future__ import annotations

from typing import Any

NAME = "llava_todre"


def manifest() -> Any:
    """Return the ``ModelManifest`` by which lmms-eval knows the model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(NAME, simple_class_path="llava_todre.lmms_plugin.model.LlavaTodre")
