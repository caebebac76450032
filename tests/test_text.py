"""Text that is not UTF-8: locales, names of files, checkouts of other users."""

import ast
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import REPOSITORY

SMALL = ["data.image_size=32", "model.width=0.1", "epochs=1", "schedule.warmup_epochs=0", "schedule.cooldown_epochs=0"]
SMALL += ["data.batch_size=16", "data.workers=1", "device=cpu"]
STRICT = {"PYTHONIOENCODING": "utf-8:strict"}
"""As stdout is by itself in most UTF-8 locales."""
DOG = os.fsdecode(b"\xb9\xb7")
"""A Chinese character in GBK."""
FILES = [REPOSITORY / "train.py", REPOSITORY / "evaluate.py", *sorted((REPOSITORY / "ghostnet").rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_text_is_read_or_written_in_the_encoding_of_the_locale(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ("read_text", "write_text"):
            assert "encoding" in given, f"line {node.lineno}"
        assert not {"text", "universal_newlines"} & set(given) or "encoding" in given or name not in ("run", "Popen")


def locale(tmp_path, language, charset):
    if shutil.which("localedef") is None:
        pytest.skip("localedef is not installed")
    made = tmp_path / f"{language}.{charset}"
    subprocess.run(["localedef", "-i", language, "-f", charset, made], check=False, capture_output=True)
    if not made.exists():
        pytest.skip(f"the sources of {made.name} are not installed")
    return {"LOCPATH": str(tmp_path), "LC_ALL": made.name, "PYTHONIOENCODING": "", "PYTHONUTF8": "0"}


@pytest.mark.parametrize(("language", "charset"), [("en_US", "ISO-8859-1"), ("zh_CN", "GB2312"), ("zh_CN", "GBK")])
def test_help_is_shown_in_any_locale(tmp_path, language, charset):
    env = os.environ | locale(tmp_path, language, charset)
    command = ["python", REPOSITORY / "train.py", "experiment=quickstart", "--help"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"Train GhostNet.")


def test_changes_of_the_code_are_kept_in_utf_8_in_any_locale(tmp_path):
    env = os.environ | locale(tmp_path, "en_US", "ISO-8859-1") | {"PYTHONPATH": "."}
    subprocess.run(["git", "clone", "-q", REPOSITORY, tmp_path / "own"], check=True)
    for path in (REPOSITORY / "ghostnet").rglob("*.py"):
        shutil.copy2(path, tmp_path / "own" / path.relative_to(REPOSITORY))
    (tmp_path / "own" / "实验.yaml").write_text("# 实验 – 😀\n", encoding="utf-8")
    program = "from pathlib import Path; from ghostnet.experiments import record; record.write(Path('..'), {})"
    subprocess.run(["python", "-c", program], check=True, env=env, cwd=tmp_path / "own")
    assert "+# 实验 – 😀\n" in (tmp_path / "code.diff").read_text(encoding="utf-8")


@pytest.fixture
def gbk_data(tmp_path):
    rng = np.random.default_rng(0)
    root = tmp_path / f"data{DOG}"
    for split, count in (("train", 16), ("val", 8)):
        for name in ("ant", DOG):
            folder = root / split / name
            try:
                folder.mkdir(parents=True)
            except OSError:
                pytest.skip("the file system takes no name that is not UTF-8")
            for number in range(count):
                Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(folder / f"{number:02}.jpg")
    (root / "val" / DOG / "00.jpg").write_bytes(b"no image")
    return root


def test_names_that_are_no_utf_8_survive_a_run_a_resume_a_repetition_and_the_leaderboard(run, tmp_path, gbk_data):
    words = [*SMALL, f"data.root='{gbk_data}'", "data.on_error=skip", f"hydra.run.dir='run{DOG}'"]
    first = run("train.py", *words, **STRICT)
    assert (first.returncode, first.stderr) == (0, "")
    assert "\\udcb9\\udcb7/00.jpg" in first.stdout
    folder = tmp_path / f"run{DOG}"
    assert (folder / "last.pt").exists()
    assert "\\udcb9\\udcb7/00.jpg" in (folder / "train.log").read_text(encoding="utf-8")
    resumed = run("train.py", *words, "resume=auto", "epochs=2", **STRICT)
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert json.loads((folder / "result.json").read_text(encoding="utf-8"))["epochs"] == 2
    evaluated = run("evaluate.py", f"ckpt='run{DOG}'", **STRICT)
    assert evaluated.returncode == 0, evaluated.stderr
    again = run("train.py", f"rerun='run{DOG}'", f"hydra.run.dir='again{DOG}'", **STRICT)
    assert again.returncode == 0, again.stderr
    board = subprocess.run(
        ["python", "-m", "ghostnet.tools.leaderboard", str(tmp_path), "html=page.html"],
        cwd=tmp_path,
        env=os.environ | STRICT | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        check=False,
    )
    assert (board.returncode, board.stderr.startswith(b"page: ")) == (0, True)
    assert Path(tmp_path / "page.html").stat().st_size > 0


def test_the_commit_of_another_users_checkout_is_recorded(tmp_path):
    """git calls its ownership dubious, if it is told to take this user for another one."""
    program = "from ghostnet.experiments import record; print(record.code()[0], record.code()[2])"
    env = os.environ | {"GIT_TEST_ASSUME_DIFFERENT_OWNER": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(["python", "-c", program], env=env, cwd=tmp_path, capture_output=True, check=True)
    head = subprocess.run(["git", "-C", REPOSITORY, "rev-parse", "HEAD"], capture_output=True, check=True)
    assert done.stdout.split() == head.stdout.split()


def test_a_commit_that_git_does_not_tell_is_said_to_be_lacking(tmp_path):
    program = "from ghostnet.experiments import record; print(record.code())"
    env = os.environ | {"PATH": "/nowhere", "PYTHONPATH": str(REPOSITORY)}
    python = shutil.which("python")
    done = subprocess.run([python, "-c", program], env=env, cwd=tmp_path, capture_output=True, check=True)
    assert done.stdout == b"(None, '', 'No such file or directory')\n"


def test_without_a_home_nothing_is_cached_and_all_is_read(monkeypatch, image_folder):
    from ghostnet.data.datasets import ImageFolder
    from ghostnet.data.index import cache_folder

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it is without HOME and an entry in passwd
    assert str(cache_folder()) == "/dev/null/no home, set XDG_CACHE_HOME"
    assert len(ImageFolder("train", str(image_folder))) == 64
