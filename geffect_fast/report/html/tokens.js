"use strict";
(() => {
  const { effects, objectives } = JSON.parse(document.getElementById("tokens-data").textContent);
  const all = (selector) => [...document.querySelectorAll(selector)];
  const risks = effects.map((_, m) => {
    const within = `section[data-risk="${m}"]`;
    return {  // along the token axis; a row has a cell a column
      tokens: all(`${within} .text span`),
      rows: all(`${within} tbody tr`).map((row) => [...row.querySelectorAll("td")]),
      totals: all(`${within} .total`),
      tops: all(`${within} .top span`),
    };
  });
  const scales = all(".scale");
  const exact = (value) =>
    value === null ? "not finite" : value === 0 ? "0" : (value < 0 ? "" : "+") + value.toExponential(4);
  const inline = (text) => text.replaceAll("\n", "").trim() || "␣".repeat(text.length);

  // a letter a token: a most unwanted, j zero, s most wanted, t undefined
  const good = (code, i) => code.charCodeAt(i) - 106;
  const paint = (element, m, code, i, value) => {
    const level = good(code, i);
    element.className = level === 10 ? "n" : level === 0 ? "" : (level > 0 ? "w" : "x") + Math.abs(level);
    element.title = `${effects[m]} = ${exact(value)}` + element.title.slice(element.title.indexOf(" · "));
  };
  const mark = (level, value) =>
    level === 10 ? "?" : level === 0 ? "·" : (value < 0 ? "-" : "+") + Math.abs(level) + (level < 0 ? "!" : "");

  const show = (objective) => {
    const title = document.getElementById("tokens-heading");
    title.textContent = objective.heading;
    if (title.tagName === "H1") document.title = objective.heading;
    risks.forEach((risk, m) => {
      const codes = objective.levels[m], values = objective.values[m];
      scales[m].textContent = objective.scales[m];
      risk.tokens.forEach((token, i) => paint(token, m, codes[0], i, values[0][i]));
      risk.rows.forEach((cells, i) => cells.forEach((cell, c) => {
        paint(cell, m, codes[c], i, values[c][i]);
        cell.textContent = mark(good(codes[c], i), values[c][i]);
      }));
      risk.totals.forEach((total, at) => { total.textContent = objective.totals[m][at]; });
      risk.tops.forEach((top, at) => {
        const words = objective.top[m][at].map(([i, share]) => `“${inline(risk.tokens[i].textContent)}” ${share}`);
        top.textContent = words.join(", ") || "none";
      });
    });
  };
  const select = document.getElementById("tokens-objective");
  if (select) {
    select.addEventListener("change", () => show(objectives[select.value]));
    select.closest(".choose").hidden = false;
    if (select.value !== "0") show(objectives[select.value]);  // as chosen before a reload
  }

  // tooltips for fingers, of all risks
  const detail = document.getElementById("tokens-detail");
  const place = new Map(risks.flatMap((risk) => risk.tokens.map((token, i) => [token, i])));
  const effect = ({ title }) => title.split(" · ")[0];
  const tell = (event) => {
    const element = event.target.closest(".tokens [title]");
    const i = place.get(element);
    const values = i === undefined ? [element] : risks.map((risk) => risk.tokens[i]);
    const row = element?.closest("tr");
    const parts = element ? [...values.map(effect), ...element.title.split(" · ").slice(1)] : [];
    if (row) parts.push(`“${row.firstChild.textContent}”`);
    detail.textContent = parts.join(" · ");
  };
  document.addEventListener("click", tell);
})();
