"""A log of somebody else's trainer is read in the forms there are, and the report says where it broke."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import public_logs
from stabnorm.cli import main
from stabnorm.dashboard.training_log import log_report, read_training_log

STEPS = 10 * np.arange(1, 321)
LOSS = 2 + 0.05 * np.sin(np.arange(320))


def broken() -> np.ndarray:
    return np.where(STEPS > 3000, 3 * LOSS, LOSS)


def trainer_state(path: Path, loss: np.ndarray) -> Path:
    points = [
        {"step": int(s), "loss": float(x), "grad_norm": 1.0, "epoch": 0.1} for s, x in zip(STEPS, loss, strict=True)
    ]
    points.insert(5, {"step": 50, "eval_loss": 9.0})
    path.write_text(json.dumps({"log_history": points, "global_step": 3200}), encoding="utf-8")
    return path


def metrics_csv(path: Path, loss: np.ndarray) -> Path:
    rows = ["epoch,step,train_loss,val_loss"]
    rows += [f"0,{s},{x},\n0,{s},,8.5" for s, x in zip(STEPS, loss, strict=True)]
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def json_lines(path: Path, loss: np.ndarray) -> Path:
    lines = [json.dumps({"iteration": int(s), "total_loss": float(x)}) for s, x in zip(STEPS, loss, strict=True)]
    path.write_text("\n".join([*lines, '{"iteration": 33']), encoding="utf-8")
    return path


@pytest.mark.parametrize("write", [trainer_state, metrics_csv, json_lines])
def test_the_logs_of_trainers_are_read_and_the_break_is_told_in_their_own_steps(write: object, tmp_path: Path) -> None:
    path = write(tmp_path / "log", broken())  # type: ignore[operator]
    log = read_training_log(path)
    np.testing.assert_array_equal(log.steps, STEPS)
    np.testing.assert_allclose(log.series["loss"], broken())
    report = log_report(path)
    assert "## Step 3,0" in report
    assert "| loss | 5.92 | 2 |" in report
    assert "320 steps watched, compared with the past from the 256th on" in report


def test_a_calm_log_is_called_calm_and_says_on_what_this_rests(tmp_path: Path) -> None:
    report = log_report(metrics_csv(tmp_path / "metrics.csv", LOSS))
    assert "**Nothing left its usual range** up to step 3,200." in report
    short = tmp_path / "short.csv"
    short.write_text("loss\n1.0\n0.9\n")
    assert "2 steps watched; comparison with the past begins at 256: only fixed bounds were checked." in log_report(
        short
    )


def test_a_loss_of_nan_in_a_log_is_told(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("step,loss\n" + "".join(f"{step},{'nan' if step == 7 else 1.0}\n" for step in range(20)))
    assert "NaN or an infinity at step 7" in log_report(path)


def test_a_loss_that_slowly_loses_all_its_progress_is_told_though_its_past_follows_it(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("loss\n" + "".join(f"{np.exp(0.01 * max(0, step - 300))}\n" for step in range(900)))
    assert "times the lowest that it was" in log_report(path)


@pytest.mark.parametrize(
    ("text", "said"), [("a,b\n1,2\n", "has no loss that is known. Its points have: a, b"), ("", "nothing")]
)
def test_a_file_without_a_loss_is_refused_in_words(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_training_log(tmp_path / "x.csv")


def test_the_command_prints_a_report_on_a_log_or_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = metrics_csv(tmp_path / "metrics.csv", LOSS)
    assert main(["report", str(log)]) == 0
    assert "Nothing left its usual range" in capsys.readouterr().out
    assert main(["report", str(log), "-o", str(tmp_path / "r.md")]) == 0
    assert "Nothing left" in (tmp_path / "r.md").read_text()
    assert main(["report", str(log), "-o", str(tmp_path / "r.html")]) == 1
    (tmp_path / "x.csv").write_text("a\n1\n")
    assert main(["report", str(tmp_path / "x.csv")]) == 1
    assert "has no loss" in capsys.readouterr().err


@pytest.mark.slow
def test_the_benchmark_prints_a_table_of_logs_with_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "load.py").write_text(
        "import numpy as np\n"
        "def load():\n"
        "    calm = 2 + 0.05 * np.sin(np.arange(320))\n"
        "    spike = np.where(np.arange(320) > 300, 3 * calm, calm)\n"
        "    return [dict(id=f'log-{i}', category=c, step=np.arange(320), loss=x, grad_norm=None)\n"
        "            for i, (c, x) in enumerate([('calm', calm), ('spike', spike)])]\n"
    )
    public_logs.main(["--data", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "| stabnorm, loss and gradient norm | 0.0 (0 of 1 logs) | - | 1/1 | - | - |" in printed
    assert "not alarmed: none" in printed
    public_logs.main(["--data", str(metrics_csv(tmp_path / "metrics.csv", broken()))])
    assert "## Step 3,0" in capsys.readouterr().out
