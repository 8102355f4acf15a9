// Building nodes. Text only ever becomes a text node or an attribute listed here; there is no markup from strings in this file.
const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);
const SAFE = /^(class|id|type|role|title|for|name|value|placeholder|tabindex|scope|colspan|alt|open|hidden|aria-[a-z]+|data-[a-z-]+|x|y|x1|y1|x2|y2|cx|cy|r|rx|d|width|height|viewBox|points|transform|text-anchor|dominant-baseline|preserveAspectRatio|marker-end|fill|stroke|stroke-width|opacity)$/;

function fillNode(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(key, value);
    else if (key === "href" && /^#[\w.-]*$/.test(value)) node.setAttribute("href", value);
    else if (SAFE.test(key)) node.setAttribute(key, value === true ? "" : String(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return node;
}
const h = (name, attributes, ...children) => fillNode(document.createElement(name), attributes, children);
const s = (name, attributes, ...children) => fillNode(document.createElementNS(SVG, name), attributes, children);

function show(value, digits = 3) {
  if (typeof value !== "number" || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(1);
  // As many digits in every row of a list: 0.520 beside 0.514.
  return Number.isInteger(value) ? String(value) : value.toFixed(Math.max(0, digits - 1 - Math.floor(Math.log10(size))));
}
const score = (value) => (typeof value === "number" ? value.toFixed(2) : "–"); // a number from 0 to 1
function percent(value) {
  if (typeof value !== "number") return "–";
  const p = 100 * value;
  return p === 0 ? "0 %" : p < 0.01 ? "< 0.01 %" : `${p < 1 ? p.toFixed(2) : p < 10 ? p.toFixed(1) : p.toFixed(0)} %`;
}

const DATA = JSON.parse(byId("data").textContent);

async function unpack(id) {
  if (typeof DecompressionStream === "undefined") throw new Error("this browser is too old to unpack it (it has no DecompressionStream)");
  const bytes = Uint8Array.from(atob(byId(id).textContent), (c) => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip")));
}
