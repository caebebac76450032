// The page: what is shown, sorted, filtered, pointed at and pinned; the table.
const $ = (selector) => document.querySelector(selector);
const element = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};

const LINES = 100; // of the table that are added at a time

const page = {
  rows: [], unbrushed: [], brushes: new Map(), pinned: new Set(), pointed: null, conditions: [], front: [],
  grouped: D.grouped, key: D.sort.replace(/^-/, ""), over: "step", loss: "train", lrScale: "linear", colour: "", theme: "",
  charts: [],

  // Everything again: the filter, the groups or the brushes have changed.
  update() {
    this.unbrushed = makeRows(this.conditions, this.grouped);
    for (const key of this.brushes.keys()) if (!this.axisKeys().includes(key)) this.brushes.delete(key);
    this.rows = sortRows(this.unbrushed.filter((row) => [...this.brushes.values()].every(({ ids }) => ids.has(row))), this.key, this.descending);
    this.pointed = null;
    $("#parallel").hidden = !this.columns().length;
    this.tint();
    drawTable();
    $("#count").textContent = `${this.rows.length} of ${makeRows([], this.grouped).length} ${this.grouped ? "rows" : "runs"}`;
    $("#brushes").replaceChildren(...[...this.brushes].map(([key, { words }]) =>
      element("button", { className: "chip", title: "Undo", textContent: `${HEADINGS[key] ?? key}: ${words}`, onclick: () => this.brush(key, null) })));
    for (const chart of this.charts) chart.render();
  },
  sort(key) {
    const upwards = !(key in D.metrics) || LESS_IS_BETTER.has(key);
    this.descending = this.key === key ? !this.descending : !upwards;
    this.key = key;
    this.rows = sortRows(this.rows, key, this.descending);
    drawTable();
  },
  filter(text) {
    try {
      this.conditions = parseFilter(text);
    } catch (fault) {
      $("#fault").textContent = fault.message;
      $("#filter").setAttribute("aria-invalid", "true");
      return;
    }
    $("#fault").textContent = "";
    $("#filter").removeAttribute("aria-invalid");
    this.brushes.clear(); // their ranges were those of other rows
    this.update();
  },
  brush(key, range) {
    if (range) this.brushes.set(key, range);
    else this.brushes.delete(key);
    this.update();
  },
  columns() {
    return D.settings.filter((s) => s.column && !(this.grouped && s.key === "seed")).map((s) => s.key);
  },
  axisKeys() {
    const there = (key) => D.metrics[key].some((value) => value !== null);
    return [...this.columns(), ...["fps", "top1"].filter(there)];
  },
  marked() {
    return [...this.pinned, ...(this.pointed && !this.pinned.has(this.pointed) ? [this.pointed] : [])];
  },
  point(row, event, quiet = false) {
    showTip(row, quiet ? null : event);
    if (row === this.pointed) return;
    this.pointed?.element?.classList.remove("hover");
    row?.element?.classList.add("hover");
    this.pointed = row;
    for (const chart of this.charts) chart.paint();
  },
  pin(row) {
    if (!this.pinned.delete(row)) this.pinned.add(row);
    row.element?.classList.toggle("pin", this.pinned.has(row));
    row.element?.setAttribute("aria-selected", this.pinned.has(row));
    for (const chart of this.charts) chart.paint();
  },

  // Colours: of a row by its place where there are few, by the chosen number, or by the option.
  tint() {
    const key = this.colour, dark = document.documentElement.dataset.theme === "dark";
    const best = sortRows(this.unbrushed, "top1", true), sequence = SEQUENCES[dark ? "dark" : "light"];
    const numbers = this.unbrushed.map((row) => rowNumber(row, key)).filter((v) => v !== null).sort((a, b) => a - b);
    const texts = [...new Set(this.unbrushed.map((row) => rowText(row, key)))].sort();
    const numeric = numbers.length && (key in D.metrics || texts.length > 6);
    const low = quantile(numbers, .1), high = numbers.at(-1);
    this.colourOf = (row) => {
      if (key === "row") return PALETTE[best.indexOf(row) % PALETTE.length];
      if (!numeric) return PALETTE[texts.indexOf(rowText(row, key)) % PALETTE.length];
      const value = rowNumber(row, key);
      if (value === null) return css("--faint");
      return mix(sequence, high > low ? (value - low) / (high - low) : 1);
    };
    legend(key, numeric ? [low, high] : null, texts, sequence);
    const cache = new Map(this.unbrushed.map((row) => [row, this.colourOf(row)]));
    this.colourOf = (row) => cache.get(row) ?? css("--faint");
    for (const row of this.unbrushed) row.element?.querySelector("i").style.setProperty("background", cache.get(row));
  },
};
page.descending = (page.key in D.metrics && !LESS_IS_BETTER.has(page.key)) !== D.sort.startsWith("-");

function showTip(row, event) {
  const tip = $("#tip");
  tip.hidden = !row || !event;
  if (tip.hidden) return;
  const facts = [...page.columns().map((key) => [key, rowText(row, key)]), ...["top1", "loss", "fps", "time"].map((key) => [HEADINGS[key], metricWords(row, key)]), ["status", row.status]];
  const notes = [...new Set(row.runs.map((run) => D.notes[run]).filter(Boolean))].map((note) => ["why", note]);
  const list = element("dl", {}, ...[...facts, ...notes].flatMap(([name, text]) => [element("dt", { textContent: name }), element("dd", { textContent: text })]));
  tip.replaceChildren(element("b", { textContent: row.name }), list);
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${event.clientX + 18 + width > innerWidth ? Math.max(4, event.clientX - width - 14) : event.clientX + 18}px`;
  tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - height - 6))}px`;
}

// What the colours say: a span of numbers, or the options.
function legend(key, span, texts, sequence) {
  const told = (value) => (key in D.metrics ? metricText(key, value) : short(value));
  if (key === "row") $("#legend").replaceChildren();
  else if (span) {
    const bar = element("i", { className: "span" });
    bar.style.background = `linear-gradient(90deg, ${sequence.join()})`;
    $("#legend").replaceChildren(`${HEADINGS[key] ?? key}  ${told(span[0])}`, bar, told(span[1]));
  } else {
    const dot = (text, i) => { const made = element("i"); made.style.background = PALETTE[i % PALETTE.length]; return [made, text]; };
    $("#legend").replaceChildren(key, ...texts.flatMap(dot));
  }
}

function metricWords(row, key) {
  const mean = row.metrics[key];
  return mean?.confidence ? `${metricText(key, mean.value)} ± ${metricText(key, mean.confidence)}` : metricText(key, mean?.value);
}

function drawHead() {
  const keys = ["name", ...page.columns(), ...(page.grouped ? ["seeds"] : []), "top1", "loss", "fps", "time", "status"];
  const cells = keys.map((key) => {
    const numeric = key in D.metrics || key === "seeds" || isNumeric(key);
    const name = HEADINGS[key] ?? { name: "run" }[key] ?? key;
    const inner = key === "seeds" ? element("span", { textContent: name, title: "seeds that the mean is of" }) : element("button", { textContent: name, onclick: () => page.sort(key) });
    const cell = element("th", { className: numeric ? "number" : "", scope: "col" }, inner);
    cell.dataset.key = key;
    return cell;
  });
  $("thead tr").replaceChildren(element("th", {}), ...cells, element("th", { scope: "col" }, element("span", { textContent: "run it again" })));
}

const isNumeric = (key) => SETTINGS.get(key)?.numbers.every((number) => number !== null) ?? false;

function drawTable() {
  for (const cell of document.querySelectorAll("th[data-key]")) {
    cell.removeAttribute("aria-sort");
    if (cell.dataset.key === page.key) cell.setAttribute("aria-sort", page.descending ? "descending" : "ascending");
  }
  $("tbody").replaceChildren();
  if (!page.rows.length) $("tbody").append(element("tr", {}, element("td", { className: "empty", colSpan: 99, textContent: "No run meets this filter." })));
  $(".scroll").scrollTop = 0;
  drawMore();
}

// The next lines of the table: a thousand at once would take a browser long to lay out.
function drawMore() {
  const best = page.rows.map((row) => row.metrics.top1?.value).filter((value) => value !== undefined);
  const high = Math.max(...best), low = Math.min(...best), lines = document.createDocumentFragment();
  const start = page.rows.length ? $("tbody").childElementCount : 0;
  page.rows.slice(start, start + LINES).forEach((row, i) => {
    const line = row.element ??= makeLine(row), value = row.metrics.top1?.value;
    line.firstChild.textContent = start + i + 1;
    if (value !== undefined) line.querySelector(".best").style.setProperty("--share", `${high > low ? 8 + (92 * (value - low)) / (high - low) : 100}%`);
    lines.append(line);
  });
  $("tbody").append(lines);
}

function makeLine(row) {
  const line = element("tr", { tabIndex: -1 });
  line.row = row;
  const cell = (text, className, ...more) => element("td", { className: text === "–" ? `${className} none` : className }, text, ...more);
  const name = element("td", { className: "name", title: row.runs.map((run) => D.folders[run]).join("\n") }, element("i"), shortName(row, page.columns()));
  name.querySelector("i").style.background = page.colourOf(row);
  line.append(element("td", { className: "rank" }), name);
  for (const key of page.columns()) line.append(cell(rowText(row, key), isNumeric(key) ? "number" : ""));
  if (page.grouped) line.append(cell(String(row.seeds), "number"));
  for (const key of ["top1", "loss", "fps", "time"]) {
    const mean = row.metrics[key], told = cell(metricText(key, mean?.value), key === "top1" && mean ? "number best" : "number");
    if (mean?.confidence && key === "top1") told.append(element("small", { textContent: ` ± ${metricText(key, mean.confidence)}` }));
    line.append(told);
  }
  const notes = row.runs.map((run) => D.notes[run]).filter(Boolean).join("\n");
  line.append(element("td", { title: notes }, element("span", { className: row.status.includes(",") ? "status" : `status ${row.status}`, textContent: row.status })));
  const commands = row.runs.map((run) => D.rerun[run]).filter(Boolean);
  const command = element("td", { className: "command" });
  if (commands.length) command.append(element("div", {}, element("button", { className: "copy", textContent: "Copy", title: "Copy what runs this again" }), element("code", { textContent: commands.join("\n"), title: commands.join("\n") })));
  line.append(command);
  line.classList.toggle("pin", page.pinned.has(row));
  return line;
}

async function copy(row) {
  const text = row.runs.map((run) => D.rerun[run]).filter(Boolean).join("\n"), button = row.element.querySelector(".copy");
  if (!button) return;
  try {
    await navigator.clipboard.writeText(text);
  } catch { // a page from a file, in some browsers
    const area = element("textarea", { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 1200);
}
