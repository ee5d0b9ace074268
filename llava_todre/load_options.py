"""How a model is loaded: one list of options for the API, the command line, the page and lmms-eval.

It imports no torch, so the command line can show these options fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from llava_todre.errors import TodreError, unknown


def _option(default: Any, help: str, own: bool = False, typed: bool = True) -> Any:
    """Declare an option.

    Args:
        default: its value when left out.
        help: for ``--help``.
        own: whether only our own class has it.
        typed: whether our command line has it.
    """
    return field(default=default, metadata={"help": help, "own": own, "typed": typed})


@dataclass(frozen=True)
class LoadOptions:
    """How :func:`llava_todre.load` loads a model; the meaning of each is its ``help``."""

    backend: str = _option("auto", "llava: our class; transformers: its own; auto: by model")
    revision: str | None = _option(None, "revision of a hub id: branch, tag or commit")
    model_base: str | None = _option(None, "base model of a LoRA or projector-only checkpoint")
    load_8bit: bool = _option(False, "quantise the decoder (bitsandbytes, LLM.int8)")
    load_4bit: bool = _option(False, "quantise the decoder (bitsandbytes, NF4)")
    quantization_config: Any = _option(None, "any that transformers has, instead", typed=False)
    dtype: Any = _option("auto", "auto, float32, float16 or bfloat16")
    device: Any = _option("auto", "cpu, cuda, cuda:1, ...; auto: GPU if any", typed=False)
    device_map: Any = _option(None, "e.g. auto, cpu, cuda:0 (default: GPU if any)")
    attn_implementation: str = _option("sdpa", "eager, sdpa or flash_attention_2")
    tp_plan: str | None = _option(
        None, "auto: split every layer over the processes of torchrun", own=True, typed=False
    )
    protocol: str = _option("native", "native, or paper (2x2 grid, no unpadding, 2880)", own=True)
    template: Any = _option("auto", "conversation template; auto: the model's own", own=True)
    clip_text: str | None = _option(
        None, "CLIP checkpoint, for methods that read the question", own=True
    )

    @classmethod
    def of(cls, options: LoadOptions | None, changes: Mapping[str, Any]) -> LoadOptions:
        """Return options with changes.

        Raises:
            TodreError: a name that is no option.
        """
        names = [each.name for each in fields(cls)]
        for key in changes:
            if key not in names:
                raise unknown("loading option", key, names)
        return replace(options or cls(), **changes)

    def shared(self) -> dict[str, Any]:
        """Return what both loaders take."""
        names = [each.name for each in fields(self) if not each.metadata["own"]]
        return {name: getattr(self, name) for name in names if name != "backend"}

    def refuse_own(self, path: str, more: Mapping[str, Any] | None = None) -> None:
        """Raise a TodreError if an option is set that only our own class has.

        Args:
            path: of the model, for the message.
            more: what else only our own class can do, by name; None where it is not wanted.
        """
        own = [each for each in fields(self) if each.metadata["own"]]
        given = {each.name: getattr(self, each.name) for each in own}
        usual = {each.name: each.default for each in own}
        for key, value in {**given, **(more or {})}.items():
            if value != usual.get(key):
                raise TodreError(
                    f"{key} must be left out for {path!r}, which a class of transformers runs, got "
                    f"{value!r}."
                )
