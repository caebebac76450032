"""The doctor's page: each fault on a line of its own with its way out, and the exit code that goes with it.

Most of it is asked of the checks in this process. What needs a fresh one, torch_npu above all, is a whole command.
"""

import ast
import functools
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import open_dict

from ghostnet.config import TrainConfig, resolved
from ghostnet.door.groups import CONF
from ghostnet.door.overrides import Checked
from ghostnet.experiments.folders import Place
from ghostnet.tools.doctor import __main__ as doctor
from ghostnet.tools.doctor import data, machine, run, software
from ghostnet.tools.doctor.finding import FAIL, OK, WARN, Case, Finding, fresh_python

REPOSITORY = Path(__file__).parent.parent
FOREIGN = ("TORCH_DEVICE", "ASCEND", "HCCL", "WANDB", "LD_", "EMULATED_NPU_GEN", "EMULATED_NPU_COUNT")
"""Variables of the shell that would change the page."""


@pytest.fixture(autouse=True)
def shell(tmp_path, monkeypatch):
    """An empty home and folder, and a shell that says nothing of the matter."""
    for name in list(os.environ):
        if name.startswith(FOREIGN):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def page(monkeypatch, capsys):
    """The exit code, and what these checks print, every finding on one line. Without checks: the door refuses."""

    def never(case):
        raise AssertionError("a check was made")

    def told(*words, checks=None):
        with monkeypatch.context() as patch:
            if checks:
                patch.setattr("ghostnet.door.overrides.check_command", composed)
            patch.setattr(doctor, "CHECKS", checks or (never,))
            code = doctor.main(list(words))
        return code, unwrapped(capsys.readouterr().out)

    return told


def fresh(*arguments: str, path: Path | None = None, **env: str) -> tuple[int, str]:
    """The same of a Python of its own. path: a folder of packages to put first."""
    paths = ":".join(str(place) for place in (path, REPOSITORY) if place)
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr == ""
    return done.returncode, unwrapped(done.stdout)


def command(*words: str, path: Path | None = None) -> tuple[int, str]:
    return fresh("-m", "ghostnet.tools.doctor", *words, path=path)


def unwrapped(text: str) -> str:
    return re.sub(r"\n {18}", " ", text)


def case(*words: str) -> Case:
    return Case(config(words), lambda: Place("hydra.run.dir", Path("outputs/x"), given=False), 200)


@functools.cache
def config(words: tuple[str, ...]) -> dict:
    return composed("train", words).jobs[0]


def composed(name: str, words: Sequence[str], multirun: bool = False) -> Checked:
    """What the door gives for words that pass it, in a third of the time."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(name, overrides=list(words), return_hydra_config=True)
        hydra = cfg.hydra
        with open_dict(cfg):
            del cfg["hydra"]
        return Checked([resolved(cfg)], hydra)


def package(folder: Path, name: str, version: str, code: str = "", metadata: str = "", entry_points: str = "") -> Path:
    """A folder with an installed package of that name."""
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}")
    (about / "entry_points.txt").write_text(entry_points)
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)
    return folder


# Whole commands


def test_a_sound_machine_ends_with_0_without_a_red_line_and_leaves_nothing_behind(tmp_path):
    code, text = command("data=samples", "device=cpu")
    assert code == 0
    assert "\nFAIL" not in text
    assert re.match(
        r"Would this start here\?  python train.py data=samples device=cpu\n\nOK    config      model ", text
    )
    assert "\nOK    data        6,000 train + 1,000 val images of 10 classes, the same in both\n" in text
    assert "\nOK    images      200 of 7,000 decoded\n" in text
    assert re.search(r"\nOK    loader      [\d,]+ img/s with \d+ thread\(s\) on \d+ CPU\(s\)\n", text)
    assert "\nYes." in text
    # In this order; cann, autoload, apex and wandb have nothing to say of a machine without NPUs.
    named = dict.fromkeys(re.findall(r"^(?:OK  |WARN|FAIL)  (.{11}) ", text, re.MULTILINE))
    names = (
        "config, python, packages, torch, torchvision, device, cpus, memory, data, images, loader, recipe, run folder"
    )
    assert ", ".join(name.strip() for name in named) == names
    assert not list(tmp_path.iterdir())


def test_a_truncated_jpeg_and_an_npu_without_torch_npu_are_red_each_with_its_ways_out(tmp_path, image_folder):
    root = shutil.copytree(image_folder, tmp_path / "data")
    broken = root / "train" / "class1" / "004.jpg"
    broken.write_bytes(broken.read_bytes()[:400])
    code, text = command(f"data.root={root}", "device=npu_1p", "data.batch_size=16")
    assert code == 1
    assert f"\nFAIL  images      88 of 88 looked at, 1 can't be read: {broken} can't be decoded: " in text
    assert "→ replace or remove them; images=all looks at every one" in text
    assert "loader  " not in text
    way_out = "→ pip install -r requirements-npu.txt. To run without a card: device=cpu"
    assert f"\nFAIL  device      torch_npu is not installed {way_out}\n" in text
    assert "\nNo, because of 2 FAIL." in text


def test_an_unknown_key_is_all_that_the_page_says():
    code, text = command("optim.lrr=1", "device=cpu")
    assert code == 1
    assert text.splitlines()[2].startswith("FAIL  config      optim.lrr: no such key. Did you mean optim.lr?")
    assert text.splitlines()[3:] == ["", "No, because of 1 FAIL."]


def mismatched(folder: Path) -> Path:
    entry = "[torch.backends]\ntorch_npu = torch_npu:_autoload\n"
    code = "raise ImportError('libhccl.so: cannot open shared object file')"
    package(folder, "torch_npu", "2.0.0", code, "Requires-Dist: torch==2.0.0\n", entry)
    shutil.copy(REPOSITORY / "tests" / "emulated_npu" / "sitecustomize.py", folder)  # torch is a CPU build
    return folder


def test_a_torch_npu_for_another_torch_is_red_where_npus_are_asked_for(tmp_path):
    code, text = command("device=npu_1p", path=mismatched(tmp_path / "packages"))
    assert code == 1
    line = r"  device      torch_npu 2\.0\.0 goes with torch ==2\.0\.0, but torch \S+ is installed → pip install -r "
    assert re.search("\nFAIL" + line, text)
    # What else is wrong there: other programs that import torch, and CANN.
    assert "\nWARN  autoload    plain `import torch` fails in other programs" in text
    assert "→ export TORCH_DEVICE_BACKEND_AUTOLOAD=0, or" in text
    assert "\nWARN  cann        none found for torch_npu 2.0.0 in " in text
    assert "\nNo, because of 1 FAIL." in text


CARDS = """
from ghostnet.tools.doctor import __main__ as doctor, machine

doctor.CHECKS = (machine.device,)
doctor.main(["device=npu_8p", "device.count=2", "amp=bf16"])
doctor.main(["device=npu_8p", "amp=bf16"])
import torch_npu  # by now it is loaded anyhow

torch_npu.npu.utils.FIRST_GENERATION = True
doctor.main(["device=npu_1p", "amp=bf16"])
doctor.main(["device=npu_1p", "amp=none"])
torch_npu.npu.utils.FIRST_GENERATION = False
doctor.main(["device=npu_1p", "amp=none", "compile=true"])
doctor.main(["device=npu_1p", "amp=none", "device.allow_hf32=false"])
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="the stand-in for torch_npu is built with g++")
def test_cards_are_named_and_the_first_generation_is_refused_bf16():
    _, text = fresh("-c", CARDS, path=REPOSITORY / "tests" / "emulated_npu", EMULATED_NPU_COUNT="2")
    fits, lacks, first, old, new, whole = text.split("Would this start here?")[1:]
    assert "\nOK    device      2 × Ascend910B2 (2 visible), bf16\n" in fits
    assert "\nYes." in fits
    assert "\nFAIL  device      device.count=8: npu card 2, 3, 4, 5, 6, 7 is not there" in lacks
    assert "\nNo, because of 1 FAIL." in lacks
    assert "\nOK    device      1 × Ascend910A (2 visible), no bf16, first generation" in first
    assert "\nFAIL  device      amp=bf16: Ascend910A has no bfloat16. Use amp=fp16 or amp=o2." in first
    assert "\nNo, because of 1 FAIL." in first
    assert "first generation: an overflow saturates, SGD has no fused kernel" in first
    hf32 = "\nOK    device      amp=none convolves in HF32, with 10-bit mantissas; device.allow_hf32=false: in "
    assert [hf32 in each for each in (fits, old, new, whole)] == [False, False, True, False]
    assert re.search(r"\nFAIL  device      compile=true: .* pip install triton-ascend", new)


def test_the_page_needs_nothing_but_the_standard_library_to_say_what_is_missing():
    code, text = fresh("-S", "-m", "ghostnet.tools.doctor")
    assert code == 1
    assert re.search(r"\nOK    python      3\.\d+\.\d+, .*\nFAIL  packages    not installed: torch, ", text)
    assert "→ pip install -r requirements.txt\n" in text


@pytest.mark.parametrize("path", sorted(Path(doctor.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_an_old_python_can_read_it_as_far_as_being_told_so(path):
    tree = ast.parse(path.read_text(), feature_version=(3, 9))
    lazy = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    assert lazy or path.stem == "__init__"


# The page


def test_the_page_is_at_most_100_columns_wide_and_keeps_paths_whole(capsys):
    path = "/data/" + "x" * 90
    doctor.show(Finding(FAIL, f"{'many words ' * 20}\n{path} is empty", "way " * 40, "data"))
    lines = capsys.readouterr().out.splitlines()
    assert any(path in line for line in lines)
    assert [line for line in lines if len(line) > 100] == [f"{'':18}{path}"]
    assert lines[0].startswith("FAIL  data        many words")


def test_help_is_what_the_program_is(capsys):
    assert doctor.main(["--help"]) == 0
    assert capsys.readouterr().out == f"{doctor.__doc__.strip()}\n"
    assert "python -m ghostnet.tools.doctor [images=all]" in doctor.__doc__


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("epochs=-1", "FAIL  config      epochs=-1: must be a whole number >= 1."),
        ("images=few", "FAIL  config      images=few: must be a whole number > 0, or all."),
        ("-m", "FAIL  config      -m: the doctor takes the words of one job, and no flags."),
        ("optim.lr=1,2", "FAIL  config      optim.lr=1,2: several values."),
    ],
)
def test_what_the_door_refuses_is_all_that_the_page_says(page, word, line):
    code, text = page(word, "device=cpu")
    assert code == 1
    assert text.splitlines()[2].startswith(line)
    rest = [line for line in text.splitlines()[3:] if "python train.py -m" not in line]
    assert rest == ["", "No, because of 1 FAIL."]


def test_every_fault_of_the_config_has_a_line(page):
    code, text = page("optim.lrr=1", "epochs=-1")
    assert (code, text.count("\nFAIL  config ")) == (1, 2)


def test_the_doctors_own_key_is_none_of_the_training():
    assert "images" not in TrainConfig.__annotations__


def test_the_doctors_own_key_says_how_many_images_are_decoded(page):
    words = ["data=samples", "device=cpu", "data.batch_size=16"]
    _, text = page(*words, "images=10", checks=(data.data, data.images))
    assert "\nOK    images      10 of 7,000 decoded\n" in text


def test_a_check_that_fails_itself_is_a_red_line_and_the_others_go_on(page):
    def odd(case):
        yield Finding(OK, "so far")
        raise ZeroDivisionError("by hand\nsecond line")

    code, text = page("device=cpu", checks=(odd, machine.cpus))
    assert code == 1
    assert "OK    odd         so far\nFAIL  odd         ZeroDivisionError: by hand → nobody foresaw this" in text
    assert re.search(r"\n(OK  |WARN)  cpus", text)


def test_an_old_python_or_a_missing_package_is_told_before_anything_else_is_tried(monkeypatch, page, tmp_path):
    monkeypatch.setattr(software, "PYTHON", (9, 0))
    code, text = page("optim.lrr=1")
    assert (code, text.splitlines()[2][:20]) == (1, "FAIL  python      3.")
    assert text.splitlines()[3:] == ["", "No, because of 1 FAIL."]
    monkeypatch.setattr(software, "PYTHON", (3, 11))
    monkeypatch.setattr(software, "REQUIREMENTS", tmp_path / "requirements.txt")
    (tmp_path / "requirements.txt").write_text("no-such-thing>=1  # why\n# words\nnumpy>=1\n")
    code, text = page("optim.lrr=1")
    assert code == 1
    assert "FAIL  packages    not installed: no-such-thing → pip install" in text
    assert "config" not in text
    (tmp_path / "requirements.txt").write_text("numpy<1\nwandb<0\n")
    (found,) = software.packages()
    assert (found.status, found.what.count("is wanted")) == (WARN, 2)


def test_a_fresh_python_that_does_not_answer_is_ended():
    assert fresh_python("import time; time.sleep(60)", 0.3, dict(os.environ)) == "no answer within 0 seconds"
    assert fresh_python("raise KeyError('x')", 20, dict(os.environ)) == "KeyError: 'x'"
    assert fresh_python("pass", 20, dict(os.environ)) is None


# The software


def test_another_package_named_apex_is_yellow_and_red_where_apex_is_asked_for(page, tmp_path, monkeypatch):
    path = package(tmp_path / "packages", "apex", "0.9.10", "raise SystemError('not to be imported')")
    monkeypatch.syspath_prepend(path)
    code, text = page("device=cpu", checks=(software.apex,))
    assert code == 0
    assert "\nWARN  apex        the apex 0.9.10 here has no apex.amp: it is another package" in text
    assert "→ pip uninstall apex\n" in text
    code, text = page("device=cpu", "amp=apex", checks=(software.apex,))
    assert code == 1
    assert "\nFAIL  apex        the apex 0.9.10 here has no apex.amp" in text
    assert "→ pip uninstall apex; amp=o2 does the same without it\n" in text


def test_apex_is_red_where_it_is_asked_for_and_missing_and_fine_where_it_is_there(tmp_path, monkeypatch):
    (found,) = software.apex(case("amp=apex"))
    assert (found.status, "amp=o2 does the same" in found.way_out) == (FAIL, True)
    assert not list(software.apex(case()))
    (package(tmp_path, "apex", "0.1") / "apex" / "amp").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert [found.status for found in software.apex(case())] == [OK]


def test_a_torchvision_of_another_torch_is_yellow_and_red_where_randaugment_needs_it(page, tmp_path, monkeypatch):
    code = "raise RuntimeError('operator torchvision::nms does not exist')"
    monkeypatch.syspath_prepend(package(tmp_path / "packages", "torchvision", "0.1", code))
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    code, text = page("device=cpu", checks=(software.torchvision,))
    assert code == 0
    assert "\nWARN  torchvision 0.1: operator torchvision::nms does not exist → pip install -r requirements.txt" in text
    assert "\nWARN  packages    torchvision>=" in text
    code, text = page("device=cpu", "data.augment.randaugment=2", checks=(software.torchvision,))
    assert code == 1
    assert "\nFAIL  torchvision 0.1: operator torchvision::nms does not exist" in text


def test_a_cuda_build_beside_torch_npu_is_yellow(monkeypatch):
    monkeypatch.setattr("torch.version.cuda", "12.6")
    monkeypatch.setattr(software, "installed", {"torch_npu": "2.12.0"}.get)
    (found,) = software.torch(case())
    assert (found.status, "a CUDA build" in found.what) == (WARN, True)
    monkeypatch.setattr("torch.version.cuda", None)
    (found,) = software.torch(case())
    assert (found.status, found.what[-9:]) == (OK, "CPU build")


@pytest.mark.parametrize(("asked", "cuda", "status"), [("npu_1p", 0, FAIL), ("auto", 0, FAIL), ("auto", 1, WARN)])
def test_a_cuda_build_beside_torch_npu_is_red_where_npus_would_be_used(page, monkeypatch, asked, cuda, status):
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setitem(sys.modules, "torch_npu", SimpleNamespace(__spec__=ModuleSpec("torch_npu", None)))
    monkeypatch.setattr(machine, "installed", {"torch_npu": "2.14.0"}.get)
    monkeypatch.setattr("torch.cuda.is_available", lambda: bool(cuda))
    monkeypatch.setattr("torch.cuda.device_count", lambda: cuda)
    monkeypatch.setattr(machine, "cards", lambda chosen: [])
    code, text = page(f"device={asked}", checks=(machine.device,))
    assert code == (1 if status == FAIL else 0)
    assert f"\n{status}  device      torch {torch.__version__} is a CUDA build, beside which torch_npu aborts;" in text
    assert "needs the CPU build of torch → pip install -r requirements-npu.txt" in text
    assert ("To run without a card: device=cpu" in text) == (status == FAIL)


def test_a_shell_that_loads_no_backends_with_torch_is_not_told_of_them(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(mismatched(tmp_path))
    monkeypatch.setattr(software, "fresh_python", lambda *arguments: None)
    monkeypatch.setattr(software, "started_with", {}.get)
    (found,) = software.autoload(case())
    assert (found.status, found.what[-9:]) == (OK, "torch_npu")
    monkeypatch.setattr(software, "started_with", {"TORCH_DEVICE_BACKEND_AUTOLOAD=0": True}.get)
    assert not list(software.autoload(case()))


def test_what_the_shell_had_is_told_from_what_the_package_set():
    code = "import os; os.environ['LATER'] = '1'; from ghostnet.tools.doctor.software import started_with; "
    code += "print([started_with(setting) for setting in ('EARLIER=1', 'EARLIER=0', 'LATER=1')])"
    assert fresh("-c", code, EARLIER="1") == (0, "[True, False, False]\n")


def test_cann_is_found_and_judged_by_the_one_pair_that_is_known(tmp_path, monkeypatch):
    versions = {"torch_npu": "2.12.0.post3"}
    monkeypatch.setattr(software, "installed", versions.get)
    monkeypatch.setattr(software, "CANN_HOMES", ())
    (found,) = software.cann(case())
    assert (found.status, found.what[:10]) == (WARN, "none found")
    for place in ("cann", "ascend-toolkit"):
        assert f"/usr/local/Ascend/{place}/set_env.sh" in found.way_out
    about = tmp_path / "x86_64-linux" / "ascend_toolkit_install.info"
    about.parent.mkdir()
    about.write_text("package_name=Ascend-cann-toolkit\nversion=9.1.0\ninnerversion=V100R001\n")
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", str(tmp_path))
    monkeypatch.setenv("LD_LIBRARY_PATH", "/usr/lib")
    _, sourced = software.cann(case())
    assert sourced.way_out == f"source {software.SET_ENV}"
    (tmp_path / "set_env.sh").touch()
    together, sourced = software.cann(case())
    assert together == Finding(OK, "torch_npu 2.12.0.post3, CANN 9.1.0: they go together")
    assert (sourced.status, sourced.way_out) == (WARN, f"source {tmp_path}/set_env.sh")
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/usr/lib:{tmp_path}/lib64")
    assert len(list(software.cann(case()))) == 2
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    assert len(list(software.cann(case()))) == 1
    about.unlink()
    (tmp_path / "version.cfg").write_text("# version: 1.0\nruntime_running_version=[7.0.0.5.242:8.0.RC3]\n")
    (found,) = software.cann(case())
    assert (found.status, found.way_out) == (WARN, "install CANN 9.1")
    assert "CANN 8.0.RC3" in found.what
    versions["torch_npu"] = "2.14.0"
    (found,) = software.cann(case())
    assert (found.status, "can't be judged" in found.what) == (OK, True)


# The machine


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_processes_on_the_cpu_will_do(count):
    (found,) = machine.device(case("device=cpu", f"device.count={count}"))
    assert found.status == OK
    assert found.what.startswith(f"{count} processes on ") == (count > 1)


def test_what_the_cpu_can_not_do_is_red(page):
    code, text = page("device=cpu_2p", "sync_bn=true", checks=(machine.device,))
    assert code == 1
    assert "\nOK    device      2 processes on " in text
    assert "\nFAIL  device      sync_bn=true: torch's SyncBatchNorm needs cards." in text


@pytest.mark.parametrize(("asked", "status"), [("npu_1p", FAIL), ("auto", WARN)])
def test_why_no_npu_can_be_used_is_red_where_npus_are_asked_for_else_yellow(page, monkeypatch, asked, status):
    monkeypatch.setattr("ghostnet.device.npu_fault", lambda: "torch_npu goes with another torch: install that.")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(machine, "installed", {"torch_npu": "2.0.0"}.get)
    code, text = page(f"device={asked}", checks=(machine.device,))
    assert code == (1 if status == FAIL else 0)
    assert f"\n{status}  device      torch_npu goes with another torch → install that." in text
    assert ("To run without a card: device=cpu" in text) == (asked == "npu_1p")
    assert bool(re.search(r"\nOK    device      .* \(auto: no card can be used\)\n", text)) == (asked == "auto")


@pytest.mark.parametrize("visible", ["1,0", "0, 1", "0,0,1"])
def test_visible_npus_that_do_not_ascend_are_red_where_npus_are_asked_for(monkeypatch, visible):
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", visible)
    for device, status in (("npu_8p", FAIL), ("cpu", WARN)):
        (found,) = machine.environment(case(f"device={device}"))
        assert (found.status, found.way_out) == (status, "export ASCEND_RT_VISIBLE_DEVICES=0,1")
        assert repr(visible) in found.what
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0,1")
    assert [found.status for found in machine.environment(case("device=npu_8p"))] == [OK]


def test_visible_npus_that_do_not_ascend_decide_the_exit_code(page, monkeypatch):
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "3,1")
    code, text = page("device=cpu", checks=(machine.environment,))
    assert (code, "\nWARN  environment ASCEND_RT_VISIBLE_DEVICES='3,1' must be" in text) == (0, True)
    code, text = page("device=npu_1p", checks=(machine.environment,))
    assert (code, "\nFAIL  environment ASCEND_RT_VISIBLE_DEVICES='3,1' must be" in text) == (1, True)
    assert "→ export ASCEND_RT_VISIBLE_DEVICES=1,3" in text


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("HCCL_EXEC_TIMEOUT", "1868", "must be below HCCL_EVENT_TIMEOUT, 1868"),
        ("HCCL_EVENT_TIMEOUT", "1000", "HCCL_EXEC_TIMEOUT=1800 must be below HCCL_EVENT_TIMEOUT, 1000"),
        ("HCCL_CONNECT_TIMEOUT", "60", "must be within 120 to 7200 seconds"),
        ("HCCL_CONNECT_TIMEOUT", "1h", "is no whole number of seconds"),
        ("HCCL_WHITELIST_DISABLE", "0", "refuses ranks that no list names"),
        ("ASCEND_LAUNCH_BLOCKING", "1", "waits for every kernel"),
    ],
)
def test_settings_of_hccl_that_will_not_do_are_yellow(monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    (found,) = machine.environment(case("device=npu_8p"))
    assert found.status == WARN
    assert words in found.what
    assert found.way_out.startswith("unset ")


def test_ranks_that_can_not_meet_are_red_and_hccl_ports_in_use_yellow(monkeypatch):
    assert not list(machine.ports(case("device=npu_1p")))
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("HCCL_IF_BASE_PORT", str(port))
        meet, *_, taken = machine.ports(case("device=npu_8p"))
    assert meet.status == OK
    assert (taken.status, str(port) in taken.what.partition("in use:")[2]) == (WARN, True)

    def refused(*words, **settings):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(socket, "create_server", refused)
    found = next(machine.ports(case("device=cpu_2p")))
    assert (found.status, "Operation not permitted" in found.what) == (FAIL, True)


def test_a_container_that_gets_less_than_the_cpus_it_sees_is_told_how_many_threads(monkeypatch):
    monkeypatch.setattr("ghostnet.device.cpu_count", lambda: 16)
    monkeypatch.setattr(machine, "cgroup", {"cpu.max": ["400000", "100000"]}.get)
    (found,) = machine.cpus(case("device=cpu_2p"))
    assert (found.status, found.way_out[:37]) == (WARN, "data.workers=2 and OMP_NUM_THREADS=2,")
    monkeypatch.setattr(machine, "cgroup", {"cpu.max": ["max", "100000"]}.get)
    assert [(f.status, f.what[-8:]) for f in machine.cpus(case("device=cpu_2p"))] == [(OK, "8 a rank")]
    monkeypatch.setattr("ghostnet.device.cpu_count", lambda: 1)
    assert [found.status for found in machine.cpus(case("device=cpu_2p"))] == [WARN]


def test_memory_that_the_loaders_batches_would_fill_is_yellow(monkeypatch):
    (found,) = machine.memory(case("device=cpu", "data.batch_size=1000000", "data.eval_batch_size=1000000"))
    assert (found.status, "a smaller data.batch_size" in found.way_out) == (WARN, True)
    assert [found.status for found in machine.memory(case("data=samples"))] == [OK]
    monkeypatch.setattr(machine, "cgroup", {"memory.max": ["2000"], "memory.current": ["1000"]}.get)
    assert [found.status for found in machine.memory(case("data=samples"))] == [WARN]


# The data


def test_a_missing_data_root_is_red_with_what_was_looked_for(page):
    code, text = page("data.root=/nowhere", "device=cpu", checks=(data.data, data.images, data.loader))
    assert code == 1
    assert "\nFAIL  data        data.root=/nowhere does not exist. Looked for /nowhere/train/<class>/*" in text
    assert "images  " not in text
    assert "loader  " not in text


def test_without_a_data_root_the_data_are_yellow_and_unchecked(page):
    code, text = page("device=cpu", checks=(data.data, data.images, data.loader))
    assert code == 0
    assert "\nWARN  data        data.root is not given: data and loader were not checked → data.root=/data" in text
    assert "images  " not in text
    assert "loader  " not in text
    assert "\nYes" not in text
    assert "\nOnce data.root is given" in text


def test_images_all_finds_what_a_sample_misses(image_folder, tmp_path):
    root = shutil.copytree(image_folder, tmp_path / "data")
    broken = root / "val" / "class3" / "005.JPEG"
    broken.write_bytes(b"")
    patient = case(f"data.root={root}", "device=cpu", "data.batch_size=16")
    assert [finding.status for finding in data.data(patient)] == [OK]
    patient.images = 10
    assert [(f.status, f.what) for f in data.images(patient)] == [(OK, "10 of 88 decoded")]
    patient.images = None
    (found,) = data.images(patient)
    assert found.status == FAIL
    assert f"all 88 looked at, 1 can't be read:\n{broken} is empty." in found.what


def test_the_images_that_are_looked_at_lie_evenly_over_both_splits(monkeypatch):
    seen = []
    monkeypatch.setattr(data, "unreadable", lambda split, index: seen.append((len(split), index)))
    patient = case("data=samples", "device=cpu")
    patient.images = 8
    list(data.data(patient))
    list(data.images(patient))
    assert sorted(seen) == [(1000, 250 * i) for i in range(4)] + [(6000, 1500 * i) for i in range(4)]


def test_more_than_one_broken_image_are_counted_and_five_named(monkeypatch):
    monkeypatch.setattr(data, "unreadable", lambda split, index: f"{len(split)}-{index} broken")
    patient = case("data=samples", "device=cpu")
    list(data.data(patient))
    (found,) = data.images(patient)
    assert found.what.splitlines()[0] == "200 of 7,000 looked at, 200 can't be read:"
    assert found.what.splitlines()[1:] == [f"6000-{60 * i} broken" for i in range(5)] + ["… and 195 more"]


def test_classes_that_differ_and_too_few_images_are_red(image_folder, tmp_path, page):
    code, text = page(f"data.root={image_folder}", "device=cpu_2p", "data.batch_size=33", checks=(data.data,))
    assert code == 1
    assert "FAIL  data        data.batch_size=33 on 2 device(s) is more than the 64" in text
    code, text = page(f"data.root={image_folder}", "device=cpu_2p", "data.batch_size=32", checks=(data.data,))
    assert (code, "\nOK    data        64 train + 24 val images of 4 classes" in text) == (0, True)
    root = shutil.copytree(image_folder, tmp_path / "data")
    (root / "val" / "class3").rename(root / "val" / "other")
    code, text = page(f"data.root={root}", "device=cpu", "data.batch_size=16", checks=(data.data,))
    assert code == 1
    assert "1 only in train (class3); 1 only in val (other)" in text


def test_a_model_with_fewer_outputs_than_classes_is_red(page):
    code, text = page("data=samples", "device=cpu", "model.num_classes=9", checks=(data.data,))
    assert code == 1
    assert "\nFAIL  data        model.num_classes=9, but the data have 10 classes.\n" in text


@pytest.mark.parametrize(
    ("words", "speed", "status"),
    [
        (["device=npu_1p"], 1378.0, WARN),
        (["device=npu_1p"], 1379.0, OK),
        (["device=npu_8p"], 1194.0, WARN),
        (["device=npu_8p"], 1195.0, OK),
        (["device=cpu"], 1.0, OK),
    ],
)
def test_a_loader_slower_than_the_reference_cards_is_yellow(monkeypatch, words, speed, status):
    monkeypatch.setattr("ghostnet.device.cpus", lambda: set(range(32)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: None)
    monkeypatch.setattr(data, "measured", lambda case, threads: speed)
    patient = case(*words)
    patient.train = object()
    assert [found.status for found in data.loader(patient)] == [status]


def test_the_loader_is_measured_on_the_cpus_of_one_rank_and_they_are_given_back(monkeypatch):
    before, seen = os.sched_getaffinity(0), []

    def measured(case, threads):
        seen.append((os.sched_getaffinity(0), threads))
        return 10.0

    monkeypatch.setattr(data, "measured", measured)
    patient = case("data=samples", "device=cpu", f"device.count={len(before)}")
    patient.train = object()
    (found,) = data.loader(patient)
    assert seen == [({min(before)}, 1)]
    assert os.sched_getaffinity(0) == before
    if len(before) > 1:
        assert f"a rank's share; {10 * len(before)} by {len(before)} ranks" in found.what


# The run


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("free", "code", "line"),
    [
        (40 << 20, 1, "FAIL  run folder  0.04 GiB free in "),
        (500 << 20, 0, "WARN  run folder  0.49 GiB free in "),
        (5 << 30, 0, "OK    run folder  5.00 GiB free in "),
    ],
)
def test_a_disk_that_two_checkpoints_would_fill_is_red_and_a_nearly_full_one_yellow(
    monkeypatch, page, free, code, line
):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(1 << 40, (1 << 40) - free, free))
    got, text = page("data=samples", "device=cpu", checks=(run.recipe, run.run_folder))
    assert got == code
    assert f"\n{line}" in text
    assert ("→ free some space, or another folder with hydra.run.dir=…" in text) == (free < 1 << 30)


def test_a_run_folder_that_can_not_be_used_is_red(tmp_path, page):
    (tmp_path / "file").touch()
    (tmp_path / "last.pt").touch()
    for words, line in (
        ([f"hydra.run.dir={tmp_path}/file/run"], "can't be written"),
        ([f"hydra.run.dir={tmp_path}"], "holds a run already"),
        (["resume=/nowhere.pt"], "/nowhere.pt does not exist"),
        (["baseline=/nowhere"], "is no result.json of a finished run"),
    ):
        code, text = page(*words, "device=cpu", checks=(run.run_folder,))
        assert code == 1
        assert "\nFAIL  run folder  " in text
        assert line in text


def test_to_go_on_without_a_folder_is_red_in_the_words_of_train_py(tmp_path, page):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.pt").touch()
    (tmp_path / "run" / "last.pt").touch()
    for word, told in (
        ("resume=auto", "resume=auto goes on in a folder: give it, hydra.run.dir=…"),
        (f"resume={tmp_path}/run/best.pt", "going on from there would overwrite the later"),
        ("hydra.run.dir=", "hydra.run.dir is empty: give a folder."),
    ):
        code, text = page(word, "device=cpu", checks=(run.run_folder,))
        assert code == 1
        assert "\nFAIL  run folder  " in text
        assert told in " ".join(text.split())
    for given in ("hydra.run.dir=", "++hydra.run.dir="):
        code, text = page("resume=auto", f"{given}{tmp_path}/new", "device=cpu", checks=(run.run_folder,))
        assert (code, "\nOK    run folder  " in text) == (0, True), given


def test_weights_and_optimizers_that_can_not_be_had_are_red(page):
    code, text = page("model.weights=/nowhere.pth", "device=cpu", checks=(run.recipe,))
    assert (code, "FAIL  recipe      /nowhere.pth" in text) == (1, True)
    code, text = page("optim.momentum=0", "optim.nesterov=true", "device=cpu", checks=(run.recipe,))
    assert (code, "FAIL  recipe      fused_sgd: Nesterov" in text) == (1, True)


def test_wandb_without_a_login_is_yellow_and_with_a_key_green(page, monkeypatch):
    code, text = page("logger=wandb", "device=cpu", checks=(run.wandb,))
    assert code == 0
    assert "\nWARN  wandb       no login: it will record offline → wandb login, or export WANDB_API_KEY" in text
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    code, text = page("logger=wandb", "device=cpu", checks=(run.wandb,))
    assert (code, "\nOK    wandb       a login is there" in text) == (0, True)
    monkeypatch.setenv("WANDB_MODE", "offline")
    code, text = page("logger=wandb", "device=cpu", checks=(run.wandb,))
    assert (code, "\nOK    wandb       records offline, as asked" in text) == (0, True)
