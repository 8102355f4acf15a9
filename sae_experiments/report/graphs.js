// Attribution graphs: columns of nodes, edges as wide as their weight; a node opens its contexts.
const BOX = { w: 186, h: 44, dx: 300, dy: 54, pad: 14, left: 34 };

// Where every node goes: a column each, a band each row; nodes of one column and row stand below one another in it.
function layout(nodes) {
  const column = (n) => Number(n.column) || 0, row = (n) => Number(n.row) || 0, distinct = (of) => [...new Set(nodes.map(of))].sort((a, b) => a - b);
  const columns = distinct(column), place = new Map(), bands = [];
  let y = BOX.pad;
  for (const r of distinct(row)) {
    const filled = columns.map((c) => nodes.filter((n) => row(n) === r && column(n) === c)), tall = Math.max(...filled.map((f) => f.length));
    filled.forEach((found, c) => found.forEach((node, i) => place.set(node.id, { x: BOX.pad + BOX.left + c * BOX.dx, y: y + (i + (tall - found.length) / 2) * BOX.dy, node })));
    bands.push({ row: r, y, named: filled.flat().some((n) => n.rule || (n.contexts || []).length) });
    y += tall * BOX.dy;
  }
  return { place, bands, width: 2 * BOX.pad + BOX.left + (columns.length - 1) * BOX.dx + BOX.w, height: y + BOX.pad };
}

function graphFigure(graph, number) {
  const { place, bands, width, height } = layout(graph.nodes), relative = bands.some((b) => b.row < 0);
  const edges = (Array.isArray(graph.edges) ? graph.edges : []).filter((e) => place.has(e.from) && place.has(e.to));
  const top = Math.max(...edges.map((e) => Math.abs(e.weight) || 0), 1e-12);
  const card = h("div", { class: "graph-card", "aria-live": "polite" }, h("p", { class: "quiet" }, "Choose a node to see where it fires."));
  const lines = edges.map((e) => {
    const a = place.get(e.from), b = place.get(e.to), right = b.x >= a.x, x1 = a.x + (right ? BOX.w : 0), x2 = b.x + (right ? 0 : BOX.w), y1 = a.y + BOX.h / 2, y2 = b.y + BOX.h / 2, bend = (x2 - x1) / 2;
    return s("path", { class: `edge${e.weight < 0 ? " minus" : ""}`, "data-from": e.from, "data-to": e.to, d: `M${x1},${y1} C${x1 + bend},${y1} ${x2 - bend},${y2} ${x2},${y2}`, "stroke-width": 0.6 + (5 * Math.abs(e.weight)) / top },
      s("title", null, `${a.node.label} → ${b.node.label}: ${show(e.weight)}`));
  });
  const boxes = [...place.values()].map(({ x, y, node }) => {
    const choose = () => {
      for (const g of drawing.querySelectorAll(".node")) g.classList.toggle("on", g === box);
      for (const line of lines) line.classList.toggle("on", line.dataset.from === String(node.id) || line.dataset.to === String(node.id));
      card.replaceChildren(nodeCard(node, edges, place, graph.bytes));
    };
    const key = (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(); } };
    const box = s("g", { class: "node", role: "button", tabindex: 0, "aria-label": String(node.label), "data-node": node.id, click: choose, keydown: key },
      s("rect", { x, y, width: BOX.w, height: BOX.h, rx: 6 }), s("text", { x: x + 8, y: y + 18, class: "label" }, cut(String(node.label ?? node.id), 24)),
      s("text", { x: x + 8, y: y + 34 }, cut(node.rule ? String(node.rule) : node.value === undefined || node.value === null ? "" : show(node.value), 25)), s("title", null, `${node.label}${node.rule ? `: ${node.rule}` : ""}`));
    return box;
  });
  const drawing = s("svg", { class: "graph", viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": String(graph.title) },
    relative ? bands.map((b, i) => [i ? s("line", { class: "axis", x1: 0, x2: width, y1: b.y - 5, y2: b.y - 5 }) : null, s("text", { x: 4, y: b.y + 26 }, !b.named ? "" : b.row === 0 ? "here" : String(b.row).replace("-", "−"))]) : null, lines, boxes);
  return h("figure", { class: "graph-figure", id: `graph-${number}` }, h("div", { class: "scroll", tabindex: 0 }, drawing), card,
    h("figcaption", null, h("strong", null, clear(graph.title || "Graph", false)), ` ${graph.cell || ""}${graph.run ? ` (${graph.run})` : ""}. Blue edges raise, orange edges lower what they point to; width: size of the attribution (widest ${show(top)}).${relative ? " Rows: characters before the place where it fires." : ""}`));
}
const cut = (text, n) => { const chars = Array.from(clear(text, false)); return chars.length > n ? `${chars.slice(0, n - 1).join("")}…` : chars.join(""); };

function nodeCard(node, edges, place, bytes) {
  const name = (id) => clear(place.get(id).node.label ?? id, bytes), contexts = new Contexts({}, bytes);
  const side = (title, found, end) => (found.length ? h("div", null, h("h4", null, title), h("ul", null, found.sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight)).slice(0, 8).map((e) => h("li", null, name(e[end]), " ", h("span", { class: "num" }, `${show(e.weight)}${typeof e.effect === "number" ? ` (measured by ablation ${show(e.effect)})` : ""}`))))) : null);
  return h("div", null, h("h3", null, clear(node.label ?? node.id, bytes)), node.rule ? h("p", { class: "rule" }, h("code", null, clear(node.rule, bytes))) : null,
    node.value === undefined || node.value === null ? null : h("p", null, `Activation here: ${show(node.value)}`),
    h("div", { class: "columns" }, side("From", edges.filter((e) => e.to === node.id), "from"), side("To", edges.filter((e) => e.from === node.id), "to")),
    node.contexts && node.contexts.length ? h("div", null, h("h4", null, "Strongest contexts"), contexts.list(node.contexts, node.max || 1)) : null);
}
