"""The device of a job, here or not."""

from pathlib import Path

from ghostnet.config import Config
from ghostnet.device import check_cards, choices, choose, describe, free_memory, resolve
from ghostnet.errors import UserError


def device(cfg: Config) -> tuple[str, str, str | None]:
    """(kind, in words, why the job could not start here)."""
    node = cfg["device"]
    many = f", {node['count']} ranks" if node["count"] > 1 else ""
    try:
        kind, why = choose(node["kind"])
        check_cards(kind, node["count"], node["ids"])
    except UserError as fault:
        cards = f" {', '.join(map(str, node['ids']))}" if node["ids"] else ""
        return node["kind"], f"{node['kind']}{cards}{many}", str(fault)
    chosen = resolve(kind, (node["ids"] or [0])[0])
    auto = f" ({why})" if node["kind"] == "auto" else ""
    return kind, f"{chosen}: {describe(chosen)}, {choices(chosen)}{many}{auto}", None


def available(kind: str) -> int | None:
    """Bytes of the device, whoever uses them."""
    if kind != "cpu":
        return free_memory(resolve(kind))[1]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal"))
    except (OSError, StopIteration):
        return None
