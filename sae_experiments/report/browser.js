// The feature browser: choose a cell, filter, sort, choose a latent.
const STEP = 200;
const COLUMNS = [
  { key: "latent", name: "#", get: (f) => f.latent, text: (f) => `${f.latent}`, up: true },
  { key: "density", name: "density", get: (f) => f.density, text: (f) => percent(f.density) },
  { key: "f1", name: "F1", get: (f) => f.f1, text: (f) => show(f.f1, 2), optional: true },
  { key: "level", name: "level", get: (f) => f.level, text: (f) => `${f.level ?? ""}`, up: true, optional: true },
  { key: "stability", name: "stability", get: (f) => f.stability, text: (f) => show(f.stability, 2), optional: true },
  { key: "max", name: "max", get: (f) => f.max, text: (f) => show(f.max, 2), narrow: true },
];

class View {
  constructor(index, cell) {
    this.index = index;
    this.latents = cell.latents;
    this.contexts = new Contexts(cell, DATA.cells[index].bytes);
    this.byNumber = new Map(cell.latents.map((f) => [f.latent, f]));
    this.columns = COLUMNS.filter((c) => !c.optional || cell.latents.some((f) => c.get(f) !== undefined));
    this.isTree = cell.latents.some((f) => f.children && f.children.length);
  }
  about(f) { return f.rule ? clear(f.rule, this.contexts.bytes) : (f.top && f.top.length ? this.contexts.short(f.top[0]) : f.density ? "" : "dead"); }
  // What a search looks through, made at the first search.
  words(f) {
    f.words ??= [`#${f.latent}`, f.rule || "", f.concept || "", ...[...(f.top || []), ...(f.samples || [])].map((c) => this.contexts.plain(c))].join("\u0000").toLowerCase();
    return f.words;
  }
}

class Browser {
  constructor(root) {
    this.root = root;
    this.views = new Map();
    this.state = { cell: -1, query: "", bin: null, sort: "f1", up: false, tree: false, latent: null, shown: STEP };
    this.cells = h("select", { id: "cell", change: () => this.open(Number(this.cells.value)) }, DATA.cells.map((c, i) => h("option", { value: i }, `${new Set(DATA.cells.map((x) => x.run)).size > 1 ? `${c.run}: ` : ""}${c.title} (${c.n} latents)`)));
    this.search = h("input", { id: "search", type: "search", placeholder: "rule, text or #number", "aria-label": "search latents", input: () => this.set({ query: this.search.value, shown: STEP }) });
    this.count = h("span", { class: "quiet", role: "status", "aria-live": "polite" });
    this.tree = h("button", { type: "button", hidden: true, "aria-pressed": "false", click: () => this.set({ tree: !this.state.tree, shown: STEP }) }, "As a tree");
    this.chart = h("div", { class: "density-box" });
    this.list = h("div", { class: "list", role: "region", "aria-label": "latents", keydown: (e) => this.key(e) });
    this.card = h("div", { class: "card", id: "latent", "aria-live": "polite" }, h("p", { class: "quiet" }, "Choose a latent from the list, or a bar above."));
    root.append(h("div", { class: "tools" }, h("label", null, "Cell ", this.cells), this.search, this.tree, this.count), this.chart, h("div", { class: "split" }, this.list, this.card));
  }

  async open(index) {
    try {
      if (!this.views.has(index)) this.views.set(index, new View(index, JSON.parse(await (await unpack(`cell-${index}`)).text())));
    } catch (error) {
      this.card.replaceChildren(h("p", { class: "alarm" }, `The features cannot be shown: ${error.message}`));
      return;
    }
    this.view = this.views.get(index);
    this.cells.value = String(index);
    this.set({ cell: index, bin: null, shown: STEP, tree: this.state.tree && this.view.isTree, sort: this.view.columns.some((c) => c.key === this.state.sort) ? this.state.sort : "density" });
  }

  // The one place where the state changes.
  set(change) {
    const before = this.state;
    this.state = { ...before, ...change };
    if (["cell", "bin"].some((k) => k in change)) this.drawChart();
    if (["cell", "bin", "query", "sort", "up", "tree", "shown"].some((k) => k in change)) this.drawList();
    if ("latent" in change || ("cell" in change && before.cell !== this.state.cell)) this.drawCard();
  }

  matching() {
    const { query, bin, sort, up, tree } = this.state, wanted = query.trim().toLowerCase(), get = COLUMNS.find((c) => c.key === sort).get;
    const exact = /^#?\d+$/.test(wanted) ? Number(wanted.replace("#", "")) : null;
    const fits = (f) => (bin === null || binOf(f.density) === bin) && (!wanted || f.latent === exact || (wanted[0] !== "#" && this.view.words(f).includes(wanted))) && (!tree || (f.children && f.children.length));
    const value = (f) => { const v = get(f); return v === undefined || v === null ? (up ? Infinity : -Infinity) : v; };
    return this.view.latents.filter(fits).sort((a, b) => (f0(value(a), value(b)) * (up ? 1 : -1)) || a.latent - b.latent);
  }

  drawChart() { this.chart.replaceChildren(densityChart(this.view.latents, this.state.bin, (bin) => this.set({ bin, shown: STEP }))); }

  drawList() {
    this.found = this.matching();
    const { shown, bin, tree } = this.state, columns = this.view.columns;
    this.tree.hidden = !this.view.isTree;
    this.tree.setAttribute("aria-pressed", String(tree));
    this.count.replaceChildren(`${this.found.length} of ${this.view.latents.length} latents`, bin === null ? "" : h("button", { type: "button", class: "clear", click: () => this.set({ bin: null }) }, `✕ ${binName(bin)}`));
    const heads = columns.map((c) => {
      const on = this.state.sort === c.key;
      return h("th", { scope: "col", class: c.narrow ? "narrow" : null, "aria-sort": on ? (this.state.up ? "ascending" : "descending") : "none" },
        h("button", { type: "button", "data-sort": c.key, click: () => this.set({ sort: c.key, up: on ? !this.state.up : Boolean(c.up), shown: STEP }) }, c.name, on ? (this.state.up ? " ↑" : " ↓") : ""));
    });
    const rows = this.found.slice(0, shown).map((f) => this.row(f, columns));
    const more = this.found.length > shown ? h("button", { type: "button", class: "more", click: () => this.set({ shown: shown + 5 * STEP }) }, `Show more (${this.found.length - shown} left)`) : null;
    this.list.replaceChildren(h("table", { class: "latents" }, h("thead", null, h("tr", null, heads, h("th", { scope: "col", class: "about" }, this.view.latents.some((f) => f.rule) ? "rule, or strongest context" : "strongest context"))), h("tbody", null, rows)), more || "");
    this.mark();
  }

  row(f, columns) {
    const cells = columns.map((c) => h("td", { class: c.narrow ? "num narrow" : "num" }, c.text(f)));
    const about = this.state.tree ? h("td", { class: "about" }, h("code", null, this.view.about(f)), branches(f, this.view, new Set([f.latent]))) : h("td", { class: "about" }, h("code", null, this.view.about(f)));
    const choose = (event) => { if (!event.target.closest("a, summary, details")) this.go(f.latent); };
    return h("tr", { tabindex: 0, "data-latent": f.latent, click: choose }, cells, about);
  }

  // Only the address changes here; the address chooses the latent, so that links and the back button work.
  go(latent) {
    const wanted = `#latent-${this.state.cell}-${latent}`;
    if (location.hash === wanted) this.follow(); else location.hash = wanted;
  }
  async follow() {
    const found = /^#latent-(\d+)-(\d+)$/.exec(location.hash);
    if (!found || !DATA.cells[Number(found[1])]) return;
    if (this.state.cell !== Number(found[1])) await this.open(Number(found[1]));
    if (!this.view) return;
    this.set({ latent: Number(found[2]) });
    if (matchMedia("(max-width: 900px)").matches) this.card.scrollIntoView();
  }
  move(by) {
    const at = this.found.findIndex((f) => f.latent === this.state.latent), next = this.found[at + by];
    if (next) this.go(next.latent);
  }
  key(event) {
    const row = event.target.closest("tr[data-latent]");
    if (!row) return;
    if (event.key === "Enter" && event.target === row) this.go(Number(row.dataset.latent));
    const to = { ArrowDown: row.nextElementSibling, ArrowUp: row.previousElementSibling }[event.key];
    if (to) { event.preventDefault(); to.focus(); this.go(Number(to.dataset.latent)); }
  }
  mark() {
    for (const row of this.list.querySelectorAll("tr[data-latent]")) row.setAttribute("aria-selected", String(Number(row.dataset.latent) === this.state.latent));
  }
  drawCard() {
    const feature = this.view.byNumber.get(this.state.latent);
    this.mark();
    this.card.replaceChildren(feature ? latentCard(feature, this.view, (by) => this.move(by)) : h("p", { class: "quiet" }, this.state.latent === null ? "Choose a latent from the list, or a bar above." : `Latent ${this.state.latent} is not among those stored for this cell.`));
    this.card.scrollTop = 0;
  }
}
const f0 = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
