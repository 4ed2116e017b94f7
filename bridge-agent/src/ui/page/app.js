// The page: keeps the state, asks the agent, and draws at most once a frame.

import { ask, follow, token } from "./agent.js";
import * as details from "./details.js";
import { $, count, h } from "./dom.js";
import { parse, toggle } from "./filter.js";
import * as map from "./map.js";
import { apart, merged, silent } from "./nodes.js";
import { EVENTS, FLOWS, LEASES, NODE, ROUTES, RULES, hops, pool } from "./panels.js";
import { Table } from "./table.js";

const MOST_EVENTS = 10000;
const VIEWS = { events: "Events", flows: "Flows", rules: "Rules", routes: "Routes", pool: "Port pool" };

const state = {
  view: "events", filter: "", paused: false, connected: null, error: null, version: "", status: null, cluster: null, receivedAt: 0, reasons: {},
  events: [], groups: new Map(), flows: [], flowsTotal: 0, rules: [], routes: null, leases: [], missed: 0, problems: {}, serial: 0,
};

// The URL is the state of the view and the filter.
function read() {
  const query = new URLSearchParams(location.search);
  state.view = Object.hasOwn(VIEWS, query.get("view")) ? query.get("view") : "events";
  state.filter = query.get("filter") ?? "";
  $("filter").value = state.filter;
}

function write(push) {
  const query = new URLSearchParams();
  if (state.view !== "events") query.set("view", state.view);
  if (state.filter) query.set("filter", state.filter);
  const text = query.toString();
  history[push ? "pushState" : "replaceState"](null, "", location.pathname + (text ? `?${text}` : ""));
}

let frame = null;
const redraw = () => {
  frame ??= requestAnimationFrame(() => {
    frame = null;
    try {
      draw();
    } catch (error) {
      const text = `This page is of version ${state.version} and cannot show the agent of version ${state.status?.version ?? "unknown"}: ${error.message}`;
      delete $("banner").dataset.text;
      $("banner").replaceChildren(h("div", { class: "deny" }, text));
    }
  });
};

// Repeated events of one pair and port are one row with the source port of the last one: a client that tries again takes another.
function add(kind, event) {
  const key = kind === "route" ? null : [event.agent, event.verdict, event.reason, event.protocol, event.source, event.destination, event.destinationPort].join(" ");
  const before = key && state.groups.get(key);
  if (before) {
    before.times += 1 + (event.suppressed ?? 0);
    Object.assign(before, { time: event.time, sourcePort: event.sourcePort, version: before.version + 1 });
    // The groups are in the order of their last events.
    state.groups.delete(key);
    state.groups.set(key, before);
  } else {
    const row = { ...event, times: 1, version: 0, key: key ?? `route ${state.serial}`, serial: (state.serial += 1) };
    state.groups.set(row.key, row);
    if (state.groups.size > MOST_EVENTS) {
      const oldest = state.groups.keys().next().value;
      state.groups.delete(oldest);
    }
  }
  state.stale = true;
}

// Listing all rows is work: it is done at most four times a second.
let listedAt = 0;
function rows() {
  if (state.stale && performance.now() - listedAt > 250) {
    state.events = [...state.groups.values()].reverse();
    state.stale = false;
    listedAt = performance.now();
  } else if (state.stale) setTimeout(redraw, 250);
  return state.events;
}

const open = (row) => details.open(row, state.reasons);
const onNode = (row) => (row.agent ? `${row.agent}-` : "");
const flowKey = (row) => onNode(row) + [row.protocol, row.source, row.sourcePort, row.destination, row.destinationPort].join("-").replaceAll(/[:.]/g, "_");
let tables = {};
function build() {
  // Of a cluster, each row names its node.
  const columns = (list) => (state.cluster ? [NODE, ...list] : list);
  const name = (text) => text.replaceAll(/\W/g, "_");
  tables = {
    events: new Table("Events", columns(EVENTS(state.reasons)), { open, key: (row) => row.serial }),
    flows: new Table("Flows", columns(FLOWS), { open, key: flowKey }),
    rules: new Table("Rules", columns(RULES), { open, key: (row) => name(onNode(row) + row.index) }),
    routes: new Table("Routes", columns(ROUTES), { open, key: (row) => name(`${onNode(row)}${row.to}${row.source}${row.origin ?? ""}`) }),
    pool: new Table("Ports in use", columns(LEASES), { open: null, key: (row) => name([row.agent ?? "", row.kind, row.id ?? "", row.port, row.destination, row.protocol, row.pid].join("-")) }),
  };
}

function views() {
  $("views").replaceChildren(...Object.entries(VIEWS).map(([name, title]) => h("button", {
    type: "button", "aria-current": name === state.view ? "page" : null,
    onclick: () => { state.view = name; write(true); views(); poll(); redraw(); },
  }, title)));
}

// Nodes reach a new policy one after the other, and count alone.
const generations = (list) => (list.length > 1 ? `${count(list[0])} to ${count(list.at(-1))}` : count(list[0]));

function strip() {
  const { status } = state;
  const items = [];
  const item = (name, value, kind = "") => items.push(h("li", { class: kind }, h("span", {}, name), h("b", {}, value)));
  const nodes = state.cluster?.nodes;
  if (nodes) {
    const answer = nodes.filter((node) => node.status).length;
    item("Nodes", `${answer} of ${nodes.length} answer`, answer < nodes.length ? "deny" : "allow");
  } else item("Agent", state.connected === null ? "connecting" : state.connected ? "connected" : "away", state.connected === false ? "deny" : state.connected ? "allow" : "");
  if (status) {
    const { enforcement, firewall, flows, routes, pool: ports, kubernetes } = status;
    if (enforcement) {
      item("Mode", enforcement.mode, enforcement.mode.includes("audit") ? "audit" : "");
      item("Generation", generations([enforcement.generation].flat()));
      item("Interfaces", enforcement.interfaces.length > 2 ? `${enforcement.interfaces.length} attached` : enforcement.interfaces.map((one) => one.name).join(", ") || "none", enforcement.interfaces.length ? "" : "deny");
    } else if (status.role) item("Role", status.role);
    if (firewall) {
      const [packets, engine] = [apart(firewall.divergence), firewall.engine || "iptables"];
      item("Engines", firewall.failure ? `${engine} failed` : packets ? `disagree on ${count(packets)}` : enforcement ? "agree" : engine, firewall.failure || packets ? "deny" : "");
    }
    if (flows) item("Flows", count(flows.established + flows.halfOpen));
    if (routes) item("Next hops", routes.nextHopsDown.length ? `${routes.nextHopsDown.length} of ${routes.nextHops} down` : `${routes.nextHops} up`, routes.nextHopsDown.length ? "deny" : "");
    if (ports) item("Pool", `${count(ports.held)} in use`);
    if (kubernetes) item("Cluster", kubernetes.connected ? "followed" : "unreachable", kubernetes.connected ? "" : "deny");
  }
  $("strip").replaceChildren(...items);
}

function banner() {
  const lines = [];
  const line = (kind, ...text) => lines.push(h("div", { class: kind }, ...text));
  if (!token()) line("deny", "The token is missing: open the address that `bridge-agent ui` printed.");
  else if (state.connected === false) line("deny", `${state.error ?? "The agent does not answer"}. Enforcement stays active; the page connects again by itself.`);
  const { status } = state;
  for (const text of state.cluster ? silent(state.cluster) : []) line("deny", `${text}`);
  const trial = status?.trial;
  let left = null;
  if (trial) {
    left = Math.max(0, Math.ceil(trial.secondsLeft - (Date.now() - state.receivedAt) / 1000));
    line("audit", `A configuration is on trial${trial.node ? ` on ${trial.node}` : ""}: rolled back in `, h("b", { id: "countdown", role: "timer" }), " unless ", h("code", {}, "bridge-agent confirm"), " runs.");
  }
  const failed = status?.reloads?.last?.error;
  if (failed) line("deny", `The last reload was refused, the former configuration is active: ${failed}`);
  for (const warning of [...(status?.warnings ?? []), ...(status?.enforcement?.remarks ?? [])]) line("audit", warning);
  if (state.missed) line("audit", `${count(state.missed)} events were too many for this page and are not shown; the counters have them.`);
  // Unchanged text is announced once.
  const text = lines.map((one) => one.textContent).join("\n");
  if (text !== $("banner").dataset.text) {
    $("banner").dataset.text = text;
    $("banner").replaceChildren(...lines);
  }
  // The countdown is not announced each second.
  if (left !== null && $("countdown")) $("countdown").textContent = `${left} s`;
}

const given = { events: () => rows(), flows: () => state.flows, rules: () => state.rules, routes: () => state.routes?.routes ?? [], pool: () => state.leases };

function draw() {
  // A LAN host that only has routes judges no packets.
  $("map-panel").hidden = Boolean(state.status && !state.status.enforcement && !state.status.firewall);
  strip();
  banner();
  const filter = parse(state.filter);
  $("filter").setAttribute("aria-invalid", String(filter.unknown.length > 0));
  $("filter").title = filter.unknown.length ? `Unknown: ${filter.unknown.join(", ")}` : "";
  if (Date.now() - (draw.mapAt ?? 0) > 400) {
    draw.mapAt = Date.now();
    map.draw(map.pairs(state.flows, rows()).filter((pair) => state.connected !== null || pair), (address) => search(toggle(state.filter, `host:${address}`)));
  }
  const table = tables[state.view];
  const all = given[state.view]();
  const shown = state.filter ? all.filter(filter.matches) : all;
  if (!state.paused || draw.view !== state.view || draw.filter !== state.filter) table.show(shown);
  const [view] = [$("view")];
  const problem = state.problems[state.view];
  const parts = [];
  if (state.view === "pool" && state.status?.pool) parts.push(...pool(state.status.pool).flat());
  if (state.view === "routes" && state.routes) parts.push(hops(state.routes.nextHops ?? state.routes.next_hops ?? []));
  if (shown.length > 0) parts.push(table.element);
  else parts.push(h("p", {}, problem ?? (all.length ? "No row matches the filter." : EMPTY[state.view])));
  // A table that stays keeps its place and the focus.
  if (parts.length === 1 && view.firstChild === parts[0] && view.childNodes.length === 1) table.later();
  else if (!(parts.includes(table.element) && view.contains(table.element) && same(view, parts))) view.replaceChildren(...parts);
  // Cards that do not fit are scrolled by keyboard, too.
  const scrolls = ["pool", "routes"].includes(state.view) && view.scrollHeight > view.clientHeight;
  if (scrolls) view.setAttribute("tabindex", "0");
  else view.removeAttribute("tabindex");
  // Of many flows, the agent sends a part.
  const total = state.view === "flows" ? Math.max(all.length, state.flowsTotal) : all.length;
  $("count").textContent = shown.length < total ? `${count(shown.length)} of ${count(total)}` : `${count(total)} ${total === 1 ? "row" : "rows"}`;
  Object.assign(draw, { view: state.view, filter: state.filter });
}

const same = (view, parts) => view.childNodes.length === parts.length && parts.every((part, index) => part === view.childNodes[index] || part.isEqualNode?.(view.childNodes[index]));

const EMPTY = {
  events: "Nothing was denied yet. Denied packets appear here as they happen.", flows: "No flow is known.", rules: "The policy has no rules: everything is denied.",
  routes: "This agent has no routes.", pool: "No port is in use.",
};

function search(text) {
  state.filter = text;
  $("filter").value = text;
  write(false);
  redraw();
}

async function get(name, path, use) {
  try {
    use(await ask(path));
    delete state.problems[name];
  } catch (error) {
    state.problems[name] = error.message;
    if (error.status === 401) Object.assign(state, { connected: false, error: error.message });
  }
  redraw();
}

// The flows are large: they are asked for less often when there are many.
let polling = 0;
async function poll() {
  const mine = (polling += 1);
  const start = performance.now();
  await get("status", "/api/status", (status) => Object.assign(state, status.nodes ? { status: merged(status.nodes), cluster: status } : { status }, { receivedAt: Date.now() }));
  if (state.status?.enforcement) {
    await get("flows", "/api/flows?limit=10000", ({ flows, total }) => Object.assign(state, { flows, flowsTotal: total }));
    if (state.view === "rules") await get("rules", "/api/rules", (rules) => Object.assign(state, { rules }));
  }
  if (state.view === "routes" && state.status?.routes) await get("routes", "/api/routes", (routes) => Object.assign(state, { routes }));
  if (state.view === "pool" && state.status?.pool) await get("pool", "/api/leases", (leases) => Object.assign(state, { leases: leases.leases ?? leases.ports ?? leases }));
  const wait = Math.max(2000, 10 * (performance.now() - start));
  setTimeout(() => { if (mine === polling) poll(); }, wait);
}

function theme(next) {
  const dark = (next ?? localStorage.getItem("bridge-theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  $("theme").textContent = dark ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", dark ? "Switch to the light theme" : "Switch to the dark theme");
}

async function start() {
  theme();
  token();
  read();
  views();
  map.legend();
  await get("about", "/api/about", ({ version, reasons, cluster }) => Object.assign(state, { version, reasons, cluster: cluster ? { nodes: [] } : null }));
  build();
  $("theme").addEventListener("click", () => {
    const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    localStorage.setItem("bridge-theme", next);
    theme(next);
  });
  $("filter").addEventListener("input", () => search($("filter").value));
  $("search").addEventListener("submit", (event) => event.preventDefault());
  $("pause").addEventListener("click", () => {
    state.paused = !state.paused;
    $("pause").setAttribute("aria-pressed", String(state.paused));
    $("pause").textContent = state.paused ? "Paused" : "Pause";
    redraw();
  });
  // The printed address in an open tab: only its fragment is another one.
  addEventListener("hashchange", ({ newURL }) => {
    if (!newURL.includes("#token=")) return;
    token();
    location.reload();
  });
  addEventListener("popstate", () => { read(); views(); redraw(); });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") details.close();
    if (event.key === "/" && !/INPUT|TEXTAREA/.test(document.activeElement.tagName)) {
      event.preventDefault();
      $("filter").focus();
    }
  });
  addEventListener("resize", () => { draw.mapAt = 0; redraw(); });
  setInterval(redraw, 1000);
  if (token()) {
    poll();
    follow({
      event(kind, data) {
        if (kind === "missed") state.missed += data.missed;
        else if (kind !== "restarted") add(kind, data);
        redraw();
      },
      connected() { Object.assign(state, { connected: true, error: null }); redraw(); },
      lost(error) {
        // An agent that enforces nothing by eBPF has no events, and answers other queries.
        if (error.code === "no-ebpf") Object.assign(state, { connected: true, problems: { ...state.problems, events: error.message } });
        else Object.assign(state, { connected: false, error: error.message });
        redraw();
      },
    });
  }
  redraw();
}

start();
