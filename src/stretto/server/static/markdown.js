/** Turns an answer's Markdown into safe HTML. The text is from a model: raw HTML, images and styles stay out of it. */
import { element } from "./stream.js";

const parser = window.markdownit({ html: false, linkify: false, breaks: true }).disable("image");
// The page's policy forbids style attributes: a column's alignment becomes a class.
parser.core.ruler.push("alignment", ({ tokens }) => {
  for (const token of tokens) {
    const style = token.attrGet("style");
    if (!style) continue;
    token.attrs = token.attrs.filter(([name]) => name !== "style");
    token.attrJoin("class", style.replace("text-align:", "to-"));
  }
});
const ALLOWED = {
  ALLOWED_TAGS: ["p", "br", "strong", "em", "s", "code", "pre", "ul", "ol", "li", "blockquote", "h1", "h2", "h3", "h4", "h5", "h6",
    "hr", "a", "table", "thead", "tbody", "tr", "th", "td"],
  ALLOWED_ATTR: ["href", "title", "class", "start"], ALLOW_DATA_ATTR: false, RETURN_DOM_FRAGMENT: true,
};

/** Copies a text and says so on the button for two seconds. */
export async function copy(button, text) {
  const before = button.textContent;
  let done = "Copied";
  try { await navigator.clipboard.writeText(text); } catch { done = "The browser refused"; }
  button.textContent = done;
  setTimeout(() => { button.textContent = before; }, 2000);
}

export function button(name, act, kind = "quiet") {
  const made = element("button", kind, name);
  made.type = "button";
  made.addEventListener("click", () => act(made));
  return made;
}

/** Shows `text` in `box`. `whole`: it is complete, so code gets its copy button. */
export function show(box, text, whole) {
  const safe = window.DOMPurify.sanitize(parser.render(text), ALLOWED);
  for (const link of safe.querySelectorAll("a")) Object.assign(link, { target: "_blank", rel: "noopener noreferrer" });
  for (const table of safe.querySelectorAll("table")) {
    const wide = element("div", "wide");
    table.replaceWith(wide);
    wide.append(table);
  }
  for (const code of whole ? safe.querySelectorAll("pre") : []) {
    const holder = element("div", "code");
    code.replaceWith(holder);
    code.tabIndex = 0;
    holder.append(code, button("Copy", (made) => copy(made, code.textContent), "quiet small-button"));
  }
  box.replaceChildren(safe);
}
