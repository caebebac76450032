"use strict";
// The runs as data: rows of one run or of several seeds, the filter, the order. Nothing here draws.
const D = JSON.parse(document.getElementById("data").textContent);
const RUNS = D.names.length;
const METRICS = Object.keys(D.metrics);
const HEADINGS = { top1: "Acc@1", top5: "Acc@5", loss: "loss", fps: "FPS", time: "time" };
const LESS_IS_BETTER = new Set(["loss", "time"]);
const SETTINGS = new Map(D.settings.map((s) => [s.key, s]));
const COLLATOR = new Intl.Collator("en", { numeric: true }); // model 10 after model 9
const SIGN = /^([^=!<>~]+?)\s*(!=|<=|>=|=|<|>|~)\s*(.*)$/s;
const NUMBER = /^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$/;

// Curves were written as differences.
for (const curve of D.curves) {
  for (const key of ["s", "t", "es", "et"]) {
    let sum = 0;
    curve[key] = curve[key].map((gap) => (sum += gap));
  }
}

function seconds(value) {
  if (value === 0) return "0";
  if (value < 99.95) return `${value.toFixed(1)} s`;
  const whole = Math.round(value), two = (n) => String(n).padStart(2, "0");
  return `${Math.floor(whole / 3600)}:${two(Math.floor((whole % 3600) / 60))}:${two(whole % 60)}`;
}

function metricText(name, value) {
  if (value === null || value === undefined) return "–";
  return name === "time" ? seconds(value) : value.toFixed({ fps: 1, loss: 4 }[name] ?? 3);
}

// The mean over seeds with half of its 95 % confidence interval; a seed that ran twice counts once, by its own mean.
function overSeeds(name, runs) {
  const bySeed = new Map();
  for (const run of runs) {
    const value = D.metrics[name][run];
    if (value === null) continue;
    bySeed.set(D.seeds[run], [...(bySeed.get(D.seeds[run]) ?? []), value]);
  }
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const means = [...bySeed.values()].map(mean);
  if (!means.length) return null;
  const value = mean(means), n = means.length;
  if (n === 1) return { value, confidence: null, n };
  const variance = means.reduce((sum, one) => sum + (one - value) ** 2, 0) / (n - 1);
  return { value, confidence: D.student[n - 2] * Math.sqrt(variance / n), n };
}

const made = new Map(); // a row is made once for the same runs: its element and its pin stay
function makeRow(runs) {
  const id = runs.join();
  if (made.has(id)) return made.get(id);
  const completed = runs.filter((run) => D.status[run] === "completed");
  const counted = completed.length ? completed : runs;
  const counts = new Map();
  for (const run of [...completed, ...runs.filter((run) => D.status[run] !== "completed")]) counts.set(D.status[run], (counts.get(D.status[run]) ?? 0) + 1);
  const status = counts.size === 1 ? D.status[runs[0]] : [...counts].map(([word, n]) => `${n} ${word}`).join(", ");
  const row = { id, runs, name: rowName(runs), status, metrics: {}, element: null };
  for (const metric of METRICS) row.metrics[metric] = overSeeds(metric, counted);
  row.seeds = row.metrics.top1?.n ?? new Set(runs.map((run) => D.seeds[run])).size;
  made.set(id, row);
  return row;
}

// What a run, or a row by its first run, has for a setting: {text, number}, or null.
function setting(run, key) {
  const one = SETTINGS.get(key);
  if (!one) return key in D.constants ? { text: D.constants[key], number: asNumber(D.constants[key]) } : null;
  const index = one.index[run];
  return index < 0 ? null : { text: one.texts[index], number: one.numbers[index] };
}

function rowNumber(row, key) {
  return key in D.metrics ? row.metrics[key]?.value ?? null : setting(row.runs[0], key)?.number ?? null;
}

function rowText(row, key) {
  if (key in D.metrics) return metricText(key, row.metrics[key]?.value);
  return { name: row.name, status: row.status }[key] ?? setting(row.runs[0], key)?.text ?? "–";
}

const asNumber = (text) => (NUMBER.test(text) ? Number(text) : null);

// Conditions with commas between, as the command's filter= takes them; throws a message.
function parseFilter(text) {
  const parts = text.match(/(?:\[[^\]]*\]|'[^']*'|[^,])+/g) ?? [];
  return parts.map((part) => part.trim()).filter(Boolean).map((part) => {
    const found = SIGN.exec(part);
    if (!found) throw new Error(`“${part}” is no condition: key=value, with = != < <= > >= ~`);
    let [, key, sign, value] = found;
    if (/^'.*'$/s.test(value) && value.length > 1) value = value.slice(1, -1);
    if (!["name", "status", ...METRICS].includes(key) && !SETTINGS.has(key) && !(key in D.constants)) {
      throw new Error(`${key}: no such key`);
    }
    if (/[<>]/.test(sign) && asNumber(value) === null) throw new Error(`“${part}”: ${sign} needs a number`);
    return { key, sign, value, ofRow: key === "name" || key in D.metrics };
  });
}

function holds({ sign, value }, text, number) {
  const own = asNumber(value);
  if (/[<>]/.test(sign)) {
    if (number === null) return false;
    return { "<": number < own, "<=": number <= own, ">": number > own, ">=": number >= own }[sign];
  }
  if (sign === "~") return text !== null && text.toLowerCase().includes(value.toLowerCase());
  const same = number !== null && own !== null ? number === own : (text ?? "null") === value;
  return same === (sign === "=");
}

// What is left of the names of runs without their seed, else the first one's and how many more.
function rowName(runs) {
  const bare = new Set(runs.map((run) => D.names[run].split(",").filter((word) => word !== `seed=${D.seeds[run]}`).join(",")));
  if (runs.length > 1 && bare.size === 1 && !bare.has("")) return [...bare][0];
  return D.names[runs[0]] + (runs.length > 1 ? ` +${runs.length - 1}` : "");
}

// A row's name without what columns tell: the folder of a sweep names its jobs by their settings.
function shortName(row, columns) {
  const parts = row.name.split("/"), told = (word) => columns.includes(word.split("=")[0]) && word.includes("=");
  parts.push(parts.pop().split(",").filter((word) => !told(word)).join(","));
  return parts.filter(Boolean).join("/") || D.folders[row.runs[0]].split("/").at(-2) || row.name;
}

// The rows that meet a filter: settings and status are asked of runs, names and numbers of rows.
function makeRows(conditions, grouped) {
  const groups = new Map();
  for (let run = 0; run < RUNS; run++) {
    const meets = conditions.every((c) => {
      if (c.ofRow) return true;
      const value = c.key === "status" ? { text: D.status[run], number: null } : setting(run, c.key);
      return holds(c, value?.text ?? null, value?.number ?? asNumber(value?.text ?? ""));
    });
    if (!meets) continue;
    const group = grouped ? D.groups[run] : run;
    groups.set(group, [...(groups.get(group) ?? []), run]);
  }
  const rows = [...groups.values()].map(makeRow);
  return rows.filter((row) => conditions.every((c) => {
    if (!c.ofRow) return true;
    const number = c.key === "name" ? asNumber(row.name) : rowNumber(row, c.key);
    return holds(c, c.key === "name" ? row.name : number === null ? null : String(number), number);
  }));
}

// Sorted by a key; those without a value come last either way.
function sortRows(rows, key, descending) {
  const keyed = rows.map((row) => ({ row, number: rowNumber(row, key), text: rowText(row, key) }));
  const turn = descending ? -1 : 1;
  keyed.sort((a, b) => {
    const lacks = (a.number === null && a.text === "–") - (b.number === null && b.text === "–");
    if (lacks) return lacks;
    if (a.number !== null && b.number !== null) return turn * (a.number - b.number);
    if ((a.number === null) !== (b.number === null)) return turn * (a.number === null ? 1 : -1);
    return turn * COLLATOR.compare(a.text, b.text);
  });
  return keyed.map(({ row }) => row);
}

// The rows that no other beats in both accuracy and speed, slowest first.
function paretoFront(rows) {
  const there = rows.filter((row) => row.metrics.top1 && row.metrics.fps);
  there.sort((a, b) => b.metrics.fps.value - a.metrics.fps.value || b.metrics.top1.value - a.metrics.top1.value);
  let best = -Infinity;
  return there.filter((row) => row.metrics.top1.value > best && ((best = row.metrics.top1.value), true)).reverse();
}
