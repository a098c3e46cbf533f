"""Generate the Python code of protos/, or with --check tell whether the committed code is up to date.

What protoc writes is changed in one place: the Open Inference Protocol's module gets a descriptor pool of its own. Its
package, `inference`, is everybody's: tritonclient and every other OIP client register the same names in the default
pool, and the second copy in one process fails with "duplicate symbol" (kserve#3099, MLServer#1730).
"""

import argparse
import filecmp
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = ("protos/inference_router/v1/inference_router.proto", "protos/open_inference/open_inference.proto")
PRIVATE_POOL = "protos/open_inference/open_inference_pb2.py"


def generate(target: pathlib.Path) -> list[pathlib.Path]:
    """Write the generated files below `target`; return their paths relative to it."""
    plugin = pathlib.Path(sys.executable).parent
    command = [sys.executable, "-m", "grpc_tools.protoc", "-Iprotos=protos"]
    command += [f"--plugin=protoc-gen-{name}={plugin / f'protoc-gen-{name}'}" for name in ("mypy", "mypy_grpc")]
    command += [f"--{kind}_out={target}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    subprocess.run([*command, *SOURCES], cwd=ROOT, check=True)
    _give_private_pool(target / PRIVATE_POOL)
    return sorted(path.relative_to(target) for path in target.rglob("*_pb2*.py*"))


def _give_private_pool(module: pathlib.Path) -> None:
    text = module.read_text()
    if text.count("_descriptor_pool.Default()") != 1:
        raise SystemExit(f"{module}: protoc's output has changed, the descriptor pool was not found")
    module.write_text(text.replace("_descriptor_pool.Default()", "_descriptor_pool.DescriptorPool()"))


def main() -> None:
    """Generate, or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the committed code is stale")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        target = pathlib.Path(scratch)
        paths = generate(target)
        stale = [path for path in paths if not _is_same(target / path, ROOT / path)]
        if check and stale:
            raise SystemExit(f"stale generated code, run `make protos`: {', '.join(map(str, stale))}")
        for path in () if check else paths:
            shutil.copyfile(target / path, ROOT / path)


def _is_same(new: pathlib.Path, old: pathlib.Path) -> bool:
    return old.exists() and filecmp.cmp(new, old, shallow=False)


if __name__ == "__main__":
    main()
