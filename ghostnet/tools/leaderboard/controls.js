// What the reader does: clicks, keys, switches; and the first drawing.
function rowOf(event) {
  return event.target.closest?.("tbody tr")?.row ?? null;
}

function move(line, by) {
  if (by > 1e6) while ($("tbody").childElementCount < page.rows.length) drawMore();
  const lines = [...document.querySelectorAll("tbody tr")], next = lines[Math.max(0, Math.min(lines.length - 1, lines.indexOf(line) + by))];
  next?.focus({ preventScroll: true });
  next?.scrollIntoView({ block: "nearest" });
  if (next?.row) page.point(next.row, null, true);
}

function makeSwitch(id, value, choose) {
  const buttons = document.querySelectorAll(`#${id} button`);
  const press = (now) => buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.value === now)));
  buttons.forEach((button) => button.addEventListener("click", () => { press(button.dataset.value); choose(button.dataset.value); }));
  press(value);
}

function remember(theme) {
  try { localStorage.setItem("leaderboard-theme", theme); } catch { /* pages from files may not keep anything */ }
}

function setTheme(theme) {
  page.theme = theme;
  const dark = theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  if (page.rows.length) { page.tint(); page.charts.forEach((chart) => chart.render()); }
}

function listen() {
  const body = $("tbody");
  body.addEventListener("pointerover", (event) => page.point(rowOf(event), null, true));
  body.addEventListener("pointerleave", () => page.point(null));
  body.addEventListener("click", (event) => {
    const row = rowOf(event);
    if (!row) return;
    if (event.target.closest(".copy")) copy(row);
    else if (!getSelection().toString()) page.pin(row);
  });
  body.addEventListener("keydown", (event) => {
    const row = rowOf(event), line = event.target.closest("tr"), step = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -1e9, End: 1e9 }[event.key];
    if (step) move(line, step);
    else if ((event.key === "Enter" || event.key === " ") && event.target === line && row) page.pin(row);
    else if (event.key === "c" && row && !event.ctrlKey && !event.metaKey) copy(row);
    else return;
    event.preventDefault();
  });
  $(".scroll").addEventListener("scroll", ({ target }) => {
    if (target.scrollTop + target.clientHeight > target.scrollHeight - 400) drawMore();
  });
  $("thead").addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown") { event.preventDefault(); move(null, 1); }
  });
  $("#filter").addEventListener("input", (event) => page.filter(event.target.value));
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches("input, select, textarea");
    if (event.key === "/" && !typing) { event.preventDefault(); $("#filter").focus(); }
    if (event.key === "Escape") {
      page.pinned.forEach((row) => row.element?.classList.remove("pin"));
      page.pinned.clear();
      page.brushes.clear();
      $("#filter").value = "";
      page.filter("");
    }
  });
}

function setUp() {
  const many = makeRows([], page.grouped).length;
  const colours = [["row", "row"], ["top1", "Acc@1"], ["fps", "FPS"], ...page.columns().map((key) => [key, key])];
  $("#colour").append(...colours.map(([value, textContent]) => element("option", { value, textContent })));
  $("#colour").value = page.colour = many > PALETTE.length ? "top1" : "row";
  $("#colour").addEventListener("change", (event) => { page.colour = event.target.value; page.tint(); page.charts.forEach((chart) => chart.render()); });
  const render = (...charts) => charts.forEach((chart) => { chart.zoom = null; chart.render(); });
  const values = (x, y) => (c) => ({ xs: page.over === "time" ? c[`${x}t`] : c[`${x}s`], ys: c[y] });
  const accuracy = new Curves("accuracy", page, values("e", "top1"), { cut: [.12, 1] });
  const loss = new Curves("loss", page, (c) => (page.loss === "train" ? values("", "loss") : values("e", "eloss"))(c), { cut: [0, .97] });
  const lr = new Curves("lr", page, values("", "lr"), { log: () => page.lrScale === "log" });
  page.charts = [new Parallel("parallel", page), accuracy, loss, lr, new Speed("speed", page)];
  makeSwitch("over", "step", (value) => { page.over = value; render(accuracy, loss, lr); });
  makeSwitch("which", "train", (value) => { page.loss = value; render(loss); });
  makeSwitch("scale", "linear", (value) => { page.lrScale = value; render(lr); });
  makeSwitch("grouping", String(page.grouped), (value) => {
    page.grouped = value === "true";
    page.brushes.clear();
    page.pinned.clear();
    for (const row of made.values()) row.element = null; // other columns
    drawHead();
    page.update();
  });
  let theme = "";
  try { theme = localStorage.getItem("leaderboard-theme") ?? ""; } catch { /* as above */ }
  makeSwitch("theme", theme, (value) => { remember(value); setTheme(value); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTheme(page.theme));
  setTheme(theme);
  const shared = Object.entries(D.constants);
  $("#constants summary").textContent = `The same in all runs: ${shared.length} settings`;
  $("#constants dl").append(...shared.flatMap(([key, text]) => [element("dt", { textContent: key }), element("dd", { textContent: text })]));
  $("#summary").textContent = `${RUNS.toLocaleString("en")} ${RUNS > 1 ? "runs" : "run"} · ${new Date(D.made * 1000).toISOString().slice(0, 16).replace("T", " ")} UTC`;
  $("#command").textContent = D.command;
  if (new Set(D.seeds).size < 2 || new Set(D.groups).size === RUNS) $("#grouping").hidden = true;
}

setUp();
drawHead();
listen();
page.update();
