"""The Dockerfile, read: no engine builds it here."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import tomllib
from pathlib import Path

from helpers import ROOT
from helpers.manifests import K8S, distinct, pods
from ray._private.thirdparty.pathspec import PathSpec

DOCKERFILE = (K8S / "Dockerfile").read_text()
FINAL = ("cpu", "cuda", "mlflow")
COMPILERS = ("build-essential", "gcc", "g++", "clang", "-dev", "nvcc", "make")


def stages() -> dict[str, tuple[str, list[list[str]]]]:
    """By name: what it starts from, and its instructions as words."""
    text = re.sub(r"^\s*#.*$", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, tuple[str, list[list[str]]]] = {}
    name = ""
    for line in filter(None, (line.strip() for line in text.splitlines())):
        words = line.split()
        if words[0] == "FROM":
            assert words[2] == "AS", "every stage has a name"
            name = words[3]
            found[name] = words[1], []
        elif name:
            found[name][1].append(words)
    return found


def lineage(stage: str) -> list[list[str]]:
    """Instructions of a stage and of all that it starts from, in order."""
    source, lines = stages()[stage]
    return [*(lineage(source) if source in stages() else []), *lines]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.partition("==") for line in lines if line)
    return {plain(name): version for name, _, version in pairs}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def ignored(path: str) -> bool:
    """By .dockerignore: the last line that fits decides."""
    result = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            parts = Path(path).parts
            prefixes = ["/".join(parts[: end + 1]) for end in range(len(parts))]
            if any(fnmatch.fnmatch(prefix, pattern.removeprefix("**/")) for prefix in prefixes):
                result = not line.startswith("!")
    return result


def test_every_copied_file_exists_and_reaches_the_builder() -> None:
    copied = 0
    for _, lines in stages().values():
        for words in lines:
            if words[0] != "COPY" or words[1].startswith("--from="):
                continue
            for source in words[1:-1]:
                assert (ROOT / source).exists(), source
                assert not ignored(source), f"{source} is in .dockerignore"
                copied += 1
    assert copied >= 8


def test_what_is_not_copied_is_not_sent() -> None:
    for path in (
        "tests",
        "docs",
        ".git",
        "runs/x",
        ".venv/bin/python",
        "k8s/base",
        "README.md",
        "x.pt",
    ):
        assert ignored(path), path
    assert ignored("model/__pycache__") or "**/__pycache__" in (ROOT / ".dockerignore").read_text()


def test_stages_copy_from_stages() -> None:
    taken = [words[1].removeprefix("--from=") for _, lines in stages().values()
             for words in lines if words[0] == "COPY" and words[1].startswith("--from=")]  # fmt: skip
    assert sorted(taken) == ["cpu-packages", "cuda-packages", "mlflow-packages"]
    assert set(taken) <= set(stages())


def test_final_images_have_no_compiler_and_do_not_run_as_root() -> None:
    for name in FINAL:
        lines = lineage(name)
        users = [words[1] for words in lines if words[0] == "USER"]
        assert users[-1] == "1000:1000", name
        after = lines[max(i for i, words in enumerate(lines) if words[0] == "USER") :]
        assert not any(words[0] == "RUN" for words in after), f"{name}: RUN as the final user"
        text = " ".join(" ".join(words) for words in lines if words[0] == "RUN")
        assert not any(compiler in text for compiler in COMPILERS), name
        assert "pip install" not in text, f"{name}: packages come whole from their stage"
        assert any(words[0] == "HEALTHCHECK" for words in lines), name
        assert "wget" in text, "the operator's probes call it"


def test_users_of_image_and_manifests_agree() -> None:
    for pod in pods():
        for container in pod.containers():
            if "effdet" in container["image"]:
                assert pod.spec["securityContext"]["runAsUser"] == 1000, pod.name
                assert pod.spec["securityContext"]["fsGroup"] == 1000, pod.name


def test_base_images_are_pinned() -> None:
    bases = {source for source, _ in stages().values() if source not in stages()}
    assert bases == {"${PYTHON_IMAGE}"}
    (default,) = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(
        r"docker\.io/library/python:\d+\.\d+\.\d+-slim-\w+(@sha256:[0-9a-f]{64})?", default
    )
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    minor = tuple(map(int, default.partition(":")[2].split(".")[:2]))
    assert minor >= tuple(map(int, needed.removeprefix(">=").split(".")))


def test_every_package_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for name in ("requirements-ray.txt", "requirements-mlflow.txt"):
        lines = (K8S / name).read_text().splitlines()
        wanted += [line for line in lines if line and not line.startswith("#")]
    missing = []
    for requirement in wanted:
        match = re.match(r"[\w.-]+", requirement)
        assert match is not None
        if plain(match[0]) not in pins():
            missing.append(match[0])
    assert missing == [], "add them to constraints.txt"
    installs = re.findall(r"pip install [^\n\\]*", DOCKERFILE)
    assert len(installs) == 4
    for line in installs:
        words = shlex.split(line.replace(";", " "))
        assert "constraints.txt" in words or "torch.txt" in words, line


def test_scripts_find_what_they_import() -> None:
    """Those of the tracker's image import none of our packages, the others find them."""
    slim = pins().keys() - {"torch"}
    assert slim
    mlflow_scripts: set[Path] = set()
    ray_scripts: set[Path] = set()
    for pod in pods():
        for container in pod.containers():
            command = [*container.get("command", ()), *container.get("args", ())]
            hook = (
                container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
            )
            for words in (command, hook):
                if words[:1] == ["python"] and words[1].endswith(".py"):
                    (path,) = K8S.rglob(words[1].rpartition("/")[2])
                    (mlflow_scripts if "effdet-mlflow" in container["image"] else ray_scripts).add(
                        path
                    )
    assert {path.name for path in mlflow_scripts} >= {"mlflow_prepare.py", "buckets.py"}
    assert {path.name for path in ray_scripts} >= {
        "prefetch.py",
        "retain_checkpoints.py",
        "drain.py",
    }
    for path in mlflow_scripts:
        assert not re.search(
            r"^\s*(?:from|import) (?:model|orchestrator|ray)\b", path.read_text(), re.MULTILINE
        )
    ray_lines = lineage("cuda")
    assert any("PYTHONPATH=/opt/efficientdet" in words for words in ray_lines if words[0] == "ENV")


def test_entrypoints_run_where_the_code_is() -> None:
    lines = lineage("cuda")
    (folder,) = {words[1] for words in lines if words[0] == "WORKDIR"}
    copied = {word for words in lines if words[0] == "COPY" for word in words[1:-1]}
    assert folder == "/opt/efficientdet"
    assert {"model", "orchestrator", "jobs"} <= copied
    for name, doc in distinct().items():
        if doc["kind"] == "RayJob":
            assert "workingDir" not in str(doc["spec"].get("runtimeEnvYAML", "")), name


def left_behind() -> PathSpec:
    """What Ray does not send along, by its own reading of .rayignore."""
    return PathSpec.from_lines("gitwildmatch", (ROOT / ".rayignore").read_text().splitlines())


def test_a_submitted_folder_is_small() -> None:
    """Without .rayignore the virtual environment would go along."""
    spec = left_behind()
    for path in (".git/HEAD", ".venv/bin/python", "runs/x", "tests/k8s/x.py", "docs/index.md"):
        assert spec.match_file(path), path
    size = 0
    for folder, below, files in os.walk(ROOT):
        here = Path(folder).relative_to(ROOT)
        below[:] = [name for name in below if not spec.match_file(f"{here / name}/x")]
        size += sum(
            (ROOT / here / name).stat().st_size for name in files
            if not spec.match_file(str(here / name))
        )  # fmt: skip
    assert 100_000 < size < 20 * 2**20


CODE = ("model", "orchestrator", "jobs")
# Files of packages that are no Python, and names that are also folders at the top.
ALSO = [
    f"orchestrator/serving/static/{name}"
    for name in ("index.html", "app.js", "style.css", "docs/help.html", "icon.svg")
]


def test_all_code_reaches_the_image_and_a_submitted_folder() -> None:
    spec = left_behind()
    there = [
        path.relative_to(ROOT).as_posix()
        for name in CODE for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]  # fmt: skip
    assert len(there) > 100
    for path in (*there, *ALSO):
        assert not ignored(path), f"{path}: .dockerignore"
        assert not spec.match_file(path), f"{path}: .rayignore"
    copies = [words[1:] for words in lineage("cuda") if words[0] == "COPY"]
    assert all([name, name] in copies for name in CODE), "whole folders"
