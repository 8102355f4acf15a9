// Attribution graphs: columns of nodes, edges as wide as their weight; a node opens its contexts.
const BOX = { w: 186, h: 44, dx: 300, dy: 54, pad: 14, left: 34 };

// Where every node goes: a column each, a band each row; nodes of one column and row stand below one another in it.
function layout(nodes) {
  const column = (n) => Number(n.column) || 0, row = (n) => Number(n.row) || 0, distinct = (of) => [...new Set(nodes.map(of))].sort((a, b) => a - b);
  const columns = distinct(column), place = new Map(), bands = [];
  let y = BOX.pad;
  for (const r of distinct(row)) {
    const filled = columns.map((c) => nodes.filter((n) => row(n) === r && column(n) === c)), tall = Math.max(...filled.map((f) => f.length));
    filled.forEach((found, c) => found.forEach((node, i) => place.set(keyOf(node.id), { x: BOX.pad + BOX.left + c * BOX.dx, y: y + (i + (tall - found.length) / 2) * BOX.dy, node })));
    bands.push({ row: r, y, named: filled.flat().some((n) => n.rule || (n.contexts || []).length) });
    y += tall * BOX.dy;
  }
  return { place, bands, width: 2 * BOX.pad + BOX.left + (columns.length - 1) * BOX.dx + BOX.w, height: y + BOX.pad };
}

// Ids become strings, so that what is stored in the page and what is drawn from it are found alike.
const keyOf = (value) => String(value);
const listOf = (value) => (Array.isArray(value) ? value : []);
const sum = (values) => values.reduce((total, value) => total + value, 0);

// One graph with what its reader has made of it: nodes pinned, latents grouped, weak nodes hidden.
class GraphView {
  constructor(graph, number) {
    this.graph = graph;
    this.number = number;
    this.nodes = new Map(graph.nodes.map((node) => [keyOf(node.id), node]));
    this.edges = listOf(graph.edges).map((e) => ({ ...e, from: keyOf(e.from), to: keyOf(e.to) }))
      .filter((e) => this.nodes.has(e.from) && this.nodes.has(e.to));
    const effects = listOf(graph.removals);
    this.groups = listOf(graph.groups).map((group, i) => ({ ...this.group(String(group.label), listOf(group.members)), effect: effects[i] }))
      .filter((group) => group.members.length > 1);
    this.pinned = new Set();
    this.folded = false;
    this.most = Infinity;
    this.chosen = null;
    this.scroll = h("div", { class: "scroll", tabindex: 0 });
    this.card = h("div", { class: "graph-card", "aria-live": "polite" }, h("p", { class: "quiet" }, "Choose a node to see where it fires."));
    this.caption = h("figcaption");
    this.figure = h("figure", { class: "graph-figure", id: `graph-${number}` }, this.caption, this.tools(), this.scroll, this.card);
    this.draw();
  }

  group(label, members) { return { label, total: members.length, members: members.map(keyOf).filter((id) => this.nodes.has(id)) }; }

  tools() {
    const shares = this.graph.nodes.map((node) => node.influence).filter((share) => typeof share === "number");
    this.fold = h("button", { type: "button", class: "fold", "aria-pressed": "false", click: () => { this.folded = !this.folded; this.draw(); } }, "Supernodes");
    this.join = h("button", { type: "button", class: "join", title: "Make one supernode of the pinned latents", click: () => this.joinPinned() }, "Group pinned");
    this.range = h("input", { type: "range", "aria-label": "share of the influence that is shown", input: () => { this.most = Number(this.range.value); this.draw(); } });
    const last = Math.ceil(100 * Math.max(...shares, 0)) / 100;
    Object.assign(this.range, { min: Math.floor(100 * Math.min(...shares, last)) / 100, max: last, step: "any", value: last });
    this.said = h("span", { class: "quiet", role: "status", "aria-live": "polite" });
    return h("div", { class: "tools" }, shares.length ? h("label", null, "Influence shown ", this.range) : null, this.fold, this.join, this.said);
  }

  // Pinned latents leave the groups they were in.
  joinPinned() {
    const members = [...this.pinned].filter((id) => this.nodes.has(id));
    if (members.length < 2) return;
    this.groups = this.groups.map((group) => {
      const rest = group.members.filter((id) => !this.pinned.has(id));
      return rest.length === group.members.length ? group : { ...group, members: rest, effect: undefined };
    }).filter((group) => group.members.length > 1);
    this.groups.push(this.group(`own group of ${members.length}`, members));
    this.folded = true;
    this.draw();
  }

  ungroup(group) {
    this.groups = this.groups.filter((other) => other !== group);
    this.chosen = null;
    this.draw();
  }

  pin(id) {
    const members = this.shown.get(id)?.members || [id];
    const all = members.every((member) => this.pinned.has(member));
    for (const member of members) if (all) this.pinned.delete(member); else this.pinned.add(member);
    this.draw();
  }

  // Nodes to draw by id, groups in place of their members, and where each node has gone.
  visible() {
    const within = (id, node) => typeof node.influence !== "number" || node.influence <= this.most || this.pinned.has(id);
    const kept = new Map([...this.nodes].filter(([id, node]) => within(id, node)));
    const home = new Map([...kept.keys()].map((id) => [id, id]));
    if (this.folded) this.groups.forEach((group, i) => {
      const members = group.members.filter((id) => kept.has(id));
      if (members.length < 2) return;
      const id = `group ${i}`, inside = members.map((member) => kept.get(member));
      kept.set(id, { id, label: group.label, column: Math.max(...inside.map((n) => Number(n.column) || 0)), row: inside[0].row, members, group });
      for (const member of members) { kept.delete(member); home.set(member, id); }
    });
    return { kept, home };
  }

  // Edges between what is drawn; those between the members of two groups are added up.
  joined(home) {
    const found = new Map();
    for (const edge of this.edges) {
      const from = home.get(edge.from), to = home.get(edge.to);
      if (from === undefined || to === undefined || from === to) continue;
      const key = JSON.stringify([from, to]);
      found.set(key, [...(found.get(key) || []), edge]);
    }
    return [...found].map(([key, edges]) => {
      const [from, to] = JSON.parse(key);
      return edges.length === 1 ? { ...edges[0], from, to } : { from, to, weight: sum(edges.map((e) => Number(e.weight) || 0)), joins: edges.length };
    });
  }

  draw() {
    const { kept, home } = this.visible(), held = document.activeElement?.dataset?.node, had = this.scroll.contains(document.activeElement);
    this.shown = kept;
    this.lines = this.joined(home);
    const { place, bands, width, height } = layout([...kept.values()]), relative = bands.some((b) => b.row < 0);
    const top = Math.max(...this.lines.map((e) => Math.abs(e.weight) || 0), 1e-12);
    this.place = place;
    const lines = this.lines.map((edge) => edgeLine(edge, place, top)), boxes = [...place.values()].map((at) => this.box(at));
    this.drawing = s("svg", { class: "graph", viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": String(this.graph.title) },
      relative ? bands.map((b, i) => [i ? s("line", { class: "axis", x1: 0, x2: width, y1: b.y - 5, y2: b.y - 5 }) : null,
        s("text", { x: 4, y: b.y + 26 }, !b.named ? "" : b.row === 0 ? "here" : String(b.row).replace("-", "−"))]) : null, lines, boxes);
    this.scroll.replaceChildren(this.drawing);
    this.caption.replaceChildren(h("strong", null, clear(this.graph.title || "Graph", false)),
      ` ${this.graph.cell || ""}${this.graph.run ? ` (${this.graph.run})` : ""}. Blue edges raise, orange edges lower what they point to; width: size of the attribution (widest ${show(top)}).${relative ? " Rows: positions before the place where it fires." : ""} P pins a node.`);
    this.fold.hidden = !this.groups.length;
    this.fold.setAttribute("aria-pressed", String(this.folded));
    this.join.disabled = this.pinned.size < 2;
    this.said.textContent = kept.size < this.nodes.size || this.pinned.size ? `${kept.size} nodes${this.pinned.size ? `, ${this.pinned.size} pinned` : ""}` : "";
    if (this.chosen !== null) this.choose(this.chosen);
    if (had) this.boxOf(held)?.focus();
  }

  boxOf(id) { return [...this.drawing.querySelectorAll(".node")].find((g) => g.dataset.node === id); }

  choose(id) {
    this.chosen = this.shown.has(id) ? id : null;
    for (const g of this.drawing.querySelectorAll(".node")) g.classList.toggle("on", g.dataset.node === this.chosen);
    for (const line of this.drawing.querySelectorAll(".edge")) line.classList.toggle("on", line.dataset.from === this.chosen || line.dataset.to === this.chosen);
    if (this.chosen !== null) this.card.replaceChildren(nodeCard(this, this.shown.get(id)));
  }

  box({ x, y, node }) {
    const id = keyOf(node.id), pinned = (node.members || [id]).every((member) => this.pinned.has(member));
    const key = (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); this.choose(id); }
      if (event.key === "p" || event.key === "P") this.pin(id);
    };
    const under = node.members ? `${node.members.length} latents` : node.rule ? String(node.rule) : node.value === undefined || node.value === null ? "" : show(node.value);
    return s("g", { class: `node${node.members ? " many" : ""}${pinned ? " pinned" : ""}`, role: "button", tabindex: 0, "aria-label": String(node.label), "data-node": id, click: () => this.choose(id), keydown: key },
      s("rect", { x, y, width: BOX.w, height: BOX.h, rx: 6 }), s("text", { x: x + 8, y: y + 18, class: "label" }, cut(String(node.label ?? node.id), 24)),
      s("text", { x: x + 8, y: y + 34 }, cut(under, 25)), s("title", null, `${node.label}${node.rule ? `: ${node.rule}` : ""}`));
  }
}

function edgeLine(edge, place, top) {
  const a = place.get(edge.from), b = place.get(edge.to), right = b.x >= a.x;
  const x1 = a.x + (right ? BOX.w : 0), x2 = b.x + (right ? 0 : BOX.w), y1 = a.y + BOX.h / 2, y2 = b.y + BOX.h / 2, bend = (x2 - x1) / 2;
  return s("path", { class: `edge${edge.weight < 0 ? " minus" : ""}`, "data-from": edge.from, "data-to": edge.to, d: `M${x1},${y1} C${x1 + bend},${y1} ${x2 - bend},${y2} ${x2},${y2}`, "stroke-width": 0.6 + (5 * Math.abs(edge.weight)) / top },
    s("title", null, `${a.node.label} → ${b.node.label}: ${weightOf(edge)}`));
}

// Weight of an edge and what carries it: heads, or how many edges were added up.
function weightOf(edge) {
  const parts = listOf(edge.parts).filter((part) => Array.isArray(part)).map(([name, weight]) => `${name} ${show(weight)}`);
  const more = edge.joins ? `sum of ${edge.joins} edges` : parts.join(", ");
  return `${show(edge.weight)}${more ? ` (${more})` : ""}${typeof edge.effect === "number" ? ` (measured by ablation ${show(edge.effect)})` : ""}`;
}

const graphFigure = (graph, number) => new GraphView(graph, number).figure;
const cut = (text, n) => { const chars = Array.from(clear(text, false)); return chars.length > n ? `${chars.slice(0, n - 1).join("")}…` : chars.join(""); };

// What the removal of a whole supernode did to the most probable next token.
function removal({ effect, total }) {
  if (!effect || typeof effect.measured !== "number") return null;
  return h("p", { class: "removal" }, `Its ${total} latents removed together: probability of the next token ${show(effect.before)} → ${show(effect.after)}; its logit ${show(effect.measured)}, predicted ${show(effect.predicted)}.`);
}

function nodeCard(view, node) {
  const bytes = view.graph.bytes, id = keyOf(node.id), contexts = new Contexts({}, bytes);
  const name = (other) => clear(view.shown.get(other)?.label ?? view.nodes.get(other)?.label ?? other, bytes);
  const side = (title, found, end) => (found.length ? h("div", null, h("h4", null, title), h("ul", null, found.sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight)).slice(0, 8).map((e) => h("li", null, name(e[end]), " ", h("span", { class: "num" }, weightOf(e)))))) : null);
  const pinned = (node.members || [id]).every((member) => view.pinned.has(member));
  const buttons = h("p", { class: "tools" }, h("button", { type: "button", class: "pin", "aria-pressed": String(pinned), click: () => view.pin(id) }, pinned ? "Unpin" : "Pin"),
    node.group ? h("button", { type: "button", class: "ungroup", click: () => view.ungroup(node.group) }, "Ungroup") : null);
  const members = (node.members || []).map((member) => view.nodes.get(member));
  return h("div", null, h("h3", null, clear(node.label ?? node.id, bytes)), buttons, node.rule ? h("p", { class: "rule" }, h("code", null, clear(node.rule, bytes))) : null,
    node.value === undefined || node.value === null ? null : h("p", null, `Activation here: ${show(node.value)}`), node.group ? removal(node.group) : null,
    members.length ? h("ul", { class: "members" }, members.map((one) => h("li", null, clear(one.label, bytes), one.rule ? [" ", h("code", null, clear(one.rule, bytes))] : null))) : null,
    h("div", { class: "columns" }, side("From", view.lines.filter((e) => e.to === id), "from"), side("To", view.lines.filter((e) => e.from === id), "to")),
    node.contexts && node.contexts.length ? h("div", null, h("h4", null, "Strongest contexts"), contexts.list(node.contexts, node.max || 1)) : null);
}
