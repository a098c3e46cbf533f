"""Check, without a network, that the requirement files fit pyproject.toml; say what does not and fail.

Each file pins every dependency that pyproject.toml declares for it, at a version that it allows, and nothing that it no
longer declares; what both files of `.venv` pin, they pin alike; every pin has a hash; no file names a package index,
since where packages come from is the business of whoever installs them.
"""

import pathlib
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Each file, and which parts of pyproject.toml it is resolved from: the project's own dependencies, or a group.
PROJECT = "project"
SOURCES = {
    "requirements.txt": (PROJECT,),
    "requirements-dev.txt": (PROJECT, "dev"),
    "requirements-load.txt": ("load",),
    "requirements-mlserver.txt": ("mlserver",),
    "requirements-triton.txt": ("triton",),
}
# One pin with its hashes and the comment that tells who wants it, as `uv pip compile` writes them. A package that has
# different versions for different Pythons is pinned more than once, each with a marker.
PIN = re.compile(
    r"^(?P<name>[A-Za-z0-9._-]+)(?:\[[^]]*\])?==(?P<version>[^\s;]+)(?P<marker>[^\\\n]*)(?P<rest>.*\n(?:[ \t].*\n?)*)",
    re.MULTILINE,
)
INDEX = re.compile(r"^[^#\n]*(://|--(extra-)?index-url|--find-links)|^#.*://", re.MULTILINE)


def declared(pyproject: str, sources: Sequence[str]) -> list[Requirement]:
    """Return what pyproject.toml asks for."""
    document = tomllib.loads(pyproject)
    parts = {PROJECT: document["project"]["dependencies"], **document["dependency-groups"]}
    return [Requirement(text) for source in sources for text in parts[source]]


def find_problems(pyproject: str, lock: str, sources: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with one requirement file."""
    wanted = declared(pyproject, sources)
    wanted_names = {canonicalize_name(requirement.name) for requirement in wanted}
    pins = list(PIN.finditer(lock))
    yield from (
        f"{name} is not pinned" for name in sorted(wanted_names - {canonicalize_name(pin["name"]) for pin in pins})
    )
    for pin in pins:
        name, version = canonicalize_name(pin["name"]), pin["version"]
        for requirement in wanted:
            if canonicalize_name(requirement.name) == name and not requirement.specifier.contains(
                version, prereleases=True
            ):
                yield f"{name}=={version} does not satisfy {requirement}"
        if "(pyproject.toml" in pin["rest"] and name not in wanted_names:
            yield f"{name} is pinned for pyproject.toml, which does not ask for it"
        if "--hash=" not in pin["rest"]:
            yield f"{name} has no hash"
    for match in INDEX.finditer(lock):
        yield f"line {lock.count(chr(10), 0, match.start()) + 1} names a package index"


def find_differences(lock: str, dev_lock: str) -> Iterator[str]:
    """Yield what the first file pins and the second does not, or not so."""
    dev_pins = {pin.group("name", "version", "marker") for pin in PIN.finditer(dev_lock)}
    for pin in PIN.finditer(lock):
        if pin.group("name", "version", "marker") not in dev_pins:
            yield f"{pin['name']}=={pin['version']} is not what requirements-dev.txt pins"


def main() -> int:
    """Print every problem; 1 if there is one."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    locks = {name: (ROOT / name).read_text() for name in SOURCES}
    problems = [
        f"{name}: {text}" for name, lock in locks.items() for text in find_problems(pyproject, lock, SOURCES[name])
    ]
    differences = find_differences(locks["requirements.txt"], locks["requirements-dev.txt"])
    problems += [f"requirements.txt: {text}" for text in differences]
    for problem in problems:
        print(f"{problem} (make lock?)", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
