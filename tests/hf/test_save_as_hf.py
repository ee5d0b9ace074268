"""The bundled model, saved in the layout of transformers, is the same model there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from eval.mini.heldout import held_out
from llava_todre import Request, TodreError, answer, load_pretrained_model
from llava_todre.cli import main
from llava_todre.hf.load import load_stock_model, needs_stock
from llava_todre.hf.stock import StockModel
from llava_todre.model.export_hf import save_as_hf
from llava_todre.vlm import Answer

MINI = Path(__file__).parents[2] / "checkpoints" / "mini"
METHODS = {
    "vanilla": {},
    "todre": {"retain_ratio": 0.1},
    "todre, one by one": {"retain_ratio": 0.25, "tau": 0.01},
    "todre_v1": {"retain_ratio": 0.25},
    "fastervlm": {"retain_ratio": 0.1},
    "divprune": {"retain_ratio": 0.1},
    "fastv": {"retain_ratio": 0.25},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hf") / "mini"
    assert main(["convert", "--model", str(MINI), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def stock(folder: Path) -> StockModel:
    return load_stock_model(str(folder))


@pytest.fixture(scope="module")
def ours() -> tuple[Any, Any]:
    tokenizer, model, _, _ = load_pretrained_model(MINI)
    return tokenizer, model


@pytest.mark.parametrize("name", METHODS)
def test_both_classes_keep_the_same_tokens_and_give_the_same_answers(
    stock: StockModel, ours: tuple[Any, Any], name: str
) -> None:
    tokenizer, model = ours
    for each in (model, stock):
        each.set_pruner(name.split(",")[0], **METHODS[name])
    sample = held_out(3)[list(METHODS).index(name) % 3]
    requests = [Request(question.text, [sample.image]) for question in sample.questions]
    expected = answer(model, tokenizer, requests, max_new_tokens=8)
    given = stock.answer(requests, max_new_tokens=8)
    assert [a.text for a in given] == [a.text for a in expected]
    for a, b in zip(given, expected, strict=True):
        check(a, b)


def check(ours: Answer, theirs: Answer) -> None:
    assert ours.stats.prompt_tokens_per_layer == theirs.stats.prompt_tokens_per_layer
    assert ours.stats.visual_tokens_per_layer == theirs.stats.visual_tokens_per_layer
    assert ours.stats.newline_tokens == theirs.stats.newline_tokens
    for image, other in zip(ours.stats.images, theirs.stats.images, strict=True):
        assert torch.equal(image.keep_idx, other.keep_idx)
        assert torch.equal(image.patches, other.patches)
    assert [p.dropped for p in ours.stats.probes] == [p.dropped for p in theirs.stats.probes]


def test_the_command_line_asks_either_class(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(MINI / "examples" / "scene_0.png")
    fixed = ["generate", "--image", image, "--question", "What does the sign say?", "--json"]
    reports = []
    for model, backend in ((MINI, "auto"), (folder, "transformers"), (folder, "llava")):
        capsys.readouterr()
        assert main([*fixed, "--model", str(model), "--backend", backend]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    for report in reports[1:]:
        assert report["answer"] == "3 4 4" and report["keep_idx"] == reports[0]["keep_idx"]
        assert report["visual_tokens_per_layer"] == reports[0]["visual_tokens_per_layer"]
    for option in (["--picture", "x.png"], ["--protocol", "paper"], ["--template", "plain"]):
        stock = ["--model", str(folder), "--backend", "transformers", *option]
        assert main([*fixed, *stock]) == 1
        assert f"{option[0][2:]} must be left out for" in capsys.readouterr().err


def test_a_mixed_batch_has_text_several_images_and_places_of_its_own(
    stock: StockModel, ours: tuple[Any, Any]
) -> None:
    tokenizer, model = ours
    first, second = (sample.image for sample in held_out(2))
    requests = [
        Request("What does the sign say?", [first]),
        Request("What color is the ring?", [first, second]),
        Request("What is one and one?"),
    ]
    for each in (model, stock):
        each.set_pruner("todre", retain_ratio=0.25)
    expected = answer(model, tokenizer, requests, max_new_tokens=6)
    given = stock.answer(requests, max_new_tokens=6)
    assert [a.text for a in given] == [a.text for a in expected]
    assert [a.stats.kept_tokens for a in given] == [80, 160, 0]
    (between,) = stock.answer([Request("The sign <image> says ?", [first])], max_new_tokens=2)
    assert between.stats.kept_tokens == 80
    for wrong in (Request(" ", [first]), Request("<image> and <image> ?", [first])):
        with pytest.raises(TodreError):
            stock.answer([wrong])
    assert stock.answer([]) == []


def test_pictures_that_do_not_reach_the_prompt_are_an_error(stock: StockModel) -> None:
    frames = [sample.image for sample in held_out(2)]
    for method in ("vanilla", "todre"):
        stock.set_pruner(method)
        with pytest.raises(TodreError, match="put 0 of 1 images or videos into the prompt"):
            stock.answer([Request("What does the sign say?", frames, is_video=True)])
    for wrong in ({"max_new_tokens": 0}, {"num_return_sequences": 2}):
        with pytest.raises(TodreError, match=next(iter(wrong))):
            stock.answer([Request("What does the sign say?", frames[:1])], **wrong)  # type: ignore[arg-type]


def test_a_prompt_that_begins_with_bos_gets_no_second(
    stock: StockModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    generate = stock.model.generate

    def spy(**inputs: Any) -> Any:
        seen.append(inputs["input_ids"][0].tolist())
        return generate(**inputs)

    monkeypatch.setitem(stock.model.__dict__, "generate", spy)
    request = Request("What does the sign say?", [held_out(1)[0].image])
    stock.answer([request], max_new_tokens=1)
    begin, rest = stock.processor.chat_template.split("\n", 1)
    assert begin == "{{- bos_token -}}"
    monkeypatch.setattr(stock.processor, "chat_template", rest)  # as those of llava-hf
    stock.answer([request], max_new_tokens=1)
    first = stock.processor.tokenizer.bos_token_id
    assert [ids.count(first) for ids in seen] == [1, 1] and seen[0][0] == seen[1][0] == first


@pytest.mark.parametrize("option", [{}, {"method": "todre", "retain_ratio": 0.25}])
def test_generate_takes_its_arguments_by_position_too(
    stock: StockModel, option: dict[str, Any]
) -> None:
    model = stock.model
    stock.set_pruner(option.pop("method", "vanilla"), **option)
    inputs = stock._inputs([Request("What does the sign say?", [held_out(1)[0].image])])
    settings = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=2)
    ids = inputs.pop("input_ids")
    given = model.generate(ids, settings, **inputs)
    assert torch.equal(given, model.generate(ids, generation_config=settings, **inputs))
    assert given.shape[1] - ids.shape[1] <= 4


def test_what_transformers_reads_answers_as_ours_does(folder: Path) -> None:
    """Without any code of ours, so that the files alone are judged."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    scene = json.loads((MINI / "examples" / "examples.json").read_text())[:9]
    image = Image.open(MINI / "examples" / "scene_0.png")
    right = 0
    for entry in scene:
        content: Sequence[dict[str, Any]] = [
            {"type": "image", "image": image},
            {"type": "text", "text": entry["question"]},
        ]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += text.strip().lower() == entry["answer"].lower()
    assert right >= 8


def test_ours_reads_it_back(folder: Path, ours: tuple[Any, Any]) -> None:
    tokenizer, model, _, _ = load_pretrained_model(folder)
    first = held_out(1)[0]
    requests = [Request(question.text, [first.image]) for question in first.questions]
    expected = answer(ours[1].cpu(), ours[0], requests, max_new_tokens=8)
    model.set_pruner(ours[1].pruner)
    given = answer(model, tokenizer, requests, max_new_tokens=8)
    assert [a.text for a in given] == [a.text for a in expected]


def test_a_checkpoint_goes_to_the_class_that_runs_it(folder: Path) -> None:
    assert not needs_stock(str(MINI)) and not needs_stock(str(folder))
    assert not needs_stock("no/such-checkpoint-anywhere")


@pytest.mark.parametrize(("model_type", "decoder"), [("qwen2_5_vl", None), ("llava_next", "qwen2")])
def test_other_families_and_decoders_are_stock(
    tmp_path: Path, model_type: str, decoder: str | None
) -> None:
    config = {"model_type": model_type} | (
        {"text_config": {"model_type": decoder}} if decoder else {}
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert needs_stock(str(tmp_path))


def test_what_cannot_be_saved_is_one_line(ours: tuple[Any, Any], tmp_path: Path) -> None:
    tokenizer, _ = ours
    _, model, _, _ = load_pretrained_model(MINI, protocol="paper")
    with pytest.raises(TodreError, match="got 'mlp2x_gelu', 'spatial' and 'anyres'"):
        save_as_hf(model, tokenizer, tmp_path / "x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(TodreError, match="out must be a new or an empty folder"):
        save_as_hf(ours[1], tokenizer, tmp_path / "full")


def test_what_a_processor_cannot_read_is_one_line(
    stock: StockModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TodreError, match="LlavaNextProcessor does not take this batch of 1: "):
        stock.answer([Request("What does the sign say?", [None])])
    monkeypatch.setattr(stock.processor, "chat_template", None)
    with pytest.raises(TodreError, match="LlavaNextProcessor cannot write the prompt: .*template"):
        stock.answer([Request("What does the sign say?", [held_out(1)[0].image])])


def test_weights_that_are_damaged_or_missing_are_one_line(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    lost = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
    save_file(
        {name: weight for name, weight in weights.items() if name != lost},
        copy / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(TodreError, match=r"lacks 1 tensors .*\.layers\.1\.mlp\.up_proj\.weight"):
        load_stock_model(str(copy))
    (copy / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(TodreError, match="does not load: ") as caught:
        load_stock_model(str(copy))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_does_not_load_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava_next"}')
    with pytest.raises(TodreError, match="does not load") as caught:
        load_stock_model(str(tmp_path))
    assert "\n" not in str(caught.value)
