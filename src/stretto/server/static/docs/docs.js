// The reference page: the OpenAPI document of this server as routes, fields, an example and a form to try it.
const GROUPS = [
  ["OpenAI", (path) => /^\/v1\/(chat|completions|embeddings|responses|models)/.test(path)],
  ["Anthropic", (path) => path.startsWith("/v1/messages")],
  ["Ollama", (path) => path.startsWith("/api/")],
  ["Tokens and ranking", (path) => /token|score|rerank/.test(path)],
  ["Feedback", (path) => path.startsWith("/v1/feedback")],
  ["The server", () => true],
];
const LONGEST_ANSWER = 200_000; // characters
const find = (id) => document.getElementById(id);

function make(tag, options = {}, ...children) {
  const node = Object.assign(document.createElement(tag), options);
  node.append(...children.filter((child) => child !== null));
  return node;
}

const named = (schema) => schema.$ref?.split("/").pop();

// Code in backticks, all other text as it is.
function prose(text) {
  const node = make("p");
  (text ?? "").split(/`([^`]+)`/).forEach((part, at) => node.append(at % 2 ? make("code", { textContent: part }) : part));
  return node;
}

function kind(schema) {
  if (schema.$ref) return named(schema);
  if (schema.anyOf) return [...new Set(schema.anyOf.map(kind))].join(" or ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  if (schema.type === "array") return schema.items ? `list of ${kind(schema.items)}` : "list";
  const limits = [["minimum", "≥"], ["exclusiveMinimum", ">"], ["maximum", "≤"], ["exclusiveMaximum", "<"]];
  const bounds = limits.filter(([key]) => key in schema).map(([key, sign]) => `${sign} ${schema[key]}`);
  return [schema.type ?? "any", bounds.join(", ")].join(" ").trim();
}

// The named types directly inside a schema.
function parts(schema) {
  if (schema.$ref) return [named(schema)];
  const inside = [...(schema.anyOf ?? []), ...(schema.items ? [schema.items] : [])];
  return [...new Set(inside.flatMap(parts))];
}

function fields(schema, types) {
  const list = make("ul", { className: "fields" });
  for (const [name, field] of Object.entries(schema.properties ?? {})) {
    const must = (schema.required ?? []).includes(name);
    list.append(make("li", {},
      make("code", { textContent: name }),
      make("span", { className: "kind", textContent: kind(field) }),
      must ? make("span", { className: "must", textContent: "required" }) : null,
      field.description ? prose(field.description) : null,
      ...parts(field).filter((part) => part in types).map((part) => folded(part, types))));
  }
  return list;
}

// A type, written out when it is opened: types may contain themselves.
function folded(name, types) {
  const details = make("details", {}, make("summary", { textContent: name }));
  details.addEventListener("toggle", () => details.open && details.childElementCount === 1 && details.append(...type(name, types)));
  return details;
}

function type(name, types) {
  const schema = types[name];
  const inner = schema.properties ? [] : parts(schema).filter((part) => part !== name && part in types);
  return [schema.description ? prose(schema.description) : null, schema.properties ? fields(schema, types) : null,
    ...inner.map((part) => folded(part, types))].filter(Boolean);
}

function copied(text) {
  const button = make("button", { className: "quiet small-button", type: "button", textContent: "Copy" });
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  return make("div", { className: "code" }, make("pre", {}, make("code", { textContent: text })), button);
}

function curl(method, url, body) {
  const lines = [`curl ${method === "get" ? "" : `-X ${method.toUpperCase()} `}${url}`];
  if (body !== undefined) {
    const quoted = JSON.stringify(body).replaceAll("'", "'\\''");
    lines.push("  -H 'Content-Type: application/json'", `  -d '${quoted}'`);
  }
  return lines.join(" \\\n");
}

async function answer(method, path, body, shown, signal) {
  const headers = find("key").value ? { Authorization: `Bearer ${find("key").value}` } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const came = await fetch(path, { method: method.toUpperCase(), headers, body, signal });
  shown.textContent = `${came.status} ${came.statusText}\n\n`;
  const reader = came.body.pipeThrough(new TextDecoderStream()).getReader();
  const json = came.headers.get("content-type")?.includes("application/json");
  let whole = "";
  for (let next = await reader.read(); !next.done; next = await reader.read()) {
    whole += next.value;
    if (whole.length > LONGEST_ANSWER) { await reader.cancel(); whole += "\n..."; break; }
    if (!json) shown.textContent = `${came.status}\n\n${whole}`;
  }
  if (json) shown.textContent += JSON.stringify(JSON.parse(whole), null, 2);
}

function form(method, path, example) {
  const shown = make("pre", { className: "answer", hidden: true });
  shown.setAttribute("aria-live", "polite");
  const text = example === undefined ? null : make("textarea", { value: JSON.stringify(example, null, 2), spellcheck: false });
  text?.setAttribute("aria-label", `Body of ${method.toUpperCase()} ${path}`);
  const place = path.includes("{") ? make("input", { type: "text", value: path, spellcheck: false }) : null;
  place?.setAttribute("aria-label", "Path");
  const send = make("button", { type: "submit", textContent: "Send" });
  const node = make("form", { className: "try" }, place, text, make("div", { className: "row" }, send), make("div", { className: "code" }, shown));
  let running = null;
  node.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running) return running.abort();
    running = new AbortController();
    send.textContent = "Stop";
    shown.hidden = false;
    shown.textContent = "";
    try {
      await answer(method, (place?.value ?? path).replace(/^\//, ""), text?.value, shown, running.signal);
    } catch (error) {
      shown.textContent += error.name === "AbortError" ? "\nstopped" : `The server did not answer: ${error.message}`;
    }
    running = null;
    send.textContent = "Send";
  });
  return node;
}

function route(path, method, operation, types, base) {
  const body = operation.requestBody?.content["application/json"];
  const given = operation.responses["200"].content;
  const id = `${method}${path}`;
  const section = make("section", { className: "route", id },
    make("h2", {}, make("span", { className: `method ${method}`, textContent: method.toUpperCase() }), ` ${path}`),
    prose(operation.summary));
  if (body) {
    const name = named(body.schema);
    section.append(make("h3", { textContent: "Request" }), folded(name, types));
  }
  section.append(make("h3", { textContent: "Response" }));
  for (const [media, { schema }] of Object.entries(given)) {
    const told = schema.properties?.data?.description ?? schema.description;
    const of = (told ?? "").match(/\b[A-Z]\w+(?=[ .;]|$)/g)?.find((word) => word in types);
    section.append(make("p", { textContent: told ? `${media}: ${told}` : media }));
    const name = named(schema) ?? of;
    if (name) section.append(folded(name, types));
  }
  const errors = Object.entries(operation.responses).filter(([status]) => status !== "200");
  if (errors.length) {
    const list = make("ul", { className: "fields" }, ...errors.map(([status, { description }]) => make("li", {}, make("code", { textContent: status }), prose(description))));
    section.append(make("details", {}, make("summary", { textContent: "Errors" }), list));
  }
  section.append(make("h3", { textContent: "Try it" }), copied(curl(method, base + path, body?.example)));
  if (path !== "/live") section.append(make("details", {}, make("summary", { textContent: "Send it from here" }), form(method, path, body?.example)));
  return section;
}

function show(text) {
  const word = text.trim().toLowerCase();
  for (const link of document.querySelectorAll("#routes a")) {
    link.hidden = word !== "" && !link.dataset.words.includes(word);
  }
  for (const group of document.querySelectorAll("#routes section")) {
    group.hidden = ![...group.querySelectorAll("a")].some((link) => !link.hidden);
  }
}

async function begin() {
  const base = new URL(".", location.href).href.replace(/\/$/, "");
  find("base").textContent = `${base}/v1`;
  const whole = await (await fetch("openapi.json")).json();
  const types = whole.components.schemas;
  find("version").textContent = `Version ${whole.info.version}`;
  const all = Object.entries(whole.paths).flatMap(([path, methods]) => Object.entries(methods).map(([method, operation]) => ({ path, method, operation })));
  for (const [title, belongs] of GROUPS) {
    const mine = all.filter((each) => GROUPS.find(([, test]) => test(each.path))[1] === belongs);
    const group = make("section", {}, make("h2", { textContent: title }));
    for (const { path, method, operation } of mine) {
      const link = make("a", { href: `#${method}${path}` }, make("span", { className: `method ${method}`, textContent: method.toUpperCase() }), path);
      const body = types[named(operation.requestBody?.content["application/json"].schema ?? {})];
      link.dataset.words = [path, operation.summary, ...Object.keys(body?.properties ?? {})].join(" ").toLowerCase();
      group.append(link);
      find("reference").append(route(path, method, operation, types, base));
    }
    find("routes").append(group);
  }
  find("find").addEventListener("input", (event) => show(event.target.value));
  if (location.hash) document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
}

begin().catch((error) => find("intro").append(` The document could not be read: ${error.message}.`));
