"""The Dockerfiles, read: nothing here can build them."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "deploy" / "docker").glob("Dockerfile.*"))
VALUES = ROOT / "deploy" / "helm" / "rorqual"


def instructions(file: Path) -> list[tuple[str, str]]:
    """Instruction and argument, lines that go on joined."""
    text = re.sub(r"^\s*#.*\n", "", file.read_text(), flags=re.M).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def test_there_is_one_for_each_family():
    assert [file.suffix for file in FILES] == [".cpu", ".cuda", ".rocm"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.suffix)
def test_bases_are_pinned_and_the_last_stage_runs_as_the_charts_user(file: Path):
    found = instructions(file)
    bases = [argument.split()[0] for name, argument in found if name == "FROM"]
    assert len(bases) == 2
    assert all(re.search(r":[\w.-]*\d", base) for base in bases)
    values = yaml.safe_load((VALUES / "values.yaml").read_text())
    last = found[max(i for i, (name, _) in enumerate(found) if name == "FROM") :]
    users = [argument for name, argument in last if name == "USER"]
    assert users == [str(values["podSecurityContext"]["runAsUser"])]
    assert ("ENTRYPOINT", '["rorqual"]') in last
    assert any(f"--uid {users[0]}" in argument for name, argument in last if name == "RUN")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.suffix)
def test_what_is_copied_is_there_and_torch_comes_first_at_its_pin(file: Path):
    found = instructions(file)
    for name, argument in found:
        if name == "COPY" and not argument.startswith("--from"):
            *sources, _ = argument.split()
            assert all(source == "." or list(ROOT.glob(source.rstrip("/"))) for source in sources), argument
    runs = " ".join(argument for name, argument in found if name == "RUN")
    assert runs.index("requirements/torch.txt") < runs.index("-r requirements/lock.txt")
    assert "pip install --no-deps ." in runs


def test_the_cpu_image_has_the_model_where_the_local_values_look_for_it():
    path = yaml.safe_load((VALUES / "values-local.yaml").read_text())["model"]["path"]
    copies = [argument for name, argument in instructions(FILES[0]) if name == "COPY"]
    (copy,) = [argument for argument in copies if argument.startswith("models/demo/")]
    assert copy.split()[-1].rstrip("/") == path
    names = {found.name for source in copy.split()[:-1] for found in ROOT.glob(source)}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= names
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert not any(Path("models/demo/config.json").match(line) for line in ignored if line)
