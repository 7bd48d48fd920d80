// What is wrong with a page as it is shown, as JSON: read by the browser that shows it.
(() => {
  const channel = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) =>
    0.2126 * channel(r / 255) + 0.7152 * channel(g / 255) + 0.0722 * channel(b / 255);
  const rgba = (text) => {
    const [r, g, b, a = 1] = text.match(/[\d.]+/g).map(Number);
    return [r, g, b, a];
  };
  const over = (top, bottom) =>
    [0, 1, 2].map((i) => top[i] * top[3] + bottom[i] * (1 - top[3])).concat(1);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const own = rgba(getComputedStyle(at).backgroundColor);
      if (own[3] === 1) return own;
    }
    return [255, 255, 255, 1];
  };
  const opacity = (element) => {
    let product = 1;
    for (let at = element; at; at = at.parentElement) product *= getComputedStyle(at).opacity;
    return product;
  };
  // as the page's filter shows a colour of a drawing
  const shown = (element, [r, g, b, a]) => {
    const svg = element.closest("svg");
    const filter = svg && /invert\(([\d.]+)\) hue-rotate\(180deg\)/.exec(getComputedStyle(svg).filter);
    if (!filter) return [r, g, b, a];
    const [x, y, z] = [r, g, b].map((c) => 255 * filter[1] + (1 - 2 * filter[1]) * c);
    const grey = 2 * (0.213 * x + 0.715 * y + 0.072 * z);
    return [...[x, y, z].map((c) => Math.round(Math.min(255, Math.max(0, grey - c)))), a];
  };
  const seen = (element) => element.checkVisibility({ opacityProperty: true });
  const name = (element) => `${element.tagName}.${element.getAttribute("class") ?? ""}`;

  const texts = [...document.querySelectorAll("body *")].filter(
    (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) &&
      seen(e) && !e.closest(".skip, script, style, title"));
  const faint = [], small = [];
  for (const element of texts) {
    const svg = element.closest("svg");
    const style = getComputedStyle(element);
    const behind = ground(element);
    const colour = shown(element, rgba(svg ? style.fill : style.color));
    colour[3] *= opacity(element);
    const [a, b] = [luminance(over(colour, behind)), luminance(behind)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) faint.push(`${name(element)} “${element.textContent.slice(0, 30)}” ${ratio.toFixed(2)}`);
    let size = parseFloat(style.fontSize);
    if (svg) size *= svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    if (size < (element.tagName === "tspan" ? 4 : 6.5)) small.push(`${name(element)} “${element.textContent.slice(0, 30)}” ${size.toFixed(1)}`);
  }
  const wide = [...document.querySelectorAll("body *")].filter((e) => {
    const box = e.getBoundingClientRect();
    return seen(e) && !e.closest(".skip") && !e.parentElement.closest(".box, .map, svg") &&
      box.width && (box.right > innerWidth + 1 || box.left < -1);
  }).map((e) => `${name(e)} ${e.getBoundingClientRect().right}`);
  const style = getComputedStyle(document.body);
  return JSON.stringify({
    faint: faint.slice(0, 8), small: small.slice(0, 8), wide: wide.slice(0, 8),
    scrolls: document.documentElement.scrollWidth - innerWidth,
    empty: [...document.querySelectorAll("section.part, figure svg, table")]
      .filter((e) => seen(e) && (e.getBoundingClientRect().width < 20 || e.getBoundingClientRect().height < 10))
      .map(name),
    ground: luminance(rgba(style.backgroundColor)), ink: luminance(rgba(style.color)),
    lines: [...new Set([...document.querySelectorAll("figure svg path")]
      .filter((e) => getComputedStyle(e).stroke !== "none")
      .map((e) => shown(e, rgba(getComputedStyle(e).stroke)).slice(0, 3).join(" ")))],
  });
})();
