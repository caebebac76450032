"""The reference's commands become ours, by the door's own check; what became of each flag is told."""

import re
import shlex
import subprocess
import sys

import pytest

from ghostnet.config import flat
from ghostnet.door.overrides import check_command
from ghostnet.errors import ConfigError
from ghostnet.tools.translate.command import ITSELF, NONE, NOTE, NOTHING, VERSION, WARNING, translate
from ghostnet.tools.translate.flags import FLAGS, RECIPE, SCRIPTS, VERSIONS
from ghostnet.tools.translate.inverse import reference
from ghostnet.tools.translate.shell import parse
from tests.conftest import REPOSITORY, environment

LISTED = [
    "--amp",
    "--data_path",
    "--model",
    "--momentum",
    "--workers",
    "--j",
    "--lr",
    "--weight-decay",
    "--sched",
    "--epochs",
    "-b",
    "--warmup-lr",
    "--warmup-epochs",
    "--cooldown-epochs",
    "--min-lr",
    "--drop",
    "--npu",
    "--num-classes",
    "--clip-grad",
    "--smoothing",
    "--width",
    "--seed",
    "--opt",
    "--resume",
    "--pretrained",
    "--mixup",
    "--cutmix",
    "--color-jitter",
    "--scale",
    "--ratio",
    "--hflip",
    "--vflip",
    "--reprob",
    "--sync-bn",
    "--dist-bn",
    "--channels-last",
    "--tta",
    "--log-interval",
    "--recovery-interval",
    "--checkpoint-hist",
    "--eval-metric",
    "--world_size",
]
"""The parameters that the reference documents."""
EXAMPLES = {
    "--scale": "0.2 0.9", "--ratio": "0.5 2", "--mean": "0.5 0.4 0.3", "--std": "0.2 0.2 0.2", "--sched": "cosine",
    "--opt": "adamw", "--opt-betas": "0.8 0.9", "--dist-bn": "broadcast", "--interpolation": "bilinear",
    "--train-interpolation": "bicubic", "--input-size": "3 192 192", "--resume": "a.pt", "--output": "runs/a",
    "--width": "0.7", "--checkpoint": "w.pth", "--mixup-mode": "elem", "--drop": "0.3", "--epochs": "90",
    "--hflip": "0.25", "--world_size": "2", "--img-size": "192", "--decay-epochs": "5", "--mixup-switch-prob": "0.3",
}  # fmt: skip


def call(*words):
    return subprocess.run(
        [sys.executable, "-m", "ghostnet.tools.translate", *words],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )


def command(text):
    return translate(parse(text))


def config(words):
    return check_command("train", words, multirun=False).jobs[0]


def about(text, heading):
    return [(flag, why) for kind, flag, why in command(text).remarks if kind == heading]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_its_experiment(script):
    done = call(f"bash ./test/{script} --data_path=/data/x")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == f"python train.py experiment={SCRIPTS[script][2]} data.root=/data/x"
    assert config(shlex.split(done.stdout.splitlines()[0])[2:])["data"]["root"] == "/data/x"


def test_the_evaluation_script_is_evaluate():
    done = call("bash", "test/train_eval_1p.sh", "--data_path=/data/x", "--checkpoint=a b.pth.tar")
    line = done.stdout.splitlines()[0]
    assert line == "python evaluate.py 'ckpt='\"'\"'a b.pth.tar'\"'\"'' data.root=/data/x"
    assert check_command("evaluate", shlex.split(line)[2:], multirun=False).jobs[0]["ckpt"] == "a b.pth.tar"


OWN = {"1.5": (10, 128.0), "1.8": (2, "dynamic")}
"""Cool-down epochs and loss scale of the reference's versions."""


@pytest.mark.parametrize("version", OWN)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_has_the_values_of_the_version_that_is_asked_for(script, version):
    done = call(f"--version={version}", f"bash ./test/{script} --data_path=/data/x")
    assert (done.returncode, done.stderr) == (0, "")
    got = dict(flat(config(shlex.split(done.stdout.splitlines()[0])[2:])))
    cooldown, scale = OWN[version]
    expected = dict(flat(config([f"experiment={SCRIPTS[script][2]}", "data.root=/data/x"])))
    expected |= {"schedule.cooldown_epochs": 0 if "performance" in script else cooldown, "amp.loss_scale": scale}
    assert got == expected
    assert f"PyTorch {version}, as --version={version} says" in done.stdout
    assert {"1.5": "73.3796 % at 4,329 img/s", "1.8": "73.129 % at 9,559 img/s"}[version] in done.stdout


@pytest.mark.parametrize(
    ("text", "version", "why"),
    [
        # The interpreter's name tells nothing, beside the file that tells and without it.
        ("source ${test_path_dir}/env_npu.sh\nnohup python3.7 -u a.py /d --amp", "1.8", "told by env_npu.sh"),
        ("python3.7 -u train_ghostnet_1p.py /d --amp", "1.8", "assumed: nothing in the line tells it"),
        ("source test/env.sh; python3 a.py /d --amp", "1.5", "told by env.sh"),
        ("source ${test_path_dir}/env.sh; python a.py /d --amp", "1.5", "told by env.sh"),
        ("source test/env_npu.sh\nnohup python3 a.py /d --amp", "1.8", "told by env_npu.sh"),
        (
            "source test/env_npu.sh; source test/env.sh; python3.7 a.py /d --amp",
            "1.8",
            "assumed: env_npu.sh and env.sh are of different",
        ),
        ("python a.py /d --amp", "1.8", "assumed: nothing in the line tells it; --version=1.5 takes the other"),
        ("python3 a.py /d --amp --version=1.5", "1.5", "as --version=1.5 says"),
        ("--version=1.8 source test/env.sh; python3.7 a.py /d --amp", "1.8", "as --version=1.8 says"),
    ],
)
def test_the_version_is_told_with_the_word_that_tells_it_and_its_values_are_taken(text, version, why):
    assert f"PyTorch {version}, {why}" in about(text, VERSION)[0][1]
    values = dict(flat(config(command(text).words)))
    assert (values["schedule.cooldown_epochs"], values["amp.loss_scale"]) == OWN[version]


def test_a_cool_down_that_is_given_holds_in_either_version():
    for version, (_, scale) in OWN.items():
        values = dict(flat(config(command(f"python a.py /d --amp --cooldown-epochs 5 --version={version}").words)))
        assert (values["schedule.cooldown_epochs"], values["amp.loss_scale"]) == (5, scale)


def test_both_versions_evaluate_alike():
    text = "source test/env.sh; python3 validate_ghostnet.py /d --checkpoint a --amp"
    assert about(text, VERSION) == [("", "both evaluate alike")]
    assert command(f"{text} --version=1.5").words == command(text).words


@pytest.mark.parametrize("word", ["--version=2", "--version=", "--version"])
def test_another_version_is_refused(word):
    done = call("bash test/train_full_8p.sh --data_path=/d", word)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {word}: the reference has --version=1.5 and --version=1.8.\n"


def test_two_versions_of_one_line_are_refused():
    done = call("--version=1.5 bash test/train_full_8p.sh --data_path=/d", "--version=1.8")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: --version=1.5 --version=1.8: of which version is the line? Give one.\n"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_line_that_a_script_runs_gives_the_config_of_its_experiment(script, version):
    cards, own, experiment = SCRIPTS[script]
    flags = RECIPE | own | {"--lr": 0.4 * cards, "--num-classes": 1000}
    words = [f"{name} {value}" if value is not True else name for name, value in flags.items()]
    loop = f"for i in $(seq 0 {cards - 1}); do taskset -c 0-9 " if cards > 1 else ""
    ranks = f"--world_size {cards} --local_rank $i & done" if cards > 1 else "--npu 0"
    run = f"nohup python3.7 -u train_ghostnet_{cards}p.py /data/x {' '.join(words)} -j 24 {ranks}"
    found = command(f"source test/{VERSIONS[version].environment}; {loop}{run}")
    got, wanted = (dict(flat(config(w))) for w in (found.words, [f"experiment={experiment}", "data.root=/data/x"]))
    differ = {key: (got[key], wanted[key]) for key in wanted if got[key] != wanted[key]}
    expected = {"model.num_classes": (1000, None), "data.workers": (24, None)}
    # Documented at the experiments: epochs of the README, one evaluation of a performance run, no cool-down of its own.
    expected |= {"epochs": (40, 10)} if script == "train_full_1p.sh" else {}
    expected |= {"eval_every": (1, 2)} if "performance" in script else {}
    if version == "1.5":
        expected |= {"amp.loss_scale": (128.0, "dynamic")}
        expected |= {"schedule.cooldown_epochs": (10, 2)} if "full" in script else {}
    assert differ == expected


def example(flag):
    value = "" if flag.kind == "switch" else EXAMPLES.get(flag.name, "0.5" if flag.kind == "float" else "5")
    return f"{flag.name} {value}".strip()


def test_every_documented_parameter_is_known():
    names = {name for flag in FLAGS for name in flag.names} | {"--data_path", "--device_id"}
    assert set(LISTED) <= names


def test_every_flag_passes_the_door_and_those_with_a_home_keep_their_values():
    groups = {"--sched step --opt npufusedsgd": ("--decay-",), "--opt adamw": ("--opt-",)}
    groups |= {"--sched cosine --world_size 2": ()}
    for line, own in groups.items():
        given = [
            flag
            for flag in FLAGS
            if flag.of != "evaluate"
            and flag.name not in ("--opt", "--sched", "--world_size", "--npu")
            and (flag.name.startswith(own) or not flag.name.startswith(("--decay-", "--opt-", "--interpolation")))
        ]
        found = command(f"python main.py /data {line} {' '.join(map(example, given))}")
        values = dict(flat(config(found.words)))
        assert not [text for kind, text, _ in found.remarks if kind == WARNING]
        for flag in given:
            if flag.key in values and flag.kind in ("int", "float") and flag.name != "--img-size":
                assert values[flag.key] == float(example(flag).split()[1]), flag.name
            told = [text for kind, text, _ in found.remarks if kind in (NOTHING, NONE, ITSELF)]
            assert flag.fate == "home" or example(flag) in told, flag.name


def test_every_flag_of_the_evaluation_passes_the_door_there():
    given = [flag for flag in FLAGS if flag.of in ("both", "evaluate") and flag.name != "--img-size"]
    found = command(f"python validate_ghostnet.py /data {' '.join(map(example, given))}")
    values = dict(flat(check_command("evaluate", found.words, multirun=False).jobs[0]))
    assert values["ckpt"] == "w.pth"
    assert (values["data.eval_batch_size"], values["model.num_classes"], values["data.image_size"]) == (5, 5, 192)
    assert (values["ema"], values["model.width"]) == (True, 0.7)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("-b 256 --lr 0.1", "optim.lr", 0.4),
        ("-b 512 --world_size 8 --lr 3.2", "optim.lr", 0.8),
        ("--amp", "amp._target_", "ghostnet.amp.O2"),
        ("--native-amp", "amp._target_", "ghostnet.amp.Fp16"),
        ("", "amp._target_", "ghostnet.amp.Amp"),
        ("--npu 3", "device.ids", [3]),
        ("--width 1.3", "model.width", 1.3),
        ("--opt npufusedsgd", "optim._target_", "ghostnet.optim.fused_sgd"),
        ("--opt sgd", "optim.nesterov", True),
        ("--recovery-interval 100", "save_every", 100),
        ("--pretrained", "model.freeze", True),
        ("--epoch 7", "epochs", 7),  # argparse takes what is cut short
        ("--epochs 7", "schedule.decay_rate", 1.0),
        ("--epochs 2", "schedule.warmup_epochs", 2),
        ("--opt sgd --momentum 0", "optim.nesterov", False),
        ("-b=64", "data.batch_size", 64),
        ("-vb 2 -b 64", "data.eval_batch_size", 128),
        ("", "epochs", 200),
        ("", "schedule.warmup_epochs", 3),
        ("", "clip_grad_norm", None),
    ],
)
def test_values_mean_the_same(text, key, value):
    assert dict(flat(config(command(f"python3.7 -u main.py /data {text}").words)))[key] == value


def test_what_did_nothing_there_is_told():
    text = "python main.py /data --drop-path 0.1 --drop-block 0.1 --bn-tf --bn-momentum 0.9 --bn-eps 1e-3 --recount 2"
    assert [flag for flag, _ in about(text, NOTHING)] == [
        *("--drop-path 0.1", "--drop-block 0.1", "--bn-tf", "--bn-momentum 0.9", "--bn-eps 1e-3", "--recount 2"),
    ]


def test_what_has_no_home_here_is_told_with_the_reason():
    found = dict(about("python main.py /data --tta 3 --checkpoint-hist 5 --eval-metric loss --opt radam", NONE))
    assert "no augmentation of evaluation images" in found["--tta 3"]
    assert "as many as keep says" in found["--checkpoint-hist 5"]
    assert found["--eval-metric loss"]
    assert "fused_sgd" in found["--opt radam"]


def test_scripts_read_four_flags_and_what_they_don_t_read_is_told():
    found = dict(about("bash test/train_full_8p.sh --data_path=/d --epochs=90 --world_size=4 --device_id=2", NOTHING))
    assert "here: epochs=90" in found["--epochs=90"]
    assert "device.count" in found["--world_size=4"]
    assert "log's folder" in found["--device_id=2"]
    assert command("bash test/train_full_1p.sh --data_path=/d --device_id=2").words[-1] == "device.ids=[2]"


def test_an_unknown_flag_is_warned_of_with_the_nearest():
    (flag, why), *_ = about("python main.py /data --dorp 0.1", WARNING)
    assert (flag, why) == ("--dorp", "no flag of its: left out. Did you mean --drop?")
    (flag, why), *_ = about("bash test/train_full_8p.sh --data_pth=/d --data_path=/d", WARNING)
    assert "Did you mean --data_path?" in why


def test_what_only_the_shell_knows_is_left_out_and_told():
    text = (
        'for((i=0;i<8;i++)); do python3.7 -u x_8p.py "$@" ${data_path} -j $(($(nproc)/8)) -b $B --local_rank $i & done'
    )
    found = command(text)
    assert "data.root=DATA_PATH" in found.words
    assert "device.count" not in " ".join(found.words)  # 8, as the experiment has
    assert not [word for word in found.words if "$" in word or "workers" in word]
    assert ("-b $B", "only the shell knows it: left out") in about(text, WARNING)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bash test/train_ful_8p.sh --data_path=/d", "Did you mean train_full_8p.sh?"),
        ("bash test/train_full_8p.sh", "--data_path=… is not given"),
        ("bash test/train_eval_1p.sh --data_path=/d", "--checkpoint=… is not given"),
        ("python main.py --amp", "the data path is not given"),
        ("python main.py /d --epochs many", "--epochs many: --epochs takes a whole number."),
        ("python main.py /d --drop 1.5", "model.dropout=1.5: must be a number in [0, 1)"),
        ("python main.py /d --input-size 3 224 192", "pictures here are square"),
        ("echo hello", "no program of the reference is in it"),
        ("bash 'x", "a quote is not closed"),
    ],
)
def test_what_can_t_be_translated_ends_in_one_message(text, message):
    done = call(text)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message in done.stderr


def test_it_starts_without_torch():
    code = "import sys; from ghostnet.tools.translate.__main__ import main; "
    code += "main(['bash test/train_full_8p.sh --data_path=/d']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True, timeout=60)


WAY_BACK = [
    ["experiment=full_8p"],
    ["experiment=full_8p", "schedule.cooldown_epochs=10", "amp.loss_scale=128"],
    ["experiment=full_1p", "schedule.cooldown_epochs=2", "amp.loss_scale=128", "epochs=40"],
    ["experiment=full_1p", "schedule.cooldown_epochs=10", "epochs=40"],
    ["experiment=performance_1p", "amp.loss_scale=128", "eval_every=1"],
    ["experiment=performance_1p", "device.ids=[2]"],
    ["experiment=full_8p", "epochs=90", "optim.lr=0.5", "model=ghostnet_130", "data.augment.hflip=0.1"],
    [
        "experiment=full_1p",
        "epochs=40",
        "optim=adamw",
        "data.mix.mixup=0.2",
        "schedule=step",
        "amp=none",
        "clip_grad_norm=null",
    ],
    ["device=npu_8p", "device.count=4", "data.batch_size=96", "data.image_size=192", "sync_bn=true", "seed=3"],
]


@pytest.mark.parametrize("words", WAY_BACK, ids=" ".join)
def test_our_command_as_the_reference_s_and_back_trains_the_same(words):
    cfg = config([*words, "data.root=/data/x"])
    text, unable = reference(cfg, classes=1000)
    assert unable == [] or all(
        "schedule.interval" in why or "eval_every" in why or "40 epochs" in why for why in unable
    )
    got, wanted = dict(flat(config(command(text).words))), dict(flat(cfg))
    differ = {key for key in wanted if got.get(key) != wanted[key]}
    assert differ <= {"model.num_classes", "data.workers", "device.batch_size"}


def test_what_the_reference_can_t_do_is_listed():
    cfg = config(["device=cuda_1p", "amp=bf16", "ema_decay=0.9", "accumulate=2", "data.root=/d", "compile=true"])
    _, unable = reference(cfg, classes=10)
    for word in ("device.kind=cuda", "amp=bf16", "ema_decay", "accumulate=2", "compile=true", "schedule.interval"):
        assert any(why.startswith(word) for why in unable), word
    assert reference(config(["data=samples"]), classes=10)[0] is None
    _, unable = reference(config(["device=npu_1p", "amp.loss_scale=64", "data.root=/d"]), classes=10)
    assert any(why.startswith("amp.loss_scale: its O2 has dynamic") and "128" in why for why in unable)


def test_the_reference_s_own_optimizer_is_named_and_the_way_back_knows_it():
    for text in ("bash test/train_full_8p.sh --data_path=/d", "python3 a.py /d --opt npufusedsgd"):
        assert "optim=npu_fused_sgd" in " ".join(why for _, why in about(text, NOTE))
    assert "optim=npu_fused_sgd" not in " ".join(why for _, why in about("python3 a.py /d --opt sgd", NOTE))
    text, unable = reference(config(["experiment=full_1p", "optim=npu_fused_sgd", "data.root=/d"]), classes=1000)
    assert "--opt npufusedsgd" in text
    assert not [why for why in unable if why.startswith("optim")]


def test_notes_name_what_differs_from_the_script():
    text = " ".join(why for _, why in about("bash test/train_full_1p.sh --data_path=/d", NOTE))
    assert "epochs=40" in text
    assert "schedule.interval=epoch" in text


def test_a_fault_of_the_door_names_our_key():
    with pytest.raises(ConfigError, match=re.escape("label_smoothing=1: must be")):
        command("python main.py /data --smoothing 1")
