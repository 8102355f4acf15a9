// The card of one latent.
const KNOWN = new Set(["latent", "density", "max", "mean", "histogram", "top", "samples", "next", "promotes", "suppresses", "partners", "stability", "rule", "weak_rule", "f1",
  "precision", "recall", "lift", "length", "order", "r2", "concept", "phi", "threshold", "active_frac", "level", "children", "parents", "steering", "virtual_from", "virtual_to"]);

function bar(value, top) {
  const inner = h("span", { class: `fill${value < 0 ? " minus" : ""}` });
  inner.style.setProperty("width", `${Math.min(100, (100 * Math.abs(value)) / (top || 1))}%`);
  return h("span", { class: "meter", "aria-hidden": "true" }, inner);
}

function characters(title, rows, bytes, format, why) {
  if (!rows || !rows.length) return null;
  const top = Math.max(...rows.map((r) => Math.abs(r[1])));
  return h("div", { class: "chars" }, h("h4", { title: why }, title), h("ul", null, rows.map((r) =>
    h("li", null, charNode(String(r[0]), bytes), bar(r[1], top), h("span", { class: "num" }, format(r))))));
}

function facts(feature, bytes) {
  const rows = [["fires on", percent(feature.density)], ["strongest", show(feature.max)], ["mean where it fires", show(feature.mean)],
    ["level", feature.level], ["stability", feature.stability === undefined ? undefined : show(feature.stability, 2)],
    ["n-gram order", feature.order ? `${feature.order} (R² ${show(feature.r2, 2)})` : undefined],
    ["concept", feature.concept ? `${clear(feature.concept, bytes)} (φ ${show(feature.phi, 2)})` : undefined]];
  for (const [key, value] of Object.entries(feature)) if (!KNOWN.has(key) && (typeof value !== "object" || value === null)) rows.push([clear(key, bytes).replaceAll("_", " "), typeof value === "number" ? show(value) : clear(value, bytes)]);
  return h("dl", { class: "facts-list" }, rows.filter(([, v]) => v !== undefined && v !== null && v !== "–").map(([k, v]) => h("div", null, h("dt", null, k), h("dd", null, String(v)))));
}

function ruleLine(feature, bytes) {
  if (!feature.rule && feature.weak_rule) return h("p", { class: "quiet" }, `No short rule tells where it fires: the best has F1 ${score(feature.f1)} on text it was not made from.`);
  if (!feature.rule) return h("p", { class: "quiet" }, "No rule: it fires too rarely, or the metric rules was not among those measured.");
  const shown = feature.f1 === undefined ? null : h("span", { class: "scores" }, bar(feature.f1, 1), ` F1 ${score(feature.f1)} (precision ${score(feature.precision)}, recall ${score(feature.recall)} on text it was not made from)`);
  return h("p", { class: "rule" }, h("code", null, clear(feature.rule, bytes)), shown);
}

// Continuations of a prompt with the latent's direction added to the stream, a line per strength.
function steered(feature, bytes) {
  const made = feature.steering;
  if (!made || !Array.isArray(made.texts)) return null;
  const lines = made.texts.filter((pair) => Array.isArray(pair)).map(([strength, text]) =>
    h("div", null, h("dt", null, strength > 0 ? `+${show(strength)}` : String(show(strength)).replace("-", "−")), h("dd", null, h("code", null, clear(String(text), bytes)))));
  return h("div", { class: "steering" }, h("h4", { title: "strength is in multiples of its largest activation; the same random numbers in every line" }, "Steering"),
    h("p", { class: "quiet" }, `After the prompt "${clear(String(made.prompt), bytes)}", with this latent added or removed:`), h("dl", null, lines));
}

// Latents it has to do with: [number, weight] as links, each with its rule.
function related(title, pairs, view, name) {
  if (!pairs || !pairs.length) return null;
  return h("div", { class: "related" }, h("h4", null, title), h("ul", null, pairs.map(([id, weight, plain]) => {
    const other = view.byNumber.get(id), more = plain === undefined ? "" : ` (weight ${show(plain, 2)})`;
    return h("li", null, other ? h("a", { href: `#latent-${view.index}-${id}` }, `#${id}`) : `#${id}`, " ", h("span", { class: "num" }, `${name} ${show(weight, 2)}${more}`), " ",
      h("code", { class: "quiet" }, other ? view.about(other) : ""));
  })));
}

function latentCard(feature, view, move) {
  const contexts = view.contexts, max = feature.max || 1;
  const heading = h("div", { class: "latent-head" }, h("h3", { id: "latent-title", tabindex: -1 }, `Latent ${feature.latent}`),
    h("span", { class: "buttons" }, h("button", { type: "button", click: () => move(-1), "aria-label": "previous latent in the list" }, "← previous"),
      h("button", { type: "button", click: () => move(1), "aria-label": "next latent in the list" }, "next →")), h("a", { class: "back", href: "#features" }, "back to the list"));
  if (isDead(feature) && !feature.top) return h("div", null, heading, h("p", null, "Dead: it fires nowhere in the held-out text."));
  const tree = feature.children && feature.children.length ? h("div", { class: "tree" }, h("h4", null, "Below it: features that it opens, and their contexts"), branches(feature, view, new Set([feature.latent]))) : null;
  const list = (title, packed) => (packed && packed.length ? h("div", null, h("h4", null, title), contexts.list(packed, max)) : null);
  return h("div", null, heading, ruleLine(feature, contexts.bytes), facts(feature, contexts.bytes), tree, list("Strongest contexts", feature.top),
    h("div", { class: "columns" },
      characters("Promotes", feature.promotes, contexts.bytes, (r) => `+${show(r[1], 2)}`.replace("+-", "−"), "what it adds to the logits on the direct path, at its strongest"),
      characters("Suppresses", feature.suppresses, contexts.bytes, (r) => show(r[1], 2).replace("-", "−"), "what it takes from the logits on the direct path, at its strongest"),
      characters("Followed by", feature.next, contexts.bytes, (r) => `${percent(r[1])}, ×${show(r[2], 2)}`, `the next ${view.unit} in the text where it fires: share, and how many times its share anywhere`)),
    feature.histogram ? h("div", null, h("h4", null, "Activations where it fires"), histogram(feature.histogram, { low: 0, high: feature.max, label: "histogram of activations", unit: `${view.unit}s` })) : null,
    list("From strongest to weakest, evenly", feature.samples), steered(feature, contexts.bytes),
    h("div", { class: "columns" }, related("Parents", feature.parents, view, "weight"), related("Fires together with", feature.partners, view, "φ"),
      related("Reads from, whatever the prompt", feature.virtual_from, view, "expected"), related("Writes to, whatever the prompt", feature.virtual_to, view, "expected")));
}

// Children as a tree that opens; a latent already above is named, not opened again.
function branches(feature, view, above) {
  return h("ul", { class: "branches" }, (feature.children || []).map(([id, weight]) => {
    const child = view.byNumber.get(id);
    if (!child) return h("li", null, `#${id} `, h("span", { class: "num" }, `weight ${show(weight, 2)}`));
    const box = h("details", null, h("summary", null, h("a", { href: `#latent-${view.index}-${id}` }, `#${id}`), " ", h("span", { class: "num" }, `weight ${show(weight, 2)}`), " ", h("code", null, view.about(child))));
    box.addEventListener("toggle", () => {
      if (!box.open || box.childElementCount > 1) return;
      box.append(child.top ? view.contexts.list(child.top.slice(0, 4), child.max || 1) : "");
      if (child.children && child.children.length && !above.has(id)) box.append(branches(child, view, new Set([...above, id])));
    }, { passive: true });
    return h("li", null, box);
  }));
}
