// Accuracy against speed, and the parallel coordinates.
class Speed extends Chart {
  constructor(id, page) {
    super(id, page);
    this.zooms = true;
  }
  draw(g) {
    this.points = this.page.rows.filter((row) => row.metrics.top1 && row.metrics.fps);
    this.empty = !this.points.length;
    const few = this.points.length <= 80; // with their confidence
    const span = (key) => {
      const ends = ({ value, confidence }) => (few && key === "top1" && confidence ? [value - confidence, value + confidence] : [value]);
      const values = this.points.flatMap((row) => ends(row.metrics[key]));
      const [low, high] = values.length ? [Math.min(...values), Math.max(...values)] : [0, 1];
      return [low - (high - low) * .05, high + (high - low) * .07];
    };
    this.x = scale(...(this.zoom?.x ?? span("fps")), this.box.left, this.box.right);
    this.y = scale(...(this.zoom?.y ?? span("top1")), this.box.bottom, this.box.top);
    this.clipped(g, () => {
      this.front(g);
      g.globalAlpha = this.points.length > 80 ? .7 : .95;
      for (const row of [...this.points].reverse()) this.dot(g, row, this.points.length > 200 ? 3 : 4.5);
      g.globalAlpha = 1;
    });
  }
  under(g) {
    this.grid(g);
    if (this.empty) return;
    g.textAlign = "right";
    g.textBaseline = "bottom";
    g.fillText("images/s", this.box.right, this.box.bottom - 4);
  }
  // From the slowest of the front to the fastest, in steps: what is reached at a speed or a higher one.
  front(g) {
    const best = this.page.front = paretoFront(this.page.rows);
    g.strokeStyle = css("--accent");
    g.lineWidth = 1.5;
    g.setLineDash([5, 4]);
    g.beginPath();
    best.forEach((row, i) => {
      const x = this.x(row.metrics.fps.value), y = this.y(row.metrics.top1.value);
      if (i === 0) g.moveTo(this.box.left, y);
      else g.lineTo(this.x(best[i - 1].metrics.fps.value), y);
      g.lineTo(x, y);
    });
    g.stroke();
    g.setLineDash([]);
    for (const row of best) {
      g.beginPath();
      g.arc(this.x(row.metrics.fps.value), this.y(row.metrics.top1.value), 7, 0, 7);
      g.stroke();
    }
  }
  dot(g, row, radius) {
    const { top1, fps } = row.metrics, x = this.x(fps.value);
    g.fillStyle = g.strokeStyle = this.page.colourOf(row);
    g.beginPath();
    g.arc(x, this.y(top1.value), radius, 0, 7);
    g.fill();
    if (top1.confidence && this.points.length <= 80) this.whisker(g, x, top1);
  }
  whisker(g, x, { value, confidence }) {
    g.lineWidth = 1;
    g.beginPath();
    g.moveTo(x, this.y(value - confidence));
    g.lineTo(x, this.y(value + confidence));
    g.stroke();
  }
  mark(g, row) {
    if (!row.metrics.top1 || !row.metrics.fps) return;
    this.clipped(g, () => {
      this.dot(g, row, 7);
      if (row.metrics.top1.confidence) this.whisker(g, this.x(row.metrics.fps.value), row.metrics.top1);
    });
  }
  nearest(at) {
    let best = null, least = 24;
    for (const row of this.points ?? []) {
      const distance = Math.hypot(this.x(row.metrics.fps.value) - at.x, this.y(row.metrics.top1.value) - at.y);
      if (distance < least) [least, best] = [distance, row];
    }
    return best;
  }
}

// An axis for each setting that varies, then accuracy and speed; dragging along one filters.
class Parallel extends Chart {
  draw(g) {
    const all = this.page.unbrushed, keys = this.page.axisKeys();
    this.box = { left: 56, right: this.width - 56, top: 34, bottom: this.height - 14 };
    const gap = keys.length > 1 ? (this.box.right - this.box.left) / (keys.length - 1) : 0;
    this.list = keys.map((key, i) => this.axis(key, this.box.left + i * gap, all)).filter(Boolean);
    const shown = new Set(this.page.rows);
    g.lineWidth = 1;
    for (const row of all) if (!shown.has(row)) this.trace(g, row, css("--faint"));
    g.globalAlpha = Math.max(.25, Math.min(.9, 9 / Math.sqrt(shown.size + 80)));
    g.lineWidth = shown.size > 60 ? 1 : 1.6;
    for (const row of [...this.page.rows].reverse()) this.trace(g, row, this.page.colourOf(row));
    g.globalAlpha = 1;
  }
  axis(key, x, rows) {
    const { top, bottom } = this.box, numbers = rows.map((row) => rowNumber(row, key)).filter((v) => v !== null);
    const texts = [...new Set(rows.map((row) => rowText(row, key)).filter((text) => text !== "–"))];
    const numeric = numbers.length && texts.every((text) => key in D.metrics || asNumber(text) !== null);
    if (!numeric) {
      texts.sort((a, b) => COLLATOR.compare(a, b));
      const place = (i) => (texts.length > 1 ? bottom - 12 - (i * (bottom - top - 24)) / (texts.length - 1) : (top + bottom) / 2);
      return { key, x, ticks: texts.map((text, i) => [place(i), text]), at: (row) => { const i = texts.indexOf(rowText(row, key)); return i < 0 ? null : place(i); } };
    }
    const low = Math.min(...numbers), high = Math.max(...numbers), log = low > 0 && high / low > 20;
    const y = scale(low, high, bottom - 4, top + 4, log);
    const few = [...new Set(numbers)].sort((a, b) => a - b);
    const ticks = (few.length <= 6 && !(key in D.metrics) ? few : y.ticks(5)).map((value) => [y(value), key === "time" ? seconds(value) : short(value)]);
    return { key, x, y, ticks, at: (row) => { const v = rowNumber(row, key); return v === null ? null : y(v); } };
  }
  trace(g, row, colour) {
    let pen = false;
    g.strokeStyle = colour;
    g.beginPath();
    for (const axis of this.list) {
      const y = axis.at(row);
      if (y === null) { pen = false; continue; }
      g[pen ? "lineTo" : "moveTo"](axis.x, y);
      pen = true;
    }
    g.stroke();
  }
  over(g) {
    const { top, bottom } = this.box;
    for (const [i, { key, x, ticks }] of this.list.entries()) {
      g.fillStyle = css("--line");
      g.fillRect(x - .5, top, 1, bottom - top);
      g.textAlign = i === 0 ? "left" : i === this.list.length - 1 ? "right" : "center";
      g.textBaseline = "alphabetic";
      g.fillStyle = css("--text");
      g.fillText(HEADINGS[key] ?? key, x + (i === 0 ? -44 : i === this.list.length - 1 ? 44 : 0), top - 14);
      g.textAlign = "left";
      g.textBaseline = "middle";
      for (const [y, text] of ticks) {
        g.lineWidth = 4;
        g.strokeStyle = css("--card");
        g.strokeText(text, x + 6, y);
        g.fillStyle = css("--soft");
        g.fillText(text, x + 6, y);
      }
      const brush = this.drag?.axis?.key === key && this.drag.to ? [this.drag.y, this.drag.to.y] : this.page.brushes.get(key)?.pixels;
      if (brush) {
        g.fillStyle = css("--bar");
        g.strokeStyle = css("--accent");
        g.lineWidth = 1;
        g.fillRect(x - 8, Math.min(...brush), 16, Math.abs(brush[1] - brush[0]));
        g.strokeRect(x - 8, Math.min(...brush), 16, Math.abs(brush[1] - brush[0]));
      }
    }
  }
  mark(g, row) {
    g.lineWidth = 2.6;
    this.trace(g, row, this.page.colourOf(row));
  }
  pressed(event) {
    super.pressed(event);
    this.drag.axis = this.list.find((axis) => Math.abs(axis.x - this.drag.x) < 16) ?? null;
  }
  released(event) {
    const { axis, y, to } = this.drag ?? {};
    if (!axis) return super.released(event);
    this.drag = null;
    const ends = to && [Math.min(y, to.y), Math.max(y, to.y)];
    const meets = (row) => { const at = axis.at(row); return at !== null && at >= ends[0] && at <= ends[1]; };
    const words = ends && (axis.y
      ? `${short(axis.y.invert(ends[1]))} … ${short(axis.y.invert(ends[0]))}`
      : axis.ticks.filter(([at]) => at >= ends[0] && at <= ends[1]).map(([, text]) => text).join(", ") || "none");
    this.page.brush(axis.key, ends ? { pixels: ends, ids: new Set(this.page.unbrushed.filter(meets)), words } : null);
  }
  nearest(at) {
    const i = this.list.findIndex((axis, n) => axis.x <= at.x && this.list[n + 1]?.x >= at.x);
    if (i < 0) return null;
    const [a, b] = [this.list[i], this.list[i + 1]], share = (at.x - a.x) / (b.x - a.x || 1);
    let best = null, least = 14;
    for (const row of this.page.rows) {
      const [from, to] = [a.at(row), b.at(row)];
      if (from === null || to === null) continue;
      const distance = Math.abs(from + (to - from) * share - at.y);
      if (distance < least) [least, best] = [distance, row];
    }
    return best;
  }
}
