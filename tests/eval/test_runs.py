"""A config becomes a run, or one line that says what is wrong with it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from eval.results import known_models
from eval.run import checkpoints
from eval.run import spec as runs
from eval.run.config import with_changes
from eval.run.spec import resolve, resolve_model
from llava_todre.errors import TodreError
from llava_todre.files import read_mapping
from llava_todre.pruners import create_pruner

CONFIG: dict[str, Any] = {"model": "mini", "method": "todre", "suite": "mini"}
MINI = runs.ROOT / "checkpoints" / "mini"


def names(**changes: Any) -> set[str]:
    """Return the names of the plain run and of the changed one."""
    return {resolve(CONFIG).name, resolve(CONFIG | changes).name}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methd": "todre"}, "key 'methd' is unknown. Did you mean 'method'?"),
        ({"method": "todray"}, "method 'todray' is unknown. Did you mean 'todre'?"),
        ({"method": None}, "key 'method' is missing"),
        ({"method": ["todre"]}, "method must be text, got ['todre']"),
        ({"options": {"retain": 0.1}}, "'retain' is unknown. Did you mean 'retain_ratio'?"),
        ({"options": {"retain_ratio": 1.5}}, "0 < retain_ratio <= 1, got 1.5"),
        ({"options": {"seed": 3}}, "'seed' is the key 'seed' of the run"),
        ({"options": [0.1]}, "options must be 'key: value' lines or null, got [0.1]"),
        ({"suite": "imagge"}, "suite 'imagge' is unknown. Did you mean 'image'?"),
        ({"limit": 0}, "limit must be a whole number, 1 or more or null, got 0"),
        ({"limit": "4"}, "limit must be a whole number, 1 or more or null, got '4'"),
        ({"limit": 1.0}, "limit must be a whole number, 1 or more or null, got 1.0"),
        ({"limit": 2.5}, "limit must be a whole number, 1 or more or null, got 2.5"),
        ({"batch_size": True}, "batch_size must be a whole number, 1 or more, got True"),
        ({"seed": -1}, "seed must be a whole number, 0 or more, got -1"),
        ({"seed": 2**32}, "seed must be at most 4294967295, got 4294967296"),
        (
            {"options": {"retain_ratio": 0.25, "retain_tokens": 9}},
            "options retain_ratio and retain_tokens were both given",
        ),
        ({"suite": "ablation", "limit": 3}, "limit 3 does not fit 'mme', which is scored in bl"),
        ({"model": "minni"}, "model 'minni' is unknown. Did you mean 'mini'?"),
        ({"model": ["mini"]}, "model ['mini'] is unknown"),
        ({"model": {"pretrained": "here"}}, "pretrained 'here' does not exist"),
        ({"model": {"key": "mini", "dtypes": "float32"}}, "Did you mean 'dtype'?"),
        ({"model": {"key": "mini", "dtype": "float8"}}, "dtype 'float8' is unknown"),
        ({"model": {"key": "mini", "protocol": "papr"}}, "Did you mean 'paper'?"),
        (
            {"model": {"key": "mini", "max_new_tokens": 0}},
            "max_new_tokens must be a whole number, 1 or more, got 0",
        ),
        ({"model": {"key": "mini", "revision": 7}}, "revision must be text or null, got 7"),
        ({"model": {"dtype": "float32"}}, "key 'pretrained' is missing"),
    ],
)
def test_a_wrong_config_is_one_line_with_what_is_allowed(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(TodreError) as raised:
        resolve(CONFIG | changes)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_run_is_known_by_what_it_computes() -> None:
    assert len(names(options={"tau": 0.10, "probe_depths": [0.875]}, limit=None)) == 1
    assert len(names(model={"key": "mini", "dtype": "float32"})) == 1
    for changes in (
        {"options": {"tau": 0.11}},
        {"options": {"retain_tokens": 32}},
        {"method": "todre_v1"},
        {"model": {"key": "mini", "protocol": "paper"}},
        {"limit": 8},
        {"seed": 1},
        {"batch_size": 2},
    ):
        assert len(names(**changes)) == 2, changes


def test_a_changed_default_of_a_method_makes_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resolve(CONFIG).name
    knobs = runs.options_of
    monkeypatch.setattr(runs, "options_of", lambda pruner: knobs(pruner) | {"tau": 0.2})
    assert resolve(CONFIG).name != before


def test_a_name_tells_what_was_run() -> None:
    options = {"retain_ratio": 0.25, "probe_depths": [0.5, 0.75]}
    name = resolve(CONFIG | {"options": options, "limit": 8, "seed": 3}).name
    readable, _, digest = name.rpartition("-")
    assert readable == "mini-mini-todre-0.25-probe_depths-0.5+0.75-seed3-limit8"
    assert len(digest) == 8
    assert (
        len(resolve(CONFIG | {"options": {"probe_depths": [i / 99 for i in range(1, 90)]}}).name)
        < 140
    )


def test_options_have_one_spelling() -> None:
    def spelled(method: str, **options: Any) -> dict[str, Any]:
        return runs.canonical_options(method, options)

    assert spelled("todre") == {"retain_ratio": 0.10}
    assert spelled("todre", tau=0.1, probe_depths=[]) == {"retain_ratio": 0.1, "probe_depths": ()}
    assert spelled("todre", retain_tokens=32) == {"retain_tokens": 32}
    assert spelled("vanilla") == {"retain_ratio": 1.0}
    both = spelled("divprune+todre", retain_ratio=0.25, tau=0.2)
    assert both == {"retain_ratio": 0.25, "inside.tau": 0.2}
    assert create_pruner("divprune+todre", **both) == create_pruner(
        "divprune+todre", retain_ratio=0.25, tau=0.2
    )


def test_the_config_in_a_result_is_json_and_resolves_to_the_same_run() -> None:
    options = {"probe_depths": [0.5, 0.75]}
    run = resolve(CONFIG | {"options": options, "limit": 4, "seed": 3, "batch_size": 2})
    config = json.loads(json.dumps(run.config()))
    assert config["benchmarks"][0] == "exist" and config["model"]["key"] == "mini"
    del config["benchmarks"], config["model"]["fingerprint"]
    assert resolve(config) == run


def test_a_checkpoint_with_other_weights_is_another_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("one")
    weights = tmp_path / "model.safetensors"
    prints = []
    for content, readme in ((b"one", "one"), (b"two", "one"), (b"two", "two")):
        weights.write_bytes(content)
        (tmp_path / "README.md").write_text(readme)
        checkpoints.fingerprint.cache_clear()
        prints.append(resolve_model(str(tmp_path))[1]["fingerprint"])
    assert prints[0] != prints[1] == prints[2]


def test_other_weights_of_the_same_size_are_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_LARGE_FILE", 1000)
    monkeypatch.setattr(checkpoints, "_SAMPLE", 4)
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    prints = set()
    for content in (b"0" * 9000, b"1" * 9000, b"1" * 4500 + b"0" * 4500, b"1" * 8999 + b"0"):
        weights.write_bytes(content)
        checkpoints.fingerprint.cache_clear()
        prints.add(resolve_model(str(tmp_path))[1]["fingerprint"])
    assert len(prints) == 4


def test_another_clip_in_the_same_folder_is_another_run(tmp_path: Path) -> None:
    found = set()
    for content in (b"one", b"two"):
        (tmp_path / "model.safetensors").write_bytes(content)
        checkpoints.fingerprint.cache_clear()
        run = resolve(CONFIG | {"model": {"key": "mini", "clip_text": str(tmp_path)}})
        assert "fingerprint" not in run.model_args("log")
        found.add(run.name)
    assert len(found) == 2


def test_stored_results_have_the_names_that_the_same_runs_have_now() -> None:
    files = sorted((runs.ROOT / "docs" / "results" / "reproduce_mini").glob("*.json"))
    assert len(files) > 20
    for file in files:
        config = json.loads(file.read_text())["config"]
        model = {key: config["model"][key] for key in config["model"] if key != "fingerprint"}
        asked = {key: config[key] for key in runs.RUN_KEYS} | {"model": model}
        assert resolve(asked).name == file.stem


@pytest.mark.parametrize(
    "name",
    [
        "llava_next_7b-ablation-vanilla-1-a92e56ac",
        "llava_next_7b-image-vanilla-1-a24e957f",
        "llava_next_7b-video-vanilla-1-37e3c6af",
        "qwen2_5_vl_7b-image-vanilla-1-cec1e9f4",
    ],
)
def test_a_benchmark_outside_of_averages_leaves_names_as_they_were(name: str) -> None:
    """``mme_total`` joined two suites later; the names are those from before."""
    model, suite, _ = name.split("-", 2)
    assert resolve({"model": model, "suite": suite, "method": "vanilla"}).name == name


def test_options_of_a_stage_can_be_set_from_the_command_line() -> None:
    config = CONFIG | {"method": "fastervlm+todre", "options": {"retain_ratio": 0.25}}
    changed = with_changes(config, ["options.inside.tau=0.05"])
    assert resolve(changed).options == {"retain_ratio": 0.25, "inside.tau": 0.05}
    with pytest.raises(TodreError, match="'taw' is unknown"):
        resolve(with_changes(config, ["options.inside.taw=0.05"]))


def test_an_edited_model_file_makes_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mini.yaml"
    file.write_text((known_models.FOLDER / "mini.yaml").read_text())
    monkeypatch.setattr(known_models, "FOLDER", tmp_path)
    before = resolve(CONFIG).name
    file.write_text(file.read_text().replace("dtype: float32", "dtype: bfloat16"))
    assert resolve(CONFIG).name != before


def test_a_model_is_a_name_a_path_a_hub_id_or_keys() -> None:
    key, settings = resolve_model("mini")
    assert key == "mini" and settings["template"] == "vicuna_v1"
    assert resolve_model({"pretrained": str(MINI)})[1]["dtype"] == "auto"
    key, settings = resolve_model("llava-hf/llava-v1.6-vicuna-13b-hf")
    assert key == "llava_next_13b", "a copy of a known model is that model"
    assert settings["protocol"] == "paper" and settings["device_map"] == "auto"
    assert settings["pretrained"] == "llava-hf/llava-v1.6-vicuna-13b-hf"
    assert resolve_model("owner/some-llava") == (
        "some-llava",
        asdict(runs.Model("owner/some-llava")),
    )
    assert resolve_model({"key": "mini", "dtype": "float16"})[1]["dtype"] == "float16"
    assert resolve_model({"pretrained": "owner/some-llava"})[0] == "some-llava"


def test_a_model_is_spread_or_split_and_is_the_same_run_either_way() -> None:
    def run(**model: Any) -> runs.Run:
        return resolve(CONFIG | {"model": {"key": "llava_next_13b", **model}})

    spread, split = run(), run(tp_plan="auto")
    assert (spread.is_spread, spread.is_split) == (True, False)
    assert (split.is_spread, split.is_split) == (False, True), "it takes the place of device_map"
    config = split.config()
    del config["benchmarks"]
    assert config["model"]["tp_plan"] == "auto" and resolve(config) == split
    assert spread.name == split.name == run(device_map=None).name
    with pytest.raises(TodreError, match="device_map and tp_plan were both given"):
        run(tp_plan="auto", device_map="auto")
    with pytest.raises(TodreError, match="tp_plan 'outo' is unknown. Did you mean 'auto'"):
        run(tp_plan="outo")


def test_changes_reach_nested_keys_and_leave_the_config_alone() -> None:
    config = {"model": "mini", "options": {"tau": 0.1}, "limit": 3}
    lines = ["options.tau=0.05", "options.pivot=random", "limit=null", "model.dtype=float16"]
    assert with_changes(config, lines) == {
        "model": {"key": "mini", "dtype": "float16"},
        "options": {"tau": 0.05, "pivot": "random"},
        "limit": None,
    }
    assert config == {"model": "mini", "options": {"tau": 0.1}, "limit": 3}
    for line in ("limit", "=3", "limit=[", "limit.x=3"):
        with pytest.raises(TodreError, match="set "):
            with_changes(config, [line])


def test_files_that_are_no_mapping_are_named(tmp_path: Path) -> None:
    for text, said in (("- 1", "key: value"), ("a: [", "not valid YAML"), (None, "cannot be read")):
        file = tmp_path / f"{said[:3]}.yaml"
        if text is not None:
            file.write_text(text)
        with pytest.raises(TodreError, match=said) as raised:
            read_mapping(file, "config")
        assert str(file) in str(raised.value)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("vanilla", {}),
        ("todre", {"retain_ratio": 1.0, "tau": 0.0}),
        ("todre", {"probe_depths": []}),
        ("todre", {"probe_depths": [0.5]}),
        ("todre_v1", {"probe_depths": [0.5, 0.75], "pivot": "random", "cls_layer": -2}),
        ("divprune+todre", {"retain_tokens": 32, "tau": 0.2}),
    ],
)
def test_lmms_eval_and_the_model_read_the_same_run_out_of_model_args(
    method: str, options: dict[str, Any]
) -> None:
    pytest.importorskip("lmms_eval")
    from lmms_eval.utils import simple_parse_args_string

    from llava_todre.lmms_plugin.arguments import build_pruner

    run = resolve(CONFIG | {"method": method, "options": options, "seed": 5})
    given = simple_parse_args_string(run.model_args("out, put/log"))
    assert given["log_dir"] == "'out, put/log'", "its quotes are taken off by the model"
    own = [*runs.MODEL_KEYS, "method", "seed", "log_dir", "max_frames", "num_items"]
    knobs = {key: value for key, value in given.items() if key not in own}
    pruner, seed = build_pruner(given["method"], knobs, given["seed"], own)
    assert seed == 5
    wanted = create_pruner(method, **dict(run.options))
    assert (
        runs.options_of(pruner) | {"seed": 0} == runs.options_of(wanted) | {"seed": 0}
        or "+" in method
    )
    if "+" in method:
        assert pruner.before == wanted.before and pruner.inside.tau == 0.2


def test_the_suite_says_how_many_frames_a_clip_has() -> None:
    video = resolve(CONFIG | {"suite": "video"})
    assert ",max_frames=5," in video.model_args("log")
    assert "max_frames" not in resolve(CONFIG).model_args("log")


def test_a_limit_bounds_the_expected_items() -> None:
    assert set(resolve(CONFIG).expected.values()) == {96}
    assert set(resolve(CONFIG | {"limit": 8}).expected.values()) == {8}
    assert set(resolve(CONFIG | {"limit": 800}).expected.values()) == {96}


def test_every_model_config_resolves() -> None:
    files = sorted((runs.CONFIGS / "models").glob("*.yaml"))
    assert len(files) >= 5
    for file in files:
        assert resolve_model(file.stem)[0] == file.stem


@pytest.mark.parametrize(
    ("model", "template"),
    [
        ("mini", "vicuna_v1"),
        ("llava_1_5_7b", "vicuna_v1"),
        ("llava-hf/llava-1.5-7b-hf", "vicuna_v1"),
        ("liuhaotian/llava-v1.6-mistral-7b", "mistral_instruct"),
        ("liuhaotian/llava-v1.6-34b", "chatml_direct"),
        ("lmms-lab/llama3-llava-next-8b", "llava_llama_3"),
        ("owner/some-llava", "auto"),
        ({"key": "llava_1_5_7b", "template": "llava_v1"}, "llava_v1"),
    ],
)
def test_a_plan_says_which_template_a_checkpoint_gets(model: Any, template: str) -> None:
    assert resolve_model(model)[1]["template"] == template


def test_a_template_that_is_not_read_does_not_name_a_run() -> None:
    stock = {"key": "qwen2_5_vl_7b"}
    runs_of = [
        resolve({"model": stock | more, "method": "todre", "suite": "image"}).name
        for more in ({}, {"template": "vicuna_v1"}, {"template": "plain"})
    ]
    assert len(set(runs_of)) == 1
