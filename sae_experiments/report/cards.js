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
  place.replaceChildren(h("p", { class: "quiet cards-about" }, "Where a latent fires: a rule for it, its F1 on other text, its three strongest contexts."), ...cards);
}

function latentSummary(feature, view) {
  const about = DATA.cells[view.index];
  const several = new Set(DATA.cells.map((c) => c.dataset)).size > 1;
  const where = [several ? about.dataset : "", about.sae].filter(Boolean).join(", ");
  const link = h("a", { href: `#latent-${view.index}-${feature.latent}` }, `#${feature.latent}`);
  const head = h(
    "p",
    { class: "card-head" },
    h("code", { class: "rule-text", title: clear(feature.rule || "", view.contexts.bytes) || null }, clear(feature.rule || view.about(feature), view.contexts.bytes)),
    h("span", { class: "num" }, feature.f1 === undefined ? "" : `F1 ${score(feature.f1)}`),
  );
  const top = (feature.top || []).slice(0, CARD_CONTEXTS);
  const contexts = h("ol", { class: "contexts" }, top.map((c) => view.contexts.node(c, feature.max || 1, 26)));
  const known = feature.concept && Math.abs(feature.phi) >= CONCEPT_PHI && !String(feature.rule || "").includes(`(${feature.concept})`);
  const concept = known ? `, ${feature.phi < 0 ? "not " : ""}${clear(feature.concept, view.contexts.bytes)}` : "";
  const foot = h("p", { class: "quiet foot" }, link, where ? ` ${where}, ` : " ", h("span", { class: "num" }, `fires on ${percent(feature.density)}`), h("span", { title: "the concept that goes best with it, and their correlation" }, concept));
  return h("article", { class: "telling" }, head, contexts, foot);
}
