"""What is installed is what is locked, and the lock is what pyproject.toml asks for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.metadata import distribution, distributions
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from eval.pages.licences import PAGE, licence, packages
from llava_todre.errors import TodreError
from llava_todre.stage2.supported import TOO_NEW, check_transformers

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
NOT_LOCKED = {"flash", "deepspeed", "torchao"}
"""Extras that want a GPU."""
TOOLS = {"pip", "wheel", "setuptools"}
"""What an environment may have had before."""


def entries(file: str) -> list[Requirement]:
    """Return the requirements of a file, without their hashes."""
    lines = (ROOT / file).read_text().splitlines()
    return [Requirement(line.rstrip(" \\")) for line in lines if re.match(r"[a-z]", line)]


LOCK = entries("requirements.txt")
(TORCH,) = entries("requirements-torch.txt")


def pins(environment: Mapping[str, str]) -> dict[str, Version]:
    """Return the versions that are locked for an environment, by name."""
    chosen = [
        each for each in LOCK if each.marker is None or each.marker.evaluate(dict(environment))
    ]
    found = {each.name: Version(str(each.specifier).removeprefix("==")) for each in chosen}
    assert len(found) == len(chosen), "one version each"
    return found


def installed() -> dict[str, Version]:
    """Return what an import would find; of several environments on the path, the first's."""
    found: dict[str, Version] = {}
    for each in distributions():
        if Path(str(each.locate_file(""))).name == "_vendor":  # setuptools, once it is imported
            continue
        found.setdefault(canonicalize_name(each.metadata["Name"]), Version(each.version))
    return found


def needs(name: str) -> Iterator[str]:
    """Yield the names of what a package needs here."""
    for line in distribution(name).requires or ():
        needed = Requirement(line)
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            yield canonicalize_name(needed.name)


def brought_along(name: str) -> Iterator[str]:
    """Yield the names of what a package needs, and what that needs."""
    for needed in needs(name):
        yield needed
        yield from brought_along(needed)


def test_what_is_installed_is_what_is_locked() -> None:
    expected, found = pins(default_environment()), installed()
    assert expected.keys() - found.keys() == set(), "not installed; run `make setup`"
    differing = {
        name: f"{found[name]} instead of {version}"
        for name, version in expected.items()
        if found[name] != version and name not in TOOLS
    }
    assert not differing
    own = {"llava-todre", "torch", *brought_along("torch"), *TOOLS}
    assert found.keys() - expected.keys() - own == set(), "installed, but not locked"


def test_torch_is_the_tested_one_whatever_its_build() -> None:
    assert TORCH.specifier.contains(Version(distribution("torch").version).public)


def asked() -> list[Requirement]:
    """Return what pyproject.toml asks for, but for extras that are not locked."""
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *PROJECT["dependency-groups"]["tested"]]
    lines += [line for name in extras.keys() - NOT_LOCKED for line in extras[name]]
    return [Requirement(line) for line in lines]


def machine(python: str, system: str = "linux", processor: str = "x86_64") -> dict[str, str]:
    """Return what markers ask about a machine."""
    return {
        **{"python_version": python, "python_full_version": f"{python}.1"},
        **{"sys_platform": system, "platform_system": system.capitalize()},
        **{"platform_machine": processor, "os_name": "posix", "extra": ""},
        **{"implementation_name": "cpython", "platform_python_implementation": "CPython"},
    }


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(
    ("system", "processor"), [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")]
)
def test_the_lock_is_what_pyproject_asks_for(python: str, system: str, processor: str) -> None:
    environment = machine(python, system, processor)
    locked = {**pins(environment), "torch": Version(str(TORCH.specifier).removeprefix("=="))}
    for each in asked():
        if each.marker is None or each.marker.evaluate(environment):
            version = locked.get(canonicalize_name(each.name))
            assert version and each.specifier.contains(version), f"{each}: run `make lock`"


def test_the_lock_is_made_with_all_extras_and_has_hashes_for_all() -> None:
    (made_with,) = re.findall(r"^EXTRAS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(made_with.split()) == {*PROJECT["project"]["optional-dependencies"]} - NOT_LOCKED
    text = (ROOT / "requirements.txt").read_text()
    heads = re.split(r"^(?=[a-z])", text, flags=re.MULTILINE)[1:]
    assert len(heads) == len(LOCK) and all("--hash=sha256:" in head for head in heads)
    assert not re.search(r"^(-|torch\b)|index|find-links|file:|@", text, re.MULTILINE)


def test_what_torch_needs_is_locked_before_it_is_installed() -> None:
    given = tomllib.loads((ROOT / "uv.toml").read_text())["dependency-metadata"]
    (lines,) = (each["requires-dist"] for each in given if each["name"] == "torch")
    stated = {canonicalize_name(Requirement(line).name) for line in lines}
    unstated = set(needs("torch")) - stated
    assert all(name.startswith(("nvidia-", "cuda-")) for name in unstated), unstated


@pytest.mark.parametrize("version", ["5.24.0", "5.24.0.dev0", "5.24.3", "5.30.1", "6.0.0"])
def test_a_transformers_that_answers_wrongly_is_refused(version: str) -> None:
    with pytest.raises(TodreError, match=rf"must be below {TOO_NEW}, got {re.escape(version)}"):
        check_transformers(version)


def test_the_transformers_that_pip_chooses_is_not_refused() -> None:
    (asked,) = [
        each
        for each in map(Requirement, PROJECT["project"]["dependencies"])
        if each.name == "transformers"
    ]
    assert f"<{TOO_NEW}" in str(asked.specifier).split(",")
    for pin in LOCK:
        if pin.name == "transformers":
            check_transformers(str(pin.specifier).removeprefix("=="))


def test_torchao_is_tested_in_a_version_that_pyproject_allows() -> None:
    (version,) = re.findall(r"^TORCHAO := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    asked = map(Requirement, PROJECT["project"]["optional-dependencies"]["torchao"])
    assert [each.specifier.contains(version) for each in asked if each.name == "torchao"] == [True]


def test_every_locked_package_is_in_the_list_of_licences() -> None:
    listed = {
        canonicalize_name(name): stated
        for name, stated in re.findall(
            r"^\| ([\w.-]+) \| ([^|]+) \|", PAGE.read_text(), re.MULTILINE
        )
        if name not in ("package", "---")
    }
    assert "not stated" not in listed.values()
    locked = [{*pins(machine(python)), "torch"} for python in PYTHONS]
    assert set(listed) in locked, "run `make docs`"
    expected = pins(default_environment())
    for name, package in packages().items():
        if Version(package.version) == expected.get(canonicalize_name(name)):
            assert listed[canonicalize_name(name)] == licence(package.metadata), name
