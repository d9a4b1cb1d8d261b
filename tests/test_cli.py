"""The command: what it prints, what it says when something is wrong, and what it loads."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from stabnorm.cli import main

FACTORIES = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)), [torch.randn(64, 4) for _ in range(3)]

class Models:
    build = staticmethod(build)

def named():
    model, batches = build()
    return model, {"input": batches[0]}

def fails():
    return build()["model"]

def alone():
    return build()[0]

def swapped():
    model, batches = build()
    return batches, model

def three():
    return (*build(), None)

def wrong_example():
    return build()[0], torch.randn(3, 5)

def no_norm():
    return nn.Linear(4, 2), torch.randn(3, 4)

number = 3
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "project" / "models"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "small.py").write_text(FACTORIES, encoding="utf-8")
    (folder / "broken.py").write_text("import torch\n\nraise RuntimeError('not today')\n", encoding="utf-8")
    (folder / "lacking.py").write_text("import a_package_that_is_not_there\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in sys.modules if name.partition(".")[0] == "models"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("factory", ["models.small:build", "models.small:Models.build", "models.small:named"])
def test_the_plan_is_printed(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", factory]) == 0
    out, err = capsys.readouterr()
    first, header, norm = out.splitlines()[:3]
    assert first.startswith("1 norms, if switched to prepbn: 1 forward;")
    assert "affine residual" in header
    assert norm.split()[:3] == ["1", "layer", "forward"]
    assert err == ""


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("nowhere:build", "there is no module 'nowhere' here"),
        ("models.nowhere:build", "there is no module 'models.nowhere' here"),
        ("models.small:nothing", "models.small has no 'nothing'"),
        (
            "models.small:number",
            "models.small:number is no function but of type int. Name one that returns (model, example)",
        ),
        ("models.small:alone", "models.small:alone returned a Sequential. Return (model, example)"),
        ("models.small:swapped", "returned a tuple (list, Sequential). Return (model, example)"),
        ("models.small:three", "returned a tuple (Sequential, list, NoneType)"),
        ("models.small:wrong_example", "the model does not run on the example: RuntimeError"),
        ("models.small:no_norm", "Linear has no norm, so there is nothing to plan"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(factory: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", factory]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("stabnorm plan: error: ")
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("factory", "message", "line"),
    [
        ("models.small:fails", "models.small:fails failed: TypeError: ", 'return build()["model"]'),
        ("models.broken:build", "models.broken cannot be imported: RuntimeError: not today", "raise RuntimeError"),
        (
            "models.lacking:build",
            "models.lacking cannot be imported: ModuleNotFoundError: No module",
            "import a_package",
        ),
    ],
)
def test_a_failure_in_the_users_code_comes_with_their_traceback_and_none_of_ours(
    factory: str, message: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", factory]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith(f"stabnorm plan: error: {message}")
    assert line in err
    assert "stabnorm/cli.py" not in err
    assert "importlib" not in err


@pytest.mark.parametrize("reference", ["models.small", "models.small:", ":build"])
def test_a_reference_without_module_or_name_is_no_call(reference: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["plan", reference])
    assert left.value.code == 2
    assert f"{reference!r} is no factory: write package.module:factory" in capsys.readouterr().err


def test_the_installed_command_finds_modules_in_the_current_folder() -> None:
    command = Path(sysconfig.get_path("scripts")) / "stabnorm"
    ran = subprocess.run([command, "plan", "models.small:build"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "1 forward" in ran.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["plan", "nowhere:build"]])
def test_help_and_slips_load_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
from stabnorm.cli import main
try:
    main({arguments!r})
except SystemExit:
    pass
print("loaded", *[m for m in ("torch", "numpy", "pytorch_lightning", "tensorboard") if m in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "loaded"
