"""Who started this process as one of several ranks: torchrun, srun, mpirun, a PyTorchJob; told by the environment."""

import os
import subprocess
from pathlib import Path

from ghostnet.errors import UserError

MPI = {
    "mpirun": tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
"""By starter (Open MPI; MPICH and Intel MPI), the variables in which they tell what RANKS does."""
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""torchrun's own."""
PORT = "29500"
"""Where ranks meet if nobody says so, as under torchrun."""


def started_by() -> tuple[str, str]:
    """Find out who started this process as one of several ranks, and set torchrun's variables as torchrun would.

    Returns torchrun, srun, mpirun, mpiexec or '' (nobody: it trains alone), and a note for the user where what the
    environment says is not plain, else ''. Raises UserError where the variables contradict themselves.
    """
    env = os.environ
    if set(RANKS[:3]) <= set(env):
        return "torchrun", ""
    # Only srun sets it; a batch script that starts one process has the job's SLURM_NTASKS too.
    if (tasks := _count("SLURM_STEP_NUM_TASKS")) > 1:
        if "SLURM_PTY_PORT" in env and not _is_child_of_slurm():
            return "", (
                f"this is a shell of srun --pty: its {tasks} tasks (SLURM_STEP_NUM_TASKS) are not taken for ranks, and "
                "this process trains alone. For all tasks: `srun python train.py …` outside of it, or "
                "`unset SLURM_PTY_PORT` in each; for several devices of this machine: device.count=…"
            )
        _take_from_slurm()
        return "srun", ""
    for starter, names in MPI.items():
        if (size := _count(names[1])) > 1:
            return _take_from_mpi(starter, names, size)
    if {"RANK", "MASTER_ADDR"} <= set(env) and (size := _count("WORLD_SIZE")) > 1:
        return _take_from_cluster(size)
    return "", ""


def number(name: str) -> int:
    """A whole number of the environment; UserError where it is none."""
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        raise UserError(f"the environment's {name}={os.environ.get(name, '')} is no number: set or unset it.") from None


def _count(name: str) -> int:
    return number(name) if os.environ.get(name) else 1


def _is_child_of_slurm() -> bool:
    """Whether this is the command of srun itself, not one typed into a shell that srun started."""
    try:
        return Path(f"/proc/{os.getppid()}/comm").read_text(encoding="utf-8").startswith("slurmstepd")
    except OSError:
        return False


def _take_from_slurm() -> None:
    env = os.environ
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
    env["LOCAL_RANK"] = env["SLURM_LOCALID"]
    # '4(x2),3': four tasks on each of two machines, three on the third.
    counts: list[int] = []
    for part in env["SLURM_STEP_TASKS_PER_NODE"].split(","):
        tasks, _, times = part.rstrip(")").partition("(x")
        counts += [int(tasks)] * int(times or 1)
    env["LOCAL_WORLD_SIZE"] = str(counts[int(env.get("SLURM_NODEID", "0"))])
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = _first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "")))
    # Two steps of one job, or two jobs on one machine, must not meet.
    job, step = int(env.get("SLURM_JOB_ID", "0")), int(env.get("SLURM_STEP_ID", "0"))
    env.setdefault("MASTER_PORT", str(20000 + (job * 64 + step % 64) % 40000))


def _first_host(nodes: str) -> str:
    if nodes and not set(nodes) & set("[,"):
        return nodes
    try:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, encoding="utf-8", check=True, timeout=60
        )
        return listed.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        raise UserError(
            f"srun: the first host of {nodes!r} can't be told without scontrol. Set MASTER_ADDR to the host of rank 0."
        ) from None


def _take_from_mpi(starter: str, names: tuple[str, ...], size: int) -> tuple[str, str]:
    env, way_out = os.environ, f"To train alone: `env -u {names[1]} python train.py …`."
    if missing := [name for name in names if name not in env]:
        return "", (
            f"{names[1]}={size}, but {', '.join(missing)} is not set: MPI's variables are not taken for ranks, and "
            f"this process trains alone. Start the ranks by torchrun, or set {missing[0]}."
        )
    if "MASTER_ADDR" not in env:
        if number(names[3]) < size:
            raise UserError(
                f"{starter} started {size} ranks ({names[1]}) on several machines: set MASTER_ADDR to the host of rank "
                f"0 for all of them. {way_out}"
            )
        env["MASTER_ADDR"] = "127.0.0.1"
    env.setdefault("MASTER_PORT", PORT)
    env.update(zip(RANKS, (env[name] for name in names), strict=True))
    return starter, (
        f"one of the {size} ranks that {starter} started ({names[1]}); they meet at {place()} "
        f"(MASTER_ADDR, MASTER_PORT). {way_out}"
    )


def _take_from_cluster(size: int) -> tuple[str, str]:
    """RANK and WORLD_SIZE without LOCAL_RANK, as Kubeflow's PyTorchJob sets them for each of its pods."""
    env, each = os.environ, os.environ.get("PET_NPROC_PER_NODE", "1")
    if each not in ("1", "auto"):
        return "", (
            f"RANK={env['RANK']} WORLD_SIZE={size} PET_NPROC_PER_NODE={each} are of a PyTorchJob, for torchrun, which "
            "starts its ranks by them: `torchrun train.py …`. They are not taken here: this process trains alone."
        )
    env.setdefault("MASTER_PORT", PORT)
    env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"] = "0", "1"
    return "torchrun", (
        f"rank {number('RANK')} of {size}, alone on its machine (RANK and WORLD_SIZE are set, LOCAL_RANK is not, as in "
        f"a PyTorchJob); they meet at {place()}. To train alone: `env -u WORLD_SIZE python train.py …`."
    )


def place() -> str:
    """Return where the ranks meet, as host:port."""
    return f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
