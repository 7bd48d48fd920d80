// node page.js PAGE.json SCRIPT.js OBJECTIVE...: what the script of a token view makes of its page.
// PAGE.json holds the elements as [tag, attributes, children], of which these are made:
const fs = require("fs");

class Element {
  constructor([tag, attributes, children], parent) {
    Object.assign(this, { tag, attributes, parent, handlers: {} });
    this.children = children.map((c) => (typeof c === "string" ? c : new Element(c, this)));
  }
  get className() { return this.attributes.class ?? ""; }
  set className(value) { this.attributes.class = value; }
  get title() { return this.attributes.title ?? ""; }
  set title(value) { this.attributes.title = value; }
  get firstChild() { return this.children[0]; }
  get hidden() { return "hidden" in this.attributes; }
  set hidden(value) { if (!value) delete this.attributes.hidden; }
  get textContent() {
    return this.children.map((c) => (typeof c === "string" ? c : c.textContent)).join("");
  }
  set textContent(value) { this.children = [String(value)]; }
  addEventListener(name, handler) { this.handlers[name] = handler; }
  within() {
    return this.children.filter((c) => c.tag).flatMap((c) => [c, ...c.within()]);
  }
  is(simple) {
    return simple.match(/\[[^\]]+\]|[.]?[\w-]+/g).every((part) => {
      if (part[0] === ".") return this.className.split(" ").includes(part.slice(1));
      if (part[0] !== "[") return this.tag === part;
      const [name, value] = part.slice(1, -1).replaceAll('"', "").split("=");
      return name in this.attributes && (value === undefined || this.attributes[name] === value);
    });
  }
  matches(selector) {
    const parts = selector.split(" ");
    if (!this.is(parts.pop())) return false;
    let at = this.parent;
    for (; at && parts.length; at = at.parent) if (at.is(parts.at(-1))) parts.pop();
    return !parts.length;
  }
  querySelectorAll(selector) { return this.within().filter((e) => e.matches(selector)); }
  closest(selector) { return this.matches(selector) ? this : (this.parent?.closest(selector) ?? null); }
}

const [page, script, ...choices] = process.argv.slice(2);
const root = new Element(JSON.parse(fs.readFileSync(page)), null);
const find = (selector) => root.querySelectorAll(selector);
global.document = root;
document.getElementById = (id) => root.within().find((e) => e.attributes.id === id) ?? null;
const select = document.getElementById("tokens-objective");
select.value = "0";
eval(fs.readFileSync(script, "utf8"));

const texts = (selector) => find(selector).map((e) => e.textContent);
const state = () => ({
  tokens: find(".tokens [title]").map((e) => [e.className, e.title, e.textContent]),
  rest: ["h1", ".scale", ".total", ".top"].map(texts),
  hidden: select.closest(".choose").hidden,
});
const states = choices.map((choice) => {
  select.value = choice;
  select.handlers.change();
  return state();
});
const told = [".text span", "td[title]", "h2"].map((selector) => {
  root.handlers.click({ target: find(selector)[5 % find(selector).length] });
  return document.getElementById("tokens-detail").textContent;
});
console.log(JSON.stringify({ states, told }));
