"use strict";
// Text from traces is untrusted: it is set as text content, never as markup. The document holds one trace at a time.

const at = id => document.getElementById(id);
const element = (tag, attributes = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value != null) made.setAttribute(key, value);
  }
  made.append(...children.filter(child => child != null));
  return made;
};

const METRICS = {
  nll: { label: "NLL", short: "NLL", full: 5, what: "negative log-likelihood of the sampled token under the teacher" },
  entropy: { label: "Entropy", short: "entropy", full: 2.5, what: "entropy of the teacher's distribution (stored entries, and all other tokens as one outcome)" },
  kl: { label: "KL to student", short: "KL", full: 2, what: "KL(teacher ‖ student) over the entries stored for both: a lower bound" },
};
const FILTERS = {
  all: ["All", () => true],
  right: ["Correct", trace => trace.correct === true],
  wrong: ["Wrong", trace => trace.correct === false],
  cut: ["Truncated", trace => trace.finish === "length"],
};
const LEVELS = 10;
const MOST_TOKENS = 200;

let data, traces, table, columns, special, metrics;
const state = { shade: "nll", filter: "all", query: "", sort: "stored", tab: "traces", view: [], trace: null, token: -1 };

// ------------------------------------------------------------------------------------------------ data

async function load() {
  const packed = at("data").textContent.trim();
  const text = atob(packed);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  data = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  at("data").remove();
  ({ traces, table } = data);
  special = new Set(data.special);
  columns = {};
  let offset = 4 + length;
  for (const [name, [planes, count]] of Object.entries(data.arrays)) {
    const values = planes === 1 ? new Uint8Array(count) : planes === 2 ? new Uint16Array(count) : new Uint32Array(count);
    for (let plane = 0; plane < planes; plane++) {
      const bytes = new Uint8Array(buffer, offset, count);
      for (let i = 0; i < count; i++) values[i] |= bytes[i] << (8 * plane);
      offset += count;
    }
    columns[name] = values;
  }
  metrics = Object.keys(METRICS).filter(name => columns[name]);
  let start = 0, entry = 0;
  if (columns.count) {
    columns.entry = new Uint32Array(columns.count.length + 1);
    for (let i = 0; i < columns.count.length; i++) columns.entry[i] = entry, entry += columns.count[i];
    columns.entry[columns.count.length] = entry;
  }
  traces.forEach((trace, index) => {
    Object.assign(trace, { index, start, means: {} });
    for (const name of metrics) {
      let sum = 0;
      for (let i = start; i < start + trace.tokens; i++) sum += nats(name, i);
      trace.means[name] = trace.tokens ? sum / trace.tokens : 0;
    }
    start += trace.tokens;
  });
}

const nats = (name, position) => {
  const value = columns[name][position];
  return value === data.unknown ? data.unknown / data.quantum : value / data.quantum;
};
const tokenText = (trace, n) => trace.completed[n] ?? table[columns.ids[trace.start + n]];
const isPart = (trace, n) => /^‹[0-9A-F]{2}( [0-9A-F]{2})*›$/.test(tokenText(trace, n));

function completion(trace) {
  if (trace.text === undefined) {
    const parts = new Array(trace.tokens);
    for (let n = 0; n < trace.tokens; n++) parts[n] = tokenText(trace, n);
    trace.text = parts.join("");
    trace.lower = trace.text.toLowerCase();
    trace.searched = `${trace.question}\n${trace.id} ${trace.problem}`.toLowerCase();
  }
  return trace.text;
}

// ------------------------------------------------------------------------------------------------ formatting

const share = value => {
  if (value >= 0.0995) return (100 * value).toFixed(1) + "%";
  if (value >= 0.000995) return (100 * value).toFixed(2) + "%";
  return value > 0 ? value.toExponential(0).replace("e-", "e−") : "0";
};
const probability = value => (value === data.unknown ? null : Math.exp(-value / data.quantum));
const number = value => (value >= data.unknown / data.quantum - 1e-9 ? "> 65" : value.toFixed(value < 0.0995 ? 3 : 2));
const spelled = text => text.replace(/^ +| +$/g, blanks => "·".repeat(blanks.length)).replace(/\n/g, "↵").replace(/\t/g, "⇥") || "∅";
const verdictOf = trace => (trace.correct === true ? "correct" : trace.correct === false ? "wrong" : "not judged");
const markOf = trace => (trace.correct === true ? "✓" : trace.correct === false ? "✗" : "?");

// ------------------------------------------------------------------------------------------------ list

function choose() {
  const query = state.query.toLowerCase();
  const wanted = FILTERS[state.filter][1];
  state.view = traces.filter(trace => {
    if (!wanted(trace)) return false;
    if (!query) return true;
    completion(trace);
    return trace.lower.includes(query) || trace.searched.includes(query);
  });
  if (state.sort === "longest") state.view.sort((a, b) => b.tokens - a.tokens);
  else if (METRICS[state.sort]) state.view.sort((a, b) => b.means[state.sort] - a.means[state.sort]);
  drawList();
  drawPlace();
}

function drawList() {
  const list = at("list"), metric = METRICS[state.sort] ? state.sort : state.shade;
  const items = document.createDocumentFragment();
  const button = (trace, token, mark, what, value) => {
    const made = element("button", { type: "button", tabindex: -1, "data-trace": trace.index, "data-token": token },
      element("span", { class: trace.correct === true ? "mark right" : "mark", title: verdictOf(trace) }, mark), what,
      element("span", { class: "num" }, value));
    items.append(element("li", {}, made));
  };
  if (state.tab === "traces") {
    for (const trace of state.view) {
      const value = METRICS[state.sort] ? number(trace.means[metric]) : String(trace.tokens);
      button(trace, null, markOf(trace), element("span", { class: "what" }, trace.question.replace(/\s+/g, " ").slice(0, 90)), value);
    }
  } else {
    for (const [trace, n, value] of mostShaded(metric)) {
      const before = Array.from({ length: Math.min(3, n) }, (_, i) => tokenText(trace, n - Math.min(3, n) + i)).join("").slice(-14);
      const what = element("span", { class: "what" }, spelled(before.replace(/^ +/, "")).replace(/·+$/, " "), element("em", {}, spelled(tokenText(trace, n))));
      button(trace, n, markOf(trace), what, number(value));
    }
  }
  list.replaceChildren(items);
  list.setAttribute("aria-label", state.tab === "traces" ? "Traces" : `Tokens by ${METRICS[metric].label}`);
  at("none").hidden = list.childElementCount > 0;
  markCurrent(false);
}

function mostShaded(metric) {
  const values = columns[metric], counts = new Uint32Array(data.unknown + 1);
  let floor = data.unknown, above = 0;
  for (const trace of state.view) for (let i = trace.start; i < trace.start + trace.tokens; i++) counts[values[i]]++;
  while (floor > 0 && above < MOST_TOKENS) above += counts[floor--];
  const found = [];
  for (const trace of state.view)
    for (let n = 0; n < trace.tokens; n++) if (values[trace.start + n] > floor) found.push([trace, n, values[trace.start + n]]);
  found.sort((a, b) => b[2] - a[2]);
  return found.slice(0, MOST_TOKENS).map(([trace, n]) => [trace, n, nats(metric, trace.start + n)]);
}

let current = null;

function markCurrent(scroll = true) {
  const list = at("list");
  const token = state.tab === "tokens" ? `[data-token="${state.token}"]` : "";
  const found = state.trace ? list.querySelector(`button[data-trace="${state.trace.index}"]${token}`) : null;
  if (current) current.tabIndex = -1, current.removeAttribute("aria-current");
  current = found ?? list.querySelector("button");
  if (!current) return;
  current.tabIndex = 0;
  if (!found) return;
  found.setAttribute("aria-current", "true");
  if (scroll) found.scrollIntoView({ block: "nearest" });
}

// ------------------------------------------------------------------------------------------------ a trace

function open(trace, token = -1, quiet = false) {
  if (trace !== state.trace) {
    state.trace = trace;
    drawTrace();
  }
  pick(token, !quiet);
  markCurrent();
}

function drawTrace() {
  const trace = state.trace, main = at("trace");
  const more = Object.entries(trace.rewards).map(([name, value]) => [name, String(Math.round(1e4 * value) / 1e4)]);
  const facts = [
    ["verdict", verdictOf(trace) + (trace.finish === "length" ? ", cut off at the token limit" : "")],
    ["answer", trace.answer ?? "none found"],
    ["reference", trace.gold ?? "none"],
    ...more,
    ...metrics.map(name => ["mean " + METRICS[name].short, number(trace.means[name]) + " nats"]),
  ];
  const verdict = element("dl", { class: "verdict" });
  for (const [label, value] of facts) verdict.append(element("dt", {}, label), element("dd", {}, value));
  const parts = [
    element("div", { class: "line" },
      element("h2", { tabindex: -1 }, element("span", { class: trace.correct === true ? "badge right" : "badge" }, `${markOf(trace)} ${verdictOf(trace)}`),
        trace.finish === "length" ? " · truncated" : "", ` · ${trace.tokens} tokens`),
      element("span", { class: "steps" }, element("span", { id: "place" }),
        element("button", { type: "button", class: "step", id: "previous", "aria-label": "Previous trace (k)" }, "‹"),
        element("button", { type: "button", class: "step", id: "next", "aria-label": "Next trace (j)" }, "›"))),
    element("canvas", { class: "strip", id: "strip", role: "img" }),
    element("div", { class: "scale" }, element("span", { id: "what" }), element("span", { class: "ramp" }, "0", element("i"), element("span", { id: "full" }))),
    element("section", {}, element("h3", {}, "Prompt"), element("div", { class: "text" }, trace.question),
      element("details", {}, element("summary", {}, "As the model saw it"), element("div", { class: "text" }, trace.prompt))),
  ];
  const section = (title, from, to) => element("section", {}, element("h3", {}, title, element("span", {}, `${to - from} tokens`)),
    tokensElement(trace, from, to, title));
  // A token that ends the closing marker and begins the answer is cut in two, and both halves are the same token.
  const cut = trace.split == null ? trace.thinking : trace.thinking - 1;
  if (trace.thinking) parts.push(section("Thinking", 0, trace.thinking));
  if (cut < trace.tokens) parts.push(section(trace.thinking ? "Answer" : "Completion", cut, trace.tokens));
  parts.push(element("section", {}, element("h3", {}, "Verdict"), verdict));
  main.replaceChildren(...parts);
  main.setAttribute("aria-busy", "false");
  main.scrollTop = 0;
  spans = Array.from({ length: trace.tokens }, () => []);
  for (const span of main.querySelectorAll(".tokens span")) spans[span.dataset.n].push(span);
  at("previous").onclick = () => step(-1);
  at("next").onclick = () => step(1);
  at("strip").onclick = event => {
    const box = event.target.getBoundingClientRect();
    pick(Math.min(trace.tokens - 1, Math.floor(((event.clientX - box.left) / box.width) * trace.tokens)), true);
  };
  explain();
  drawPlace();
  hits();
}

let spans = [];

function tokensElement(trace, from, to, title) {
  const holder = element("div", { class: "tokens", role: "group", "aria-label": `${title}: tokens` });
  for (let n = from; n < to; n++) {
    const made = document.createElement("span"), text = shownText(trace, n, title);
    made.textContent = text.includes("\n") ? text.replace(/\n/g, "↵\n") : text;
    made.dataset.n = n;
    made.className = classOf(trace, n);
    made.setAttribute("role", "button");
    made.tabIndex = -1;
    holder.append(made);
  }
  return holder;
}

function shownText(trace, n, title) {
  const text = tokenText(trace, n);
  if (trace.split == null || n !== trace.thinking - 1) return text;
  return title === "Thinking" ? text.slice(0, trace.split) : text.slice(trace.split);
}

const level = (name, position) => {
  const value = nats(name, position) / METRICS[name].full;
  return value <= 0.004 ? 0 : Math.max(1, Math.min(LEVELS, Math.ceil(LEVELS * Math.pow(Math.min(1, value), 0.75))));
};

function classOf(trace, n) {
  const heat = level(state.shade, trace.start + n);
  const kind = special.has(columns.ids[trace.start + n]) ? " special" : isPart(trace, n) ? " part" : "";
  return (heat ? "h" + heat : "") + kind;
}

function shadeTokens() {
  const trace = state.trace;
  spans.forEach((halves, n) => halves.forEach(span => (span.className = classOf(trace, n))));
  if (state.token >= 0) spans[state.token]?.forEach(span => span.classList.add("at"));
  explain();
  drawStrip();
}

function explain() {
  const name = state.shade;
  at("what").textContent = METRICS[name].what;
  at("full").textContent = `≥ ${METRICS[name].full} nats`;
}

let stripWidth = 600, colours = {};

function readPage() {
  const style = getComputedStyle(document.documentElement), main = getComputedStyle(at("trace"));
  colours = { accent: style.getPropertyValue("--accent"), line: style.getPropertyValue("--line") };
  stripWidth = at("trace").clientWidth - parseFloat(main.paddingLeft) - parseFloat(main.paddingRight);
  if (state.trace) drawStrip();
}

function drawStrip() {
  const canvas = at("strip"), trace = state.trace;
  if (!canvas) return;
  const scale = window.devicePixelRatio || 1, width = stripWidth, height = 34;
  canvas.width = width * scale;
  canvas.height = height * scale;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.fillStyle = colours.line;
  pen.fillRect(0, height - 1, width, 1);
  const each = width / Math.max(1, trace.tokens), gap = each > 4 ? 1 : 0;
  for (let n = 0; n < trace.tokens; n++) {
    const tall = Math.max(1, Math.min(1, nats(state.shade, trace.start + n) / METRICS[state.shade].full) * (height - 4));
    pen.fillStyle = colours.accent;
    pen.globalAlpha = n === state.token ? 1 : n < trace.thinking ? 0.55 : 0.9;
    pen.fillRect(n * each, height - tall, Math.max(0.7, Math.min(each - gap, 14)), tall);
    if (n === state.token) pen.fillRect(n * each, 0, Math.max(1, Math.min(each - gap, 14)), 2);
  }
  canvas.setAttribute("aria-label", `${METRICS[state.shade].label} along the ${trace.tokens} tokens; mean ${number(trace.means[state.shade])} nats`);
}

function drawPlace() {
  if (!state.trace || !at("place")) return;
  const index = state.view.indexOf(state.trace);
  at("place").textContent = index < 0 ? `not among the ${state.view.length} shown` : `${index + 1} of ${state.view.length}`;
}

function hits() {
  const query = state.query.toLowerCase();
  if (!state.trace) return;
  for (const span of spans.flat()) span.classList.remove("hit");
  if (!query) return;
  completion(state.trace);
  const starts = [];
  let length = 0;
  for (let n = 0; n < state.trace.tokens; n++) starts.push(length), length += tokenText(state.trace, n).length;
  starts.push(length);
  for (let from = state.trace.lower.indexOf(query); from >= 0; from = state.trace.lower.indexOf(query, from + query.length))
    for (let n = 0; n < state.trace.tokens; n++)
      if (starts[n] < from + query.length && starts[n + 1] > from) spans[n].forEach(span => span.classList.add("hit"));
}

// ------------------------------------------------------------------------------------------------ a token

function pick(token, focus) {
  const trace = state.trace;
  for (const span of spans[Math.max(0, state.token)] ?? []) span.tabIndex = -1, span.classList.remove("at");
  state.token = token >= 0 && token < trace.tokens ? token : -1;
  if (state.token >= 0) {
    const span = spans[state.token][0];
    span.tabIndex = 0;
    spans[state.token].forEach(half => half.classList.add("at"));
    if (focus) {
      span.focus({ preventScroll: true });
      span.scrollIntoView({ block: matchMedia("(max-width: 720px)").matches ? "center" : "nearest" });
    }
  } else if (spans.length) spans[0][0].tabIndex = 0;
  detail(state.token);
  drawStrip();
  const hash = "#" + encodeURIComponent(trace.id) + (state.token >= 0 ? "." + state.token : "");
  if (location.hash !== hash) history.replaceState(null, "", hash);
}

function rowsOf(position) {
  const rows = [], sampled = columns.ids[position];
  let known = false;
  if (columns.count)
    for (let e = columns.entry[position]; e < columns.entry[position + 1]; e++) {
      const id = columns.cand_ids[e];
      known ||= id === sampled;
      rows.push({ id, sampled: id === sampled, teacher: probability(columns.cand_teacher[e]), student: columns.cand_student ? probability(columns.cand_student[e]) : null });
    }
  if (!known)
    rows.push({ id: sampled, sampled: true, outside: true, teacher: probability(columns.nll[position]), student: columns.student_nll ? probability(columns.student_nll[position]) : null });
  return rows.sort((a, b) => (b.teacher ?? -1) - (a.teacher ?? -1) || (b.student ?? -1) - (a.student ?? -1));
}

function detail(token) {
  const aside = at("detail"), trace = state.trace;
  if (token < 0) {
    aside.replaceChildren(element("p", { class: "hint" }, columns.count
      ? "Point at a token, or move with ← and →, to see the teacher's most probable tokens at its position."
      : "These traces were stored without distributions (top_logprobs: 0): only the probability of each sampled token is known."));
    return;
  }
  const position = trace.start + token, student = aside.dataset.student;
  const parts = [
    element("p", { class: "token" }, spelled(tokenText(trace, token))),
    element("p", { class: "where" }, `token ${token + 1} of ${trace.tokens} · id ${data.table_ids[columns.ids[position]]}`),
  ];
  const list = element("dl");
  const fact = (label, value) => list.append(element("dt", {}, label), element("dd", {}, value));
  fact("NLL", number(nats("nll", position)));
  if (columns.entropy) fact("entropy", number(nats("entropy", position)));
  if (columns.kl) {
    fact("student NLL", number(nats("student_nll", position)));
    fact("KL to student", number(nats("kl", position)));
  }
  parts.push(list);
  const cell = (value, second) => {
    if (value === null) return element("td", {}, "–");
    const bar = element("span", { class: second ? "bar second" : "bar" });
    bar.style.width = Math.max(0.5, 100 * value) + "%";
    return element("td", {}, share(value), bar);
  };
  const body = element("tbody");
  let outside = 0, outsideStudent = 0;
  for (const row of rowsOf(position)) {
    if (row.outside) outside = row.teacher ?? 0, outsideStudent = row.student ?? 0;
    const text = spelled(table[row.id]);
    body.append(element("tr", { class: row.sampled ? "sampled" : null },
      element("td", { title: text }, (row.sampled ? "▸" : "") + text), cell(row.teacher), columns.kl ? cell(row.student, true) : null));
  }
  if (columns.rest) {
    const rest = Math.max(0, (probability(columns.rest[position]) ?? 0) - outside);
    const other = columns.kl ? Math.max(0, (probability(columns.student_rest[position]) ?? 0) - outsideStudent) : 0;
    body.append(element("tr", { class: "rest" }, element("td", {}, "all others"), cell(rest), columns.kl ? cell(other, true) : null));
  }
  parts.push(element("table", {}, element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "token"), element("th", { scope: "col" }, "teacher"),
    columns.kl ? element("th", { scope: "col", title: student }, "student") : null)), body));
  aside.replaceChildren(...parts);
}

// ------------------------------------------------------------------------------------------------ navigation

function step(by) {
  if (!state.view.length) return;
  const index = state.view.indexOf(state.trace);
  open(state.view[Math.min(state.view.length - 1, Math.max(0, index < 0 ? 0 : index + by))], -1);
}

function byShade(by) {
  const trace = state.trace, order = Array.from({ length: trace.tokens }, (_, n) => n);
  order.sort((a, b) => columns[state.shade][trace.start + b] - columns[state.shade][trace.start + a] || a - b);
  const now = order.indexOf(state.token);
  pick(order[Math.min(order.length - 1, Math.max(0, now + by))], true);
}

// Keys pressed inside a form control belong to it: text to the search, arrows and letters to a select, arrows to radio buttons.
const CONTROLS = "input:not([type=radio]), select, textarea";

// A control that was used with the pointer gives the keys back to the page; one that is used with keys keeps them.
let byPointer = false;
const release = control => byPointer && control.blur();

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || !state.trace) return;
  if (event.target.matches(CONTROLS)) {
    if (event.key === "Escape" && event.target.id === "search") (event.target.value = ""), search(), event.target.blur();
    return;
  }
  if (event.key === "Escape") {
    pick(-1);
    return;
  }
  const radio = event.target.type === "radio", inList = at("list").contains(event.target);
  const shades = { 1: "nll", 2: "entropy", 3: "kl" };
  let done = true;
  if (event.key === "j" || event.key === "n") step(1);
  else if (event.key === "k" || event.key === "p") step(-1);
  else if (event.key === "ArrowRight" && !radio) pick(Math.min(state.trace.tokens - 1, state.token + 1), true);
  else if (event.key === "ArrowLeft" && !radio) pick(Math.max(0, state.token - 1), true);
  else if (event.key === ".") byShade(1);
  else if (event.key === ",") byShade(-1);
  else if (event.key === "/") at("search").focus();
  else if (event.key === "?") at("help").click();
  else if (metrics.includes(shades[event.key])) setShade(shades[event.key]);
  else if (inList && (event.key === "ArrowDown" || event.key === "ArrowUp")) {
    const item = event.target.closest("li"), other = event.key === "ArrowDown" ? item.nextElementSibling : item.previousElementSibling;
    other?.firstElementChild.focus();
  } else done = false;
  if (done) event.preventDefault();
}

function setShade(name) {
  state.shade = name;
  document.querySelector(`input[name=shade][value=${name}]`).checked = true;
  shadeTokens();
  hits();
  if (state.tab === "tokens") drawList();
}

function search() {
  state.query = at("search").value;
  choose();
  hits();
}

// The trace that the page opens with: the first in the list that is shaded about as much as the darkest one.
function telling() {
  const shaded = state.view.map(trace => {
    let sum = 0;
    for (let n = 0; n < trace.tokens; n++) sum += level(state.shade, trace.start + n);
    return trace.tokens ? sum / trace.tokens : 0;
  });
  const most = Math.max(...shaded);
  return state.view[most > 0 ? shaded.findIndex(value => value >= most / 2) : 0];
}

// Whether a metric shades any token of the page.
function shades(name) {
  for (let position = 0; position < columns.ids.length; position++) if (level(name, position) > 0) return true;
  return false;
}

function fromHash() {
  const hash = decodeURIComponent(location.hash.slice(1)), dot = hash.lastIndexOf(".");
  const whole = traces.find(trace => trace.id === hash);
  if (whole) return [whole, -1];
  const trace = dot > 0 ? traces.find(trace => trace.id === hash.slice(0, dot)) : null;
  return trace ? [trace, Number(hash.slice(dot + 1))] : null;
}

function radios(holder, name, options, chosen, change) {
  for (const [value, label, count] of options) {
    const input = element("input", { type: "radio", name, value });
    input.checked = value === chosen;
    input.onchange = () => (change(value), release(input));
    at(holder).append(element("label", {}, input, label, count != null ? element("i", {}, String(count)) : null));
  }
}

async function start() {
  try {
    await load();
  } catch (error) {
    at("wait").textContent = `The traces could not be decompressed (${error}). This page needs a browser of 2023 or later.`;
    throw error;
  }
  if (columns.kl) state.shade = state.sort = "kl";
  else if (!shades("nll")) state.shade = metrics.find(shades) ?? "nll";
  radios("shade", "shade", metrics.map(name => [name, METRICS[name].label]), state.shade, setShade);
  radios("filter", "filter", Object.entries(FILTERS).map(([key, [label, test]]) => [key, label, traces.filter(test).length]), "all",
    value => { state.filter = value; choose(); });
  radios("tab", "tab", [["traces", "Traces"], ["tokens", "Tokens"]], "traces", value => { state.tab = value; drawList(); });
  const sorts = [["stored", "as stored"], ...metrics.map(name => [name, METRICS[name].short]), ["longest", "length"]];
  for (const [value, label] of sorts) at("sort").append(element("option", { value }, label));
  at("sort").value = state.sort;
  at("sort").onchange = event => { state.sort = event.target.value; choose(); release(event.target); };
  at("search").oninput = search;
  at("help").onclick = () => {
    at("keys").hidden = !at("keys").hidden;
    at("help").setAttribute("aria-expanded", String(!at("keys").hidden));
  };
  at("list").onclick = event => {
    const button = event.target.closest("button");
    if (button) open(traces[Number(button.dataset.trace)], button.dataset.token === undefined ? -1 : Number(button.dataset.token));
  };
  const main = at("trace");
  const tokenAt = target => (target.dataset?.n !== undefined ? Number(target.dataset.n) : -1);
  main.onpointerover = event => tokenAt(event.target) >= 0 && detail(tokenAt(event.target));
  main.onpointerleave = () => detail(state.token);
  main.addEventListener("click", event => tokenAt(event.target) >= 0 && pick(tokenAt(event.target), true));
  main.addEventListener("focusin", event => {
    const token = tokenAt(event.target);
    if (token >= 0 && token !== state.token) pick(token, false);
  });
  document.addEventListener("pointerdown", () => (byPointer = true), true);
  document.addEventListener("keydown", () => (byPointer = false), true);
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", () => { const place = fromHash(); if (place) open(...place); });
  window.addEventListener("resize", readPage);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", readPage);
  readPage();
  choose();
  const [trace, token] = fromHash() ?? [telling(), -1];
  if (trace) open(trace, token, token < 0);
  else at("wait").textContent = "There are no traces here.";
  performance.mark("ready");
  document.documentElement.dataset.ready = "true";
}

start();
