"""Small data sets with the real schema of all twelve benchmarks, made on the spot.

    python -m eval.mini.fixtures FOLDER

The task code of lmms-eval runs on them unchanged and offline, with FOLDER as working directory,
because ``load_dataset`` prefers a folder named like the hub's repository:

    FOLDER/<owner>/<name>/README.md, <config>-<split>.parquet
    FOLDER/hf_home/...                clips and subtitles where the task code expects them; HF_HOME

Pictures and questions are those of the bundled model's held-out scenes in the benchmarks' wording,
so a score means nothing, except that it is one. Equal calls write equal bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.mini import Sample, held_out
from llava_todre.errors import TodreError

NUM_SCENES = 4
SIDE = 112
"""Pixels of a picture's longer side; every other picture is cut to landscape."""
NUM_FRAMES = 12
FRAMES_PER_SECOND = 4
HF_HOME = "hf_home"
_LETTERS = "ABCDE"
_MISSING = "nan"
"""How MMBench spells an option that is not there."""

Rows = list[dict[str, Any]]
_Split = tuple[str, str, str, Rows, dict[str, Any]]
"""Repository, config, split, rows, types of columns that the values do not show."""


def make_fixtures(folder: Path) -> Path:
    """Write all data sets and clips below ``folder`` and return it.

    Raises:
        TodreError: a package is missing.
    """
    try:
        import av
        import datasets
    except ImportError as error:
        raise TodreError(
            f"the fixtures need the package {error.name}: pip install 'llava-todre[eval,video]'."
        ) from None
    del av, datasets
    scenes = held_out(NUM_SCENES)
    for repository, config, split, rows, types in _data_sets(scenes):
        _write_split(folder / repository, config, split, rows, types)
    for path, scene in _clips(scenes):
        _write_clip(folder / HF_HOME / path, scene)
    for number in range(NUM_SCENES):
        _write_subtitles(folder / HF_HOME / f"datasets/longvideobench/subtitles/lvb{number}.json")
    return folder


def _data_sets(scenes: Sequence[Sample]) -> Iterator[_Split]:
    yield from _pope(scenes)
    yield from _mme(scenes)
    yield from _gqa(scenes)
    yield from _scienceqa(scenes)
    yield from _mmbench(scenes)
    yield from _vizwiz(scenes)
    yield from _vqav2(scenes)
    yield from _videomme(scenes)
    yield from _egoschema(scenes)
    yield from _mlvu(scenes)
    yield from _longvideobench(scenes)


# ------------------------------------------------------------------------- pictures and questions


def _picture(scenes: Sequence[Sample], number: int) -> Image.Image:
    picture = scenes[number % len(scenes)].image.resize((SIDE, SIDE))
    return picture.crop((0, SIDE // 8, SIDE, SIDE - SIDE // 8)) if number % 2 else picture


def _asked(sample: Sample, task: str) -> tuple[str, str]:
    """Return question and answer of a task of the bundled model."""
    return next((q.text, q.answer) for q in sample.questions if q.task == task)


def _choice(sample: Sample) -> tuple[str, list[str], int]:
    """Return a question, its four options and the right one's place."""
    text, letter = _asked(sample, "choice")
    question, _, listed = text.partition(" A. ")
    options = [part.rstrip(" BCD") for part in f"{listed} ".split(". ")]
    return question, options, _LETTERS.index(letter)


def _ten(answer: str) -> list[str]:
    """Return ten people's answers: eight agree."""
    return [answer] * 8 + ["unanswerable", "unsuitable"]


# ---------------------------------------------------------------------------------- images


def _pope(scenes: Sequence[Sample]) -> Iterator[_Split]:
    repository = "lmms-lab-encoder/POPE"
    every: Rows = []
    for category in ("adversarial", "popular", "random"):
        rows: Rows = []
        for number, sample in enumerate(scenes):
            question, answer = _asked(sample, "exist")
            if number % 2:
                question, answer = "Is there a transparent object?", "no"
            name = str(len(every) + len(rows))
            rows.append(
                {
                    "id": name,
                    "question_id": name,
                    "question": question,
                    "answer": answer,
                    "image_source": f"COCO_val2014_{number:012d}",
                    "category": category,
                    "image": _picture(scenes, number),
                }
            )
        yield repository, "Full", category, rows, {}
        every += rows
    yield repository, "default", "test", every, {}


def _mme(scenes: Sequence[Sample]) -> Iterator[_Split]:
    rows: Rows = []
    for number, category in enumerate(("existence", "color", "OCR", "commonsense_reasoning")):
        colour = _asked(scenes[number], "colour")[1]
        for name, answer in ((colour, "Yes"), ("transparent", "No")):
            question = f"Is there a {name} object? Please answer yes or no."
            rows.append(
                {
                    "question_id": f"{category}/{number:04d}.png",
                    "image": _picture(scenes, number),
                    "question": question,
                    "answer": answer,
                    "category": category,
                }
            )
    yield "lmms-lab-encoder/MME", "default", "test", rows, {}


def _gqa(scenes: Sequence[Sample]) -> Iterator[_Split]:
    questions: Rows = []
    images: Rows = []
    for number, sample in enumerate(scenes):
        images.append({"id": f"n{number}", "image": _picture(scenes, number)})
        for task in ("colour", "shape"):
            question, answer = _asked(sample, task)
            questions.append(
                {
                    "id": f"{number}{task}",
                    "imageId": f"n{number}",
                    "question": question,
                    "answer": answer,
                    "fullAnswer": f"It is {answer}.",
                }
            )
    yield "lmms-lab-encoder/GQA", "testdev_balanced_instructions", "testdev", questions, {}
    yield "lmms-lab-encoder/GQA", "testdev_balanced_images", "testdev", images, {}


def _scienceqa(scenes: Sequence[Sample]) -> Iterator[_Split]:
    rows: Rows = []
    for number, sample in enumerate(scenes):
        question, options, right = _choice(sample)
        has_image = number % 2 == 0
        rows.append(
            {
                "image": _picture(scenes, number) if has_image else None,
                "question": question,
                "choices": options[: 2 + number % 3],
                "answer": min(right, 1 + number % 3),
                "hint": "" if has_image else "There is one object only.",
                "task": "closed choice",
                "grade": "grade2",
                "subject": "natural science",
                "topic": "physics",
                "category": "Materials",
                "skill": "Identify properties of an object",
                "lecture": "",
                "solution": "",
            }
        )
    shown = [row for row in rows if row["image"] is not None]
    yield "lmms-lab-encoder/ScienceQA", "ScienceQA-FULL", "test", rows, {"answer": "int8"}
    yield "lmms-lab-encoder/ScienceQA", "ScienceQA-IMG", "test", shown, {"answer": "int8"}


def _mmbench(scenes: Sequence[Sample]) -> Iterator[_Split]:
    for config in ("en", "cn"):
        rows: Rows = []
        for number, sample in enumerate(scenes):
            question, options, right = _choice(sample)
            options = options[: max(right + 1, 4 - number % 2)]
            for turn in range(len(options) if number < 2 else 1):
                turned = options[turn:] + options[:turn]
                rows.append(
                    {
                        "index": number + turn * 1_000_000,
                        "question": question,
                        "hint": _MISSING if number % 2 else "Look at the shapes.",
                        "answer": _LETTERS[turned.index(options[right])],
                        **dict(zip("ABCD", [*turned, _MISSING], strict=False)),
                        "category": "attribute_recognition",
                        "image": _picture(scenes, number),
                        "source": "scenes",
                        "L2-category": "finegrained_perception (instance-level)",
                        "comment": _MISSING,
                        "split": "dev",
                    }
                )
        yield "lmms-lab-encoder/MMBench", config, "dev", rows, {}


def _vizwiz(scenes: Sequence[Sample]) -> Iterator[_Split]:
    types = {"answers": ["string"], "category": "string"}
    for split in ("val", "test"):
        rows: Rows = []
        for number, sample in enumerate(scenes):
            question, answer = _asked(sample, "colour")
            rows.append(
                {
                    "question_id": f"VizWiz_{split}_{number:08d}",
                    "image": _picture(scenes, number),
                    "question": question,
                    "answers": _ten(answer) if split == "val" else None,
                    "category": "other" if split == "val" else None,
                }
            )
        yield "lmms-lab-encoder/VizWiz-VQA", "default", split, rows, types


def _vqav2(scenes: Sequence[Sample]) -> Iterator[_Split]:
    one = {"answer": "string", "answer_confidence": "string", "answer_id": "int64"}
    hidden = ("question_type", "multiple_choice_answer", "answer_type")
    types = {"answers": [one], **dict.fromkeys(hidden, "string")}
    for split in ("validation", "testdev", "test"):
        is_public = split == "validation"
        rows: Rows = []
        for number, sample in enumerate(scenes):
            question, answer = _asked(sample, ("colour", "count")[number % 2])
            people = [
                {"answer": said, "answer_confidence": "yes", "answer_id": place + 1}
                for place, said in enumerate(_ten(answer))
            ]
            rows.append(
                {
                    "question_type": "what color is" if is_public else None,
                    "multiple_choice_answer": answer if is_public else None,
                    "answers": people if is_public else None,
                    "image_id": number,
                    "answer_type": "other" if is_public else None,
                    "question_id": 1000 * number,
                    "question": question,
                    "image": _picture(scenes, number),
                }
            )
        yield "lmms-lab-encoder/VQAv2", "default", split, rows, types


# ---------------------------------------------------------------------------------- clips


def _videomme(scenes: Sequence[Sample]) -> Iterator[_Split]:
    rows: Rows = []
    for number, duration in enumerate(("short", "medium", "long")):
        question, options, right = _choice(scenes[number])
        for copy in range(2):
            rows.append(
                {
                    "video_id": f"{number:03d}",
                    "duration": duration,
                    "domain": "Knowledge",
                    "sub_category": "Astronomy",
                    "url": f"https://www.youtube.com/watch?v=vmme{number}",
                    "videoID": f"vmme{number}",
                    "question_id": f"{number:03d}-{copy + 1}",
                    "task_type": ("Object Recognition", "Attribute Perception")[copy],
                    "question": question,
                    "options": [
                        f"{k}. {name}." for k, name in zip(_LETTERS, options, strict=False)
                    ],
                    "answer": _LETTERS[right],
                }
            )
    yield "lmms-eval/Video-MME", "default", "test", rows, {}


def _egoschema(scenes: Sequence[Sample]) -> Iterator[_Split]:
    for config in ("GENERATION", "Subset"):
        rows: Rows = []
        for number, sample in enumerate(scenes):
            question, options, right = _choice(sample)
            options = [*options, "nothing"]
            rows.append(
                {
                    "question_idx": str(number),
                    "question": question,
                    "video_idx": f"ego{number}",
                    "option": [f"{k}. {name}" for k, name in zip(_LETTERS, options, strict=True)],
                    "answer": str(right) if config == "Subset" else None,
                }
            )
        yield "lmms-eval/egoschema", config, "test", rows, {"answer": "string"}


def _mlvu(scenes: Sequence[Sample]) -> Iterator[_Split]:
    kinds = ("anomaly_reco", "count", "ego", "needle", "order", "plotQA", "topic_reasoning")
    rows: Rows = []
    for number, kind in enumerate(kinds):
        question, options, right = _choice(scenes[number % len(scenes)])
        listed = [f"({k}) {name}" for k, name in zip(_LETTERS, options, strict=False)]
        rows.append(
            {
                "video_name": f"mlvu{number % len(scenes)}.mp4",
                "duration": NUM_FRAMES / FRAMES_PER_SECOND,
                "question": "\n".join([question, *listed]),
                "answer": _LETTERS[right],
                "task_type": kind,
            }
        )
    yield "sy1998/MLVU_dev", "default", "test", rows, {}


def _longvideobench(scenes: Sequence[Sample]) -> Iterator[_Split]:
    rows: Rows = []
    for number, sample in enumerate(scenes):
        question, options, right = _choice(sample)
        options = [*options, "nothing"][: 4 + number % 2]
        rows.append(
            {
                "id": f"lvb{number}_0",
                "video_id": f"lvb{number}",
                "question": question,
                **{f"option{place}": "N/A" for place in range(5)},
                **{f"option{place}": name for place, name in enumerate(options)},
                "correct_choice": right,
                "video_path": f"lvb{number}.mp4",
                "subtitle_path": f"lvb{number}.json",
                "duration": NUM_FRAMES / FRAMES_PER_SECOND,
                "duration_group": (15, 60)[number % 2],
                "question_category": ("S2E", "TOS")[number % 2],
                "topic_category": "NP-News-Programs",
                "level": "L1-Perception",
                "starting_timestamp_for_subtitles": 0.0,
                "view_count": 1.0,
            }
        )
    yield "longvideobench/LongVideoBench", "default", "validation", rows, {}


def _clips(scenes: Sequence[Sample]) -> Iterator[tuple[str, Sample]]:
    """Yield where below HF_HOME a clip lies, and the scene it shows."""
    for number, scene in enumerate(scenes):
        if number < 3:
            yield f"videomme/data/vmme{number}.mp4", scene
        yield f"egoschema/videos/ego{number}.mp4", scene
        yield f"mlvu/mlvu{number}.mp4", scene
        yield f"datasets/longvideobench/videos/lvb{number}.mp4", scene


# ---------------------------------------------------------------------------------- files


def _write_split(folder: Path, config: str, split: str, rows: Rows, types: dict[str, Any]) -> None:
    """Write one split, and name it in the README, where ``load_dataset`` looks for it."""
    import pyarrow.parquet
    from datasets import Dataset, Features

    folder.mkdir(parents=True, exist_ok=True)
    table = {name: [row[name] for row in rows] for name in rows[0]}
    features = Features(
        {name: _feature(types.get(name) or _type(rows[0][name])) for name in rows[0]}
    )
    file = folder / f"{config}-{split}.parquet"
    pyarrow.parquet.write_table(Dataset.from_dict(table, features=features).data.table, file)
    configs: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.parquet")):
        name, _, part = path.stem.rpartition("-")
        configs.setdefault(name, []).append(f"  - split: {part}\n    path: {path.name}\n")
    header = "".join(
        f"- config_name: {name}\n  data_files:\n{''.join(parts)}" for name, parts in configs.items()
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{header}---\n")


def _type(value: Any) -> Any:
    """Return the name of a value's type in ``datasets``; a list of it for a list."""
    if isinstance(value, list):
        return [_type(value[0])]
    names = {str: "string", int: "int64", float: "float64"}
    return names.get(type(value), "image")


def _feature(kind: Any) -> Any:
    """Return the type of a column from its name; a list or a mapping of it nests."""
    import datasets

    if isinstance(kind, list):
        return datasets.List(_feature(kind[0]))
    if isinstance(kind, dict):
        return {name: _feature(inner) for name, inner in kind.items()}
    return datasets.Image() if kind == "image" else datasets.Value(kind)


def _write_clip(path: Path, scene: Sample) -> None:
    """Write a clip: the scene moves to the right by a few pixels a frame."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.asarray(scene.image.resize((SIDE, SIDE)))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FRAMES_PER_SECOND)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        stream.thread_count = 1  # so that equal frames give equal bytes
        for number in range(NUM_FRAMES):
            frame = av.VideoFrame.from_ndarray(np.roll(pixels, 2 * number, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _write_subtitles(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"start": "00:00:00.000", "end": "00:00:02.000", "line": "Here are some shapes."}]
    path.write_text(json.dumps(lines))


def main() -> None:
    """Write small data sets with the real schema of all twelve benchmarks."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path, help="where to write them")
    try:
        print(make_fixtures(parser.parse_args().folder))
    except TodreError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
