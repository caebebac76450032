// Drawing: each chart keeps its picture and paints what is pointed at on top of it.
const PALETTE = ["#3b6fe0", "#e0662f", "#2c9c6a", "#c33d69", "#8a56cf", "#b48a1c", "#1f9fb5", "#7c7f8a", "#d4569f", "#5d8a2b"];
const SEQUENCES = { // from worst to best; the best stands out from the background
  light: ["#e9c9a4", "#e39a8f", "#c25c8b", "#743d92", "#1d2a6b"],
  dark: ["#66589f", "#8f4a90", "#c2506f", "#ee8a5b", "#fbe08a"],
};
const CLOCK = [10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400]; // steps of seconds
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function mix(colours, share) {
  const at = Math.min(1, Math.max(0, share)) * (colours.length - 1), low = Math.min(colours.length - 2, Math.floor(at));
  const parts = (colour) => [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
  const a = parts(colours[low]), b = parts(colours[low + 1]);
  return `rgb(${a.map((value, i) => Math.round(value + (b[i] - value) * (at - low))).join()})`;
}

const quantile = (sorted, q) => sorted[Math.min(sorted.length - 1, Math.max(0, Math.round(q * (sorted.length - 1))))];

// From values to pixels and back; log: as their logarithms.
function scale(low, high, from, to, log = false) {
  if (!(high > low)) [low, high] = log ? [low / 2, low * 2] : [low - (Math.abs(low) || 1) * .05, low + (Math.abs(low) || 1) * .05];
  const f = log ? Math.log10 : Number, a = f(low), b = f(high);
  const at = (value) => from + ((f(value) - a) / (b - a)) * (to - from);
  at.invert = (pixel) => { const v = a + ((pixel - from) / (to - from)) * (b - a); return log ? 10 ** v : v; };
  at.ticks = (count, clock = false) => {
    if (log && b - a >= 1) {
      const steps = b - a > 3 ? [1] : b - a > 1.6 ? [1, 3] : [1, 2, 5], found = [];
      for (let power = Math.floor(a); power <= b; power++) for (const step of steps) found.push(step * 10 ** power);
      return found.filter((v) => v >= low * .999 && v <= high * 1.001);
    }
    const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
    const round = clock && raw > 5 && CLOCK.find((s) => s >= raw * .999), found = [];
    const step = round || [1, 2, 2.5, 5, 10].find((s) => s * power >= raw * .999) * power;
    for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-9; v += step) found.push(Math.abs(v) < step * 1e-9 ? 0 : v);
    return found;
  };
  return at;
}

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  return size && size < 1e-3 ? value.toExponential(1).replace(".0", "").replace("e-", "e−") : String(+value.toPrecision(4));
}

class Chart {
  constructor(id, page) {
    this.page = page;
    this.canvas = document.querySelector(`#${id} canvas`);
    this.picture = document.createElement("canvas");
    this.height = Number(this.canvas.getAttribute("height"));
    this.zoom = this.drag = null;
    new ResizeObserver(() => this.render()).observe(this.canvas.parentElement);
    this.canvas.addEventListener("pointermove", (event) => this.moved(event));
    this.canvas.addEventListener("pointerleave", () => { if (!this.drag) page.point(null); });
    this.canvas.addEventListener("pointerdown", (event) => this.pressed(event));
    this.canvas.addEventListener("pointerup", (event) => this.released(event));
    this.canvas.addEventListener("dblclick", () => { this.zoom = null; this.render(); });
  }
  // Draw everything anew, at the canvas's size and the screen's resolution.
  render() {
    const width = this.canvas.parentElement.clientWidth, ratio = devicePixelRatio || 1;
    if (!width) return;
    this.width = width;
    for (const canvas of [this.canvas, this.picture]) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(this.height * ratio);
      canvas.getContext("2d").setTransform(ratio, 0, 0, ratio, 0, 0);
    }
    this.canvas.style.height = `${this.height}px`;
    this.box = { left: 52, right: width - 16, top: 12, bottom: this.height - 28 };
    const g = this.picture.getContext("2d");
    g.font = "11px system-ui, sans-serif";
    g.lineJoin = "round";
    g.clearRect(0, 0, width, this.height);
    this.draw(g);
    this.paint();
  }
  // The picture, and on top of it the rows that are pointed at or pinned.
  paint() {
    if (!this.width) return;
    const g = this.canvas.getContext("2d"), marked = this.page.marked();
    g.clearRect(0, 0, this.width, this.height);
    g.font = "11px system-ui, sans-serif";
    g.lineJoin = "round";
    this.under?.(g);
    g.globalAlpha = marked.length ? .28 : 1;
    g.drawImage(this.picture, 0, 0, this.width, this.height);
    g.globalAlpha = 1;
    this.over?.(g);
    for (const row of marked) this.mark(g, row);
    if (this.drag?.to && this.zooms) {
      const [x, y] = [Math.min(this.drag.x, this.drag.to.x), Math.min(this.drag.y, this.drag.to.y)];
      g.fillStyle = css("--bar");
      g.fillRect(x, y, Math.abs(this.drag.x - this.drag.to.x), Math.abs(this.drag.y - this.drag.to.y));
    }
  }
  at(event) {
    const place = this.canvas.getBoundingClientRect();
    return { x: event.clientX - place.left, y: event.clientY - place.top };
  }
  pressed(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.drag = this.at(event);
  }
  moved(event) {
    const at = this.at(event);
    if (this.drag) {
      if (Math.hypot(at.x - this.drag.x, at.y - this.drag.y) > 4) { this.drag.to = at; this.paint(); }
      return;
    }
    this.page.point(this.nearest(at), event);
  }
  released(event) {
    const { x, y, to } = this.drag ?? {};
    this.drag = null;
    if (to && this.zooms) {
      const sorted = (a, b) => [Math.min(a, b), Math.max(a, b)];
      this.zoom = { x: sorted(this.x.invert(x), this.x.invert(to.x)), y: sorted(this.y.invert(y), this.y.invert(to.y)) };
      this.render();
    } else if (!to) {
      const row = this.nearest(this.at(event));
      if (row) this.page.pin(row);
    }
  }
  grid(g, unitX = short, clock = false) {
    const { left, right, bottom } = this.box;
    if (this.empty) {
      g.textAlign = "center";
      g.fillStyle = css("--soft");
      g.fillText("nothing recorded", (left + right) / 2, bottom / 2);
      return;
    }
    g.textBaseline = "middle";
    g.textAlign = "right";
    for (const tick of this.y.ticks(5)) {
      const y = this.y(tick);
      g.fillStyle = css("--grid");
      g.fillRect(left, Math.round(y), right - left, 1);
      g.fillStyle = css("--soft");
      g.fillText(short(tick), left - 8, y);
    }
    g.textBaseline = "top";
    g.textAlign = "center";
    g.fillStyle = css("--soft");
    for (const tick of this.x.ticks(Math.max(3, Math.floor((right - left) / 90)), clock)) g.fillText(unitX(tick), this.x(tick), bottom + 8);
  }
  clipped(g, paint) {
    const { left, right, top, bottom } = this.box;
    g.save();
    g.beginPath();
    g.rect(left, top - 6, right - left + 8, bottom - top + 8);
    g.clip();
    paint();
    g.restore();
  }
}

// Values over steps or over wall time, a line for each run.
class Curves extends Chart {
  constructor(id, page, ofRun, options = {}) {
    super(id, page);
    Object.assign(this, { ofRun, zooms: true, options });
  }
  lines(row) {
    return row.runs.map((run) => this.ofRun(D.curves[run])).filter((line) => line.xs.length);
  }
  draw(g) {
    const rows = this.page.rows, log = this.options.log?.() ?? false, xs = [], ys = []; // xs: where each line ends
    for (const row of rows) for (const line of this.lines(row)) {
      xs.push(line.xs.at(-1));
      for (const value of line.ys) if (value !== null && (!log || value > 0)) ys.push(value);
    }
    ys.sort((a, b) => a - b);
    this.empty = !ys.length;
    const [lowest, highest] = ys.length > 12 * xs.length ? this.options.cut ?? [0, 1] : [0, 1]; // short curves are shown whole
    const range = ys.length ? [quantile(ys, lowest), quantile(ys, highest)] : [0, 1];
    const pad = log ? 0 : (range[1] - range[0]) * .04;
    const [low, high] = this.zoom?.y ?? [range[0] - pad, range[1] + pad];
    const [from, to] = this.zoom?.x ?? [0, Math.max(...xs, 1e-9)];
    this.log = log;
    this.x = scale(from, to, this.box.left, this.box.right);
    this.y = scale(low, high, this.box.bottom, this.box.top, log);
    const count = rows.reduce((sum, row) => sum + row.runs.length, 0);
    g.lineWidth = count > 60 ? 1 : 1.6;
    g.globalAlpha = Math.max(.28, Math.min(.95, 9 / Math.sqrt(count + 80)));
    this.clipped(g, () => { for (const row of [...rows].reverse()) this.trace(g, row); });
    g.globalAlpha = 1;
  }
  under(g) {
    this.grid(g, this.page.over === "time" ? seconds : short, this.page.over === "time");
  }
  trace(g, row) {
    g.strokeStyle = g.fillStyle = this.page.colourOf(row);
    for (const { xs, ys } of this.lines(row)) {
      let pen = false;
      g.beginPath();
      for (let i = 0; i < xs.length; i++) {
        if (ys[i] === null || (this.log && ys[i] <= 0)) { pen = false; continue; }
        g[pen ? "lineTo" : "moveTo"](this.x(xs[i]), this.y(ys[i]));
        pen = true;
      }
      g.stroke();
      if (xs.length === 1 && pen) g.fillRect(this.x(xs[0]) - 2, this.y(ys[0]) - 2, 4, 4);
    }
  }
  mark(g, row) {
    g.lineWidth = 2.4;
    this.clipped(g, () => this.trace(g, row));
  }
  nearest(at) {
    let best = null, least = 26;
    for (const row of this.page.rows) for (const { xs, ys } of this.lines(row)) {
      const x = Math.min(xs.at(-1), Math.max(xs[0], this.x.invert(at.x)));
      let low = 0, high = xs.length - 1;
      while (high - low > 1) { const middle = (low + high) >> 1; if (xs[middle] <= x) low = middle; else high = middle; }
      if (ys[low] === null || ys[high] === null) continue;
      const share = xs[high] > xs[low] ? (x - xs[low]) / (xs[high] - xs[low]) : 0;
      const y = this.y(ys[low]) + share * (this.y(ys[high]) - this.y(ys[low]));
      const distance = Math.hypot(this.x(x) - at.x, y - at.y);
      if (distance < least) [least, best] = [distance, row];
    }
    return best;
  }
}
