"""Runs side by side, best first: python -m ghostnet.tools.leaderboard RUNS… [key=value …].

RUNS are folders; all runs in them are found, however deep. Those that differ in nothing but their seed are one row:
the mean, and ± half of its 95 % confidence interval by Student's t. The columns are the settings in which the runs
differ. Its words, in any order:

  sort=top1             or top5, loss, fps, time, status, name, a setting such as optim.lr; best first, settings
                        ascending; sort=-optim.lr turns that round
  filter='optim.lr>0.2,status=completed'
                        key, one of = != < <= > >= ~ (contains), value; all must hold. Keys are those of sort, and any
                        key of the config. Settings and status are those of runs, numbers those of the rows
  seeds=group           each: a row for every run
  top=N                 the first N rows
  format=text           or csv, json, markdown
  html=FILE             one page with everything: table, curves, accuracy against speed, parallel coordinates;
                        it needs no network and no other file
"""

import sys

from ghostnet.errors import ConfigError
from ghostnet.experiments import results
from ghostnet.tools import entry
from ghostnet.tools.leaderboard import formats, query
from ghostnet.tools.leaderboard.words import Words, check


def ranked(words: Words) -> list[results.Row]:
    """The rows that a command asks for, in its order; ConfigError where there are no runs, or none of its keys."""
    runs = results.collect(words.roots)
    if not runs:
        raise ConfigError(f"{', '.join(map(str, words.roots))}: no run in there. A run's folder has a config.yaml.")
    key = words.sort.removeprefix("-")
    query.check_key("sort", key, runs)
    for condition in words.filter:
        query.check_key("filter", condition.key, runs)
    rows = results.rows(query.chosen_runs(runs, words.filter), words.seeds == "group")
    rows = results.best_first(query.chosen_rows(rows, words.filter), key, backwards=words.sort.startswith("-"))
    if not rows:
        raise ConfigError(f"filter: none of the {len(runs)} runs meets it.")
    return rows[: words.top]


def run(typed: list[str]) -> None:
    """Check, read, print, write; UserError with one message."""
    words = check(typed)
    rows = ranked(words)
    keys = results.columns([one for row in rows for one in row.runs], words.seeds == "group")
    if words.format == "text":
        results.show(rows, keys, formats.COLUMNS)
    else:
        write = {"csv": formats.as_csv, "json": formats.as_json, "markdown": formats.as_markdown}[words.format]
        print(write(rows, keys), end="")
    if words.html:
        from ghostnet.tools.leaderboard.page import page

        words.html.write_text(page(rows, words.sort, words.seeds == "group", typed), encoding="utf-8")
        print(f"page: {words.html} ({words.html.stat().st_size / 1e6:.1f} MB)", file=sys.stderr)


def main(typed: list[str]) -> int:
    """The exit code."""
    return entry.ended(run, __doc__, typed)


if __name__ == "__main__":
    entry.start(main)
