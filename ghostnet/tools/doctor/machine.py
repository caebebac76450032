"""Checks of the machine: cards, what the shell tells CANN and HCCL, ports, CPUs, memory."""

from __future__ import annotations  # so that an old Python comes as far as being told so

import contextlib
import os
import re
import shutil
import socket
from pathlib import Path
from typing import Any

from ghostnet.tools.doctor.finding import (
    FAIL,
    GIB,
    OK,
    WARN,
    Case,
    Finding,
    Findings,
    fresh_python,
    installed,
    needed,
)

HCCL_PORTS = 32
"""From 60000 or HCCL_IF_BASE_PORT on, since CANN 8.5; 16 before."""


def device(case: Case) -> Findings:
    """The device that is asked for, its cards, what they can compute."""
    from torch import device

    from ghostnet.device import check_bf16, check_cards, check_compile, check_sync_bn, choose, describe, npu_fault
    from ghostnet.errors import UserError

    kind, count, ids = (case.cfg["device"][key] for key in ("kind", "count", "ids"))
    fault = npu_fault() if kind == "npu" or (kind == "auto" and installed("torch_npu")) else None
    try:
        case.kind, _ = choose(kind)
    except UserError:
        if not fault:
            raise
    if fault:
        what, _, way_out = fault.rpartition(": ")
        to_cpu = " To run without a card: device=cpu" * (not case.kind)
        yield Finding(needed(not case.kind), what, way_out + to_cpu)
    if not case.kind:
        return
    first = device(case.kind) if case.kind == "cpu" else device(case.kind, ids[0] if ids else 0)
    check_cards(case.kind, count, ids)
    if case.kind == "cpu":
        many = f"{count} processes on " if count > 1 else ""
        yield Finding(OK, f"{many}{describe(first)}{' (auto: no card can be used)' if kind == 'auto' else ''}")
    else:
        yield from cards([device(case.kind, index) for index in ids or range(count)])
        yield from hf32(case, first)
    if case.cfg["amp"]["_target_"].endswith(".Bf16"):
        check_bf16(first)
    if case.cfg["sync_bn"]:
        check_sync_bn(first)
    if backend := case.cfg["compile"]["backend"]:
        check_compile(first, backend)


def hf32(case: Case, card: Any) -> Findings:  # noqa: ANN401 (torch is not imported yet)
    """Say that an NPU's float32 convolutions are not of float32's precision, unless the config decides on that."""
    from ghostnet.device import saturates

    fp32 = case.cfg["amp"]["_target_"].endswith(".Amp")
    if case.kind == "npu" and fp32 and case.cfg["device"].get("allow_hf32") is None and not saturates(card):
        yield Finding(
            OK, "amp=none convolves in HF32, with 10-bit mantissas; device.allow_hf32=false: in whole float32"
        )


def cards(chosen: list[Any]) -> Findings:
    """Names, generation and free memory of torch devices."""
    from ghostnet import device

    kind, names = chosen[0].type, [device.describe(card) for card in chosen]
    for name, card in dict(zip(names, chosen, strict=True)).items():
        can = "bf16" if device.has_bf16(card) else "no bf16"
        old = ", first generation: an overflow saturates, SGD has no fused kernel" if device.saturates(card) else ""
        yield Finding(OK, f"{names.count(name)} × {name} ({device.cards(kind)} visible), {can}{old}")
    for card in chosen:
        free, total = device.free_memory(card)
        if free < total / 2:
            what = f"card {card.index}: {free / GIB:.1f} of {total / GIB:.1f} GiB are free, somebody else uses it"
            tool = "npu-smi info" if kind == "npu" else "nvidia-smi"
            yield Finding(WARN, what, f"see {tool}; wait after a killed run; other cards with device.ids=[…]")


def environment(case: Case) -> Findings:
    """What the shell tells CANN and HCCL; training sets what the shell doesn't."""
    from ghostnet.device import ENVIRONMENT

    env: dict[str, str] = {"HCCL_EVENT_TIMEOUT": "1868"} | ENVIRONMENT["npu"] | dict(os.environ)
    faults = []
    visible = env.get("ASCEND_RT_VISIBLE_DEVICES", "0")
    ids = [int(part) for part in visible.split(",")] if re.fullmatch(r"\d+(,\d+)*", visible) else [1, 0]
    if ids != sorted(set(ids)):
        right = ",".join(map(str, sorted({int(number) for number in re.findall(r"\d+", visible)})))
        what = f"ASCEND_RT_VISIBLE_DEVICES={visible!r} must be numbers that ascend, with commas and without spaces"
        yield Finding(needed(case.on_npu), what, f"export ASCEND_RT_VISIBLE_DEVICES={right}")
    timeouts = {key: env[f"HCCL_{key}_TIMEOUT"] for key in ("CONNECT", "EXEC", "EVENT")}
    seconds = {key: int(value) for key, value in timeouts.items() if value.isdecimal()}
    for key in timeouts.keys() - seconds.keys():
        faults.append((f"HCCL_{key}_TIMEOUT={timeouts[key]!r}", "is no whole number of seconds"))
    if seconds.get("EXEC", 0) >= (event := seconds.get("EVENT", 1868)):
        faults.append((f"HCCL_EXEC_TIMEOUT={seconds['EXEC']}", f"must be below HCCL_EVENT_TIMEOUT, {event}"))
    if not 120 <= seconds.get("CONNECT", 600) <= 7200:
        faults.append((f"HCCL_CONNECT_TIMEOUT={seconds['CONNECT']}", "must be within 120 to 7200 seconds"))
    if env["HCCL_WHITELIST_DISABLE"] != "1" and "HCCL_WHITELIST_FILE" not in env:
        faults.append((f"HCCL_WHITELIST_DISABLE={env['HCCL_WHITELIST_DISABLE']}", "refuses ranks that no list names"))
    if env.get("ASCEND_LAUNCH_BLOCKING") == "1":
        faults.append(("ASCEND_LAUNCH_BLOCKING=1", "waits for every kernel: for debugging, slow"))
    if case.on_npu and ids == sorted(set(ids)) and not faults:
        yield Finding(OK, "nothing of CANN or HCCL is set against what they need")
    for setting, why in faults:
        yield Finding(WARN, f"{setting} {why}", f"unset {setting.partition('=')[0]}")


def ports(case: Case) -> Findings:
    """Whether ranks can meet: on this machine, by the host's name, on HCCL's ports."""
    if case.ranks == 1:
        return
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 5):
            yield Finding(OK, "ranks can meet on 127.0.0.1")
    except OSError as error:
        way_out = "see the loopback interface (ip addr show lo) and the firewall"
        yield Finding(FAIL, f"no TCP connection within this machine: {error.strerror or error}", way_out)
    lookup = "import socket; socket.getaddrinfo(socket.gethostname(), None)"
    if fault := fresh_python(lookup, 3, dict(os.environ)):
        what = f"the host's name, {socket.gethostname()}, can't be looked up ({fault}); several machines need that"
        yield Finding(WARN, what, "add it to /etc/hosts, or set GLOO_SOCKET_IFNAME to the network interface")
    base = os.environ.get("HCCL_IF_BASE_PORT", "")
    first = int(base) if base.isdecimal() and 1024 <= int(base) <= 65520 else 60000
    last = min(first + HCCL_PORTS, 2**16) - 1
    taken = [port for port in range(first, last + 1) if case.on_npu and not is_free(port)]
    if taken:
        what = f"of HCCL's ports, {first} to {last}, in use: {', '.join(map(str, taken[:5]))}"
        yield Finding(WARN, what, "after a killed run wait a minute; else see ss -tanp, or set HCCL_IF_BASE_PORT")


def is_free(port: int) -> bool:
    """Whether a TCP port can be listened on."""
    with socket.socket() as server, contextlib.suppress(OSError):
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", port))
        return True
    return False


def cpus(case: Case) -> Findings:
    """Those of this process, of each rank, and what its container may use."""
    from ghostnet.device import cpu_count, pinned_by_user

    mine, there, quota = cpu_count(), os.cpu_count() or 1, cgroup("cpu.max")
    allowed = int(quota[0]) / int(quota[1]) if quota and quota[0].isdecimal() else mine
    each = max(1, int(min(mine, allowed)) // case.ranks)
    what = f"{mine}{f' of the {there} of the machine' if mine < there else ''}"
    if allowed < mine:
        what += f", but the container gets the time of {allowed:g}: a thread for each is throttled"
        yield Finding(WARN, what, f"data.workers={each} and OMP_NUM_THREADS={each}, or a larger quota")
    elif mine < case.ranks:
        what += f" for {case.ranks} ranks, which wait for each other"
        yield Finding(WARN, what, "more CPUs for this process (taskset, the container), or fewer ranks")
    else:
        yield Finding(OK, f"{what}{f', {each} a rank' if case.ranks > 1 else ''}")
    if case.on_npu and pinned_by_user("npu") and mine < there:
        what = "CPU_AFFINITY_CONF is set, but torch_npu heeds it only where a process may use all CPUs"
        yield Finding(WARN, what, "unset CPU_AFFINITY_CONF: each rank then gets CPUs of its own")


def memory(case: Case) -> Findings:
    """The host's memory against what the loaders' batches take."""
    from ghostnet.data.loader import AHEAD

    node, lines = case.cfg["data"], Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    limit, used = cgroup("memory.max"), cgroup("memory.current")
    if limit and used and limit[0].isdecimal():
        free = min(free, int(limit[0]) - int(used[0]))
    images = case.ranks * (AHEAD + 2) * (node["batch_size"] + node["eval_batch_size"])
    need = images * 3 * node["image_size"] ** 2
    what = f"{free / GIB:.1f} GiB free, {need / GIB:.1f} GiB for the loaders' batches"
    if free < need:
        yield Finding(WARN, what, "a smaller data.batch_size or data.eval_batch_size, or more memory")
    else:
        shared = shutil.disk_usage("/dev/shm").total / GIB if Path("/dev/shm").exists() else 0
        yield Finding(OK, f"{what}; /dev/shm has {shared:.1f} GiB, not used")


def cgroup(name: str) -> list[str]:
    """The words of a file of this process's control group (v2); none where there is none."""
    with contextlib.suppress(OSError):
        return (Path("/sys/fs/cgroup") / name).read_text(encoding="utf-8").split()
    return []
