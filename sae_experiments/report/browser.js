// The feature browser: choose a cell, filter, sort, choose a latent.
const PAGE = 100; // latents on a page of the list
const CONCEPT_PHI = 0.3; // least |phi| with which a latent is listed under a concept
const COLUMNS = [
  { key: "latent", name: "#", get: (f) => f.latent, text: (f) => `${f.latent}`, up: true },
  { key: "density", name: "density", get: (f) => f.density, text: (f) => percent(f.density) },
  { key: "f1", name: "F1", get: (f) => f.f1, text: (f) => score(f.f1), optional: true },
  { key: "level", name: "level", get: (f) => f.level, text: (f) => `${f.level ?? ""}`, up: true, optional: true },
  { key: "stability", name: "stability", get: (f) => f.stability, text: (f) => show(f.stability, 2), optional: true },
  { key: "max", name: "max", get: (f) => f.max, text: (f) => show(f.max, 2), narrow: true },
];

class View {
  constructor(index, cell) {
    this.index = index;
    this.latents = cell.latents;
    this.unit = cell.tokens ? "token" : "character";
    this.contexts = new Contexts(cell, DATA.cells[index].bytes);
    this.byNumber = new Map(cell.latents.map((f) => [f.latent, f]));
    this.columns = COLUMNS.filter((c) => !c.optional || cell.latents.some((f) => c.get(f) !== undefined));
    this.isTree = cell.latents.some((f) => f.children && f.children.length);
  }
  about(f) { return f.rule ? clear(f.rule, this.contexts.bytes) : (f.top && f.top.length ? this.contexts.short(f.top[0]) : isDead(f) ? "dead" : ""); }
  // What a search looks through, made at the first search.
  words(f) {
    f.words ??= [`#${f.latent}`, f.rule || "", f.concept || "", ...[...(f.top || []), ...(f.samples || [])].map((c) => this.contexts.plain(c))].join("\u0000").toLowerCase();
    return f.words;
  }
}

// A latent that was looked at and fires nowhere; of others that is not known.
const isDead = (f) => f.density === 0;

// Filters of the list, by name; `fits` gets a latent.
const RULE_LIKE = 0.5;
const DENSE = 0.1;
const FILTERS = [
  { key: "all", name: "all latents", fits: () => true },
  { key: "rule", name: "rule-like (F1 ≥ 0.5)", fits: (f) => f.f1 >= RULE_LIKE },
  { key: "unexplained", name: "alive without a good rule", fits: (f) => f.density > 0 && !(f.f1 >= RULE_LIKE) },
  { key: "dense", name: "dense (fire on > 10 %)", fits: (f) => f.density > DENSE },
  { key: "dead", name: "dead", fits: isDead },
];

// What the list depends on: a change of any of these draws it again.
const OF_THE_LIST = ["cell", "bin", "query", "filter", "concept", "sort", "up", "tree", "page"];

class Browser {
  constructor(root) {
    this.root = root;
    this.views = new Map();
    this.state = { cell: -1, query: "", filter: "all", concept: "", bin: null, sort: "f1", up: false, tree: false, latent: null, page: 0 };
    const several = new Set(DATA.cells.map((c) => c.run)).size > 1;
    const cellName = (c) => `${several ? `${c.run}: ` : ""}${c.title} (${c.n} latents)`;
    this.cells = h("select", { id: "cell", change: () => this.open(Number(this.cells.value)) }, DATA.cells.map((c, i) => h("option", { value: i }, cellName(c))));
    this.search = h("input", { id: "search", type: "search", placeholder: "rule, text or #number", "aria-label": "search latents", input: () => this.set({ query: this.search.value, page: 0 }) });
    this.filter = h("select", { id: "filter", "aria-label": "kind of latent", change: () => this.set({ filter: this.filter.value, page: 0 }) });
    this.concept = h("select", { id: "concept", "aria-label": "concept", change: () => this.set({ concept: this.concept.value, page: 0 }) });
    this.count = h("span", { class: "quiet", role: "status", "aria-live": "polite" });
    this.tree = h("button", { type: "button", hidden: true, "aria-pressed": "false", click: () => this.set({ tree: !this.state.tree, page: 0 }) }, "As a tree");
    this.chart = h("div", { class: "density-box" });
    this.list = h("div", { class: "list", role: "region", "aria-label": "latents", keydown: (e) => this.key(e) });
    this.card = h("div", { class: "card", id: "latent", "aria-live": "polite" });
    const tools = h("div", { class: "tools" }, h("label", null, "Cell ", this.cells), this.search, this.filter, this.concept, this.tree, this.count);
    root.append(tools, h("div", { class: "split" }, this.list, this.card), this.chart);
  }

  // The view of a cell, unpacked once.
  async load(index) {
    if (!this.views.has(index)) this.views.set(index, new View(index, JSON.parse(await (await unpack(`cell-${index}`)).text())));
    return this.views.get(index);
  }

  async open(index, latent) {
    try {
      this.view = await this.load(index);
    } catch (error) {
      this.card.replaceChildren(h("p", { class: "alarm" }, `The features cannot be shown: ${error.message}`));
      return;
    }
    this.cells.value = String(index);
    this.offer();
    const sort = this.view.columns.some((c) => c.key === this.state.sort) ? this.state.sort : "density";
    this.set({ cell: index, bin: null, page: 0, filter: "all", concept: "", tree: this.state.tree && this.view.isTree, sort });
    this.set({ latent: latent ?? (this.found.length ? this.found[0].latent : null) });
    this.reveal();
  }

  // Turn to the page of the list with the chosen latent, and scroll the list to it.
  reveal() {
    const at = this.found.findIndex((f) => f.latent === this.state.latent);
    if (at < 0) return;
    if (Math.floor(at / PAGE) !== this.state.page) this.set({ page: Math.floor(at / PAGE) });
    const row = this.list.querySelector("tr[aria-selected=true]");
    if (row) this.list.scrollTop = Math.max(0, row.offsetTop - this.list.clientHeight / 3);
  }

  // The filters that this cell has latents for, with their numbers.
  offer() {
    const latents = this.view.latents, options = FILTERS.map((f) => [f, latents.filter(f.fits).length]);
    this.filter.replaceChildren(...options.filter(([, n]) => n).map(([f, n]) => h("option", { value: f.key }, `${f.name} (${n})`)));
    const counts = new Map();
    for (const f of latents) if (f.concept && Math.abs(f.phi) >= CONCEPT_PHI) counts.set(f.concept, (counts.get(f.concept) || 0) + 1);
    const names = [...counts].sort((a, b) => b[1] - a[1] || f0(a[0], b[0]));
    this.concept.hidden = !names.length;
    const bytes = this.view.contexts.bytes;
    this.concept.replaceChildren(h("option", { value: "" }, "any concept"), ...names.map(([name, n]) => h("option", { value: name }, `${clear(name, bytes)} (${n})`)));
  }

  // The one place where the state changes.
  set(change) {
    const before = this.state;
    this.state = { ...before, ...change };
    if (["cell", "bin"].some((k) => k in change)) this.drawChart();
    if (OF_THE_LIST.some((k) => k in change)) this.drawList();
    if ("latent" in change || ("cell" in change && before.cell !== this.state.cell)) this.drawCard();
  }

  matching() {
    const { query, filter, concept, bin, sort, up, tree } = this.state, wanted = query.trim().toLowerCase();
    const get = COLUMNS.find((c) => c.key === sort).get, ofKind = FILTERS.find((f) => f.key === filter).fits;
    const exact = /^#?\d+$/.test(wanted) ? Number(wanted.replace("#", "")) : null;
    const said = (f) => !wanted || f.latent === exact || (wanted[0] !== "#" && this.view.words(f).includes(wanted));
    const about = (f) => !concept || (f.concept === concept && Math.abs(f.phi) >= CONCEPT_PHI);
    const fits = (f) => (bin === null || binOf(f.density) === bin) && ofKind(f) && about(f) && said(f) && (!tree || (f.children && f.children.length));
    const value = (f) => { const v = get(f); return v === undefined || v === null ? (up ? Infinity : -Infinity) : v; };
    return this.view.latents.filter(fits).sort((a, b) => (f0(value(a), value(b)) * (up ? 1 : -1)) || a.latent - b.latent);
  }

  drawChart() { this.chart.replaceChildren(densityChart(this.view.latents, this.state.bin, (bin) => this.set({ bin, page: 0 }))); }

  drawList() {
    this.found = this.matching();
    const { page, bin, tree } = this.state, columns = this.view.columns;
    this.tree.hidden = !this.view.isTree;
    this.tree.setAttribute("aria-pressed", String(tree));
    this.filter.value = this.state.filter;
    this.concept.value = this.state.concept;
    const clearBin = bin === null ? "" : h("button", { type: "button", class: "clear", click: () => this.set({ bin: null, page: 0 }) }, `✕ ${binName(bin)}`);
    this.count.replaceChildren(`${this.found.length} of ${this.view.latents.length} latents`, clearBin);
    const heads = columns.map((c) => {
      const on = this.state.sort === c.key;
      return h("th", { scope: "col", class: c.narrow ? "narrow" : null, "aria-sort": on ? (this.state.up ? "ascending" : "descending") : "none" },
        h("button", { type: "button", "data-sort": c.key, click: () => this.set({ sort: c.key, up: on ? !this.state.up : Boolean(c.up), page: 0 }) }, c.name, on ? (this.state.up ? " ↑" : " ↓") : ""));
    });
    const rows = this.found.slice(page * PAGE, (page + 1) * PAGE).map((f) => this.row(f, columns));
    const last = h("th", { scope: "col", class: "about" }, this.view.latents.some((f) => f.rule) ? "rule, or strongest context" : "strongest context");
    this.list.replaceChildren(h("table", { class: "latents" }, h("thead", null, h("tr", null, heads, last)), h("tbody", null, rows)), this.pager() || "");
    this.list.scrollTop = 0;
    this.mark();
  }

  // The pages of the list; null if there is one.
  pager() {
    const { page } = this.state, pages = Math.ceil(this.found.length / PAGE);
    if (pages < 2) return null;
    const go = (to, name) => h("button", { type: "button", "aria-label": name, hidden: to < 0 || to >= pages, click: () => this.set({ page: to }) }, name === "next page" ? "→" : "←");
    const shown = `${page * PAGE + 1} to ${Math.min((page + 1) * PAGE, this.found.length)} of ${this.found.length}`;
    return h("p", { class: "pager" }, go(page - 1, "previous page"), ` ${shown} `, go(page + 1, "next page"));
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
    const wanted = /^#latent-(\d+)-(\d+)$/.exec(location.hash);
    if (!wanted || !DATA.cells[Number(wanted[1])]) return;
    const cell = Number(wanted[1]), latent = Number(wanted[2]);
    if (this.state.cell !== cell) await this.open(cell, latent);
    if (!this.view) return;
    this.set({ latent });
    const box = this.card.getBoundingClientRect(), onPhone = matchMedia("(max-width: 900px)").matches;
    if (onPhone || box.top > innerHeight - 80 || box.bottom < 80) this.card.scrollIntoView();
  }
  // The latent `by` places further in the list, whatever page it is on.
  move(by) {
    const at = this.found.findIndex((f) => f.latent === this.state.latent), next = this.found[at + by];
    if (!next) return;
    const page = Math.floor((at + by) / PAGE);
    if (page !== this.state.page) this.set({ page });
    this.go(next.latent);
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
    this.card.replaceChildren(feature ? latentCard(feature, this.view, (by) => this.move(by)) : h("p", { class: "quiet" }, this.state.latent === null ? "No latent." : `Latent ${this.state.latent} is not among those stored for this cell.`));
    this.card.scrollTop = 0;
  }
}
const f0 = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
