"""Operations that a training step launches on a card: run as `python -m tests.launches [OVERRIDES OF train.py]`.

    python -m tests.launches amp=none
    python -m tests.launches amp=fp16 optim=adamw --first-generation

train.py runs for a few steps on the stand-in for torch_npu, and the table is of its last step: what the loop does
between two steps included, so a step with neither a log nor an evaluation nor a checkpoint. The numbers depend
neither on the images' size nor on the batch's. Counted is what gives the card work: kernels, copies and fills, not
views, nor memory that is allocated, nor `detach`.
"""

import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
STEPS = 5
BATCH = 2
WORDS = [
    "data=synthetic",
    "device=npu_1p",
    f"data.batch_size={BATCH}",
    "data.image_size=64",
    "epochs=1",
    "schedule.warmup_epochs=0",
]
WORDS += [f"data.dataset.num_train={BATCH * STEPS}", "data.dataset.num_val=2", "log_every=1000", "data.workers=1"]


def launches(*words: str, **environment: str) -> "Counter[str]":
    """Operations of one step by name, in a subprocess; the overrides of train.py, and environment variables."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join([str(ROOT / "tests" / "emulated_npu"), str(ROOT)])
        env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment
        command = [sys.executable, "-m", "tests.launches", "--count", folder, *WORDS, *words]
        subprocess.run([*command, f"hydra.run.dir={folder}/run"], cwd=ROOT, env=env, check=True, stdout=sys.stderr)
        return Counter(json.loads(Path(folder, "launches.json").read_text()))


def count(folder: str, words: list[str]) -> None:
    """Run train.py in this process, and write what its last step launched to folder/launches.json."""
    from ghostnet import engine

    train, seen = engine.train, []

    def counted(*args: Any, **kwargs: Any) -> Iterator[int]:
        for step in train(*args, **kwargs):
            from torch_npu import counters

            seen.append(Counter(counters.snapshot()["ops"]))
            yield step

    engine.train = counted
    sys.argv = ["train.py", *words]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    Path(folder, "launches.json").write_text(json.dumps(seen[-1] - seen[-2]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--count"]:
        count(sys.argv[2], sys.argv[3:])
    else:
        table = launches(*sys.argv[1:])
        for name, number in table.most_common():
            print(f"{number:6}  {name}")
        print(f"{table.total():6}  in all")
