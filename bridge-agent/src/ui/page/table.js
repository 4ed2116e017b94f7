// A table that draws only the rows in sight, so that 10,000 rows cost no more than 30.

import { h } from "./dom.js";

const ROW = 32;
const SPARE = 6;

export class Table {
  // columns: { title, width, cell(row) -> node or text, number, sort(row) }
  constructor(label, columns, { open, key }) {
    Object.assign(this, { all: columns, open, key, rows: [], given: [], selected: null, drawn: new Map(), sorted: null });
    this.head = h("div", { class: "row head", role: "row", "aria-rowindex": 1 });
    this.body = h("div", { class: "body", role: "rowgroup" });
    this.element = h("div", {
      class: "grid", role: "grid", "aria-label": label, tabindex: "0", onscroll: () => this.later(), onkeydown: (event) => this.press(event),
    }, h("div", { role: "rowgroup", class: "top" }, this.head), this.body);
    this.element.querySelector(".top").style.display = "contents";
    const narrow = matchMedia("(max-width: 640px)");
    narrow.addEventListener("change", () => this.fit(narrow.matches));
    this.fit(narrow.matches);
    new ResizeObserver(() => this.later()).observe(this.element);
  }

  // A narrow screen shows fewer columns; the details have all of them.
  fit(narrow) {
    this.columns = this.all.filter((column) => !narrow || !column.wide);
    this.sorted = null;
    const widths = this.columns.map((column) => (narrow ? column.narrow ?? column.width.replace(/minmax\((\d+)px/, (_, px) => `minmax(${Math.min(px, column.mono ? 144 : 190)}px`) : column.width));
    this.widths = widths.join(" ");
    // All rows have the same width, whatever is in them, so that their columns are in line.
    const [gap, padding] = narrow ? [10, 20] : [16, 28];
    const least = widths.reduce((sum, width) => sum + Number(/\d+/.exec(width)[0]) + gap, padding - gap);
    this.element.style.setProperty("--least", `${least}px`);
    this.head.replaceChildren(...this.columns.map((column, index) => this.title(column, index)));
    this.head.style.gridTemplateColumns = this.widths;
    for (const line of this.drawn.values()) line.element.remove();
    this.drawn.clear();
    this.show(this.given);
  }

  title(column, index) {
    const label = column.sort ? h("button", { type: "button", onclick: () => this.sort(index) }, column.title) : column.title;
    return h("div", { role: "columnheader", class: column.number ? "number" : "" }, label);
  }

  sort(index) {
    const descending = this.sorted?.index === index ? !this.sorted.descending : true;
    this.sorted = { index, descending };
    [...this.head.children].forEach((cell, at) => {
      if (at === index) cell.setAttribute("aria-sort", descending ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    });
    this.show(this.given);
  }

  show(rows) {
    this.given = rows;
    if (this.sorted) {
      const { index, descending } = this.sorted;
      const value = this.columns[index].sort;
      rows = [...rows].sort((a, b) => (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0) * (descending ? -1 : 1));
    }
    this.rows = rows;
    this.element.setAttribute("aria-rowcount", rows.length + 1);
    this.body.style.height = `${rows.length * ROW}px`;
    this.later();
  }

  later() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.draw();
    });
  }

  draw() {
    const top = Math.max(0, Math.floor(this.element.scrollTop / ROW) - SPARE);
    const end = Math.min(this.rows.length, Math.ceil((this.element.scrollTop + this.element.clientHeight) / ROW) + SPARE);
    const wanted = new Map();
    for (let index = top; index < end; index += 1) wanted.set(this.key(this.rows[index]), index);
    for (const [key, line] of this.drawn) {
      if (!wanted.has(key)) {
        line.element.remove();
        this.drawn.delete(key);
      }
    }
    for (const [key, index] of wanted) {
      const row = this.rows[index];
      let line = this.drawn.get(key);
      if (!line || line.row !== row || line.version !== row.version) {
        const fresh = this.make(row, key);
        if (line) line.element.replaceWith(fresh);
        else this.body.append(fresh);
        line = { element: fresh, row, version: row.version };
        this.drawn.set(key, line);
      }
      line.element.style.top = `${index * ROW}px`;
      line.element.setAttribute("aria-rowindex", index + 2);
      line.element.setAttribute("aria-selected", String(key === this.selected));
    }
    if (this.selected && this.drawn.has(this.selected)) this.element.setAttribute("aria-activedescendant", this.drawn.get(this.selected).element.id);
    else this.element.removeAttribute("aria-activedescendant");
  }

  make(row, key) {
    const cells = this.columns.map((column) => h("div", { role: "gridcell", class: column.number ? "number" : column.mono ? "mono" : "" }, column.cell(row)));
    const element = h("div", { class: "row", role: "row", id: `row-${key}`, onclick: () => this.choose(key, true) }, cells);
    element.style.gridTemplateColumns = this.widths;
    return element;
  }

  choose(key, open) {
    this.selected = key;
    this.draw();
    const row = this.rows.find((other) => this.key(other) === key);
    if (open && row) this.open?.(row);
  }

  press(event) {
    // Of the title of a column.
    if (event.target !== this.element) return undefined;
    const now = this.rows.findIndex((row) => this.key(row) === this.selected);
    const page = Math.max(1, Math.floor(this.element.clientHeight / ROW) - 2);
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Enter" && now >= 0) {
      // The key would go on to the button that gets the focus.
      event.preventDefault();
      return this.open?.(this.rows[now]);
    }
    if (step === undefined || this.rows.length === 0) return undefined;
    event.preventDefault();
    const index = Math.min(this.rows.length - 1, Math.max(0, now + step));
    const top = index * ROW;
    const room = this.element.clientHeight - 30 - ROW;
    if (top < this.element.scrollTop) this.element.scrollTop = top;
    if (top > this.element.scrollTop + room) this.element.scrollTop = top - room;
    return this.choose(this.key(this.rows[index]), false);
  }
}
