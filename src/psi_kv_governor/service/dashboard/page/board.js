// The live view: server-sent events in, the page out. No framework and no build step.
"use strict";

const SPAN_S = 120;
const MOST_EVENTS = 200;
const $ = (id) => document.getElementById(id);
const points = [];
const marks = [];
let offset_ms = null; // of the governed program's monotonic time to this clock

const CHARTS = [
  { key: "stall", title: "Stall", unit: (v) => percent(v), of: (v) => v.some, least: 0.1 },
  { key: "headroom", title: "Headroom", unit: (v) => bytes(v), of: (v) => v.headroom_bytes, least: 1 },
  { key: "resident", title: "In memory", unit: (v) => bytes(v), of: (v) => v.resident_bytes, least: 1 },
];

function percent(share) {
  return `${(share * 100).toFixed(share < 0.1 ? 1 : 0)} %`;
}

function bytes(n) {
  if (n === null || n === undefined) return "no limit";
  return n >= 2 ** 30 ? `${(n / 2 ** 30).toFixed(2)} GiB` : `${Math.round(n / 2 ** 20)} MiB`;
}

// A cgroup by its own name: where it lies takes a line of its own, and is told when pointed at.
function brief(words) {
  return words.replace(/\/sys\/fs\/cgroup\/(?:[^\s/]+\/)+/g, "\u2026/");
}

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function svg(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function text(id, words) {
  if ($(id).textContent !== words) $(id).textContent = words;
}

for (const chart of CHARTS) {
  chart.now = element("span", {});
  chart.svg = svg("svg", { viewBox: "0 0 1000 100", preserveAspectRatio: "none", role: "img" });
  const caption = element("figcaption", {}, element("span", {}, chart.title), chart.now);
  $("charts").append(element("figure", { class: `chart ${chart.key}` }, caption, chart.svg));
}

function draw() {
  const end = points[points.length - 1].time_s;
  const x = (time_s) => (1000 * (time_s - end + SPAN_S)) / SPAN_S;
  for (const chart of CHARTS) {
    const known = points.filter((point) => chart.of(point) !== null);
    const top = Math.max(chart.least, ...known.map(chart.of)) * 1.05;
    const y = (value) => 98 - (96 * value) / top;
    const way = known.map((p, i) => `${i ? "L" : "M"}${x(p.time_s).toFixed(1)},${y(chart.of(p)).toFixed(1)}`);
    const lines = marks.map((time_s) => svg("line", { x1: x(time_s), x2: x(time_s), y1: 0, y2: 100 }));
    chart.svg.replaceChildren(...lines, svg("path", { d: way.join("") }));
    const last = known.length ? chart.unit(chart.of(known[known.length - 1])) : "not known";
    const most = known.length ? chart.unit(Math.max(...known.map(chart.of))) : "not known";
    chart.now.textContent = `${last}, peak ${most}`;
    chart.svg.setAttribute("aria-label", `${chart.title} over two minutes: now ${last}, at most ${most}`);
  }
}

function said(blocks) {
  const sums = new Map();
  for (const [kind, cells] of blocks) sums.set(kind, (sums.get(kind) || 0) + cells);
  if (sums.size > 1) sums.delete("free"); // the cache's, not the sequence's: other sequences use it too
  return [...sums].map(([kind, cells]) => `${cells.toLocaleString("en")} ${kind}`).join(", ");
}

function strip(one, cache) {
  const words = said(one.blocks);
  const blocks = one.blocks.map(([kind, cells]) => {
    const block = element("i", { class: `block ${kind}`, title: `${cells.toLocaleString("en")} ${kind}` });
    block.style.flexGrow = cells;
    return block;
  });
  const label = `Sequence ${one.sequence}, ${one.running ? "running" : "idle"}: ${words} cells`;
  const row = element("div", { class: "row" });
  row.append(
    element(
      "span", { "aria-hidden": "true" }, `Sequence ${one.sequence}, ${one.running ? "running" : "idle"}`,
      element("small", {}, words),
    ),
    element("div", { class: "strip", role: "img", "aria-label": label }, ...blocks),
  );
  return row;
}

function caches(view) {
  if (!view.caches.length) return [element("p", { class: "hint" }, "No cache is open yet.")];
  return view.caches.flatMap((cache) => {
    const size = [
      cache.capacity_cells ? `${cache.capacity_cells.toLocaleString("en")} cells` : "",
      `${bytes(cache.resident_bytes)} in memory`,
      cache.saved_bytes ? `${bytes(cache.saved_bytes)} of saved states` : "",
    ].filter(Boolean).join(", ");
    return [element("h3", {}, `${cache.name}: ${size}`), ...cache.strips.map((one) => strip(one, cache))];
  });
}

function log(events) {
  for (const [time_s, kind, words] of events) {
    const at = new Date(time_s * 1000 + offset_ms).toLocaleTimeString("en-GB");
    $("log").prepend(element("li", {}, element("time", {}, at), element("b", {}, kind), element("span", { title: words }, brief(words))));
    marks.push(time_s);
  }
  while ($("log").childElementCount > MOST_EVENTS) $("log").lastElementChild.remove();
}

function show(view) {
  if (offset_ms === null) offset_ms = Date.now() - view.time_s * 1000;
  points.push(view);
  log(view.events);
  while (points[0].time_s < view.time_s - SPAN_S) points.shift();
  while (marks.length && marks[0] < view.time_s - SPAN_S) marks.shift();
  text("name", view.name || "PSI KV Governor");
  text("mode", view.mode);
  $("mode").className = `mode ${view.mode}`;
  text("reason", brief(view.reason));
  $("reason").title = view.reason;
  text("stall", percent(view.some));
  text("headroom", bytes(view.headroom_bytes));
  text("resident", bytes(view.resident_bytes));
  text("parked", bytes(view.parked_bytes));
  text("masked", `${view.masked_cells.toLocaleString("en")} cells`);
  document.title = `${view.mode}: ${view.name || "PSI KV Governor"}`;
  const key = JSON.stringify(view.caches);
  if (key !== show.caches) $("caches").replaceChildren(...caches(view));
  show.caches = key;
  draw();
}

async function command(asked) {
  text("answer", "...");
  try {
    const answer = await fetch("/command", { method: "POST", body: JSON.stringify(asked) });
    text("answer", (answer.ok ? "" : "Not done: ") + (await answer.text()));
  } catch {
    text("answer", "Not done: the program does not answer.");
  }
}

function able(yes) {
  for (const control of document.querySelectorAll("button, input")) control.disabled = !yes;
}

function gone(why) {
  $("gone").textContent = `This is how it stood last: ${why}.`;
  $("gone").hidden = false;
  able(false);
}

const live = new EventSource("/live");
live.addEventListener("start", () => {
  $("gone").hidden = true;
  $("log").replaceChildren();
  marks.length = 0;
  able(true);
});
live.addEventListener("message", (event) => show(JSON.parse(event.data)));
live.addEventListener("gone", (event) => {
  live.close();
  gone(JSON.parse(event.data));
});
live.addEventListener("error", () => gone("the program does not answer"));

for (const button of document.querySelectorAll("[data-verb]")) {
  button.addEventListener("click", () => command({ do: button.dataset.verb }));
}
$("share").addEventListener("input", () => text("shown", `${$("share").value} %`));
$("limit").addEventListener("submit", (event) => {
  event.preventDefault();
  command({ do: "limit", share: Number($("share").value) / 100 });
});
$("lift").addEventListener("click", () => command({ do: "limit" }));
