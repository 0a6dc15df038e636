"use strict";

// Text from the cluster is set with textContent, never as markup. An unknown value is
// shown as a dash, never as a number.

const byId = (id) => document.getElementById(id);
const interval = 2000;
const requestTimeout = 10000;
const tokenName = "dsnode-admin-token"; // kept for this tab only
let lastAnswer = null;
let timer = 0;

function element(name, text, kind) {
  const e = document.createElement(name);
  e.textContent = text;
  if (kind) e.className = kind;
  return e;
}

const known = (v) => v !== null && v !== undefined && v !== "";
const show = (v) => (known(v) ? String(v) : "–");
const of = (part, whole) => show(part) + " / " + show(whole);
const seconds = (s) => (known(s) ? (s < 10 ? s.toFixed(1) : Math.round(s)) + " s" : "–");
const when = (t) => (known(t) ? new Date(t).toLocaleString() : "–");
const stateClass = (state) =>
  ["healthy", "alive"].includes(state) ? "good" : ["unknown", "left"].includes(state) ? "quiet" : "bad";

function table(id, heads, rows) {
  const head = document.createElement("tr");
  head.append(...heads.map((h) => element("th", h)));
  const lines = rows.map((cells) => {
    const line = document.createElement("tr");
    line.append(...cells.map((c) => (c instanceof Node ? c : element("td", show(c)))));
    return line;
  });
  byId(id).replaceChildren(head, ...lines);
}

function headline(text, kind) {
  byId("headline").textContent = text;
  byId("headline").className = kind;
}

function draw(s) {
  document.title = (s.healthy ? "✓ " : "✗ ") + s.cluster + " · dsnode";
  byId("cluster").textContent = s.cluster;
  headline(s.healthy ? "healthy" : s.raft.quorum ? "degraded" : "no quorum", s.healthy ? "good" : "bad");
  byId("reasons").replaceChildren(...s.reasons.map((r) => element("li", r)));

  const p = s.primary;
  const facts = [
    ["primary", p ? p.site + " · epoch " + p.epoch + " · since " + when(p.since) + " · " + p.reason : "–"],
    ["generation", show(s.generation)],
    ["raft", (s.raft.quorum ? "quorum" : "no quorum") + " since " + when(s.raft.quorum_since) +
      " · leader " + show(s.raft.leader) + " · term " + show(s.raft.term) + " · " + show(s.raft.voters) + " voters"],
    ...s.warnings.map((w) => ["warning", w]),
  ];
  byId("facts").replaceChildren(...facts.flatMap(([name, text]) => [element("dt", name), element("dd", text)]));

  table("sites", ["name", "city", "role", "state", "nodes", "upstreams", "last heard"],
    (s.sites || []).map((x) => [x.name, x.city, x.role, element("td", x.state, stateClass(x.state)),
      of(x.nodes_alive, x.nodes_total), of(x.upstreams_healthy, x.upstreams_total), seconds(x.last_heard_seconds)]));
  table("nodes", ["name", "site", "state", "raft", "last heard", "version", "api", "started"],
    (s.nodes || []).map((x) => [x.name, x.site, element("td", x.draining ? x.state + ", draining" : x.state, stateClass(x.state)),
      x.leader ? "leader" : x.voter ? "voter" : x.voter === false ? "non-voter" : "–",
      seconds(x.last_heard_seconds), x.version, x.api, when(x.started_at)]));

  byId("source").textContent = "as seen by " + s.observer.node + " at " + when(s.observed_at) + " · dsnode " + s.version;
  byId("view").hidden = false;
}

function fail(text) {
  const age = lastAnswer ? "; the data below is " + Math.round((Date.now() - lastAnswer) / 1000) + " s old" : "";
  headline(text + age, "bad");
}

async function refresh() {
  const headers = {};
  const token = sessionStorage.getItem(tokenName);
  if (token) headers.Authorization = "Bearer " + token;
  try {
    const answer = await fetch("/admin/v1/status", { headers, cache: "no-store", signal: AbortSignal.timeout(requestTimeout) });
    const body = await answer.json();
    byId("login").hidden = answer.status !== 401;
    if (!answer.ok) {
      fail(body.error.message);
      return;
    }
    draw(body);
    lastAnswer = Date.now();
  } catch {
    fail("this node does not answer");
  }
}

async function watch() {
  clearTimeout(timer);
  if (!document.hidden) await refresh();
  clearTimeout(timer);
  timer = setTimeout(watch, interval);
}

byId("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(tokenName, byId("token").value);
  byId("token").value = "";
  watch();
});
document.addEventListener("visibilitychange", watch);
watch();
