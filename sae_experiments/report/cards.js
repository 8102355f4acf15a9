// The cards of the first screen: a latent with its rule, its F1 and three contexts.
const CARD_CONTEXTS = 3;

async function drawCards(browser) {
  const place = byId("cards");
  if (!place) return;
  const cards = [];
  for (const [cell, latent] of DATA.cards) {
    const view = await browser.load(cell);
    const feature = view && view.byNumber.get(latent);
    if (feature) cards.push(latentSummary(feature, view));
  }
  place.replaceChildren(...cards);
}

function latentSummary(feature, view) {
  const about = DATA.cells[view.index];
  const several = new Set(DATA.cells.map((c) => c.dataset)).size > 1;
  const where = [several || !about.sae ? about.dataset : "", about.sae].filter(Boolean).join(", ");
  const link = h("a", { href: `#latent-${view.index}-${feature.latent}` }, `#${feature.latent}`);
  const head = h(
    "p",
    { class: "card-head" },
    h("code", { class: "rule-text" }, clear(feature.rule || view.about(feature), view.contexts.bytes)),
    h("span", { class: "num" }, feature.f1 === undefined ? "" : `F1 ${show(feature.f1, 2)}`),
  );
  const top = (feature.top || []).slice(0, CARD_CONTEXTS);
  const contexts = h("ol", { class: "contexts" }, top.map((c) => view.contexts.node(c, feature.max || 1, 26)));
  const foot = h("p", { class: "quiet" }, link, ` ${where}, `, h("span", { class: "num" }, `fires on ${percent(feature.density)}`));
  return h("article", { class: "telling" }, head, contexts, foot);
}
